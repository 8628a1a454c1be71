"""The report: every notebook in order through papermill, then pages that need neither kernel nor network.

`python -m epiutils.report --help` says what can be asked.  Notebooks hand over numbers and figures by
`epiutils.report.record`; `epiutils.report.pages` makes of them what is left.
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
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import papermill
from nbclient import NotebookClient
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from epiutils.data import human36m
from epiutils.data.files import replacing
from epiutils.data.recordings import Recording, read_recording
from epiutils.report.pages import RECORDING, VIEW, build, executed

_ROOT = Path(__file__).resolve().parents[2]
LATEST = _ROOT / "reports" / "latest"
# One number of threads everywhere, because it decides the last digits of a sum (the Makefile says the same).
THREADS = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "PYTHONHASHSEED": "0"}
_QUIET = ["--log-level=CRITICAL"]  # the kernel's own log, which has nothing for the reader
_TO_LATEST = """<!DOCTYPE html>
<meta http-equiv="refresh" content="0; url=latest/index.html">
<a href="latest/index.html">The report</a>
"""


# Parameters

_READER = (
    "cameras",
    "model",
    "person",
    "unit",
    "video_start",
)  # what `read_recording` is told, by notebooks' `options`


def _choose_parameters(notebooks: list[Path], given: dict[str, str], usual: dict[str, str]) -> dict[Path, dict]:
    """What each notebook gets of the parameters given as text, in the type of its default.

    usual: parameters for whoever has them.  Raises ValueError for a given name that no notebook has, and
    for a value of another type.  A `dataset` is for all: notebooks without that parameter look at it as a `recording`.
    """
    known = {}
    for notebook in notebooks:
        found = papermill.inspect_notebook(str(notebook))
        known[notebook] = {name: ast.literal_eval(entry["default"]) for name, entry in found.items()}
    names = {"dataset"}.union(*known.values())
    given = dict(given)
    if "options" in names:
        told = {name: given.pop(name) for name in _READER if name in given and name not in names}
        if told:
            whole = {name: int(text) if text.isdecimal() else text for name, text in told.items()}
            given["options"] = repr(ast.literal_eval(given.get("options", "{}")) | whole)
        names |= set(_READER)
        if given.get("recording") or given.get("dataset"):
            given.setdefault("options", "{}")
    names = sorted(names)
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
        value = ast.literal_eval(text.capitalize() if text.lower() in ("true", "false") else text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(default) is int and isinstance(value, float):
        return value  # a threshold of 1.5 px; where a count is wanted, the notebook says so
    if default is not None and type(value) is not type(default):
        raise ValueError(f"{name} is of type {type(default).__name__} (like {default!r}), got {text!r}")
    return value


def _read(parameters: dict[Path, dict]) -> Recording | None:
    """The recording that notebooks look at, read before they run: ValueError where it, or what they are told, cannot be."""
    told = next((p for p in parameters.values() if p.get("recording") and "options" in p), None)
    if told is None or human36m.is_there(told["recording"]):
        if any(p.get("network") for p in parameters.values()):
            raise ValueError("--network looks at a recording's videos: say --recording, and a notebook that shows them")
        return None
    if told.get("network"):
        from epiutils.studies.filmed import read_film  # the network's work: what notebooks see, they find in the cache

        recording = read_film(told["recording"], told["network"], **told["options"])
    else:
        recording = read_recording(told["recording"], **told["options"])
    if len(recording.cameras) < 2:
        raise ValueError(
            f"{recording.path}: a report compares two cameras or more, here {recording.cameras[0].name} alone"
        )
    for choice in parameters.values():
        recording.joints.index(choice.get("joint", recording.joints[0]))  # lists what there is
        if not choice.get("threshold", 1) > 0:
            raise ValueError(f"threshold must be positive, in px, got {choice['threshold']}")
    return recording


def _folder(option: str, text: str, *others: Path) -> str:
    """The folder that the caller means, as an absolute path, because notebooks run in their own."""
    places = dict.fromkeys([Path(text).expanduser(), *others])
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise ValueError(f"--{option} {text}: no folder {' or '.join(map(str, places))}")
    return str(found.resolve())


def _check_writable(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{option} {folder}: {error.strerror}") from None


# Running


def _stamp(notebook: Path, parameters: dict) -> str:
    """What decides a notebook's outcome, as one hash: its cells, its parameters, the package, what is stored in data."""
    cells = [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in nbformat.read(notebook, 4).cells]
    digest = hashlib.sha256(json.dumps([cells, parameters], sort_keys=True).encode())
    code = [path for path in (_ROOT / "epiutils").rglob("*") if path.suffix in (".py", ".toml")]
    for path in sorted([*code, *_ROOT.glob("data/results/*"), *_ROOT.glob("data/checkpoints/*")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _say(text: str) -> None:
    """A line, in a terminal in place of the line of progress."""
    print(f"\r\x1b[K{text}" if sys.stdout.isatty() else text, flush=True)


def _progress(notebook: Path, text: str):
    """What nbclient calls as a cell starts: a terminal shows which one of how many, in one line that changes.

    The cell of parameters that papermill puts in is not counted.
    """
    cells = [c for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
    begin, started = time.time(), []

    def on_cell_start(cell: nbformat.NotebookNode, cell_index: int) -> None:
        if cell.cell_type != "code" or "injected-parameters" in cell.metadata.get("tags", []):
            return
        started.append(cell_index)
        line = f"{text}: cell {len(started)} of {len(cells)}, {time.time() - begin:.0f} s ..."
        print(f"\r\x1b[K{line}", end="", flush=True)

    return on_cell_start if sys.stdout.isatty() else None


def _execute(notebook: Path, parameters: dict, out: Path, timeout: int, text: str) -> Exception | None:
    """Run one notebook through papermill into out/notebooks; returns what stopped it, after saying so.

    text: which notebook it is, for the line of progress.
    """
    copy = out / "notebooks" / notebook.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.unlink(missing_ok=True)  # its stamp is the mark of completion, which goes before what it stands for
    (out / "records" / f"{notebook.stem}.json").unlink(missing_ok=True)
    handed = {"EPIUTILS_REPORT": "1", "EPIUTILS_REPORT_DIR": str(out), "EPIUTILS_REPORT_SOURCE": notebook.stem}
    os.environ |= handed
    begin, mark = time.time(), _stamp(notebook, parameters)
    try:
        nb = papermill.execute_notebook(
            str(notebook),
            str(copy),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(notebook.parent),
            execution_timeout=timeout,
            progress_bar=False,
            on_cell_start=_progress(notebook, text),
            extra_arguments=_QUIET,
        )
        nb.metadata["epiutils"] = {"seconds": round(time.time() - begin, 1), "stamp": mark}
        with replacing(copy) as part:
            nbformat.write(nb, part)
    except Exception as failure:  # noqa: BLE001  a cell's error, a timeout, a dead kernel, a full disk
        _show_failure(notebook, executed(copy), failure)
        return failure
    finally:
        for name in handed:
            del os.environ[name]
    return None


def _show_failure(notebook: Path, nb: nbformat.NotebookNode | None, failure: Exception) -> None:
    """The failing cell's source and its traceback, for the terminal."""
    cells = [c for c in nb.cells if c.cell_type == "code"] if nb else []
    started = [c.source for c in cells if c.metadata.get("papermill", {}).get("start_time")]
    cell = getattr(failure, "source", started[-1] if started else "")
    trace = "\n".join(getattr(failure, "traceback", None) or [f"{type(failure).__name__}: {failure}"])
    if not sys.stderr.isatty():
        trace = re.sub(r"\x1b\[[0-9;]*m", "", trace)
    print(f"\n{notebook.name} failed in this cell:\n\n{cell}\n\n{trace}\n", file=sys.stderr, flush=True)


def _refresh(notebooks: list[Path], timeout: int) -> None:
    """Run notebooks and store their outputs in place, the same bytes in every run (what nbval compares)."""
    for number, notebook in enumerate(notebooks, 1):
        begin, nb = time.time(), nbformat.read(notebook, 4)
        NotebookClient(
            nb,
            kernel_name="python3",
            timeout=timeout,
            record_timing=False,
            on_cell_start=_progress(notebook, f"{notebook.stem} ({number} of {len(notebooks)})"),
            extra_arguments=_QUIET,
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
        with replacing(notebook) as part:
            nbformat.write(nb, part)
        _say(f"{notebook.name}: stored, {time.time() - begin:.0f} s")


def _describe(profile: str, parameters: dict) -> dict:
    """Where the numbers come from: profile, parameters, versions and device, without dates or folders."""
    import torch

    versions = {"python": platform.python_version()}
    for name in ("epiutils", "numpy", "torch", "opencv-python-headless", "matplotlib"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # importable from its folder all the same
            versions[name] = "not installed"
    threads = f"CPU ({platform.machine()}, {os.environ['OMP_NUM_THREADS']} threads)"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else threads
    named = {
        name: Path(value).name if name in ("recording", "dataset", "network") else value
        for name, value in parameters.items()
    }
    return {"profile": profile, "parameters": named, "versions": versions, "device": device}


# The command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m epiutils.report", description="Run the notebooks, write the report."
    )
    add = parser.add_argument
    add("--profile", choices=("quick", "full"), default="quick", help="full: all that is stored anew, for hours")
    add("--recording", metavar="PATH", help="a calibrated recording of your own, a folder")
    add("--network", metavar="NAME", help="that sees its videos: movenet, or a file .pth, .safetensors or .onnx")
    add("--dataset", metavar="NAME", help="Human3.6M: its folder, or the name of one in data/")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a notebook's parameter")
    add("--only", nargs="+", metavar="NN", help="these notebooks, by the start of their names")
    add("--resume", action="store_true", help="skip notebooks that are done and unchanged")
    add("--publish", type=Path, nargs="?", const=LATEST.parent, metavar="FOLDER",
        help="also make anew what is committed there (%(const)s)")  # fmt: skip
    add("--refresh", action="store_true", help="store the outputs in the notebooks instead of a report")
    add("--out", type=Path, default=LATEST, help="where the report goes (%(default)s)")
    add("--notebooks", type=Path, default=_ROOT / "notebooks", help="where they are (%(default)s)")
    add("--timeout", type=int, default=1800, metavar="S", help="longest time for one cell (%(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """`python -m epiutils.report`; returns the exit status.

    What can be known is checked before the first notebook runs; SIGTERM is heard like Ctrl-C.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    os.environ.pop("MPLBACKEND", None)  # a backend from outside takes the figures out of the notebooks
    os.environ |= {name: os.environ.get(name, value) for name, value in THREADS.items()}

    notebooks, args.out = sorted(args.notebooks.resolve().glob("[0-9]*.ipynb")), args.out.resolve()
    chosen = [n for n in notebooks if n.name.startswith(tuple(args.only or [""]))]
    idle = [start for start in args.only or [] if not any(n.name.startswith(start) for n in notebooks)]
    if idle or not chosen:
        parser.error(f"no notebook {' '.join(idle)} in {args.notebooks}; there are: {[n.stem for n in notebooks]}")
    if args.publish and args.only:
        parser.error("--publish needs the numbers of every notebook: leave out --only")
    said = ("recording", "dataset", "network")
    given = dict(args.p) | {name: text for name in said if (text := getattr(args, name))}
    try:
        if given.get("recording"):
            given["recording"] = _folder("recording", given["recording"])
            if Path(given["recording"]).is_relative_to((args.out / RECORDING).resolve()):
                raise ValueError(f"--recording {given['recording']} is where results are put: copy it elsewhere")
        if given.get("network", "movenet") != "movenet":
            given["network"] = str(Path(given["network"]).expanduser().resolve())  # notebooks run in their own folder
        if given.get("dataset"):
            given["dataset"] = _folder("dataset", given["dataset"], _ROOT / "data" / given["dataset"])
        parameters = _choose_parameters(chosen, given, {"profile": args.profile})
        for option in ("notebooks",) if args.refresh else ("out", "publish") if args.publish else ("out",):
            _check_writable(f"--{option}", getattr(args, option))
        recording = _read(parameters)
    except (ValueError, FileNotFoundError, ImportError) as error:  # of what is given: no usage, which names all options
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if args.refresh:
        _refresh(chosen, args.timeout)
        return 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _report(args, notebooks, parameters, recording)
    except OSError as error:  # a full disk
        print(f"report: {error}{'' if error.filename else f', while writing to {args.out}'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while pages were written; in a notebook `_report` has heard it
        print("report: interrupted. What was done is kept; go on with --resume.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(
    args: argparse.Namespace, notebooks: list[Path], parameters: dict[Path, dict], recording: Recording | None
) -> int:
    """Run the notebooks that have parameters, build the report from all; returns the exit status."""
    shutil.rmtree(args.out / RECORDING, ignore_errors=True)
    if recording is not None:
        from epiutils.data.exports import write_results

        results = [str(path.relative_to(args.out)) for path in write_results(recording, args.out / RECORDING)]
        with replacing(args.out / RECORDING / "report.json") as part:
            part.write_text(json.dumps({"notes": recording.notes, "results": results}), "utf-8")
    flat = {name: value for choice in parameters.values() for name, value in choice.items()}
    flat = {name: value for name, value in flat.items() if name != "profile" and value != {}}
    meta, failure, interrupted, notebook = _describe(args.profile, flat), None, False, None
    try:
        if args.profile == "full":
            from epiutils.studies import runs

            runs.main([])  # what it has done is not done again
        for number, notebook in enumerate(parameters, 1):
            ran = executed(args.out / "notebooks" / notebook.name) if args.resume else None
            if ran and ran.metadata.get("epiutils", {}).get("stamp") == _stamp(notebook, parameters[notebook]):
                print(f"{notebook.stem}: unchanged", flush=True)
                continue
            begin, text = time.time(), f"{notebook.stem} ({number} of {len(parameters)})"
            print(f"{text} ...", end="" if sys.stdout.isatty() else "\n", flush=True)
            failure = _execute(notebook, parameters[notebook], args.out, args.timeout, text)
            if failure:
                break
            _say(f"{notebook.stem}: done, {time.time() - begin:.0f} s")
    except KeyboardInterrupt:
        interrupted = True
    stopped = ""
    if failure or interrupted:
        stopped = f"{notebook.stem if notebook else 'The report'} {'was interrupted' if interrupted else 'failed'}."
    build(notebooks, args.out, meta, bool(stopped or args.only), stopped, None if stopped else args.publish)
    if args.out == LATEST:
        with replacing(args.out.parent / "index.html") as part:
            part.write_text(_TO_LATEST, "utf-8")
    _say(f"{stopped} What was done is kept; go on with --resume. " * bool(stopped) + str(args.out / "index.html"))
    return 130 if interrupted else 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
