"""The report's pages: an executed notebook as HTML without kernel, network or MathJax, and the first page, README.md
and metrics.json from what all notebooks handed over.

Widgets become their last picture and settings, explorers made with `ahead=` a live slider over pictures, formulas
MathML.  template/ holds the look; of the story, story.toml says what is told, story.html.j2 and README.md.j2 how.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

import nbformat
from jinja2 import Environment, FileSystemLoader
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbformat import NotebookNode
from PIL import Image
from pygments.formatters import HtmlFormatter

from epiutils.data.files import replacing

RECORDING = "recording"  # the folder of what is taken away from one
VIEW = "application/vnd.jupyter.widget-view+json"
_STATE = "application/vnd.jupyter.widget-state+json"
_TEMPLATES = Path(__file__).resolve().parent / "template"
_LARGE = 60_000  # characters of base64
_FIELD = re.compile(r"\{([^{}:]+):([^{}]*)\}")


# Formulas

_MATH = re.compile(r"(```.*?```|`[^`\n]*`)|\$\$(.+?)\$\$|(?<![\\$])\$(?!\s)([^$\n]+?)(?<![\s\\])\$", re.DOTALL)
_TOKEN = re.compile(r"@@MATH(\d+)@@([.,;:!?)]*)")


class _Formulas:
    """Formulas kept aside while Markdown is rendered: `hide` puts tokens, `show` MathML in their place."""

    def __init__(self):
        self.found: list[str] = []

    def hide(self, markdown: str) -> str:
        """Markdown with a token for each $…$ and $$…$$ outside code."""

        def keep(match):
            if match[1]:
                return match[1]
            self.found.append(_mathml(match[2] or match[3], block=bool(match[2])))
            return f"@@MATH{len(self.found) - 1}@@"

        return _MATH.sub(keep, markdown)

    def show(self, text: str) -> str:
        """HTML with the formulas in place of their tokens, and no line break before a full stop."""

        def put(match):
            formula, stop = self.found[int(match[1])], match[2]
            return f'<span class="unbroken">{formula}{stop}</span>' if stop else formula

        return _TOKEN.sub(put, text)


# What latex2mathml or browsers lack, said in words that they know.
_TEX = {"{aligned}": "{align*}", r"\operatorname*": r"\operatorname", r"\boldsymbol": r"\mathbf"}
_RELATIONS = re.compile("<mi>([∼⇒⇔⟹⟺⟨⟩⌊⌋⌈⌉])</mi>")  # identifiers to latex2mathml: without spaces around them


def _mathml(tex: str, block: bool = False) -> str:
    """A formula as MathML; what cannot be converted stays as it was written, and is named on stderr."""
    words = re.sub(r"\\mathrm\s*\{(\w+)\}", r"\\text{\1}", tex.strip())  # browsers ignore mathvariant
    for theirs, ours in _TEX.items():
        words = words.replace(theirs, ours)
    try:
        found = convert(words, display="block" if block else "inline")
        problem = re.search(r"<m[io]>(\\\w*|&)</m", found)
    except Exception as error:  # noqa: BLE001  the converter raises many kinds
        problem = error
    if problem:
        print(f"report: cannot convert the formula {tex!r}", file=sys.stderr)
        return f"<code>{html.escape(tex)}</code>"
    found = re.sub("&#x([0-9A-F]{5});", lambda m: chr(int(m[1], 16)) if m[1] not in ("00026", "0003C") else m[0], found)
    found = _RELATIONS.sub(r"<mo>\1</mo>", found.replace("<mi>~</mi>", "<mi>∼</mi>")).replace(
        "<mo>⊤</mo>", "<mi>⊤</mi>"
    )
    return f'<span class="formula">{found}</span>' if block else found


# Widgets


def _without_kernel(nb: NotebookNode, formulas: _Formulas) -> NotebookNode:
    """The notebook with nothing in it that needs a kernel, a script from elsewhere or MathJax (in place).

    Who cannot see a figure is told the heading that it stands under.
    """
    nb, _ = CoalesceStreamsPreprocessor().preprocess(nb, {})
    state = nb.metadata.pop("widgets", {}).get(_STATE, {}).get("state", {})
    nb.cells = [cell for cell in nb.cells if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])]
    section = "figure"
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            section = [section, *re.findall(r"^#+ (.+)", cell.source, re.MULTILINE)][-1]
            cell.source = formulas.hide(cell.source)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if VIEW in data:
                model = data.pop(VIEW)["model_id"]
                ahead = output.metadata.get("epiutils", {}).get("ahead")
                text = _live(ahead) if ahead else _still(model, state)
                if text:
                    data.pop("image/png", None)
                    data["text/html"] = text
            if "image/png" in data:
                data["text/html"] = f'<img src="{_picture(data.pop("image/png"))}" alt="{html.escape(section)}">'
            elif "text/latex" in data and "text/html" not in data:
                data["text/html"] = _mathml(data["text/latex"].strip().strip("$"), block=True)
            elif "text/markdown" in data:
                data["text/markdown"] = formulas.hide(data["text/markdown"])
    return nb


def _picture(data: str, kind: str = "png") -> str:
    """An image for a page, from base64: a large PNG (a photograph, a rendering) as WebP, a fifth of its size."""
    if kind == "png" and len(data) > _LARGE:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(base64.b64decode(data))).save(buffer, "webp", quality=88)
        kind, data = "webp", base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind};base64,{data.strip()}"


def _live(ahead: dict) -> str:
    """An explorer's pictures behind a slider; without a script the first one stands with its settings."""
    first = ahead["frames"][ahead["start"]]
    others = "".join(_setting(name, text) for name, text in ahead["settings"].items())
    frames = json.dumps(ahead, ensure_ascii=False).replace("</", "<\\/")
    return (
        f'<figure class="explorer live" style="max-width:{ahead["width"]}px">'
        f'<div class="settings"><span class="setting slider">{html.escape(ahead["name"])} '
        f"<b>{html.escape(first['text'])}</b></span>{others}</div>"
        f'<img src="data:image/webp;base64,{first["webp"]}" alt="{html.escape(first["caption"])}">'
        f"<figcaption>{html.escape(first['caption'])}</figcaption>"
        f'<script type="application/json">{frames}</script></figure>'
    )


