"""Drawings show what they are given: where the artists lie, on floors, in rooms, from where they are seen."""

from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from mpl_toolkits.mplot3d.art3d import Line3DCollection, Path3DCollection
from mpl_toolkits.mplot3d.proj3d import proj_transform

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
    assert plot.skeleton3d(ax, joints, BONES, plot.BLUE, hidden, label="pose") is ax
    shadow, bones = lines(ax)
    np.testing.assert_array_equal(bones, joints[np.array(BONES)])
    np.testing.assert_array_equal(shadow, joints[np.array(BONES)] * (1, 1, 0))
    styles = [artist for artist in ax.collections if isinstance(artist, Line3DCollection)][1].get_linestyle()
    dashed = [dashes is not None for _, dashes in styles]
    assert dashed == [a in (4, 16) or b in (4, 16) for a, b in BONES]
    full, hollow = dots(ax)
    np.testing.assert_array_equal(hollow, joints[[4, 16]])
    np.testing.assert_array_equal(full, np.delete(joints, (4, 10, 16), 0))
    assert ax.get_legend_handles_labels()[1] == ["pose"]
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
def test_a_waterfall_writes_beside_its_bars_also_where_figures_share_an_axis(order):
    rows = [("first", 20.0, (18, 22)), ("up", 70.0, (47, 53)), ("down", 65.0, (-6, -4)), ("last", 65.0, (60, 70))]
    high = [(name, value + 30, interval) for name, value, interval in rows]
    fig, axes = plot.figure(2, 1, sharex=True)
    for ax, steps in zip(axes, (rows, high)[::order], strict=True):
        assert plot.waterfall(ax, steps) is ax
    fig.canvas.draw()
    for ax, steps in zip(axes, (rows, high)[::order], strict=True):
        first, last = (f"{steps[k][1]:.1f} %" for k in (0, 3))
        assert [text.get_text() for text in ax.texts] == [first, "+50.0", "−5.0", last]
        assert [bar.get_x() + bar.get_width() for bar in ax.patches] == [value for _, value, _ in steps]
        ends = [drawn.get_window_extent().x1 for drawn in (*ax.patches, *ax.lines)]
        assert max(ends) < min(text.get_window_extent().x0 for text in ax.texts)
        assert max(text.get_window_extent().x1 for text in ax.texts) <= fig.bbox.x1


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
