"""How a notebook hands a number or a figure to the report; outside a report both only check."""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from epiutils.data.files import replacing

_LARGE = 150_000  # bytes of a figure

_NAME = re.compile(r"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*")


def record(name: str, value, text: str | Mapping = "") -> None:
    """Hand a number to the report: `record("redirect.speedup_loop", 12345.6, "times faster than the loop")`.

    name: words joined by dots, the path in metrics.json.  value: a finite number, a bool or a string, numpy
    and torch scalars too; or a tuple of numbers, such as an interval.  text: what the number is; with one, it is
    listed among the key numbers.
    Or a mapping of such, or of mappings again: `record("training.hrnet", {"accuracy": 0.46})`.  Every entry is recorded
    as `name.key`, a space in a key becomes _, and what is None, nan or infinite, or holds such, is left out.  text: for
    chosen keys what the number is.
    Returns nothing, so that it may end a cell; outside a report it only checks.  Raises ValueError for a name
    or value that cannot be recorded, a name that is a group of others, or a text of a key that a mapping lacks.
    """
    if isinstance(value, Mapping):
        text = text or {}
        if unknown := set(text) - set(value):
            raise ValueError(f"record: text for {sorted(unknown)}, but {name} has {list(value)}")
        for key, each in value.items():
            if isinstance(each, Mapping) or not any(map(_unknown, each if isinstance(each, tuple | list) else [each])):
                record(f"{name}.{key}".replace(" ", "_"), each, text.get(key, ""))
        return
    if not _NAME.fullmatch(name):
        raise ValueError(f'record: a name is words joined by dots, like "redirect.speedup", got {name!r}')
    plain = [_plain(name, v) for v in value] if isinstance(value, tuple | list) else _plain(name, value)
    _hand_over("numbers", name, {"value": plain, "text": text})


def _unknown(value) -> bool:
    value = value.item() if hasattr(value, "item") else value
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _plain(name: str, value) -> float | int | bool | str:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    if not isinstance(value, bool | int | str):
        raise ValueError(f"record: {name} must be finite numbers, a bool or a string, got {value!r}")
    return value


def record_figure(name: str, figure, caption: str = ""):
    """Hand a figure to the report, saved as figures/<name>.png, the same bytes in every run.

    Saved as .svg too, unless its pictures make that large; a large .png gets 256 colours, for it is committed.
    name: a file name without its ending.  figure: a matplotlib Figure.  caption: one sentence for the reader.
    Returns the figure, so that it is shown where this ends a cell; outside a report it only checks.
    Raises ValueError for a name with other characters.
    """
    if not _NAME.fullmatch(name) or "." in name:
        raise ValueError(f'record_figure: a name is letters, digits, _ and -, like "03_fused", got {name!r}')
    folder = _hand_over("figures", name, caption)
    if not folder:
        return figure
    from matplotlib import rc_context
    from PIL import Image

    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        path, buffer = folder / "figures" / f"{name}.{kind}", io.BytesIO()
        with rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
            figure.savefig(buffer, format=kind, dpi=120, bbox_inches="tight", metadata=metadata)
        large = buffer.tell() > _LARGE
        if large and kind == "svg":
            path.unlink(missing_ok=True)
            continue
        with replacing(path) as part:
            if large:
                Image.open(buffer).convert("RGB").quantize(256).save(part, "png", optimize=True)
            else:
                part.write_bytes(buffer.getvalue())
    return figure


def _hand_over(kind: str, name: str, value) -> Path | None:
    """Keep something for the report that runs this notebook, if one does; returns the report's folder."""
    if "EPIUTILS_REPORT_DIR" not in os.environ:
        return None
    folder = Path(os.environ["EPIUTILS_REPORT_DIR"])
    path = folder / "records" / f"{os.environ.get('EPIUTILS_REPORT_SOURCE', 'script')}.json"
    records = json.loads(path.read_text("utf-8")) if path.exists() else {"numbers": {}, "figures": {}}
    for other in records[kind] if kind == "numbers" else ():
        if other.startswith(name + ".") or name.startswith(other + "."):
            raise ValueError(f"record: {name} and {other} cannot both hold a value: one is a group of the other")
    records[kind][name] = value
    with replacing(path) as part:
        part.write_text(json.dumps(records, indent=1, ensure_ascii=False), "utf-8")
    return folder
