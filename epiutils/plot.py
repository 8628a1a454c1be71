"""Drawing: functions that take data and an Axes, draw, and return the Axes; and `table`, for numbers.

Nothing here computes, shows or keeps state; `figure` makes figures without pyplot, for notebooks and explorers.
Colours are Okabe and Ito's, distinct for colour-blind readers too.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Line3DCollection
from mpl_toolkits.mplot3d.axes3d import Axes3D

ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE, GREY = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#777777",
)  # fmt: skip
COLOURS = (ORANGE, SKY, GREEN, BLUE, RED, PURPLE, YELLOW, GREY)
HEAT = "magma"

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.prop_cycle": cycler(color=COLOURS),
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
}


class _Figure(Figure):
    """A Figure that a notebook shows when it is a cell's last value, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        return buffer.getvalue()


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] | None = None, quick: bool = False, **subplots):
    """A figure and its Axes, an array where there are several: `fig, (left, right) = figure(1, 2)`.

    size: (width, height) in inches; by default a picture of about 3 inches a column.  quick: fixed margins, for
    pictures with a title and no ticks; fitting the margins takes half of the time that an explorer has.
    """
    with rc_context(STYLE):
        fig = _Figure(figsize=size or (3.1 * columns, 3.2 * rows), layout=None if quick else "constrained")
        FigureCanvasAgg(fig)
        if quick:
            fig.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.88, wspace=0.04)
        return fig, fig.subplots(rows, columns, **subplots)


