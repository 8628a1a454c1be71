import base64
import errno
import html
import importlib.metadata
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from nbconvert.filters import markdown2html
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from recorded import write_recording

from epiutils.report import pages
from epiutils.report import run as report
from epiutils.report.record import record, record_figure

FIRST = r"""# 01 · The first

From $F$ to a line, $x'^\top F x = 0$. See [the second](02_second.ipynb).

Costs `$5` in code."""
EXPLORER = """
from matplotlib.figure import Figure
from epiutils.explore import explore
def draw(threshold=2, view="left"):
    figure = Figure(figsize=(2, 1))
    figure.add_axes((0, 0, 1, 1), ylim=(0, 6)).plot([0, threshold])
    return figure, f"threshold {threshold} in the {view} view"
explore(draw, threshold=(1, 3), view=["left", "right"], ahead="threshold")
"""
RECORD = """
from matplotlib.figure import Figure
from epiutils.report.record import record, record_figure
figure = Figure(figsize=(2, 1))
figure.subplots().plot([1, 2])
record("line.slope", slope, "slope of the line")
record("line.points", 2)
record_figure("01_line", figure, "A line.")
"""
WIDGETS = """
import io
import ipywidgets as w
from PIL import Image
Image.new("RGB", (2, 2)).save(buffer := io.BytesIO(), "png")
shown = w.Image(value=buffer.getvalue(), layout=w.Layout(width="30px"))
some = w.SelectMultiple(options=["a", "b", "c"], index=[0, 2], description="some")
away = w.Stack([w.Label("behind"), w.HTML("<i>in front</i>")], selected_index=1)
row = w.HBox([w.Checkbox(True, description="box"), w.FloatSlider(0.25, description="gain"), some])
bar = w.HBox([w.FloatProgress(1), w.Label("4/4")])
plain = w.IntSlider(3, description="plain")
w.VBox([plain, w.Dropdown(options=["a", "b"], description="menu"), row, bar, away, shown, w.Label("1 < 2")])
"""


def cells(*sources):
    """Cells from sources: Markdown where one starts with #, parameters where with %."""
    made = []
    for number, source in enumerate(sources):
        if source.startswith("# "):
            made.append(new_markdown_cell(source))
        else:
            made.append(new_code_cell(source.removeprefix("%").strip()))
            made[-1].metadata["tags"] = ["parameters"] if source.startswith("%") else []
        made[-1].id = f"cell-{number}"
    return made


