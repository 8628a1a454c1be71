"""The report: every notebook in order through papermill, then pages that need neither kernel nor network.

`python -m epiutils.report --help` says what can be asked; `record` and `record_figure` are how a notebook
hands a number or a figure to it.  Pages: report/template/ and the functions of `epiutils.report.pages`.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

from epiutils.report.record import write

ROOT = Path(__file__).resolve().parents[2]
# One number of threads everywhere, because it decides the last digits of a sum (the Makefile says the same),
# and no backend from outside, which would take the figures out of the notebooks.
THREADS = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "PYTHONHASHSEED": "0"}
QUIET = ["--log-level=CRITICAL"]  # the kernel's own log, which has nothing for the reader
# What notebooks hand over


# Parameters


def parameters_of(notebook: Path) -> dict[str, object]:
    """The names and defaults of a notebook's parameters, from its cell tagged `parameters`."""
    import papermill

    found = papermill.inspect_notebook(str(notebook))
    return {name: ast.literal_eval(entry["default"]) for name, entry in found.items()}


def choose_parameters(notebooks: list[Path], given: dict[str, str], usual: dict[str, str]) -> dict[Path, dict]:
    """What each notebook gets of the parameters given as text, in the type of its default.

    usual: parameters for whoever has them.  Raises ValueError for a given name that no notebook has, and
    for a value of another type.  A `dataset` is for all: notebooks without that parameter look at it as a `recording`.
    """
    known = {notebook: parameters_of(notebook) for notebook in notebooks}
    names = sorted({"dataset"}.union(*known.values()))
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"no notebook has the parameter {', '.join(unknown)}; there are: {', '.join(names)}")
    given = usual | given
    if given.get("dataset"):
        given.setdefault("recording", given["dataset"])
    return {
        notebook: {name: _typed(name, given[name], default) for name, default in defaults.items() if name in given}
        for notebook, defaults in known.items()
    }


def _typed(name: str, text: str, default):
    """A value given as text, in the type of the parameter's default."""
    if isinstance(default, str):
        return text
    try:
        value = {"true": True, "false": False}.get(text.lower(), None)
        value = ast.literal_eval(text) if value is None else value
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if default is not None and type(value) is not type(default):
        raise ValueError(f"{name} is of type {type(default).__name__} (like {default!r}), got {text!r}")
    return value


# Running