def picture(ax: Axes, image: np.ndarray, title: str = "") -> Axes:
    """A picture, its pixel centres at whole numbers, without ticks."""
    ax.imshow(image)
    ax.set(title=title, xticks=[], yticks=[], xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    ax.spines[:].set_visible(False)
    return ax


def heatmap(ax: Axes, values, title: str = "", bar: bool = True, ticks: bool = True) -> Axes:
    """A heatmap (H, W) from its lowest to its highest value, with a colour bar and axes in heatmap pixels."""
    shown = ax.imshow(np.asarray(values), cmap=HEAT, interpolation="nearest")
    if bar:
        ax.figure.colorbar(shown, ax=ax, shrink=0.75, pad=0.02).outline.set_visible(False)
    ax.set(title=title, xlabel="x (px)", ylabel="y (px)")
    if not ticks:
        ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
    return ax


def matrix(ax: Axes, values, title: str = "", texts=None, rows=(), columns=(), limit: float | None = None) -> Axes:
    """A small matrix (R, C) such as a 3×3 weight, blue below and orange above zero, a text in each cell.

    texts: (R, C), by default the numbers.  rows, columns: names beside it.  limit: the value of full colour, by
    default the largest.  nan is white.
    """
    values = np.asarray(values)
    limit = limit or max(np.nanmax(np.abs(values)), 1e-12)
    ax.imshow(values, cmap="PuOr_r", vmin=-limit, vmax=limit)
    for (y, x), value in np.ndenumerate(values):
        ink = "white" if abs(value) > 0.6 * limit else "black"
        text = f"{value:.2g}" if texts is None else texts[y][x]
        ax.text(x, y, text, ha="center", va="center", color=ink, fontsize=8.5)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_title(title)
    ax.tick_params(length=0, labelcolor="black")
    ax.spines[:].set_visible(False)
    return ax


def points(ax: Axes, xy, colour=ORANGE, marker: str = "o", size: float = 28, label: str | None = None) -> Axes:
    """Points (N, 2), outlined so that they are seen on any picture; nan is left out."""
    xy = np.asarray(xy).reshape(-1, 2)
    ring = {"edgecolors": "white", "linewidths": 0.7} if marker in "os" else {"linewidths": 1.6}
    ax.scatter(xy[:, 0], xy[:, 1], s=size, c=colour, marker=marker, label=label, zorder=3, **ring)
    return ax


def skeleton(
    ax: Axes, joints, bones: Sequence[tuple[int, int]], colour=ORANGE, hidden=None, width: float = 1.5
) -> Axes:
    """Bones between joints (J, 2), and the joints; those that `hidden` (J,) marks are hollow.  width: of a bone.

    On 3D Axes joints are (J, 3) in metres, z up, with their shadow on the floor, the bones of hidden ones dashed, and
    nan is left out.
    """
    joints = np.asarray(joints, dtype=float)
    hidden = np.zeros(len(joints), bool) if hidden is None else np.asarray(hidden, dtype=bool)
    pairs = joints[np.array(bones)]  # (B, 2, 2) or (B, 2, 3)
    if isinstance(ax, Axes3D):
        known, dashes = np.isfinite(joints).all(-1), np.where(hidden[np.array(bones)].any(-1), "--", "-")
        ax.add_collection3d(Line3DCollection(pairs * (1, 1, 0), colors="#000000", linewidths=3, alpha=0.07))
        ax.add_collection3d(Line3DCollection(pairs, colors=colour, linewidths=width, linestyles=dashes, alpha=0.9))
        rim = {"linewidths": 0.8, "depthshade": False}
        for shown, face, edge in ((known & ~hidden, colour, "white"), (known & hidden, "white", colour)):
            if shown.any():
                ax.scatter(*joints[shown].T, s=4.5 * width**2, c=face, edgecolors=edge, **rim)
        return ax
    ax.add_collection(LineCollection(pairs, colors=colour, linewidths=width, alpha=0.85))
    full, hollow = (14, colour, "white", width / 3), (18, "none", colour, 0.8 * width)
    for shown, (area, face, edge, rim) in ((~hidden, full), (hidden, hollow)):
        if shown.any():  # one line of markers takes a fifth of a scatter's time
            ax.plot(*joints[shown].T, "o", ms=area**0.5 * width / 1.5, mfc=face, mec=edge, mew=rim, zorder=3)
    return ax


def lines(ax: Axes, abc, shape: tuple[int, int], colour=SKY, style: str = "-", width: float = 1.3, label=None) -> Axes:
    """Lines (N, 3), a·x + b·y + c = 0, across a picture of shape (H, W); `colour` is one or N of them."""
    abc = np.asarray(abc, dtype=float).reshape(-1, 3)
    middle = np.array([(shape[1] - 1) / 2, (shape[0] - 1) / 2])
    normal = abc[:, :2] / np.linalg.norm(abc[:, :2], axis=1, keepdims=True)
    offset = (abc[:, :2] @ middle + abc[:, 2]) / np.linalg.norm(abc[:, :2], axis=1)
    foot = middle - offset[:, None] * normal
    along = np.stack([-normal[:, 1], normal[:, 0]], -1) * 2 * max(shape)
    ends = np.stack([foot - along, foot + along], 1)  # (N, 2, 2)
    ax.add_collection(LineCollection(ends, colors=colour, linestyles=style, linewidths=width, label=label))
    ax.set(xlim=(-0.5, shape[1] - 0.5), ylim=(shape[0] - 0.5, -0.5))
    return ax


def fused_row(axes: Sequence[Axes], source, ridge, reference, fused) -> Sequence[Axes]:
    """The original's figure: source | ridge | reference | fused, each heatmap on its own scale, its range above it."""
    titles = ("source", "ridge", "reference", "fused")
    for ax, title, values in zip(axes, titles, (source, ridge, reference, fused), strict=True):
        low, high = (round(float(end), 2) + 0.0 for end in (values.min(), values.max()))
        heatmap(ax, values, f"{title}: {low:g} to {high:g}", bar=False, ticks=False)
    return axes


def stage(ax: Axes3D, poses, azimuth: float = -60.0, elevation: float = 12.0, title: str = "") -> Axes3D:
    """The room for skeletons: a floor of half-metre tiles at z = 0 around all of `poses` (..., 3), equal on all axes.

    azimuth, elevation: where it is seen from, in degrees.  The Axes come from `figure(subplot_kw={"projection": "3d"})`.
    """
    poses = np.asarray(poses, dtype=float).reshape(-1, 3)
    low, high = np.nanmin(poses, axis=0), np.nanmax(poses, axis=0)
    middle, half = (low + high)[:2] / 2, np.ceil(2 * (high - low)[:2].max() + 0.8) / 4  # 0.2 m around, whole tiles
    across = np.array([[(u, -half), (u, half)] for u in np.arange(-half, half + 0.01, 0.5)])  # (T, 2, 2)
    tiles = np.concatenate([across, across[..., ::-1]]) + middle
    ax.add_collection3d(Line3DCollection(np.pad(tiles, ((0, 0), (0, 0), (0, 1))), colors="#d0d0d0", linewidths=0.8))
    top = max(high[2], 0.5)
    ax.set(xlim=middle[0] + (-half, half), ylim=middle[1] + (-half, half), zlim=(0, top), title=title)
    ax.set_box_aspect((2 * half, 2 * half, top), zoom=1.15)
    ax.view_init(elevation, azimuth)
    ax.set_axis_off()
    return ax


def curves(ax: Axes, x, series: dict, xlabel: str, ylabel: str, log: str = "", marker: str = "o") -> Axes:
    """One labelled curve for each name of `series`; log: the axes ("x", "y", "xy") that are logarithmic."""
    for name, y in series.items():
        ax.plot(x, y, marker=marker, markersize=4.5, label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel, **{f"{axis}scale": "log" for axis in log})
    ax.grid(color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_xticks(x, [f"{value:g}" for value in x])
    ax.minorticks_off()
    ax.legend(fontsize=9, frameon=False)
    return ax


def waterfall(ax: Axes, steps: Sequence[tuple], unit: str = "%") -> Axes:
    """How a value changes step by step, as horizontal bars from the top down, each change with its interval.

    steps: (label, value, (low, high)), the value after each step.  The first and the last are bars from zero, with the
    interval of the value; those between reach from the value before to theirs, with the interval of the change.
    """
    labels, values, intervals = zip(*steps, strict=True)
    last = len(steps) - 1
    for y, (value, (low, high)) in enumerate(zip(values, intervals, strict=True)):
        whole = y in (0, last)
        before = 0.0 if whole else values[y - 1]
        change = value - before
        colour = GREY if whole else GREEN if change >= 0 else RED
        ax.barh(y, change, left=before, height=0.62, color=colour, alpha=1 if whole else 0.9, zorder=2)
        ax.plot((before + low, before + high), (y, y), color="#111111", lw=1.2, zorder=3)
        if y < last:
            ax.plot((value, value), (y - 0.31, y + 1.31), color="#999999", lw=0.7, zorder=1)
        text = f"{value:.1f} {unit}" if whole else f"{round(change, 1) + 0.0:+.1f}".replace("-", "−")
        beside = {"xycoords": ax.get_yaxis_transform(), "textcoords": "offset points", "fontsize": 9.5}
        ax.annotate(text, (1, y), (44, 0), ha="right", va="center", annotation_clip=False, **beside)
    return _named_rows(ax, labels)


def rows(ax: Axes, names: Sequence[str], series: dict, intervals=(), changes=False, texts=(), colours=()) -> Axes:
    """One row a name from the top down, in it a dot for each of `series`, joined by a thin line.

    series: values (N,) by name; several stand in a legend.  intervals: (low, high) of the first one's values.
    changes: there is a line of no change, and dots whose intervals hold it are hollow.  texts: beside the last one's
    dots.  colours: for each of `series` one, or N of them.
    """
    places, table = np.arange(len(names)), np.array([list(values) for values in series.values()], dtype=float)  # (S, N)
    paints = [np.broadcast_to(to_rgba_array(c), (len(names), 4)) for c in colours or (GREY, *COLOURS)]
    ax.hlines(places, table.min(0), table.max(0), color="#cccccc", lw=1.2, zorder=1)
    hollow = np.array([changes and low <= 0 <= high for low, high in intervals] or [False] * len(names))
    for y, (interval, paint) in enumerate(zip(intervals, paints[0], strict=False)):
        ax.plot(interval, (y, y), color=paint, lw=1.4, zorder=2)
    for name, values, edges in zip(series, table, paints, strict=False):
        faces = np.where(hollow[:, None], to_rgba_array("white"), edges)
        ax.scatter(values, places, s=34, c=faces, edgecolors=edges, linewidths=1.4, label=name, zorder=3)
    if changes:
        ax.axvline(0, color="#888888", lw=0.8, zorder=1)
    for *place, text in zip(table[-1], places, texts, strict=False):
        ax.annotate(text, place, (7, 0), textcoords="offset points", va="center", fontsize=9)
    ax.grid(axis="x", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    if len(series) > 1:
        beside = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": len(series)}
        ax.legend(fontsize=9, frameon=False, handletextpad=0.1, **beside)
    return _named_rows(ax, names)


def _named_rows(ax: Axes, names: Sequence[str]) -> Axes:
    """Names on the left, from the top down, without ticks."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0, labelcolor="black")
    ax.spines["left"].set_visible(False)
    return ax


class _Table:
    """Rows of texts, the header first, that a notebook shows as a table; `print` shows them aligned."""

    def __init__(self, rows: list[list[str]]):
        number, columns = re.compile(r"[+−-]?\d|[+−-]?inf|–$|$"), list(zip(*rows, strict=True))
        self.rows = rows
        self.widths = [max(map(len, column)) for column in columns]
        self.sides = ["right" if all(map(number.match, column[1:])) else "left" for column in columns]

    def __repr__(self) -> str:
        lines = []
        for row in self.rows:
            cells = zip(row, self.widths, self.sides, strict=True)
            lines.append("  ".join(cell.rjust(w) if side == "right" else cell.ljust(w) for cell, w, side in cells))
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        lines = []
        for kind, row in zip(["th"] + ["td"] * len(self.rows), self.rows, strict=False):
            cells = zip(row, self.sides, strict=True)
            cells = (f'<{kind} style="text-align: {side}">{html.escape(cell)}</{kind}>' for cell, side in cells)
            lines.append(f"<tr>{''.join(cells)}</tr>")
        return "\n".join(["<table>", *lines, "</table>"])


def table(header: Sequence[str], rows: Iterable[Sequence], digits: int | Sequence[int] = 2) -> _Table:
    """A table that a notebook shows where it ends a cell: `table(("pair", "px"), [("cam1 – cam2", 1.94)], digits=1)`.

    rows: a value for each name of the header: texts as they are, whole numbers whole, other numbers with `digits`
    decimals (one for all columns or one a column), yes or no for a bool, an interval for two numbers; None and nan are
    –.  Columns of numbers stand to the right.  The text and the HTML of the same values are the same in every run, so
    nbval compares them.
    Raises ValueError for a row, or digits, of another length than the header.
    """
    digits, texts = [digits] * len(header) if isinstance(digits, int) else digits, [list(map(str, header))]
    for row in rows:
        if not len(row) == len(header) == len(digits):
            raise ValueError(f"table: {len(header)} columns, but {len(digits)} digits and {len(row)} values: {row}")
        texts.append([_cell(value, places) for value, places in zip(row, digits, strict=True)])
    return _Table(texts)


def _cell(value, digits: int) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_cell(end, digits) for end in value)}]"
    value = value.item() if hasattr(value, "item") else value  # numpy's and torch's scalars
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value):
        return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero
    return "–" if value is None or value != value else str(value)  # nan differs from itself