def notebook(path, *sources):
    nb = new_notebook(cells=cells(*sources))
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A published report over two small notebooks: its folder, and a function that makes it again with other arguments."""
    folder = tmp_path_factory.mktemp("report")
    parameters = '%profile = "quick"\nslope = 1.0  # px per px\nrecording = ""'
    notebook(folder / "nb" / "01_first.ipynb", FIRST, parameters, RECORD, EXPLORER, WIDGETS)
    second = "# 02 · The second\n\nIt *adds*.", "%fail = False", "assert not fail, 'told to'"
    notebook(folder / "nb" / "02_second.ipynb", *second)

    def make(*arguments):
        return report.main(["--notebooks", str(folder / "nb"), "--out", str(folder / "out"), *arguments])

    with pytest.MonkeyPatch.context() as patch:
        for name in report.THREADS:
            patch.setenv(name, os.environ.get(name, report.THREADS[name]))
        assert make("-p", "slope", "2", "--publish", str(folder)) == 0
        yield folder / "out", make


def test_record_checks_and_leaves_no_trace_outside_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (1.5, np.float32(2), torch.tensor(3), True, "magsac", (0.1, 2), {"c": 1, "d e": {"f": 2}}):
        assert record("a.b", value) is None
    for name in ("", "a b", ".a", "a..b", "ä"):
        with pytest.raises(ValueError, match="words joined by dots"):
            record(name, 1)
    for value in (float("nan"), np.inf, None, [1, None], (1, math.nan), object()):
        with pytest.raises(ValueError, match="finite number"):
            record("a", value)
    figure = Figure()
    assert record_figure("a", figure) is figure
    with pytest.raises(ValueError, match="03_fused"):
        record_figure("../a", Figure())
    assert list(tmp_path.iterdir()) == []


def test_a_mapping_is_recorded_entry_by_entry_without_what_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("EPIUTILS_REPORT_DIR", str(tmp_path))
    inner = {"ci": (0.1, np.float64(0.2)), "broken": (0.1, math.nan), "n": 3}
    values = {"accuracy": torch.tensor(0.5), "a b": inner, "gone": None, "worst": -np.inf, "name": "magsac", "ok": True}
    assert record("run.one", values, {"accuracy": "share", "a b": {"n": "how many"}}) is None
    found = json.loads((tmp_path / "records" / "script.json").read_text("utf-8"))["numbers"]
    assert {name: entry["value"] for name, entry in found.items()} == {
        "run.one.accuracy": 0.5, "run.one.a_b.ci": [0.1, 0.2], "run.one.a_b.n": 3, "run.one.name": "magsac",
        "run.one.ok": True,
    }  # fmt: skip
    texts = {name: entry["text"] for name, entry in found.items() if entry["text"]}
    assert texts == {"run.one.accuracy": "share", "run.one.a_b.n": "how many"}
    with pytest.raises(ValueError, match=r"text for \['acuracy'\], but run has \['accuracy'\]"):
        record("run", {"accuracy": 0.5}, {"acuracy": "share"})
    with pytest.raises(ValueError, match="run.what must be finite numbers"):
        record("run", {"what": object()})
    record("redirect.speedup", 1)
    record("redirect.speedup_loop", 1)
    with pytest.raises(ValueError, match="group"):
        record("redirect.speedup.loop", 1)


def test_recorded_figures_are_the_same_bytes_in_every_run(tmp_path, monkeypatch):
    files = []
    for run in ("a", "b"):
        monkeypatch.setenv("EPIUTILS_REPORT_DIR", str(tmp_path / run))
        figure = Figure(figsize=(2, 1))
        figure.subplots().plot([1, 3, 2])
        assert record_figure("line", figure, "A line.") is figure
        files.append({path.name: path.read_bytes() for path in (tmp_path / run / "figures").iterdir()})
    assert sorted(files[0]) == ["line.png", "line.svg"] and files[0] == files[1]


def test_a_large_figure_is_kept_small(tmp_path, monkeypatch):
    monkeypatch.setenv("EPIUTILS_REPORT_DIR", str(tmp_path))
    figure = Figure(figsize=(8, 8))
    figure.add_axes((0, 0, 1, 1)).imshow(np.random.default_rng(0).random((400, 400, 3)))
    record_figure("noise", figure)
    (path,) = (tmp_path / "figures").iterdir()
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "P"


META = {"versions": {}, "profile": "quick", "device": "CPU"}


def reported(folder, numbers=None, figures=None, partial=True, meta=META, texts=None):
    """The report of one notebook that handed over such numbers and figures (name, caption): its page and its README."""
    path = notebook(folder / "nb" / "03_x.ipynb", "# X")
    notebook(folder / "out" / "notebooks" / path.name, "# X")
    told = {name: {"value": value, "text": (texts or {}).get(name, "")} for name, value in (numbers or {}).items()}
    records = folder / "out" / "records" / "03_x.json"
    records.parent.mkdir(exist_ok=True)
    records.write_text(json.dumps({"numbers": told, "figures": figures or {}}))
    pages.build([path], folder / "out", meta, partial, publish=folder)
    return tuple((folder / name).read_text("utf-8") for name in ("out/index.html", "README.md"))


def plain(page, readme):
    """The page as plain text, and its README without marks."""
    page = html.unescape(re.sub(r"<(style|nav).*?</\1>|<[^>]+>", "", page, flags=re.DOTALL))
    return " ".join(page.replace("\N{NO-BREAK SPACE}", " ").split()), " ".join(readme.replace("**", "").split())


def test_metrics_are_nested_sorted_and_merged(tmp_path):
    told = lambda: json.loads((tmp_path / "out" / "metrics.json").read_text())
    reported(tmp_path, {"b.z": 1, "b.a": 2, "old.x": 3})
    reported(tmp_path, {"b.c": 4}, meta=META | {"profile": "full"})
    expected = {"b": {"a": 2, "c": 4, "z": 1}, "meta": META | {"profile": "full"}, "old": {"x": 3}}
    assert told() == expected and [*told()["b"], *told()] == ["a", "c", "z", "b", "meta", "old"]
    reported(tmp_path, {"b.c.d": 5}, partial=False)
    assert told() == {"b": {"c": {"d": 5}}, "meta": META, "old": {"x": 3}}


def test_a_report_leaves_what_it_promises(made):
    out, _ = made
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["line"] == {"points": 2, "slope": 2.0}
    assert metrics["meta"]["parameters"] == {"slope": 2.0} and "torch" in metrics["meta"]["versions"]
    assert sorted(path.name for path in (out / "figures").iterdir()) == ["01_line.png", "01_line.svg"]
    index = (out / "index.html").read_text()
    assert '<td>slope of the line</td><td>2</td><td><a href="01_first.html"' in index and "A line. <a href" in index
    assert '<a href="01_first.html">01 · The first</a>' in index and "<math" in index and "figures/01_line.png" in index
    assert nbformat.read(out / "notebooks" / "01_first.ipynb", 4).cells[-1].execution_count


def test_what_is_published_lies_beside_the_report_and_links_to_the_notebooks(made):
    out, _ = made
    assert {path.name for path in out.parent.iterdir()} == {"README.md", "figures", "metrics.json", "nb", "out"}
    readme = (out.parent / "README.md").read_text()
    assert "- **[02 · The second](nb/02_second.ipynb)**: It *adds*." in readme and "[figures](figures)" in readme
    for path in (out / "metrics.json", *(out / "figures").iterdir()):
        assert (out.parent / path.relative_to(out)).read_bytes() == path.read_bytes()


def test_publishing_replaces_figures_and_keeps_numbers_of_others(tmp_path):
    (tmp_path / "figures").mkdir()
    for name in ("05_old.png", "photo.png"):
        (tmp_path / "figures" / name).touch()
    (tmp_path / "metrics.json").write_text('{"real": {"x": 1}, "old": {"x": 1, "y": 2}}')
    reported(tmp_path, {"old.x": 3}, partial=False)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"meta": META, "old": {"x": 3}, "real": {"x": 1}}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {"meta": META, "old": {"x": 3}}
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["photo.png"]


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>", "<b>[a](b)*c*`d`_e_|", "a & b %"])
def test_what_a_folder_is_called_is_shown_as_it_is(tmp_path, name):
    figures = dict.fromkeys(("05_shares", "05_other"), f"seen in {name}")
    index, readme = reported(tmp_path, {"real.off": 2}, figures, texts={"real.off": f"px (recording {name})"})
    index = index.replace("\N{NO-BREAK SPACE}", " ")
    assert index.count(f"seen in {html.escape(name)}") == 2 and f"(recording {html.escape(name)})" in index
    assert f"seen in {name}" not in index or "<" not in html.escape(name).replace("&", "<")
    assert f"<p>seen in {html.escape(name)} (" in markdown2html(readme).replace("&quot;", '"')


def test_pages_need_neither_network_nor_kernel(made):
    out, _ = made
    for path in out.glob("*.html"):
        page = path.read_text("utf-8")
        assert not re.search(
            r"""(src|href)=["']?(https?:)?//|@import|require\.js|mathjax|cdn\w*\.""", page, re.IGNORECASE
        )
        assert "vnd.jupyter" not in page and "@@MATH" not in page
        assert path.stat().st_size < 1.5e6
    page = (out / "01_first.html").read_text("utf-8")
    assert page.count("<math") == 2 and "<code>$5</code>" in page
    assert 'href="02_second.html"' in page and ".ipynb" not in page
    settings = {"plain": 3, "menu": "a", "box": "on", "gain": 0.25, "some": "a, c"}.items()
    assert "".join(f'<span class="setting">{name} <b>{value}</b></span>' for name, value in settings) in page
    assert "<figcaption>1 &lt; 2</figcaption>" in page and "<figcaption>4/4" not in page
    assert "<figcaption><i>in front</i></figcaption>" in page and "<figcaption>behind" not in page
    assert re.search('<img alt="figure" src="data:image/png;base64,[^"]+" style="width:30px"', page)


