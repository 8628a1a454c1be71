"""The report's story: its first page, README.md and metrics.json, from what all notebooks handed over.

template/story.toml says what is told, story.html.j2 and README.md.j2 how.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from pathlib import Path

import nbformat
from jinja2 import Environment, FileSystemLoader

from epiutils.report import pages
from epiutils.report.record import write

RECORDING = "recording"  # the folder of what is taken away from one
_FIELD = re.compile(r"\{([^{}:]+):([^{}]*)\}")


def executed(path: Path) -> nbformat.NotebookNode | None:
    """A notebook as it ran, also to a part; None where there is none, or one that was cut short while it was written."""
    try:
        return nbformat.read(path, 4)
    except (OSError, ValueError):
        return None


def build(
    notebooks: list[Path], out: Path, meta: dict, partial: bool, failed: str = "", publish: Path | None = None
) -> None:
    """Write the pages, the story and metrics.json from what out/notebooks and out/records hold.

    partial: not every notebook ran, so numbers of earlier runs stay.  failed: what is missing, for the reader.
    publish: the folder of what is committed; there README.md, metrics.json and figures are made anew.
    """
    nav, copies, figures, numbers, flat = [], [], [], [], {}
    for notebook in notebooks:
        records, copy = out / "records" / f"{notebook.stem}.json", executed(out / "notebooks" / notebook.name)
        nb = copy or nbformat.read(notebook, 4)
        title, summary = _heading(nb)
        source = {"source": notebook.stem, "page": f"{notebook.stem}.html", "label": notebook.stem.replace("_", " ")}
        entry = source | {"title": title or source["label"], "summary": summary, "href": None, "state": "Not run yet."}
        if copy:
            ran = nb.metadata.get("epiutils", {})
            entry["note"] = "" if "stamp" in ran else "This notebook did not run to its end."
            entry |= {"href": source["page"], "state": entry["note"] or f"Ran in {ran['seconds']:.0f} s."}
        if copy and records.exists():
            found = json.loads(records.read_text("utf-8"))
            for name, text in found["figures"].items():
                svg = (out / "figures" / f"{name}.svg").exists()
                figures.append(source | {"name": name, "caption": text, "svg": svg})
            numbers += [source | number for number in found["numbers"].values() if number["text"]]
            flat |= {name: number["value"] for name, number in found["numbers"].items()}
        nav.append(entry)
        copies.append(nb)
    for entry, nb in zip(nav, copies, strict=True):
        if entry["href"]:
            here = [other | {"here": other is entry} for other in nav]
            write(out / entry["href"], pages.notebook_page(nb, entry["title"], here, entry["note"]))
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    made = f"Made with the profile “{meta['profile']}” on {meta['device']}; {versions}."
    said = {"figures": figures, "nav": nav, "listed": numbers, "failed": failed, "made": made}
    own = out / RECORDING / "report.json"  # of a recording: what was found on reading, and what is taken away
    own = json.loads(own.read_text("utf-8")) if own.exists() else None
    known = _write_metrics(out / "metrics.json", flat, meta, partial)
    write(out / "index.html", _story("story.html.j2", known, **said, own=own))
    if publish:
        known, beside = _write_metrics(publish / "metrics.json", flat, meta, False), notebooks[0].parent
        write(publish / "README.md", _story("README.md.j2", known, **said, beside=os.path.relpath(beside, publish)))
        to = publish / "figures"
        to.mkdir(exist_ok=True)
        for path in (*to.glob("[0-9]*.png"), *to.glob("[0-9]*.svg")):
            path.unlink()
        for path in (path for figure in figures for path in (out / "figures").glob(f"{figure['name']}.*")):
            shutil.copy(path, to)


def _heading(nb: nbformat.NotebookNode) -> tuple[str, str]:
    """A notebook's title (its first # heading) and summary (the paragraph after it), as Markdown."""
    text = next((c.source for c in nb.cells if c.cell_type == "markdown" and c.source.lstrip().startswith("# ")), "")
    title, _, rest = text.lstrip().removeprefix("# ").partition("\n")
    summary = next((p for p in re.split(r"\n\s*\n", rest.strip()) if p and p[0] not in "#-*|!>`$"), "")
    return title.strip(), " ".join(summary.split())


