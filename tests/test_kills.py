"""Training and report, killed at random moments and taken up again, end as if nobody had killed them.

It takes minutes: EPIUTILS_KILLS=50 python -m pytest -s tests/test_kills.py; without it, what is killed is skipped.
Seen at the last change of the report: 20 kills, 12 of them SIGKILL, in 59 runs, and the same bytes in the end.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

KILLS = int(os.environ.get("EPIUTILS_KILLS", 0))
TINY = Path(__file__).with_name("tiny_training.py")
CELL = """from matplotlib.figure import Figure
from epiutils.report.record import record, record_figure
record("{0}.value", {0!r})
figure = record_figure("{1}_line", Figure(), "A line.")"""

pytestmark = pytest.mark.skipif(not KILLS, reason="takes minutes: EPIUTILS_KILLS=50")


def killed(arguments, kills, seconds, seed):
    """Start a command that says a line when its work begins, again and again until it ends by itself; returns the kills.

    Each time it is killed after a random part of the seconds that it took unbroken, as long as there are kills left.
    """
    draw, happened = random.Random(seed), []
    while True:
        with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            begun = process.stdout.readline()
            if len(happened) < kills:
                number, wait = draw.choice([signal.SIGKILL, signal.SIGTERM]), draw.uniform(0, 1)
                try:
                    process.wait(wait * seconds)
                except subprocess.TimeoutExpired:
                    process.send_signal(number)
                    happened.append(number)
            _, error = process.communicate()
        if process.returncode == 0:
            return happened
        assert begun and happened and process.returncode in (-happened[-1], 130, 1, 143), error.decode()


def unbroken(arguments):
    """Run the command once; returns the seconds from its first line to its end."""
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        begin = time.monotonic()
        process.communicate()
    assert process.returncode == 0
    return time.monotonic() - begin


def files(folder, pattern):
    """The bytes of all files below that are not executed notebooks; in text without how long something took."""
    found = {
        str(f.relative_to(folder)): f for f in sorted(folder.rglob(pattern)) if f.is_file() and f.suffix != ".ipynb"
    }
    text = (".html", ".json", ".md")
    took = re.compile(rb"\d+(\.\d+)? s\b")
    return {n: took.sub(b"", f.read_bytes()) if f.suffix in text else f.read_bytes() for n, f in found.items()}


def campaign(command, out, kills, pattern="*"):
    """As many kills as are asked for, over as many runs as they take, each of which ends in what an unbroken one has."""
    done, runs, seconds = [], 0, unbroken(command(out / "whole"))
    wanted = files(out / "whole", pattern)
    while len(done) < kills:
        done += killed(command(out / str(runs)), min(5, kills - len(done)), seconds, seed=runs)
        left = files(out / str(runs), pattern)
        assert left.keys() == wanted.keys()
        assert [name for name in left if left[name] != wanted[name]] == []
        assert not list((out / str(runs)).rglob(".*"))  # nothing half-written is left
        runs += 1
    print(f"{len(done)} kills, {done.count(signal.SIGKILL)} of them SIGKILL, in {runs} runs: the same bytes")


def test_training(tmp_path):
    campaign(lambda out: [TINY, "long", out], tmp_path, KILLS, "weights.safetensors")


def test_report(tmp_path):
    for number in ("01", "02", "03"):
        cells = [new_markdown_cell(f"# {number} · A title\n\nIt adds."), new_code_cell("profile = 'quick'")]
        cells += [new_code_cell(CELL.format("abc"[int(number) - 1], number)), new_code_cell("figure")]
        cells[1].metadata["tags"] = ["parameters"]
        for k, cell in enumerate(cells):
            cell.id = f"cell-{k}"
        nb = new_notebook(cells=cells)
        nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        (tmp_path / "nb").mkdir(exist_ok=True)
        nbformat.write(nb, tmp_path / "nb" / f"{number}_name.ipynb")
    command = lambda out: ["-m", "epiutils.report", "--notebooks", tmp_path / "nb", "--out", out, "--resume"]
    campaign(command, tmp_path, max(1, 2 * KILLS // 5))