def test_an_explorer_made_ahead_is_a_live_slider(made):
    page = (made[0] / "01_first.html").read_text("utf-8")
    (frames,) = re.findall(r'<script type="application/json">(.*?)</script>', page)
    ahead = json.loads(frames)
    assert [frame["caption"] for frame in ahead["frames"]] == [f"threshold {t} in the left view" for t in (1, 2, 3)]
    assert base64.b64decode(ahead["frames"][0]["webp"])[8:12] == b"WEBP" and ahead["start"] == 1
    assert "view <b>left</b>" in page and 'type: "range"' in page


def test_page_and_readme_tell_the_same_numbers_and_leave_out_what_is_missing(tmp_path):
    tiles = tomllib.loads((Path(pages.__file__).parent / "template" / "story.toml").read_text("utf-8"))["tiles"]
    needs = [set(re.findall(r"{([^{}:]+):[^{}]*}", tile["number"] + tile["text"])) for tile in tiles]
    numbers = {name: 0.0123 + 0.07 * k for k, name in enumerate(sorted(set().union(*needs)))}
    for missing in [None, *numbers]:
        left = {name: value for name, value in numbers.items() if name != missing}
        page, readme = plain(*reported(tmp_path / str(missing), left))
        for tile, need in zip(tiles, needs, strict=True):
            if missing in need:
                assert tile["what"] not in page and tile["what"] not in readme
                continue
            for key in ("what", "number", "text"):
                said = re.sub(r"{([^{}:]+):([^{}]*)}", lambda f: format(left[f[1]], f[2]), tile[key].replace("**", ""))
                said = re.sub(r"(\d)%", r"\1 %", said)
                assert said in page and said in readme
    assert not needs[0] and any(needs)  # only what was reported is written by hand


