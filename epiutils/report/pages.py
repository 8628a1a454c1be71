"""A page of the report: an executed notebook as HTML without kernel, network or MathJax.

Widgets become their last picture and settings, explorers made with `ahead=` a live slider over pictures,
formulas MathML.  The look is in template/.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbformat import NotebookNode
from PIL import Image
from pygments.formatters import HtmlFormatter

TEMPLATES = Path(__file__).resolve().parent / "template"
VIEW = "application/vnd.jupyter.widget-view+json"
_LARGE = 60_000  # characters of base64
_STATE = "application/vnd.jupyter.widget-state+json"


# Formulas

_MATH = re.compile(r"(```.*?```|`[^`\n]*`)|\$\$(.+?)\$\$|(?<![\\$])\$(?!\s)([^$\n]+?)(?<![\s\\])\$", re.DOTALL)
_TOKEN = re.compile(r"@@MATH(\d+)@@([.,;:!?)]*)")


class _Formulas:
    """Formulas kept aside while Markdown is rendered: `hide` puts tokens, `show` MathML in their place."""

    def __init__(self):
        self.found: list[str] = []

    def hide(self, markdown: str) -> str:
        """Markdown with a token for each $…$ and $$…$$ outside code."""

        def keep(match):
            if match[1]:
                return match[1]
            self.found.append(_mathml(match[2] or match[3], block=bool(match[2])))
            return f"@@MATH{len(self.found) - 1}@@"

        return _MATH.sub(keep, markdown)

    def show(self, text: str) -> str:
        """HTML with the formulas in place of their tokens, and no line break before a full stop."""

        def put(match):
            formula, stop = self.found[int(match[1])], match[2]
            return f'<span class="unbroken">{formula}{stop}</span>' if stop else formula

        return _TOKEN.sub(put, text)


# What latex2mathml or browsers lack, said in words that they know.
_TEX = {"{aligned}": "{align*}", r"\operatorname*": r"\operatorname", r"\boldsymbol": r"\mathbf"}
_RELATIONS = re.compile("<mi>([∼⇒⇔⟹⟺⟨⟩⌊⌋⌈⌉])</mi>")  # identifiers to latex2mathml: without spaces around them


def _mathml(tex: str, block: bool = False) -> str:
    """A formula as MathML; what cannot be converted stays as it was written, and is named on stderr."""
    words = re.sub(r"\\mathrm\s*\{(\w+)\}", r"\\text{\1}", tex.strip())  # browsers ignore mathvariant
    for theirs, ours in _TEX.items():
        words = words.replace(theirs, ours)
    try:
        found = convert(words, display="block" if block else "inline")
        problem = re.search(r"<m[io]>(\\\w*|&)</m", found)
    except Exception as error:  # noqa: BLE001  the converter raises many kinds
        problem = error
    if problem:
        print(f"report: cannot convert the formula {tex!r}", file=sys.stderr)
        return f"<code>{html.escape(tex)}</code>"
    found = re.sub("&#x([0-9A-F]{5});", lambda m: chr(int(m[1], 16)) if m[1] not in ("00026", "0003C") else m[0], found)
    found = _RELATIONS.sub(r"<mo>\1</mo>", found.replace("<mi>~</mi>", "<mi>∼</mi>")).replace(
        "<mo>⊤</mo>", "<mi>⊤</mi>"
    )
    return f'<span class="formula">{found}</span>' if block else found


# Widgets


def _without_kernel(nb: NotebookNode, formulas: _Formulas) -> NotebookNode:
    """The notebook with nothing in it that needs a kernel, a script from elsewhere or MathJax (in place).

    Who cannot see a figure is told the heading that it stands under.
    """
    nb, _ = CoalesceStreamsPreprocessor().preprocess(nb, {})
    state = nb.metadata.pop("widgets", {}).get(_STATE, {}).get("state", {})
    nb.cells = [cell for cell in nb.cells if "papermill-error-cell-tag" not in cell.metadata.get("tags", [])]
    section = "figure"
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            section = [section, *re.findall(r"^#+ (.+)", cell.source, re.MULTILINE)][-1]
            cell.source = formulas.hide(cell.source)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if VIEW in data:
                model = data.pop(VIEW)["model_id"]
                ahead = output.metadata.get("epiutils", {}).get("ahead")
                text = _live(ahead) if ahead else _still(model, state)
                if text:
                    data.pop("image/png", None)
                    data["text/html"] = text
            if "image/png" in data:
                data["text/html"] = f'<img src="{_picture(data.pop("image/png"))}" alt="{html.escape(section)}">'
            elif "text/latex" in data and "text/html" not in data:
                data["text/html"] = _mathml(data["text/latex"].strip().strip("$"), block=True)
            elif "text/markdown" in data:
                data["text/markdown"] = formulas.hide(data["text/markdown"])
    return nb


def _picture(data: str, kind: str = "png") -> str:
    """An image for a page, from base64: a large PNG (a photograph, a rendering) as WebP, a fifth of its size."""
    if kind == "png" and len(data) > _LARGE:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(base64.b64decode(data))).save(buffer, "webp", quality=88)
        kind, data = "webp", base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind};base64,{data.strip()}"


def _live(ahead: dict) -> str:
    """An explorer's pictures behind a slider; without a script the first one stands with its settings."""
    first = ahead["frames"][ahead["start"]]
    others = "".join(_setting(name, text) for name, text in ahead["settings"].items())
    frames = json.dumps(ahead, ensure_ascii=False).replace("</", "<\\/")
    return (
        f'<figure class="explorer live" style="max-width:{ahead["width"]}px">'
        f'<div class="settings"><span class="setting slider">{html.escape(ahead["name"])} '
        f"<b>{html.escape(first['text'])}</b></span>{others}</div>"
        f'<img src="data:image/webp;base64,{first["webp"]}" alt="{html.escape(first["caption"])}">'
        f"<figcaption>{html.escape(first['caption'])}</figcaption>"
        f'<script type="application/json">{frames}</script></figure>'
    )