def _story(template: str, numbers: dict, figures: list[dict], nav: list[dict], **said) -> str:
    """What story.toml says, with its numbers put in and without what is missing, as one of the two templates has it.

    numbers: those of metrics.json, by dotted names.  figures: an entry {name, source, ...} a recorded figure.
    nav: an entry {source, title, summary, ...} a notebook.  said: what else the template asks for.
    """
    plan = tomllib.loads((pages.TEMPLATES / "story.toml").read_text("utf-8"))
    recorded, tiles, entries = {figure["name"]: figure for figure in figures}, [], []
    for tile in plan["tiles"]:
        filled = {key: _fill(text, numbers) for key, text in tile.items()}
        if None not in filled.values():
            to = next((entry for entry in nav if entry["source"].startswith(tile["notebook"])), {})
            tiles.append(filled | {"entry": to})
    for entry in nav:
        own = [figure for figure in figures if figure["source"] == entry["source"]]
        picture = min(own, key=lambda figure: figure["name"] not in plan["pictures"], default=None)
        entries.append(entry | {"picture": picture})
    told = [recorded[name] | {"title": title} for name, title in plan["figures"].items() if name in recorded]
    others = [figure for figure in figures if figure["name"] not in plan["figures"]]
    said |= {"title": plan["title"], "question": plan["question"].strip(), "tiles": tiles, "nav": entries}
    environment = Environment(
        loader=FileSystemLoader(pages.TEMPLATES),
        autoescape=lambda name: name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"markdown": pages.markdown, "inline": _inline, "number": _number}
    environment.filters |= {"unbroken": _unbroken, "escaped": _escaped}
    return environment.get_template(template).render(css=pages.css(), told=told, others=others, **said)


def _fill(text: str, numbers: dict) -> str | None:
    """A text with each {name:format} replaced by that number, 46 % for .0%; None where a number is missing."""
    try:
        return _FIELD.sub(lambda field: format(numbers[field[1]], field[2]).replace("%", " %"), text)
    except KeyError:
        return None


def _inline(text: str) -> str:
    """One line of our own Markdown as HTML, without a paragraph around it."""
    return _unbroken(pages.markdown(text).strip().removeprefix("<p>").removesuffix("</p>"))


def _unbroken(text: str) -> str:
    """No line break before a per cent sign."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _escaped(text: str) -> str:
    """A text that notebooks handed over as Markdown that shows it as it is: a folder may be called <b> or *."""
    return re.sub(r"([\\`*_\[\]<>&|$])", r"\\\1", " ".join(text.split()))


def _number(value) -> str:
    """A number as the reader wants it: 12,346 or 0.4312."""
    if isinstance(value, bool | str):
        return {True: "yes", False: "no"}.get(value, value)
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def _write_metrics(path: Path, flat: dict, meta: dict, partial: bool = True) -> dict:
    """Merge numbers, named by dotted paths, into metrics.json: nested, sorted, with `meta` as given.

    partial: numbers already there stay beside the new ones; otherwise a group that is written anew (the
    first word of the name) holds only the new ones.  Groups that nobody writes now always stay.
    Returns all numbers that the file now holds, named in the same way.
    """
    old = _flatten(json.loads(path.read_text("utf-8"))) if path.exists() else {}
    groups = {name.split(".")[0] for name in flat}
    old = {name: value for name, value in old.items() if partial or name.split(".")[0] not in groups}
    tree: dict = {}
    for name, value in (old | flat).items():
        *folders, leaf = name.split(".")
        node = tree
        for folder in folders:
            if not isinstance(node.get(folder), dict):
                node[folder] = {}
            node = node[folder]
        node[leaf] = value
    tree["meta"] = meta
    write(path, json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return _flatten(tree)


def _flatten(tree: dict, prefix: str = "") -> dict:
    """A nested dict with its paths as names, joined by dots; `meta` is left out."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= {} if prefix + name == "meta" else _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
