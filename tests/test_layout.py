"""The package's layout: imports run one way, names stay few, and what is private stays in its module."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("epiutils", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text("utf-8")) for module, path in FILES.items()}
IDEA = ("cameras", "epipolar", "heatmaps", "redirect", "fusion", "triangulate", "space", "metrics")
WINGS = ("data", "networks", "studies", "report")
# Which floors each floor may import; files of the idea are floors of their own, a wing is one.
MAY = dict.fromkeys(IDEA, set(IDEA)) | {"plot": set(), "explore": set()}
for number, wing in enumerate(WINGS):
    MAY[wing] = {*IDEA, *WINGS[: number + 1]}
MAY["benchmarks"] = {*MAY["report"], "benchmarks"}


def floor(module):
    """The idea's file, the file of how it is shown, the wing or `benchmarks`, that a module belongs to."""
    return module.removeprefix("epiutils.").split(".")[0]


def imported(module):
    """(module, name) of all that a module imports from the package, inside of functions too; name None for a module."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names if alias.name in FILES}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found |= {(whole, None)} if whole in FILES else {(node.module, alias.name)}
    return {(other, name) for other, name in found if other in FILES}


GRAPH = {module: {other for other, _ in imported(module)} - {module} for module in FILES}


def public(module):
    """Functions and classes at the top of a module, without underscore."""
    definitions = (node for node in TREES[module].body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return [node.name for node in definitions if not node.name.startswith("_")]


def test_the_graph_knows_the_package():
    """What the other tests walk over is there: a change of layout cannot empty it."""
    assert len(FILES) > 30 and {floor(module) for module in FILES} - {"epiutils"} <= set(MAY)
    assert GRAPH["epiutils.epipolar"] == {"epiutils.cameras"}
    assert {"epiutils.heatmaps", "epiutils.data.views"} <= GRAPH["epiutils.data.dataset"]
    assert {"View", "heatmap_fundamentals"} <= set(public("epiutils.data.views"))


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module):
    wrong = {other for other in GRAPH[module] if floor(other) not in MAY.get(floor(module), set())}
    assert not wrong, f"{module} imports {wrong}"


def test_what_notebooks_need_of_the_report_needs_no_more_than_files():
    assert GRAPH["epiutils.report.record"] == {"epiutils.data.files"}
    assert not GRAPH["epiutils.data.files"]


def test_no_imports_in_a_circle():
    list(TopologicalSorter(GRAPH).static_order())  # a CycleError names the circle


def test_seven_floors():
    floors = {}
    for module, others in GRAPH.items():
        floors.setdefault(floor(module), set()).update(map(floor, others))

    @cache
    def height(name):
        return 1 + max((height(other) for other in floors[name] - {name}), default=0)

    heights = {name: height(name) for name in floors}
    assert max(heights.values()) <= 7, heights


def private(name):
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize("module", FILES)
def test_what_is_private_stays_in_its_module(module):
    names = {name for _, name in imported(module) if name and private(name)}
    assert not names - {"_accelerator"}, f"{module} imports {names}"
    modules = {other.split(".")[-1] for other, name in imported(module) if name is None}
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert not private(node.attr), f"{module}: {node.value.id}.{node.attr}"


def test_the_idea_is_short_and_names_are_few():
    lines = {
        name: FILES[f"epiutils.{name}"].read_text("utf-8").count("\n") for name in IDEA if f"epiutils.{name}" in FILES
    }
    assert sum(lines.values()) <= 2000, lines
    names = {module: public(module) for module in FILES if module.startswith("epiutils")}
    assert sum(map(len, names.values())) <= 169, names  # to be 140


CALLED = {  # by scripts outside of this repository
    "triangulate": ("triangulate", "triangulate_robust", "reprojection_error"),
    "epipolar": ("find_fundamental", "fundamental_from_cameras", "symmetric_epipolar_distance"),
    "heatmaps": ("accuracy",),
    "cameras": ("Camera",),
    "redirect": ("redirect", "Pencil"),
    "fusion": ("OriginalFusion", "SimpleFusion", "RepairedFusion"),
    "data.recordings": ("read_recording",),
    "data.people": ("scene",),
    "networks.hrnet": ("PoseHRNet", "load_checkpoint"),
    "networks.training": ("main",),
}


@pytest.mark.parametrize("module", CALLED)
def test_names_that_others_call_stay(module):
    assert set(CALLED[module]) <= set(public(f"epiutils.{module}"))


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.stem)
def test_no_test_file_imports_another(path):
    """What tests share is in files that hold no tests, so that each can run, and be read, alone."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert not [name for name in names if name.startswith("test_")]