def _still(model: str, state: dict) -> str:
    """What a widget and those inside it last showed."""
    settings, shown = [], []

    def walk(model: str) -> None:
        entry = state.get(model.removeprefix("IPY_MODEL_"))
        if entry is None:
            return
        values, kind = entry["state"], entry["model_name"]
        kinds = [
            state.get(child.removeprefix("IPY_MODEL_"), {}).get("model_name", "")
            for child in values.get("children", [])
        ]
        if any(name.endswith("ProgressModel") for name in kinds):  # tqdm's bar: nothing to read any more
            return
        buffer = next((b["data"] for b in entry.get("buffers", []) if b["path"] == ["value"]), None)
        if kind == "ImageModel" and buffer:
            style = state.get((values.get("layout") or "").removeprefix("IPY_MODEL_"), {}).get("state", {})
            width = f' style="width:{html.escape(style["width"])}"' if style.get("width") else ""
            shown.append(f'<img src="{_picture(buffer, values.get("format", "png"))}"{width} alt="figure">')
        elif kind in ("HTMLModel", "HTMLMathModel"):
            shown.append(f"<figcaption>{values.get('value', '')}</figcaption>")
        elif kind == "LabelModel":
            shown.append(f"<figcaption>{html.escape(values.get('value', ''))}</figcaption>")
        elif kind == "StackModel":  # only its selected page
            walk(values["children"][values.get("selected_index") or 0])
        elif "children" in values:
            for child in values["children"]:
                walk(child)
        elif values.get("_options_labels"):
            chosen = values.get("index")
            chosen = [chosen] if isinstance(chosen, int) else chosen or []
            settings.append(
                _setting(values.get("description"), ", ".join(values["_options_labels"][i] for i in chosen))
            )
        elif "value" in values and not kind.endswith("ProgressModel"):
            value = values["value"]
            text = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
            settings.append(_setting(values.get("description"), f"{text:g}" if isinstance(text, float) else text))

    walk(model)
    if not (settings or shown):
        return ""
    return f'<figure class="explorer"><div class="settings">{"".join(settings)}</div>{"".join(shown)}</figure>'


