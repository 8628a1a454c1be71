"""What the benchmarks say of stored rates is what docs/training.md quotes, and what the rates give."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "data" / "results" / "throughput.json"


def test_the_documentation_quotes_the_sizing_that_the_stored_rates_give():
    command = [sys.executable, ROOT / "benchmarks" / "throughput.py", "--stored", STORED]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    table = [line for line in said.splitlines() if line.startswith("|")]
    assert len(table) == 5 and "\n".join(table) in (ROOT / "docs" / "training.md").read_text("utf-8")
    W32 = json.loads(STORED.read_text("utf-8"))["networks"]["W32"].values()
    rate = max(row["training"]["images_per_second"] for row in W32)
    hours = float(table[3].split("|")[-2].replace(",", ""))
    assert abs(hours - 20 * 312_000 / rate / 3600) <= 0.5
