"""The committed notebooks keep what the tools need, and nbval notices a changed result."""

import ast
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from files36m import labels, write_jpeg, write_karfly
from nbformat.v4 import new_code_cell, new_notebook, new_output

from epiutils.data.human36m import Human36M

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
ANYWHERE = r"(?:(?<![\w.<])|(?<=\\[nrt])|(?<=\dm))/\w+/"  # an absolute path, after an escaped line end or colour too
PLACE = re.compile(rf"(?:/home/|/Users/|/root/|/tmp/|{ANYWHERE}|[A-Z]:\\\\)\w+")
ELSEWHERE = re.compile(  # what reads, or may read, relative to where a kernel was started
    r"""\.\./|\bsys\.path\b|\b(?:open|Path|listdir|glob)\(\s*[rbf]?["'.]|\b(?:chdir|getcwd|cwd)\b|__file__|^\s*[%!]"""
    r"""|["'][\w./-]*\.(?:json|npz|npy|pt|safetensors|csv|txt|toml|png|jpe?g|mp4)["']""",
    re.MULTILINE,
)
VIEW = "application/vnd.jupyter.widget-view+json"
IDEA = ("cameras", "epipolar", "heatmaps", "redirect", "fusion", "triangulate", "space", "metrics")
OPEN = (*IDEA, "data", "studies", "plot", "explore", "report.record")  # what notebooks import from
NETWORKS = {  # what notebooks import of networks, for want of another way
    "networks.hrnet.load_checkpoint", "networks.hrnet.normalise", "networks.loop.train", "networks.predict.predict",
}  # fmt: skip


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    """A committed notebook's file."""
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, 4)