def _setting(name: str | None, value) -> str:
    return f'<span class="setting">{html.escape(name or "")} <b>{html.escape(str(value))}</b></span>'


# Pages


def _notebook_page(nb: NotebookNode, title: str, nav: list[dict], note: str = "") -> str:
    """An executed notebook as one HTML page.

    nav: an entry {title, href, here} a notebook, href None where there is no page.  note: shown on top.
    """
    formulas = _Formulas()
    exporter = HTMLExporter(
        template_name=_TEMPLATES.name,
        extra_template_basedirs=[str(_TEMPLATES.parent)],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    here = next(i for i, entry in enumerate(nav) if entry["here"])
    before = nav[here - 1] if here and nav[here - 1]["href"] else {"title": "Report", "href": "index.html"}
    after = nav[here + 1] if nav[here + 1 :] and nav[here + 1]["href"] else None
    resources = {"title": title, "nav": nav, "note": note, "css": _css(), "before": before, "after": after}
    page, _ = exporter.from_notebook_node(_without_kernel(nb, formulas), resources=resources)
    page = re.sub(r'(href="(?!https?:)[^"]*?)\.ipynb(["#])', r"\1.html\2", page)  # links between notebooks
    return formulas.show(page)


def _css() -> str:
    """The pages' style sheet, with the colours of code for light and dark."""
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("friendly", "github-dark"))
    return f"{(_TEMPLATES / 'page.css').read_text('utf-8')}\n{light}\n@media screen and (prefers-color-scheme:dark){{\n{dark}}}"


def _markdown(text: str) -> str:
    """Markdown as HTML, formulas included."""
    formulas = _Formulas()
    return formulas.show(markdown2html(formulas.hide(text)))


# The whole


def _write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, "utf-8")


def executed(path: Path) -> NotebookNode | None:
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
            _write(out / entry["href"], _notebook_page(nb, entry["title"], here, entry["note"]))
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    made = f"Made with the profile “{meta['profile']}” on {meta['device']}; {versions}."
    said = {"figures": figures, "nav": nav, "listed": numbers, "failed": failed, "made": made}
    own = out / RECORDING / "report.json"  # of a recording: what was found on reading, and what is taken away
    own = json.loads(own.read_text("utf-8")) if own.exists() else None
    known = _write_metrics(out / "metrics.json", flat, meta, partial)
    _write(out / "index.html", _story("story.html.j2", known, **said, own=own))
    if publish:
        known, beside = _write_metrics(publish / "metrics.json", flat, meta, False), notebooks[0].parent
        _write(publish / "README.md", _story("README.md.j2", known, **said, beside=os.path.relpath(beside, publish)))
        to = publish / "figures"
        to.mkdir(exist_ok=True)
        for path in (*to.glob("[0-9]*.png"), *to.glob("[0-9]*.svg")):
            path.unlink()
        for path in (path for figure in figures for path in (out / "figures").glob(f"{figure['name']}.*")):
            shutil.copy(path, to)


def _heading(nb: NotebookNode) -> tuple[str, str]:
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
    plan = tomllib.loads((_TEMPLATES / "story.toml").read_text("utf-8"))
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
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=lambda name: name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"markdown": _markdown, "inline": _inline, "number": _number}
    environment.filters |= {"unbroken": _unbroken, "escaped": _escaped}
    return environment.get_template(template).render(css=_css(), told=told, others=others, **said)


def _fill(text: str, numbers: dict) -> str | None:
    """A text with each {name:format} replaced by that number, 46 % for .0%; None where a number is missing."""
    try:
        return _FIELD.sub(lambda field: format(numbers[field[1]], field[2]).replace("%", " %"), text)
    except KeyError:
        return None


def _inline(text: str) -> str:
    """One line of our own Markdown as HTML, without a paragraph around it."""
    return _unbroken(_markdown(text).strip().removeprefix("<p>").removesuffix("</p>"))


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
    _write(path, json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
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