def test_the_numbers_told_are_those_of_metrics(tmp_path):
    for value, said in ((12345.6, "12,346 times"), (99, "99 times")):
        both = plain(*reported(tmp_path, {"redirect.speedup_loop": value, "cost.loops_times_slower": 7}))
        assert all(said in text for text in both)
    numbers = {f"benchmark.original.{name}.accuracy": 0.4677 for name in ("hrnet", "original_frozen")}
    assert not any("against 47 %" in text for text in plain(*reported(tmp_path, numbers)))
    both = plain(*reported(tmp_path, numbers | {"benchmark.original.original_free.accuracy": 0.0187}))
    assert all("against 47 %" in text and "set free for 60, 1.9 %" in text for text in both)


def test_the_story_shows_its_figures_once_and_in_its_order(tmp_path):
    for name in (names := ["03_first", "07_pose", "03_ladder", "05_shares"]):
        (tmp_path / "out" / "figures").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "figures" / f"{name}.svg").touch()
    page, readme = reported(tmp_path, figures={name: name for name in names})
    order = [page.index(f'src="figures/{name}') for name in ("05_shares.svg", "03_ladder.svg", "07_pose.svg")]
    assert order == sorted(order) and page.index("<details>") < page.index('alt="03_first"')
    assert page.count('src="figures/05_shares.svg" alt="Why it failed"') == 1
    assert readme.index("05_shares.png") < readme.index("03_ladder.png") < readme.index("07_pose.png")
    assert "03_first" not in readme and "06_repairs" not in page + readme


