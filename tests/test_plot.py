"""Drawings show what they are given: where the artists lie, on floors, in rooms, from where they are seen."""

import io
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex, to_rgba_array
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Path3DCollection
from mpl_toolkits.mplot3d.proj3d import proj_transform
from PIL import Image

from epiutils import plot
from epiutils.data.people import pose
from epiutils.data.views import BONES

STANDING = pose(9, "walk", 3)  # (17, 3) metres


@pytest.fixture
def ax():
    return plot.figure(subplot_kw={"projection": "3d"})[1]


def lines(ax):
    """The segments of each collection of lines, (L, 2, 3), in the order in which they were drawn."""
    collections = [artist for artist in ax.collections if isinstance(artist, Line3DCollection)]
    return [np.array(collection._segments3d) for collection in collections]


def dots(ax):
    """The points of each scatter, (N, 3)."""
    return [np.stack(a._offsets3d, -1) for a in ax.collections if isinstance(a, Path3DCollection)]


def test_a_stage_holds_all_poses_on_a_floor_of_half_metre_tiles_and_is_equal_on_all_axes(ax):
    poses = np.stack([STANDING, STANDING + (1.1, -0.4, 0)])
    poses[1, 3] = np.nan
    assert plot.stage(ax, poses, azimuth=35, elevation=20, title="two") is ax
    limits = np.array([ax.get_xlim(), ax.get_ylim(), ax.get_zlim()])
    known = poses[np.isfinite(poses).all(-1)]
    assert (known >= limits[:, 0]).all() and (known <= limits[:, 1]).all()
    assert (known[:, :2].min(0) - limits[:2, 0] >= 0.19).all() and limits[2, 0] == 0
    (tiles,) = lines(ax)
    assert not tiles[..., 2].any()
    across, along = np.sort(np.unique(tiles[:, 0, 0])), tiles[:, 0, 0] == tiles[:, 1, 0]
    np.testing.assert_allclose(np.diff(across), 0.5)
    np.testing.assert_allclose([across[0], across[-1]], limits[0])
    assert along.sum() == len(along) / 2 == len(across)
    sides, box = np.ptp(limits, axis=1), np.array(ax._box_aspect)
    np.testing.assert_allclose(box / box[0], sides / sides[0])
    assert (ax.azim, ax.elev, ax.get_title()) == (35, 20, "two")


def test_a_skeleton_has_its_bones_its_joints_and_its_shadow_and_leaves_out_what_is_unknown(ax):
    joints, hidden = STANDING.copy(), np.zeros(17, bool)
    hidden[[4, 16]], joints[10] = True, np.nan
    before = joints.copy()
    assert plot.skeleton(ax, joints, BONES, plot.BLUE, hidden) is ax
    shadow, bones = lines(ax)
    np.testing.assert_array_equal(bones, joints[np.array(BONES)])
    np.testing.assert_array_equal(shadow, joints[np.array(BONES)] * (1, 1, 0))
    styles = [artist for artist in ax.collections if isinstance(artist, Line3DCollection)][1].get_linestyle()
    dashed = [dashes is not None for _, dashes in styles]
    assert dashed == [a in (4, 16) or b in (4, 16) for a, b in BONES]
    full, hollow = dots(ax)
    np.testing.assert_array_equal(hollow, joints[[4, 16]])
    np.testing.assert_array_equal(full, np.delete(joints, (4, 10, 16), 0))
    np.testing.assert_array_equal(joints, before)
    ax.figure.canvas.draw()


def test_what_is_seen_from_the_side_turns_with_the_azimuth(ax):
    """At an azimuth of 0° x comes towards the reader, so y is the picture's width; at 90° it is −x."""
    plot.stage(ax, STANDING)
    for azimuth, axis, sign in ((0, 1, 1), (90, 0, -1), (180, 1, -1)):
        ax.view_init(0, azimuth)
        ax.figure.canvas.draw()
        a, b = np.zeros(3), np.eye(3)[axis] * 0.1
        assert sign * (proj_transform(*b, ax.get_proj())[0] - proj_transform(*a, ax.get_proj())[0]) > 0


def test_a_flat_skeleton_has_hollow_joints_where_they_are_hidden():
    _, ax = plot.figure()
    joints, hidden = STANDING[:, ::2], np.arange(17) == 5
    assert plot.skeleton(ax, joints, BONES, hidden=hidden) is ax
    (bones,), (full, hollow) = ax.collections, ax.lines
    np.testing.assert_array_equal(bones.get_segments(), joints[np.array(BONES)])
    np.testing.assert_array_equal(hollow.get_xydata(), joints[hidden])
    np.testing.assert_array_equal(full.get_xydata(), joints[~hidden])
    assert hollow.get_markerfacecolor() == "none" and full.get_markerfacecolor() == plot.ORANGE
    assert len(plot.skeleton(plot.figure()[1], joints, BONES).lines) == 1  # nothing is hidden