@pytest.fixture
def cells(notebook):
    """The code cells of a committed notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_lines(cell):
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def test_every_cell_was_run_and_none_failed_and_what_is_stored_would_be_stored_again(notebook, cells):
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run `make notebooks`"
    assert "widgets" not in notebook.metadata and not [cell for cell in notebook.cells if "execution" in cell.metadata]
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            data = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
            found = PLACE.search(json.dumps([data, output.get("text", "")]))
            assert not found, f"{found[0]}, a place on this machine, in the output of\n{cell.source}"


def test_the_first_cell_holds_parameters_and_nothing_but_literals(cells):
    assert "parameters" in cells[0].metadata.get("tags", [])
    for statement in ast.parse(cells[0].source).body:
        assert isinstance(statement, ast.Assign | ast.AnnAssign)
        ast.literal_eval(statement.value)


def test_cells_are_short_and_run_alike_everywhere(cells):
    """What is stored is found by the package, which knows its own place; nbval runs cells outside the history, where
    IPython does not see a last semicolon, so that the output appears all the same."""
    for cell in cells:
        assert code_lines(cell) <= 12, cell.source
        assert not re.search(r"\binteract(ive|ive_output)?\b|\bOutput\(", cell.source), f"stalls:\n{cell.source}"
        assert not ELSEWHERE.search(cell.source), f"reads what lies beside the notebook:\n{cell.source}"
        assert not cell.source.rstrip().endswith(";"), f"assign to _ instead:\n{cell.source}"


@pytest.mark.parametrize("path", NOTEBOOKS[:3], ids=lambda path: path.stem)
def test_the_first_notebooks_have_one_idea_a_cell_and_say_more_than_they_compute(notebook, cells):
    assert statistics.median(map(code_lines, cells)) <= 5
    prose, code = (
        sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == kind)
        for kind in ("markdown", "code")
    )
    assert prose >= code, f"{prose} words for {code} of code"
    assert any(re.search(r"\.controls\[.+\]\.value = ", cell.source) for cell in cells), "an explorer is moved"


def test_notebooks_import_few_names_and_only_what_is_theirs(path, cells):
    names = set()
    for node in ast.walk(ast.parse("\n".join(cell.source for cell in cells))):
        if isinstance(node, ast.Import):
            assert not [alias for alias in node.names if alias.name.split(".")[0] == "epiutils"], "from … import …"
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("epiutils", "benchmarks"):
            names |= {f"{node.module}.{alias.name}".removeprefix("epiutils.") for alias in node.names}
    assert 1 <= len(names) <= 15, f"{len(names)}: {sorted(names)}"
    for name in names - NETWORKS:
        assert any(f"{name}.".startswith(f"{module}.") for module in OPEN), name
        assert not any(part.startswith("_") for part in name.split(".")), name


def test_every_notebook_shows_an_explorer(cells):
    shown = [cell for cell in cells if any(VIEW in output.get("data", {}) for output in cell.outputs)]
    assert any("explore(" in cell.source for cell in shown)


@pytest.mark.parametrize(("stored", "passes"), [("0.4976", True), ("0.4977", False)])
def test_a_changed_number_fails_nbval(tmp_path, stored, passes):
    cell = new_code_cell("spread = 0.49764\nprint(f'spread {spread:.4f} px')", execution_count=1)
    cell.outputs = [new_output("stream", name="stdout", text=f"spread {stored} px\n")]
    nb = new_notebook(cells=[cell])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nb, tmp_path / "01_tiny.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider"]
    command += ["--nbval-sanitize-with", ROOT / "tests" / "nbval_sanitize.cfg", "-c", os.devnull, "01_tiny.ipynb"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    said = re.sub(r"\x1b\[[0-9;]*m", "", ran.stdout)
    assert ran.returncode == (0 if passes else 1), ran.stdout + ran.stderr
    assert passes or ("01_tiny.ipynb::Cell 0" in said and "0.4977" in said), said


def test_the_training_runs_on_human36m(tmp_path):
    """Eight instants of subject 1 and two of subject 9; nobody is known to be hidden, so there is no such number."""
    folder = tmp_path / "human36m"
    write_karfly(folder, labels([(1, 2, 1, 1 + k) for k in range(36)] + [(9, 2, 1, 1 + k) for k in range(65)]))
    grey = np.random.default_rng(0).integers(0, 255, (1000, 1000, 3)).astype(np.uint8)
    for split, subject in (("train", 1), ("test", 9)):
        for shot in itertools.chain(*Human36M(folder, split, subjects=(subject,)).shots):
            write_jpeg(folder / shot.picture, grey)
    command = [sys.executable, "-m", "epiutils.report", "--only", "04", "--dataset", folder, "--out", tmp_path / "out"]
    point = ROOT / "data" / "checkpoints" / "original.safetensors"  # as a file of one's own is named
    small = {"frozen_iterations": 3, "free_iterations": 1, "batch": 2, "seeds": 1, "point": point}
    command += itertools.chain(*(("-p", name, str(value)) for name, value in small.items()))
    ran = subprocess.run(
        [str(word) for word in command], env=os.environ | {"EPIUTILS_CACHE": str(tmp_path)}, cwd=ROOT,
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))
    assert metrics["meta"]["parameters"]["dataset"] == "human36m" and "benchmark" not in metrics
    for name in ("hrnet", "original_frozen", "original_free"):
        assert "accuracy" in metrics["training"][name] and "accuracy_occluded" not in metrics["training"][name]
    assert "full" not in metrics["training"]  # what is stored is of others


# Wherever it is started


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('json.load(open("../data/results/fusion.json"))', True),
        ("Path('data') / name", True),
        ("open('points.csv')", True),
        ("np.load('data/results/best.npz')", True),
        ("sys.path.append('..')", True),
        ("x = 1\nos.chdir(folder)", True),
        ("%cd ..", True),
        ('f"{Path(point).stem}"', False),
        ("data = open_dataset(recording)", False),
        ("runs.load('best')", False),
        ("100 % share", False),
    ],
)
def test_a_place_is_known_when_it_is_seen(source, found):
    assert bool(ELSEWHERE.search(source)) == found


def test_a_notebook_runs_from_wherever_it_is_started(tmp_path):
    """From the root, by papermill, which stays there, and by nbconvert, which goes to the notebook's folder.

    nbval runs all notebooks in their own folder, JupyterLab copies of them in another one.
    """
    started = []
    for tool, notebook in (("papermill", NOTEBOOKS[0]), ("nbconvert", NOTEBOOKS[1])):
        name, out = os.path.relpath(notebook, ROOT), tmp_path / f"{tool}.ipynb"
        options = [name, out, "-p", "trials", 1] if tool == "papermill" else ["--execute", name, "--to", "notebook"]
        command = [sys.executable, "-m", tool, *options, *(["--output", out] if tool == "nbconvert" else [])]
        with (tmp_path / f"{tool}.log").open("w") as log:
            started.append((out, log.name, subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=log, stderr=log)))
    for out, log, process in started:
        assert process.wait(300) == 0, Path(log).read_text()
        outputs = [output for cell in nbformat.read(out, 4).cells for output in cell.get("outputs", [])]
        assert any("image/png" in output.get("data", {}) for output in outputs)