def _still(model: str, state: dict) -> str:
    """What a widget and those inside it last showed."""
    settings, shown = [], []

    def walk(model: str) -> None:
        entry = state.get(model.removeprefix("IPY_MODEL_"))
        if entry is None:
            return
        values, kind = entry["state"], entry["model_name"]
        kinds = [
            state.get(child.removeprefix("IPY_MODEL_"), {}).get("model_name", "")
            for child in values.get("children", [])
        ]
        if any(name.endswith("ProgressModel") for name in kinds):  # tqdm's bar: nothing to read any more
            return
        buffer = next((b["data"] for b in entry.get("buffers", []) if b["path"] == ["value"]), None)
        if kind == "ImageModel" and buffer:
            style = state.get((values.get("layout") or "").removeprefix("IPY_MODEL_"), {}).get("state", {})
            width = f' style="width:{html.escape(style["width"])}"' if style.get("width") else ""
            shown.append(f'<img src="{_picture(buffer, values.get("format", "png"))}"{width} alt="figure">')
        elif kind in ("HTMLModel", "HTMLMathModel"):
            shown.append(f"<figcaption>{values.get('value', '')}</figcaption>")
        elif kind == "LabelModel":
            shown.append(f"<figcaption>{html.escape(values.get('value', ''))}</figcaption>")
        elif kind == "StackModel":  # only its selected page
            walk(values["children"][values.get("selected_index") or 0])
        elif "children" in values:
            for child in values["children"]:
                walk(child)
        elif values.get("_options_labels"):
            chosen = values.get("index")
            chosen = [chosen] if isinstance(chosen, int) else chosen or []
            settings.append(
                _setting(values.get("description"), ", ".join(values["_options_labels"][i] for i in chosen))
            )
        elif "value" in values and not kind.endswith("ProgressModel"):
            value = values["value"]
            text = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
            settings.append(_setting(values.get("description"), f"{text:g}" if isinstance(text, float) else text))

    walk(model)
    if not (settings or shown):
        return ""
    return f'<figure class="explorer"><div class="settings">{"".join(settings)}</div>{"".join(shown)}</figure>'


def _setting(name: str | None, value) -> str:
    return f'<span class="setting">{html.escape(name or "")} <b>{html.escape(str(value))}</b></span>'


# Pages


def notebook_page(nb: NotebookNode, title: str, nav: list[dict], note: str = "") -> str:
    """An executed notebook as one HTML page.

    nav: an entry {title, href, here} a notebook, href None where there is no page.  note: shown on top.
    """
    formulas = _Formulas()
    exporter = HTMLExporter(
        template_name=TEMPLATES.name,
        extra_template_basedirs=[str(TEMPLATES.parent)],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    here = next(i for i, entry in enumerate(nav) if entry["here"])
    before = nav[here - 1] if here and nav[here - 1]["href"] else {"title": "Report", "href": "index.html"}
    after = nav[here + 1] if nav[here + 1 :] and nav[here + 1]["href"] else None
    resources = {"title": title, "nav": nav, "note": note, "css": css(), "before": before, "after": after}
    page, _ = exporter.from_notebook_node(_without_kernel(nb, formulas), resources=resources)
    page = re.sub(r'(href="(?!https?:)[^"]*?)\.ipynb(["#])', r"\1.html\2", page)  # links between notebooks
    return formulas.show(page)


def css() -> str:
    """The pages' style sheet, with the colours of code for light and dark."""
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("friendly", "github-dark"))
    return f"{(TEMPLATES / 'page.css').read_text('utf-8')}\n{light}\n@media screen and (prefers-color-scheme:dark){{\n{dark}}}"


def markdown(text: str) -> str:
    """Markdown as HTML, formulas included."""
    formulas = _Formulas()
    return formulas.show(markdown2html(formulas.hide(text)))