def test_a_line_runs_through_the_picture_from_edge_to_edge_at_its_distance():
    _, ax = plot.figure()
    shape, abc = (48, 64), np.array([[0.6, -0.8, 5.0], [2, 0, -40], [0, -0.1, 1]])  # of any scale
    plot.lines(ax, abc, shape)
    (drawn,) = ax.collections
    for segment, line in zip(drawn.get_segments(), abc, strict=True):
        np.testing.assert_allclose(segment @ line[:2] + line[2], 0, atol=1e-9)
        assert np.linalg.norm(segment[1] - segment[0]) > 2 * np.hypot(*shape)
    assert ax.get_xlim() == (-0.5, 63.5) and ax.get_ylim() == (47.5, -0.5)


def test_every_line_has_a_colour_of_ours():
    _, ax = plot.figure()
    assert tuple(line.get_color() for line in ax.plot(np.eye(8))) == plot.COLOURS


@pytest.mark.parametrize("order", [1, -1])
def test_a_waterfall_reaches_from_value_to_value_and_writes_beside_also_where_figures_share_an_axis(order):
    rows = [("first", 20.0, (18, 22)), ("up", 70.0, (47, 53)), ("down", 65.0, (-6, -4)), ("last", 65.0, (60, 70))]
    high = [(name, value + 30, interval) for name, value, interval in rows]
    fig, axes = plot.figure(2, 1, sharex=True)
    for ax, steps in zip(axes, (rows, high)[::order], strict=True):
        assert plot.waterfall(ax, steps) is ax
    fig.canvas.draw()
    for ax, steps in zip(axes, (rows, high)[::order], strict=True):
        a, b, c, d = (value for _, value, _ in steps)
        ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches]
        np.testing.assert_allclose(ends, [(0, a), (a, b), (b, c), (0, d)])
        assert [text.get_text() for text in ax.texts] == [f"{a:.1f} %", "+50.0", "−5.0", f"{d:.1f} %"]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["first", "up", "down", "last"]
        marks = [line.get_xdata() for line in ax.lines if len(set(line.get_ydata())) == 1]
        np.testing.assert_allclose(marks, [(18, 22), (a + 47, a + 53), (b - 6, b - 4), (60, 70)])
        ends = [drawn.get_window_extent().x1 for drawn in (*ax.patches, *ax.lines)]
        assert max(ends) < min(text.get_window_extent().x0 for text in ax.texts)
        assert max(text.get_window_extent().x1 for text in ax.texts) <= fig.bbox.x1


def scattered(ax):
    """What each series of rows shows: its name, its dots (N, 2), which of them are hollow, and their colours."""
    drawn = [artist for artist in ax.collections if isinstance(artist, PathCollection)]
    hollow = [(artist.get_facecolors() == 1).all(1).tolist() for artist in drawn]
    return [
        (a.get_label(), a.get_offsets().tolist(), h, a.get_edgecolors()) for a, h in zip(drawn, hollow, strict=True)
    ]


def test_changes_whose_intervals_hold_zero_are_hollow():
    _, ax = plot.figure()
    intervals, colours = [(-1.0, 1.0), (1.0, 3.0), (-3, 0), (-3.0, -0.1)], [plot.BLUE, plot.RED, plot.RED, plot.BLUE]
    assert plot.rows(ax, list("abcd"), {"change": (0.1, 2.0, -1, -2)}, intervals, True, colours=[colours]) is ax
    ((name, dots, hollow, edges),) = scattered(ax)
    assert name == "change" and dots == [[0.1, 0], [2, 1], [-1, 2], [-2, 3]] and hollow == [True, False, True, False]
    np.testing.assert_array_equal(edges, to_rgba_array(colours))
    *drawn, zero = ax.lines
    assert [(tuple(line.get_xdata()), *line.get_ydata()) for line in drawn] == [
        (i, k, k) for k, i in enumerate(intervals)
    ]
    assert [to_hex(line.get_color()).upper() for line in drawn] == colours and list(zero.get_xdata()) == [0, 0]
    assert [label.get_text() for label in ax.get_yticklabels()] == list("abcd") and ax.get_ylim() == (3.5, -0.5)
    assert ax.get_legend() is None
    assert not any(scattered(plot.rows(plot.figure()[1], list("abcd"), {"": range(4)}, intervals))[0][2])


