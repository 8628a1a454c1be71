"""Explorers: a picture with controls, from one call and one drawing function.

Built on `Image` and `HTML` widgets only: `interact` and `Output` stall headless runs at random (nbclient #312).
"""

from __future__ import annotations

import base64
import html
import inspect
import os
import sys
import time
from collections.abc import Callable, Mapping

import cv2
import ipywidgets as w
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BUDGET = 0.15  # s, the longest redraw that still feels like dragging
MAX_FRAMES = 41  # pictures made ahead for one slider of the report


def _encode(figure: Figure, width: int, kind: str = ".png", *options: int) -> bytes:
    """The figure as an image file of `width` pixels, without pyplot; a pyplot figure is closed.

    kind, options: as `cv2.imencode` takes them; its PNG is as exact as any and made in a third of the time.
    """
    if not isinstance(figure.canvas, FigureCanvasAgg):
        FigureCanvasAgg(figure)
    figure.set_dpi(width / figure.get_figwidth())
    figure.canvas.draw()
    bgr = cv2.cvtColor(np.asarray(figure.canvas.buffer_rgba()), cv2.COLOR_RGBA2BGR)
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close(figure)
    return cv2.imencode(kind, bgr, options)[1].tobytes()


class _Explorer:
    """Controls, a picture and a caption that follow each other; shown where it is a cell's last value.

    controls: the widgets by name; setting `.value` of one redraws.  caption: the text under the picture.
    error: the exception of the last redraw, or None.  seconds: how long the last redraw took.
    See `explore`, which makes it.
    """

    def __init__(self, draw: Callable, controls: dict[str, w.ValueWidget], ahead: str | None, width: int):
        self.draw, self.controls, self.ahead, self.width = draw, controls, ahead, width
        self.caption, self.error, self.scale = "", None, 1.5  # device pixels a CSS pixel
        self._image = w.Image(format="png", layout=w.Layout(width=f"{width}px", max_width="100%"))
        self._label = w.HTML(layout=w.Layout(max_width=f"{width}px"))
        self._redraw()
        if self.seconds > BUDGET:  # the first picture also pays for fonts and caches
            self._redraw()
        if self.seconds > BUDGET:
            self.scale = 1.0
            self._redraw()
        for control in controls.values():
            control.observe(self._follow, "value")
        row = w.HBox(list(controls.values()), layout=w.Layout(flex_flow="row wrap"))
        self.view = w.VBox([row, self._image, self._label])

    @property
    def values(self) -> dict:
        """What the controls are set to, by name."""
        return {name: control.value for name, control in self.controls.items()}

    def _redraw(self) -> None:
        """Draw at the controls' values; raises what the drawing function raises."""
        start = time.perf_counter()
        figure, self.caption = self.draw(**self.values)
        self._image.value = _encode(figure, round(self.width * self.scale))
        self._label.value = html.escape(self.caption)
        self.seconds = time.perf_counter() - start
        for control in self.controls.values():
            if hasattr(control, "continuous_update"):  # the browser waits for each redraw: it never lags behind
                control.continuous_update = self.seconds <= BUDGET

    def _follow(self, change) -> None:
        """Redraw after a control moved; an exception becomes the caption, so that the explorer lives on."""
        try:
            self._redraw()
            self.error = None
        except Exception as error:  # noqa: BLE001  whatever it is, the reader must see it
            self.error, self.caption = error, f"{type(error).__name__}: {error}"
            self._label.value = f"<b>{html.escape(self.caption)}</b>"

    def _frames(self) -> dict:
        """Pictures for every value of the `ahead` control, the others as they are (for the report's page)."""
        control = self.controls[self.ahead]
        if hasattr(control, "options"):
            options = control.options.items() if isinstance(control.options, Mapping) else control.options
            pairs = [option if isinstance(option, tuple) else (str(option), option) for option in options]
            start = control.index
        else:
            last = round((control.max - control.min) / control.step)
            steps = [round(i) for i in np.linspace(0, last, min(last + 1, MAX_FRAMES))]
            values = [round(control.min + step * control.step, 10) for step in steps]
            pairs = [(f"{value:g}", value) for value in values]
            start = int(np.argmin(np.abs(np.array(values) - control.value)))
        frames = []
        for text, value in pairs:
            figure, caption = self.draw(**self.values | {self.ahead: value})
            picture = _encode(figure, round(1.25 * self.width), ".webp", cv2.IMWRITE_WEBP_QUALITY, 70)
            frames.append({"text": text, "caption": caption, "webp": base64.b64encode(picture).decode()})
        others = {other.description: _text(other) for other in self.controls.values() if other is not control}
        about = {"name": control.description, "start": start, "width": self.width, "settings": others}
        return about | {"frames": frames}

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        """The live widget; the picture and the caption for readers without a kernel; frames for the report."""
        settings = ", ".join(f"{control.description} {_text(control)}" for control in self.controls.values())
        picture = _encode(self.draw(**self.values)[0], self.width, ".png", cv2.IMWRITE_PNG_COMPRESSION, 9)
        data = self.view._repr_mimebundle_(**kwargs) | {
            "text/plain": f"{settings}: {self.caption}",
            "image/png": base64.b64encode(picture).decode(),
        }
        ahead = self.ahead and os.environ.get("EPIUTILS_REPORT") == "1"
        return data, {"epiutils": {"ahead": self._frames()}} if ahead else {}


def _text(control: w.ValueWidget) -> str:
    """A control's value as the reader sees it."""
    value = getattr(control, "label", control.value)
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def explore(draw: Callable, *, ahead: str | None = None, width: int = 640, **controls) -> _Explorer:
    """An explorer that redraws while its controls are dragged: `explore(draw, threshold=(1, 6), view=["a", "b"])`.

    draw: called with the controls' values by name, returns (figure, caption): a `matplotlib.figure.Figure`
    made without pyplot, and a text with the numbers that the picture claims.  controls: a widget, or
    (low, high[, step]) for a slider, a list or dict for a menu, a bool for a tick box; a default value in
    draw's signature is where the control starts.  ahead: the control that stays alive in the report, where
    a picture is made for each of its values.  width: of the picture on screen, CSS px.
    An exception of the first picture is raised; later ones are shown as the caption.
    Raises TypeError for what cannot be a control, ValueError for an unknown `ahead`.
    """
    if ahead is not None and ahead not in controls:
        raise ValueError(f"ahead must name one of the controls {sorted(controls)}, got {ahead!r}")
    parameters, made = inspect.signature(draw).parameters, {}
    for name, value in controls.items():
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        made[name] = w.interactive.widget_from_abbrev(value, default)
        if not isinstance(made[name], w.ValueWidget):
            raise TypeError(f"{name}: {value!r} is neither a widget, (low, high[, step]), a list, a dict nor a bool")
        made[name].description = made[name].description or name.replace("_", " ")
    return _Explorer(draw, made, ahead, width)
