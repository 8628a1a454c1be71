"""JupyterLab in a real browser: every notebook opens and runs, and every explorer's picture follows its control."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    "@jupyterlab/notebook-extension/tracker": '{"windowingMode": "defer"}',  # keeps cells off screen in the page
}
OPEN = "path => window.jupyterapp.commands.execute('docmanager:open', {path}).then(() => null)"
READY = """path => { const w = window.jupyterapp.shell.currentWidget;
    return w?.context?.path === path && w.sessionContext.session?.kernel?.status === 'idle' }"""
RUN = """() => { window.ran = false;
    window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.ran = true }) }"""
FAILED = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells].filter(cell => cell.type === 'code'
    && (cell.executionCount === null || cell.outputs.toJSON().some(output => output.output_type === 'error')))
    .map(cell => cell.sharedModel.getSource())"""
EXPLORERS = """() => [...window.jupyterapp.shell.currentWidget.content.model.cells].flatMap((cell, i) =>
    cell.type === 'code' && cell.outputs.toJSON().some(output => 'image/png' in (output.data ?? {})
        && 'application/vnd.jupyter.widget-view+json' in output.data) ? [i] : [])"""
SHOW = """i => { const nb = window.jupyterapp.shell.currentWidget.content;
    nb.activeCellIndex = i; return nb.scrollToItem(i, 'start').then(() => null) }"""
WATCH = """image => { window.took = null; let start = null;
    for (const kind of ['keydown', 'change', 'click'])
        document.addEventListener(kind, () => { start ??= performance.now() }, {capture: true, once: true});
    image.addEventListener('load', () => { window.took = performance.now() - start }, {once: true}) }"""
CLOSE = """() => { window.jupyterapp.shell.currentWidget?.dispose();
    return window.jupyterapp.serviceManager.sessions.shutdownAll() }"""

# The copies that the browser runs are lighter, where they have such a parameter: nbval runs what is committed
LIGHTER = {"trials": 2}  # what 04 and 05 show is stored or kept, as they are committed
LIGHTER |= {"steps": 5, "limit_every": 105, "bounds_every": 105, "cameras_every": 210, "frames": 3}

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on this machine"
)


def lighten(notebook: Path, folder: Path) -> None:
    """Copy a notebook, with the smaller numbers of LIGHTER in its cell of parameters."""
    nb = nbformat.read(notebook, 4)
    cell = next(cell for cell in nb.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in LIGHTER.items():
        cell.source = re.sub(rf"^{name} = \d+\b", f"{name} = {value}", cell.source, flags=re.MULTILINE)
    nbformat.write(nb, folder / notebook.name)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab of its own, with its own settings, over copies of the notebooks; gives its address."""
    home = tmp_path_factory.mktemp("lab")
    (home / "root" / "notebooks").mkdir(parents=True)
    for notebook in NOTEBOOKS:
        lighten(notebook, home / "root" / "notebooks")
    for name, text in SETTINGS.items():
        path = home / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    folders = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "spaces"}
    folders |= {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime"}
    environment = os.environ | {name: str(home / folder) for name, folder in folders.items()}
    environment.pop("MPLBACKEND", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={home / 'root'}", "--expose-app-in-browser"]
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, cwd=home, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None and time.monotonic() < end, (home / "lab.log").read_text()
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(20)


@pytest.fixture(scope="module")
def page(lab):
    """A page of a headless chromium that shows the lab."""
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS.split())
        page = chromium.new_page(viewport={"width": 1300, "height": 950})
        page.set_default_timeout(60_000)
        page.goto(f"{lab}/lab?reset")
        page.locator("#jupyterlab-splash").wait_for(state="detached")
        page.wait_for_function("window.jupyterapp?.commands.hasCommand('docmanager:open')")
        page.evaluate("window.jupyterapp.restored.then(() => null)")
        yield page
        chromium.close()


def move(cell, step: int) -> None:
    """Move the first control of an explorer there (step 1) or back (step 0): a slider, else a menu, else a box."""
    slider, menu, box = (cell.locator(kind) for kind in (".widget-slider [role=slider]", "select", "[type=checkbox]"))
    if slider.count():
        slider.first.focus()
        low, now, high = (float(slider.first.get_attribute(f"aria-value{name}")) for name in ("min", "now", "max"))
        assert low < high
        slider.first.press("ArrowRight" if now == low or (step and now < high) else "ArrowLeft")
    elif menu.count():
        last = menu.first.locator("option").count() - 1
        now = menu.first.evaluate("menu => menu.selectedIndex")
        menu.first.select_option(index=now - 1 if now == last or not step and now else now + 1)
    else:
        box.first.click()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_every_explorer_follows_its_control(page, notebook, capsys):
    path, best = f"notebooks/{notebook.name}", {}
    try:
        page.evaluate(OPEN, path)
        page.wait_for_function(READY, arg=path)
        page.evaluate(RUN)
        page.wait_for_function("window.ran", timeout=300_000)
        assert page.evaluate(FAILED) == [], "cells that were not run, or failed"
        for index in page.evaluate(EXPLORERS):
            page.evaluate(SHOW, index)
            cell = page.locator(f".jp-Notebook .jp-Cell[data-windowed-list-index='{index}']")
            picture = cell.locator("img.widget-image").first
            picture.wait_for()
            for step in (1, 0, 1):
                before = picture.get_attribute("src")
                picture.evaluate(WATCH)
                move(cell, step)
                took = page.wait_for_function("window.took", timeout=20_000).json_value()
                assert picture.get_attribute("src") != before
                best[index] = min(took, best.get(index, took))
        assert best, "no cell shows an explorer"
    finally:
        page.evaluate(CLOSE)
    with capsys.disabled():
        print(f"\n{notebook.stem}: pictures follow after", ", ".join(f"{took:.0f} ms" for took in best.values()))