def test_a_row_joins_its_dots_and_writes_beside_the_last():
    fig, ax = plot.figure()
    plot.rows(ax, ("all", "some"), {"before": [50.0, 20.0], "now": np.array([40.0, 30.0])}, texts=("40 %", "30 %"))
    assert [(name, dots) for name, dots, *_ in scattered(ax)] == [
        ("before", [[50, 0], [20, 1]]), ("now", [[40, 0], [30, 1]])
    ]  # fmt: skip
    np.testing.assert_array_equal(scattered(ax)[1][3], to_rgba_array([plot.ORANGE] * 2))
    joined = next(artist for artist in ax.collections if isinstance(artist, LineCollection))
    assert [segment[:, 0].tolist() for segment in joined.get_segments()] == [[40, 50], [20, 30]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["before", "now"] and not ax.lines
    fig.canvas.draw()
    assert [(text.get_text(), text.xy) for text in ax.texts] == [("40 %", (40, 0)), ("30 %", (30, 1))]


def test_a_matrix_writes_into_its_cells_and_is_white_where_nothing_is_known():
    _, (left, right) = plot.figure(1, 2)
    assert plot.matrix(left, torch.tensor([[0.25, -1.0, 0.0]]), "weight") is left
    assert [text.get_text() for text in left.texts] == ["0.25", "-1", "0"] and left.get_title() == "weight"
    assert [text.get_color() for text in left.texts] == ["black", "white", "black"]
    assert left.images[0].get_clim() == (-1, 1) and len(left.get_xticks()) == len(left.get_yticks()) == 0
    plot.matrix(right, [[0.5, np.nan], [0.1, 2.0]], "", [["a", "–"], ["b", "c"]], ("up", "down"), ("l", "r"), 2)
    assert [(text.get_position(), text.get_text()) for text in right.texts] == [
        ((0, 0), "a"), ((1, 0), "–"), ((0, 1), "b"), ((1, 1), "c")
    ]  # fmt: skip
    assert [label.get_text() for label in right.get_yticklabels()] == ["up", "down"]
    assert [label.get_text() for label in right.get_xticklabels()] == ["l", "r"] and right.images[0].get_clim() == (
        -2,
        2,
    )
    assert plot.matrix(plot.figure()[1], np.zeros((2, 3))).images[0].get_clim()[1] > 0


def test_pictures_heatmaps_points_and_curves_lie_where_they_belong():
    fig, axes = plot.figure(2, 4)
    assert plot.picture(axes[0, 0], np.zeros((4, 6, 3)), "one") is axes[0, 0]
    assert axes[0, 0].get_xlim() == (-0.5, 5.5) and axes[0, 0].get_ylim() == (3.5, -0.5)
    plot.points(axes[0, 0], [[1, 2], [np.nan, 0]], plot.RED, label="joint")
    assert axes[0, 0].collections[0].get_offsets()[0].tolist() == [1, 2]
    before = len(fig.axes)
    assert plot.heatmap(axes[0, 1], torch.eye(3)).get_xlabel() == "x (px)" and len(fig.axes) == before + 1
    assert (
        plot.heatmap(axes[0, 2], np.eye(3), ticks=False, bar=False).get_xlabel() == "" and len(fig.axes) == before + 1
    )
    plot.fused_row(axes[1], *(np.eye(3) * k for k in (1, 2, 0.5, -3)))
    titles = ["source: 0 to 1", "ridge: 0 to 2", "reference: 0 to 0.5", "fused: -3 to 0"]
    assert [ax.get_title() for ax in axes[1]] == titles
    ax = plot.curves(axes[0, 3], (1, 10), {"a": (1, 2), "b": (3, 4)}, "x (px)", "y (px)", log="x")
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "linear", "x (px)", "y (px)")
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[1, 1], [10, 2]], [[1, 3], [10, 4]]]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]
    with Image.open(io.BytesIO(fig._repr_png_())) as shown:
        assert shown.size == tuple(round(110 * side) for side in fig.get_size_inches())
    quick, ax = plot.figure(size=(2, 1), quick=True)
    assert ax.get_position().x0 == 0.01 and quick.get_size_inches().tolist() == [2, 1]


# Tables


def test_a_table_is_the_same_in_text_and_html_with_numbers_to_the_right():
    rows = [("cam1 <a>", 1.96, 12, True), ("b", np.float32(-0.001), np.int64(3), np.True_), ("c", np.nan, None, False)]
    made = plot.table(("pair", "off by (px)", "n", "near"), rows, digits=1)
    assert repr(made).splitlines() == [
        "pair      off by (px)   n  near",
        "cam1 <a>          2.0  12  yes",
        "b                 0.0   3  yes",
        "c                   –   –  no",
    ]
    root = ElementTree.fromstring(made._repr_html_())
    assert [[cell.text for cell in row] for row in root] == made.rows
    assert [cell.get("style").split()[1] for cell in root[2]] == ["left", "right", "right", "left"]
    assert {cell.tag for cell in root[0]} == {"th"} and {cell.tag for row in root[1:] for cell in row} == {"td"}


def test_digits_are_one_for_all_columns_or_one_a_column_and_texts_stay():
    row = (0.12344, torch.tensor(2.5), "+1.0 [0.8, 1.3]", -np.inf)
    assert plot.table("abcd", [row]).rows[1] == ["0.12", "2.50", "+1.0 [0.8, 1.3]", "-inf"]
    assert plot.table("abcd", [row], (4, 0, 0, 0)).rows[1][:2] == ["0.1234", "2"]
    assert plot.table("ab", [((-0.04, 2.56), (None, 3))], 1).rows[1] == ["[0.0, 2.6]", "[–, 3]"]
    assert plot.table("ab", []).rows == [["a", "b"]] and repr(plot.table("ab", [])) == "a  b"
    for digits, wrong in ((2, (1, 2)), ((1, 2), row)):
        with pytest.raises(ValueError, match="4 columns, but . digits and . values"):
            plot.table("abcd", [wrong], digits)