def test_resume_skips_what_is_done_and_unchanged(made, capsys):
    out, make = made
    before = {path: path.read_bytes() for path in [out / "metrics.json", *(out / "figures").iterdir()]}
    assert make("--resume", "-p", "slope", "2") == 0
    assert capsys.readouterr().out.count("unchanged") == 2
    assert make("--resume", "-p", "slope", "2", "-p", "fail", "True") == 1  # 02 has another parameter now
    said = capsys.readouterr()
    assert "01_first: unchanged" in said.out and "02_second failed. What was done is kept" in said.out
    assert "assert not fail" in said.err and "AssertionError: told to" in said.err and "\x1b" not in said.err
    assert "did not run to its end" in (out / "02_second.html").read_text("utf-8")
    assert "02_second failed" in (out / "index.html").read_text("utf-8")
    assert nbformat.read(out / "notebooks" / "02_second.ipynb", 4).cells[-1].outputs
    assert make("--resume", "-p", "slope", "2") == 0  # a failed copy is not taken for a finished one
    assert "02_second: done" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in before}
    assert not [path for path in out.rglob("*") if path.name.startswith(".")]


def test_only_keeps_the_numbers_of_the_others(made, capsys):
    out, make = made
    assert make("--only", "02") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "02_second (1 of 1) ..." and re.fullmatch(r"02_second: done, \d+ s", said[1]) and len(said) == 3
    assert json.loads((out / "metrics.json").read_text())["line"]["slope"] == 2