def stamp(notebook: Path, parameters: dict) -> str:
    """What decides a notebook's outcome, as one hash: its cells, its parameters and the package's sources."""
    import nbformat

    cells = [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in nbformat.read(notebook, 4).cells]
    digest = hashlib.sha256(json.dumps([cells, parameters], sort_keys=True).encode())
    for path in sorted((ROOT / "epiutils").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def execute(notebook: Path, parameters: dict, out: Path, timeout: int) -> Exception | None:
    """Run one notebook through papermill into out/notebooks; returns what stopped it, after saying so."""
    import nbformat
    import papermill

    copy, part = out / "notebooks" / notebook.name, out / "notebooks" / f"{notebook.stem}.part.ipynb"
    copy.parent.mkdir(parents=True, exist_ok=True)
    (out / "records" / f"{notebook.stem}.json").unlink(missing_ok=True)
    os.environ |= {
        "EPIUTILS_REPORT": "1",
        "EPIUTILS_REPORT_DIR": str(out),
        "EPIUTILS_REPORT_SOURCE": notebook.stem,
    }
    begin, mark, failure = time.time(), stamp(notebook, parameters), None
    try:
        papermill.execute_notebook(
            str(notebook),
            str(part),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(notebook.parent),
            execution_timeout=timeout,
            progress_bar={"desc": notebook.stem, "disable": None},  # None: no bar without a terminal
            extra_arguments=QUIET,
        )
    except Exception as error:  # noqa: BLE001  a cell's error, a timeout, a dead kernel
        failure = error
    finally:
        for name in ("EPIUTILS_REPORT", "EPIUTILS_REPORT_DIR", "EPIUTILS_REPORT_SOURCE"):
            del os.environ[name]
        if part.exists():
            nb = nbformat.read(part, 4)
            nb.metadata["epiutils"] = {"seconds": round(time.time() - begin, 1), "failed": str(failure or "")}
            if failure is None and sys.exc_info()[0] is None:
                nb.metadata["epiutils"]["stamp"] = mark
            write(copy, nbformat.writes(nb))
            part.unlink()
    if failure is not None:
        _show_failure(notebook, nb if copy.exists() else None, failure)
    return failure


def _show_failure(notebook: Path, nb, failure: Exception) -> None:
    """The failing cell's source and its traceback, for the terminal."""
    started = [c for c in nb.cells if c.cell_type == "code" and c.metadata.get("papermill", {}).get("start_time")]
    cell = getattr(failure, "source", started[-1].source if started else "")
    trace = "\n".join(getattr(failure, "traceback", None) or [f"{type(failure).__name__}: {failure}"])
    if not sys.stderr.isatty():
        trace = re.sub(r"\x1b\[[0-9;]*m", "", trace)
    print(f"\n{notebook.name} failed in this cell:\n\n{cell}\n\n{trace}\n", file=sys.stderr, flush=True)


def refresh(notebooks: list[Path], timeout: int) -> None:
    """Run notebooks and store their outputs in place, the same bytes in every run (what nbval compares)."""
    import nbformat
    from nbclient import NotebookClient
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    from epiutils.report.pages import VIEW

    for notebook in notebooks:
        begin, nb = time.time(), nbformat.read(notebook, 4)
        NotebookClient(
            nb,
            kernel_name="python3",
            timeout=timeout,
            record_timing=False,
            extra_arguments=QUIET,
            resources={"metadata": {"path": str(notebook.parent)}},
        ).execute()
        views = [o.data for c in nb.cells for o in c.get("outputs", []) if "data" in o]
        views = [data[VIEW] for data in views if VIEW in data]
        for number, view in enumerate(views):
            view["model_id"] = f"{number:032x}"  # random ones would differ in every run
        nb, _ = CoalesceStreamsPreprocessor().preprocess(nb, {})  # where a stream was cut depends on timing
        for cell in nb.cells:
            cell.metadata.pop("execution", None)
        nb.metadata["language_info"] = {"name": "python"}
        nb.metadata.pop("widgets", None)
        write(notebook, nbformat.writes(nb) + "\n")
        print(f"{notebook.name}: stored, {time.time() - begin:.0f} s", flush=True)


# What is left: pages, story, metrics


def build(notebooks: list[Path], out: Path, meta: dict, partial: bool, failed: str = "") -> None:
    """Write the pages, the story and metrics.json from what out/notebooks and out/records hold.

    partial: not every notebook ran, so numbers of earlier runs stay.  failed: what is missing, for the reader.
    """
    import nbformat

    from epiutils.report import pages

    nav, copies, figures, numbers, flat = [], [], [], [], {}
    for notebook in notebooks:
        copy, records = out / "notebooks" / notebook.name, out / "records" / f"{notebook.stem}.json"
        nb = nbformat.read(copy if copy.exists() else notebook, 4)
        title, summary = pages.heading(nb)
        source = {"source": notebook.stem, "page": f"{notebook.stem}.html", "label": notebook.stem.replace("_", " ")}
        nav.append(
            source | {"title": title or source["label"], "summary": summary, "href": None, "state": "Not run yet."}
        )
        copies.append(nb)
        if copy.exists():
            ran = nb.metadata.get("epiutils", {})
            state = "" if "stamp" in ran else "This notebook did not run to its end."
            nav[-1] |= {"href": source["page"], "state": state or f"Ran in {ran['seconds']:.0f} s."}
            nav[-1]["note"] = state
        if copy.exists() and records.exists():
            found = json.loads(records.read_text("utf-8"))
            for name, text in found["figures"].items():
                svg = (out / "figures" / f"{name}.svg").exists()
                figures.append(source | {"name": name, "caption": text, "svg": svg})
            numbers += [source | entry for entry in found["numbers"].values() if entry["text"]]
            flat |= {name: entry["value"] for name, entry in found["numbers"].items()}
    for entry, nb in zip(nav, copies, strict=True):
        if entry["href"]:
            here = [other | {"here": other is entry} for other in nav]
            write(out / entry["href"], pages.notebook_page(nb, entry["title"], here, entry["note"]))
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    made = f"Made with the profile “{meta['profile']}” on {meta['device']}; {versions}."
    story = pages.story(write_metrics(out / "metrics.json", flat, meta, partial), figures, nav)
    story |= {"numbers": numbers, "failed": failed, "made": made}
    write(out / "index.html", pages.story_page(**story))
    write(out / "README.md", pages.story_readme(**story))


def write_metrics(path: Path, flat: dict, meta: dict, partial: bool = True) -> dict:
    """Merge numbers, named by dotted paths, into metrics.json: nested, sorted, with `meta` as given.

    partial: numbers already there stay beside the new ones; otherwise a group that is written anew (the
    first word of the name) holds only the new ones.  Groups that nobody writes now always stay.
    Returns all numbers that the file now holds, named in the same way.
    """
    old = flatten(json.loads(path.read_text("utf-8"))) if path.exists() else {}
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
    return flatten(tree)


def flatten(tree: dict, prefix: str = "") -> dict:
    """A nested dict with its paths as names, joined by dots; `meta` is left out."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= {} if prefix + name == "meta" else flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def describe(profile: str, parameters: dict) -> dict:
    """Where the numbers come from: profile, parameters, versions and device, without dates or folders."""
    import torch

    packages = ("epiutils", "numpy", "torch", "opencv-python-headless", "matplotlib")
    versions = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    threads = f"CPU ({platform.machine()}, {os.environ['OMP_NUM_THREADS']} threads)"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else threads
    named = {
        name: Path(value).name if name in ("recording", "dataset") else value for name, value in parameters.items()
    }
    return {"profile": profile, "parameters": named, "versions": versions, "device": device}


# The command


def main(arguments: list[str] | None = None) -> int:
    """`python -m epiutils.report`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m epiutils.report", description="Run the notebooks, write the report."
    )
    parser.add_argument(
        "--profile", choices=("quick", "full"), default="quick", help="full: all that is stored anew, for hours"
    )
    parser.add_argument("--recording", metavar="PATH", help="a calibrated recording of your own, a folder")
    parser.add_argument("--dataset", metavar="NAME", help="Human3.6M: its folder, or the name of one in data/")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a notebook's parameter"
    )
    parser.add_argument("--only", nargs="+", metavar="NN", help="these notebooks, by the start of their names")
    parser.add_argument("--resume", action="store_true", help="skip notebooks that are done and unchanged")
    parser.add_argument("--refresh", action="store_true", help="store the outputs in the notebooks instead of a report")
    parser.add_argument("--out", type=Path, default=ROOT / "reports", help="where the report goes (%(default)s)")
    parser.add_argument("--notebooks", type=Path, default=ROOT / "notebooks", help="where they are (%(default)s)")
    parser.add_argument(
        "--timeout", type=int, default=1800, metavar="S", help="longest time for one cell (%(default)s)"
    )
    args = parser.parse_args(arguments)
    os.environ.pop("MPLBACKEND", None)
    os.environ |= {name: os.environ.get(name, value) for name, value in THREADS.items()}

    notebooks, out = sorted(args.notebooks.resolve().glob("[0-9]*.ipynb")), args.out.resolve()
    chosen = [n for n in notebooks if any(n.name.startswith(start) for start in args.only or [""])]
    idle = [start for start in args.only or [] if not any(n.name.startswith(start) for n in notebooks)]
    if idle or not chosen:
        parser.error(f"no notebook {' '.join(idle)} in {args.notebooks}; there are: {[n.stem for n in notebooks]}")
    if args.refresh:
        refresh(chosen, args.timeout)
        return 0
    given = dict(args.p) | {n: v for n in ("recording", "dataset") if (v := getattr(args, n))}
    for name in ("recording", "dataset"):  # notebooks run in their own folder, the caller means its own
        if not given.get(name):
            continue
        places = [Path(given[name]).expanduser(), *([ROOT / "data" / given[name]] if name == "dataset" else [])]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            parser.error(f"--{name} {given[name]}: no folder {' or '.join(map(str, places))}")
        given[name] = str(folder.resolve())
    try:
        parameters = choose_parameters(chosen, given, {"profile": args.profile})
    except ValueError as error:
        parser.error(str(error))

    failure, interrupted, done = None, False, 0
    try:
        if args.profile == "full":
            from epiutils.studies import runs

            runs.main([])  # what it has done is not done again
        for done, notebook in enumerate(chosen):
            copy = out / "notebooks" / notebook.name
            if args.resume and _stamped(copy) == stamp(notebook, parameters[notebook]):
                print(f"{notebook.stem}: unchanged", flush=True)
                continue
            print(f"{notebook.stem} ({done + 1} of {len(chosen)}) ...", flush=True)
            begin = time.time()
            failure = execute(notebook, parameters[notebook], out, args.timeout)
            if failure:
                break
            print(f"{notebook.stem}: done, {time.time() - begin:.0f} s", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    stopped = f"{chosen[done].stem} {'was interrupted' if interrupted else 'failed'}." if failure or interrupted else ""
    flat = {name: value for choice in parameters.values() for name, value in choice.items() if name != "profile"}
    build(notebooks, out, describe(args.profile, flat), bool(stopped or args.only), stopped)
    print(f"{stopped} What was done is kept; go on with --resume. " if stopped else "", out / "index.html", flush=True)
    return 130 if interrupted else 1 if failure else 0


def _stamped(copy: Path) -> str | None:
    """The stamp of an executed copy that ran to its end, or None."""
    try:
        return json.loads(copy.read_text("utf-8"))["metadata"]["epiutils"]["stamp"]
    except (OSError, ValueError, KeyError):
        return None


if __name__ == "__main__":
    sys.exit(main())
