"""Every rival's learning rate and length of training, searched alike on a person whom nothing was trained or tested on.

    python -m epiutils.studies.search       # an hour or two on two cores, most of it for attention and dense matrices

At the operating point of the original experiment, whose backbone knows subject 1 alone.  Modules train on heatmaps of
subject 1 as in `studies.runs`, seed 0, and are scored on 105 instants of subject 8: all rates for 100 steps, then the
best of them for 400 (but for attention, which is many times slower).  Each training is kept in runs/search as soon as
it is done, so the command can be stopped and taken up again; the table is data/results/search.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from epiutils.data.files import replacing
from epiutils.metrics import joint_mean
from epiutils.networks.predict import device_name
from epiutils.studies.fitting import train_together
from epiutils.studies.predicted import found_by, heatmaps_once
from epiutils.studies.runs import RESULTS, ROOT, TOGETHER, TRAINING, measured

STORED = RESULTS / "search.json"
POINT, SHORT, LONG = "original", 100, 400  # steps
METHODS = ("repaired_frozen", "line_sum", "line_mean", "line_max", "weighted_max", "dense", "attention")
TRIED = {"dense": (1e-5, 1e-4, 1e-3), "attention": (1e-3, 1e-2, 5e-2)}  # those of few parameters bear higher ones:
_TRIED = (1e-2, 5e-2, 2e-1)


def _search(method: str, folder: Path) -> list[dict]:
    """What each rate gave: method, lr, steps, seconds and the accuracy on subject 8; the longer training last."""
    lesson = heatmaps_once(POINT, "train", TRAINING, progress=False)
    judge = heatmaps_once(POINT, "validation", slice(None, None, 4), progress=False)

    def tried(lr: float, steps: int) -> dict:
        path = folder / f"{method}-{lr:g}-{steps}.json"
        if not path.exists():
            start = time.perf_counter()
            module = train_together(TOGETHER[method], lesson, 0, steps, lr)[0]
            seconds = time.perf_counter() - start
            row = {"method": method, "lr": lr, "steps": steps, "seconds": seconds}
            row |= {"accuracy": joint_mean(found_by(module, judge))}
            print("{method:16s} lr {lr:<7g} {steps} steps: {0:.2f} %".format(100 * row["accuracy"], **row), flush=True)
            with replacing(path) as part:
                part.write_text(json.dumps(row), "utf-8")
        return json.loads(path.read_text("utf-8"))

    short = [tried(lr, SHORT) for lr in TRIED.get(method, _TRIED)]
    if method == "attention":  # 400 of its steps are an hour
        return short
    return [*short, tried(max(short, key=lambda row: row["accuracy"])["lr"], LONG)]


def _main(arguments: list[str] | None = None) -> int:
    """Try what is missing, and store what there is."""
    parser = argparse.ArgumentParser(prog="python -m epiutils.studies.search", description=_main.__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "search", help="where single trainings are kept")
    chosen = parser.parse_args(arguments)
    rows: dict[str, list] = {}
    for row in measured("search")["rows"] if STORED.exists() else []:
        rows.setdefault(row["method"], []).append(row)
    for method in chosen.methods:
        rows[method] = _search(method, chosen.out)
        about = {"command": "python -m epiutils.studies.search", "device": device_name(), "point": POINT}
        with replacing(STORED) as part:
            part.write_text(json.dumps(about | {"rows": sum(rows.values(), [])}, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