def test_a_terminal_shows_the_cell_that_runs_in_a_line_that_changes(made, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for arguments, end in ((("-p", "slope", "2"), "01_first: done"), (("--refresh",), "01_first.ipynb: stored")):
        assert made[1]("--only", "01", *arguments) == 0
        said = capsys.readouterr().out.split("\r\x1b[K")
        cells = [re.sub(r"\d+ s", "0 s", text) for text in said if "cell" in text]
        assert cells == [f"01_first (1 of 1): cell {k} of 4, 0 s ..." for k in range(1, 5)]
        assert f"{end}, " in said[said.index(next(text for text in said if "cell 4" in text)) + 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "slop", "1"], "no notebook has the parameter slop; there are: dataset, fail, profile, recording, sl"),
        (["-p", "slope", "steep"], "slope is of type float (like 1.0), got 'steep'"),
        (["-p", "fail", "1"], "fail is of type bool (like False), got '1'"),
        (["--only", "07"], "no notebook 07"),
        (["--only", "02", "-p", "slope", "1"], "no notebook has the parameter slope"),
        (["--recording", "nowhere"], "--recording nowhere: no folder nowhere"),
        (["--dataset", "human36m"], "no folder human36m or "),
        (["--out", f"{__file__}/x"], "test_report.py/x: Not a directory"),
        (["--publish", "--only", "01"], "--publish needs the numbers of every notebook"),
    ],
)
def test_wrong_arguments_are_named(made, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        made[1](*arguments)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and message in told
    assert arguments[0] != "--recording" or told.count("--recording") == told.count("\n") == 1


def test_results_read_again_as_a_recording_are_not_swept(made, capsys):
    out, make = made
    write_recording(out / "recording")
    with pytest.raises(SystemExit):
        make("--recording", str(out / "recording"), "--only", "01")
    assert "copy it elsewhere" in capsys.readouterr().err
    assert (out / "recording" / "calibration" / "Calib.toml").is_file()


def test_a_recording_is_where_the_caller_says(made, tmp_path, monkeypatch):
    out, make = made
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert make("--recording", "mine", "--only", "01") == 0
    copy = nbformat.read(out / "notebooks" / "01_first.ipynb", 4)
    assert f'recording = "{tmp_path / "mine"}"' in "\n".join(cell.source for cell in copy.cells)
    assert json.loads((out / "metrics.json").read_text())["meta"]["parameters"] == {"recording": "mine"}


LOOK = """
from epiutils.data.dataset import open_instant
data, frame = open_instant(20, recording, **options)
print([camera.name for camera in data.cameras], frame, threshold)
"""


@pytest.fixture(scope="module")
def looking(tmp_path_factory):
    """A report over a notebook that looks at a recording of three cameras, its JSON numbered from 1."""
    folder = tmp_path_factory.mktemp("looking")
    write_recording(folder / "mine", frames=range(1, 4), n=3)
    cells = '%recording = ""\noptions = {}\nthreshold = 1\njoint = "lwri"', LOOK
    notebook(folder / "nb" / "01_look.ipynb", "# 01 · A look\n\nAt yours.", *cells)

    def make(*arguments):
        return report.main(["--notebooks", str(folder / "nb"), "--out", str(folder / "out"), *arguments])

    return folder, make


def test_what_the_reader_is_told_goes_through_the_report_and_comes_back_with_it(looking):
    folder, make = looking
    asked = "-p cameras cam03,cam01 -p unit m -p person 0 -p threshold 1.5".split()
    assert make("--recording", str(folder / "mine"), *asked) == 0
    copy = nbformat.read(folder / "out" / "notebooks" / "01_look.ipynb", 4)
    assert copy.cells[-1].outputs[0].text == "['cam03', 'cam01'] 3 1.5\n"
    page = (folder / "out" / "index.html").read_text("utf-8")
    assert "Your recording" in page and "calibration Calib.toml" in page and "calibrated, but" not in page
    files = folder / "out" / "recording"
    assert f'href="recording/pose-3d/{next(files.glob("pose-3d/*.trc")).name}"' in page
    assert (files / "pose" / "cam03_json").is_dir() and not (files / "pose" / "cam02_json").exists()
    assert make() == 0  # the embedded people again
    assert not files.exists() and "Your recording" not in (folder / "out" / "index.html").read_text("utf-8")


@pytest.mark.parametrize(
    "given, message",
    [
        (("cameras", "cam07"), "no camera cam07, there are cam01, cam02, cam03"),
        (("model", "COCO"), "25 keypoints a person, but COCO has 18"),
        (("unit", "mm"), "with unit='mm', and people have"),
        (("person", "2"), "no person 2"),
        (("person", "tall"), "person must be"),
        (("video_start", "x"), "video_start must be"),
        (("cameras", "cam02"), "a report compares two cameras or more, here cam02 alone"),
        (("cameras", "cam02,cam02"), "Calib.toml: cameras to read are named twice"),
        (("threshold", "-1.5"), "threshold must be positive, in px, got -1.5"),
        (("joint", "tail"), "no joint 'tail'; there are: nose, leye"),
    ],
)
def test_what_the_reader_refuses_is_told_before_any_notebook_runs(looking, capsys, given, message):
    folder, make = looking
    with pytest.raises(SystemExit) as stop:
        make("--recording", str(folder / "mine"), "-p", *given)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and message in told and told.count("\n") == 1


def test_a_cell_that_hangs_is_stopped_and_shown(tmp_path, capsys):
    notebook(tmp_path / "nb" / "01_slow.ipynb", "# Slow", "1", "import time\ntime.sleep(60)", "2")
    arguments = ["--notebooks", str(tmp_path / "nb"), "--out", str(tmp_path / "out"), "--timeout", "2"]
    assert report.main(arguments) == 1
    assert "import time\ntime.sleep(60)" in capsys.readouterr().err


@pytest.fixture
def instead(made, monkeypatch):
    """A function that makes the report with something else in place of papermill."""

    def make(replacement, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr("papermill.execute_notebook", replacement)
            return made[1](*arguments)

    return make


def test_a_rerun_that_is_killed_is_not_taken_for_finished(made, instead, capsys):
    out, make = made
    figures = sorted(path.name for path in (out / "figures").iterdir())

    class Kill(BaseException):
        """Nobody catches it; the files stay as SIGKILL leaves them."""

    def killed(source, copy, **kwargs):
        Path(copy).write_text('{"cells": [')
        raise Kill

    with pytest.raises(Kill):
        instead(killed, "--only", "01", "-p", "slope", "2")
    assert make("--resume", "-p", "slope", "2") == 0
    said = capsys.readouterr().out
    assert "01_first: done" in said and "02_second: unchanged" in said
    index = (out / "index.html").read_text("utf-8")
    assert "A line. <a href" in index and "slope of the line" in index
    assert sorted(path.name for path in (out / "figures").iterdir()) == figures


def test_being_terminated_is_heard_like_ctrl_c(made, instead, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)

    def terminated(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    assert instead(terminated, "--only", "02") == 130
    assert "02_second was interrupted" in capsys.readouterr().out and signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(report, "build", terminated)  # and while pages are written
    assert made[1]("--resume", "--only", "01", "-p", "slope", "2") == 130
    assert "interrupted. What was done is kept" in capsys.readouterr().err


def test_a_full_disk_is_named(made, instead, monkeypatch, capsys):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(source, copy, **kwargs):
        Path(copy).write_text('{"cells": [')
        raise full

    assert instead(half, "--only", "02") == 1
    said = capsys.readouterr()
    assert "No space left on device" in said.err and "02_second failed. What was done is kept" in said.out

    def nothing(*args):
        raise full

    monkeypatch.setattr(report, "build", nothing)
    assert made[1]("--resume", "--only", "01", "-p", "slope", "2") == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"report: [Errno 28] No space left on device, while writing to {made[0]}"


def test_a_package_that_is_not_installed_but_at_hand_is_no_reason_to_fail(made, monkeypatch):
    out, make = made
    known = importlib.metadata.version

    def version(name):
        if name == "epiutils":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    assert make("--resume", "-p", "slope", "2") == 0
    versions = json.loads((out / "metrics.json").read_text())["meta"]["versions"]
    assert versions["epiutils"] == "not installed" and versions["numpy"] == np.__version__


def test_the_latest_report_is_found_from_the_folder_above_and_git_does_not_see_it(made, monkeypatch, capsys):
    out, make = made
    monkeypatch.setattr(report, "LATEST", out.parent / "latest")
    assert make("--resume", "--only", "02", "--out", str(out.parent / "latest")) == 0
    assert capsys.readouterr().out.strip().endswith("latest/index.html")
    (to,) = re.findall('url=(.*?)"', (out.parent / "index.html").read_text())
    assert (out.parent / to).is_file()
    monkeypatch.undo()
    root = report.LATEST.parents[1]
    if not (root / ".git").exists():
        pytest.skip("no git")
    made_here = ["latest/index.html", "latest/metrics.json", "latest/figures/01_x.png", "index.html"]
    committed = ["README.md", "metrics.json", "figures/01_x.png"]
    command = ["git", "check-ignore", "--no-index", *(f"reports/{name}" for name in made_here + committed)]
    ignored = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.split()
    assert ignored == [f"reports/{name}" for name in made_here] and report.LATEST == root / "reports" / "latest"


def test_interrupting_keeps_what_was_done(tmp_path):
    notebook(tmp_path / "nb" / "01_quick.ipynb", "# Quick", "1")
    notebook(tmp_path / "nb" / "02_slow.ipynb", "# Slow", "print('begun')", "import time\ntime.sleep(60)")
    command = [sys.executable, "-m", "epiutils.report", "--notebooks", tmp_path / "nb", "--out", tmp_path / "out"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, ours too
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    part = tmp_path / "out" / "notebooks" / "02_slow.ipynb"
    end = time.monotonic() + 60
    while not (part.exists() and "begun\\n" in part.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "02_slow was interrupted" in out
    assert (tmp_path / "out" / "01_quick.html").exists() and (tmp_path / "out" / "02_slow.html").exists()
    assert "stamp" not in nbformat.read(part, 4).metadata.get("epiutils", {})


def test_refreshing_twice_gives_the_same_bytes(tmp_path):
    path = notebook(tmp_path / "01_first.ipynb", FIRST, "%slope = 1.0", EXPLORER, WIDGETS, "print(slope)")
    runs = []
    for _ in range(2):
        assert report.main(["--notebooks", str(tmp_path), "--refresh"]) == 0
        runs.append(path.read_bytes())
    assert runs[0] == runs[1] and b"widget-state" not in runs[0] and b"webp" not in runs[0]
    assert nbformat.read(path, 4).cells[-1].outputs[0].text == "1.0\n"


def shown(tmp_path, *cells):
    """The page of a notebook that ran, of such cells, and the report's first page."""
    path = tmp_path / "nb" / "01_x.ipynb"
    nb = new_notebook(cells=list(cells))
    for place in (path, tmp_path / "out" / "notebooks" / path.name):
        place.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, place)
    pages.build([path], tmp_path / "out", META, partial=True)
    return [(tmp_path / "out" / name).read_text("utf-8") for name in ("01_x.html", "index.html")]


def test_formulas_outside_code_become_mathml(tmp_path, capsys):
    text = "Costs \\$5 and $x_1$, `$y$`:\n$$\\begin{aligned} a &= b \\\\ &= \\tfrac12 \\end{aligned}$$\n```\n$z$\n```"
    page, _ = shown(tmp_path, *cells(f"# Two\n\n{text}", "# Three\n\n" r"$\nonsense{x}$ $F \sim G$ $x_{\mathrm{ref}}$"))
    assert page.count("<math") == 4 and "$y$" in page and "$z$" in page and "mtable" in page
    assert '<span class="unbroken"><math' in page and "$5" in page
    assert r"<code>\nonsense{x}</code>" in page
    assert r"cannot convert the formula '\\nonsense{x}'" in capsys.readouterr().err
    assert "<mo>∼</mo>" in page and "<mtext>ref</mtext>" in page


def test_a_figure_is_named_by_the_heading_that_it_stands_under(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "png")
    picture = {"image/png": base64.b64encode(buffer.getvalue()).decode()}
    made = cells("1", "# One\n\n## Is $a < b$?\n\nProse.", "2", "3", "4")
    data = (picture, picture, {"text/latex": "$x_1$"}, {"text/markdown": "*said* $y$"})
    for cell, one in zip(made[:1] + made[2:], data, strict=True):
        cell.outputs = [new_output("display_data", one)]
    page, _ = shown(tmp_path, *made)
    assert re.findall(r'<img[^>]* alt=("[^"]*")', page) == ['"figure"', '"Is $a &lt; b$?"']
    assert "<msub><mi>x</mi><mn>1</mn></msub>" in page and re.search("<em>said</em> <math[^>]*>.*<mi>y</mi>", page)


@pytest.mark.parametrize(
    ("first", "title", "summary"),
    [("# A *title*\n\n![picture](x.png)\n\nOne line\nand another.\n\n- no", "A <em>title</em>", "One line and another."),
     ("prose", "01 x", "")],
)  # fmt: skip
def test_title_and_summary_come_from_the_first_cell(tmp_path, first, title, summary):
    _, index = shown(tmp_path, new_markdown_cell(first))
    entry = re.search(r'<a href="01_x.html">(.*?)</a>', index)
    assert entry[1] == title and (not summary or summary in index)
