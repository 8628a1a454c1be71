import base64
import io
import json

import ipywidgets as w
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from epiutils.explore import MAX_FRAMES, explore


def draw(threshold=2, view="left", grid=False, gain=0.5):
    if threshold == 5:
        raise ValueError("no lines <here>")
    figure = Figure(figsize=(3, 2))
    figure.add_axes((0, 0, 1, 1), ylim=(0, 6)).plot([0, threshold])
    return figure, f"threshold {threshold}, {view}, {grid}, {gain:g}"


def png(panel):
    """The picture for readers without a kernel, of the width asked."""
    return base64.b64decode(panel._repr_mimebundle_()[0]["image/png"])


def test_shortcuts_make_controls_that_start_at_the_defaults_of_draw():
    panel = explore(draw, threshold=(1, 6), view=["left", "right"], grid=True, gain=(0.0, 1.0, 0.1))
    kinds = {name: type(control) for name, control in panel.controls.items()}
    assert kinds == {"threshold": w.IntSlider, "view": w.Dropdown, "grid": w.Checkbox, "gain": w.FloatSlider}
    assert panel.values == {"threshold": 2, "view": "left", "grid": True, "gain": 0.5}
    assert panel.caption == "threshold 2, left, True, 0.5"
    assert explore(draw, threshold=w.IntSlider(4, 1, 6)).values == {"threshold": 4}
    assert explore(draw, view={"the left one": "left"}).caption == "threshold 2, left, False, 0.5"


def test_moving_a_control_redraws_picture_and_caption():
    panel = explore(draw, threshold=(1, 6), width=300)
    before = panel.view.children[1].value
    panel.controls["threshold"].value = 3
    assert panel.caption == "threshold 3, left, False, 0.5"
    assert panel.view.children[1].value != before
    assert Image.open(io.BytesIO(panel.view.children[1].value)).width == round(300 * panel.scale)


@pytest.mark.parametrize("width", [300, 233])
def test_a_picture_is_matplotlibs_own_to_the_last_pixel(width):
    expected, figure = io.BytesIO(), draw(4)[0]
    panel = explore(draw, threshold=w.IntSlider(4, 1, 6), width=width)
    figure.savefig(expected, format="png", dpi=width / 3)
    with Image.open(expected) as image, Image.open(io.BytesIO(png(panel))) as ours:
        assert ours.mode == "RGB" and np.array_equal(image.convert("RGB"), ours)


def test_an_exception_becomes_the_caption_and_the_explorer_lives_on():
    panel = explore(draw, threshold=(1, 6))
    panel.controls["threshold"].value = 5
    assert panel.caption == "ValueError: no lines <here>" and isinstance(panel.error, ValueError)
    assert "&lt;here&gt;" in panel.view.children[2].value
    panel.controls["threshold"].value = 4
    assert panel.caption.startswith("threshold 4") and panel.error is None


def test_the_first_picture_raises_and_nonsense_is_named():
    with pytest.raises(ValueError, match="no lines"):
        explore(draw, threshold=w.IntSlider(5, 1, 6))
    with pytest.raises(ValueError, match="ahead must name one of the controls"):
        explore(draw, threshold=(1, 6), ahead="treshold")
    with pytest.raises(TypeError, match="threshold"):
        explore(draw, threshold=object())


def test_slow_pictures_wait_for_the_mouse_to_stop(monkeypatch):
    panel = explore(draw, threshold=(1, 6))
    for budget, value in ((0, 3), (60, 4)):
        monkeypatch.setattr("epiutils.explore.BUDGET", budget)
        panel.controls["threshold"].value = value
        assert panel.controls["threshold"].continuous_update == bool(budget)


def test_figures_do_not_pile_up_even_from_pyplot():
    def careless(threshold=1):
        figure, ax = plt.subplots()
        ax.plot([threshold])
        return figure, f"{threshold}"

    before = plt.get_fignums()
    panel = explore(careless, threshold=(1, 6))
    for value in range(1, 7):
        panel.controls["threshold"].value = value
    assert plt.get_fignums() == before


def test_the_display_reads_without_a_kernel_and_is_the_same_in_every_run():
    panel = explore(draw, threshold=(1, 6), grid=False)
    data, metadata = panel._repr_mimebundle_()
    assert data["text/plain"] == "threshold 2, grid off: threshold 2, left, False, 0.5"
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.view.model_id
    assert metadata == {} and Image.open(io.BytesIO(png(panel))).format == "PNG"
    assert panel._repr_mimebundle_()[0]["image/png"] == data["image/png"]


def ahead(monkeypatch, **asked):
    """What is made ahead for the report, and for nobody else."""
    panel = explore(draw, **asked)
    assert panel._repr_mimebundle_()[1] == {}
    monkeypatch.setenv("EPIUTILS_REPORT", "1")
    made = json.loads(json.dumps(panel._repr_mimebundle_()[1]["epiutils"]["ahead"]))
    monkeypatch.delenv("EPIUTILS_REPORT")
    return made, [frame["text"] for frame in made["frames"]]


def test_pictures_are_made_ahead_for_each_value_of_a_slider_or_a_menu_and_for_some_of_a_long_slider(monkeypatch):
    made, texts = ahead(monkeypatch, threshold=(1, 4), view=["left", "right"], ahead="threshold", width=200)
    assert texts == ["1", "2", "3", "4"] and made["frames"][3]["caption"] == "threshold 4, left, False, 0.5"
    assert (made["name"], made["start"], made["settings"]) == ("threshold", 1, {"view": "left"})
    assert Image.open(io.BytesIO(base64.b64decode(made["frames"][0]["webp"]))).width == 250
    menu, texts = ahead(monkeypatch, view={"left camera": "left", "right camera": "right"}, ahead="view")
    assert texts == ["left camera", "right camera"] and menu["frames"][1]["caption"].startswith("threshold 2, right,")
    long, texts = ahead(monkeypatch, gain=(0.0, 1.0, 0.001), ahead="gain", width=50)
    assert len(texts) == MAX_FRAMES and texts[-1] == "1" and texts[long["start"]] == "0.5"
