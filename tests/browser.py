"""A real browser on a real JupyterLab: Debian's Chromium, driven through Playwright, on a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook, writes

ROOT = Path(__file__).parents[1]
SHOTS = Path(os.environ.get("ADAPTKIT_SHOTS") or ROOT / "runs/browser")
FLAGS = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync")
WIDTHS = (1280, 390)
CURRENT = "window.jupyterapp.shell.currentWidget"


def chromium() -> str:
    "The browser's program; the test is skipped, and says why, where there is none."
    found = os.environ.get("ADAPTKIT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("NO BROWSER: this test needs Chromium (Debian: apt install chromium, or ADAPTKIT_CHROMIUM=/path/to/it), so nothing was tested in a browser")
    return found


def free_port() -> int:
    "A port that nobody uses."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def answers(url: str) -> bool:
    "Whether a server is there, whatever it says."
    try:
        urllib.request.urlopen(url, timeout=2).read()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@contextmanager
def served(command: list[str], url: str, *, work: Path) -> Iterator[None]:
    "A Jupyter server with settings of its own, until the block ends; it gets none of the user's, and none of pytest's."
    places = {f"JUPYTER_{name}_DIR": str(work / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    places |= {f"JUPYTERLAB_{name}_DIR": str(work / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    places |= {"IPYTHONDIR": str(work / "ipython"), "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    log = work / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env={**os.environ, **places}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        began = time.monotonic()
        while not answers(url):
            assert server.poll() is None and time.monotonic() - began < 90, log.read_text()[-3000:]
            time.sleep(0.2)
        yield
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


@contextmanager
def lab_server(root: Path, work: Path, program: str = "jupyterlab") -> Iterator[str]:
    "JupyterLab, or Notebook 7 (`notebook`), on the folder `root`: its address."
    settings = work / "settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    port = free_port()
    options = [
        f"--port={port}", "--ip=127.0.0.1", "--no-browser", "--allow-root", "--IdentityProvider.token=", "--ServerApp.password=", "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True", "--JupyterNotebookApp.expose_app_in_browser=True",
        "--LabApp.extension_manager=readonly", "--ServerApp.log_level=WARN",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with served([sys.executable, "-m", program, *options], f"{url}/api/status", work=work):
        yield url


@contextmanager
def browser() -> Iterator[Any]:
    "Chromium."
    program = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        started = p.chromium.launch(executable_path=program, headless=True, args=[f"--{flag}" for flag in FLAGS])
        yield started
        started.close()


@dataclass
class Notebook:
    "A notebook that is open in JupyterLab."

    tab: Any  # Playwright's page
    url: str  # of the server
    name: str  # of the notebook, in the server's folder

    def open(self) -> Notebook:
        "Load it, alone, and wait for its kernel."
        self.tab.goto(f"{self.url}/lab/tree/{self.name}?reset", wait_until="domcontentloaded")
        self.tab.wait_for_function("() => window.jupyterapp && window.jupyterapp.restored.then(() => true)", timeout=90_000)
        self.panel.wait_for(timeout=60_000)
        self.tab.evaluate("() => { window.jupyterapp.shell.collapseLeft(); window.jupyterapp.shell.collapseRight() }")
        self.idle()
        return self

    def idle(self) -> None:
        "Wait until its kernel is there and has nothing to do."
        idle = f"() => {{ const k = {CURRENT}?.sessionContext?.session?.kernel; return k && k.connectionStatus === 'connected' && k.status === 'idle' }}"
        self.tab.wait_for_function(idle, timeout=90_000)

    @property
    def panel(self) -> Any:
        "Where its cells are."
        return self.tab.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")

    @property
    def outputs(self) -> Any:
        "All outputs."
        return self.panel.locator(".jp-OutputArea-child")

    def do(self, command: str, **args: object) -> None:
        "A command of JupyterLab; returns when it is done."
        self.tab.evaluate("([c, a]) => window.jupyterapp.commands.execute(c, a).then(() => null)", [command, args])

    def run(self) -> None:
        "Run all cells; an error fails the test."
        self.do("notebook:run-all-cells")
        errors = self.panel.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").all_text_contents()
        assert not errors, "\n".join(errors)

    def save(self) -> None:
        "Save it, and wait until it is written."
        self.do("docmanager:save")
        self.tab.wait_for_function(f"() => !{CURRENT}.context.model.dirty", timeout=60_000)

    def stop(self) -> None:
        "End its kernel and close the tab; nothing is asked."
        self.tab.evaluate(f"() => {CURRENT}.sessionContext.shutdown()")
        self.tab.goto("about:blank")

    def button(self, text: str) -> Any:
        "A button of a widget."
        return self.panel.locator("button.jupyter-button", has_text=text)

    def shoot(self, name: str, element: Any = None) -> None:
        "Pictures, wide and narrow, light and dark, in the folder of the screenshots."
        for theme in ("Light", "Dark"):
            self.do("apputils:change-theme", theme=f"JupyterLab {theme}")
            for width in WIDTHS:
                self.tab.set_viewport_size({"width": width, "height": 1000})
                self.tab.wait_for_timeout(700)
                if element is not None:
                    element.evaluate("e => e.scrollIntoView({block: 'nearest'})")  # in one step: a panel at work is drawn anew all the time
                SHOTS.mkdir(parents=True, exist_ok=True)
                self.tab.screenshot(path=str(SHOTS / f"{name}-{width}-{theme.lower()}.png"))
        self.do("apputils:change-theme", theme="JupyterLab Light")
        self.tab.set_viewport_size({"width": WIDTHS[0], "height": 1000})


class Seven(Notebook):
    "A notebook that is open in Notebook 7."

    def open(self) -> Notebook:
        "Load it and wait for its kernel."
        self.tab.goto(f"{self.url}/notebooks/{self.name}", wait_until="domcontentloaded")
        self.tab.wait_for_function("() => window.jupyterapp && window.jupyterapp.restored.then(() => true)", timeout=90_000)
        self.panel.wait_for(timeout=60_000)
        self.idle()
        return self


KERNEL = {"name": "python3", "display_name": "python3", "language": "python"}
LONG = """
import asyncio
from pathlib import Path

import numpy as np

from adaptkit.testing import toy_data, toy_model
from adaptkit.training.finetune import FineTune
from adaptkit.training.plan import Plan
from adaptkit.widgets.training import TrainingPanel

data = toy_data(48)
panel = TrainingPanel(toy_model(data), data, FineTune(depth=2, head_rate=1e-2), plan=Plan(epochs=100, batch_size=8, accelerator="cpu"), out="long")
noise = np.random.default_rng(0).random(STEPS + 1).tolist()


async def feed():
    while not Path("go").exists():
        await asyncio.sleep(0.1)
    for step in range(1, STEPS + 1):
        row = {"when": "step", "epoch": 100 * (step - 1) // STEPS, "step": step, "total": STEPS, "now": step / 10, "loss": noise[step]}
        panel.history.add({**row, "looks": [[noise[step], 1 - noise[step]]] * 8})
        if step % (STEPS // 100) == 0:
            panel.history.add({**row, "when": "epoch", "valid_loss": noise[step], "valid_accuracy": noise[step]})
        if step % (STEPS // UPDATES) == 0:
            panel.desk.update()
            await asyncio.sleep(0.01)
    panel.desk.refresh()


panel
"""


def memory(tab: Any) -> dict[str, float]:
    "MiB that a page holds after its garbage was collected: of JavaScript, and of the process that draws it; and its nodes."
    talk = tab.context.new_cdp_session(tab)
    talk.send("Performance.enable")
    for _ in range(3):
        talk.send("HeapProfiler.collectGarbage")
        tab.wait_for_timeout(300)
    told = {m["name"]: m["value"] for m in talk.send("Performance.getMetrics")["metrics"]}
    talk.detach()
    drawing = [p for p in psutil.Process().children(recursive=True) if "--type=renderer" in " ".join(p.cmdline())]
    return {"heap": told["JSHeapUsedSize"] / 2**20, "process": sum(p.memory_info().rss for p in drawing) / 2**20, "nodes": told["Nodes"]}


def long_run(tab: Any, url: str, folder: Path, *, steps: int, updates: int) -> dict[str, Any]:
    "A panel that is told of so many batches while it is looked at: what the page holds before and after, and the size of the saved notebook in MB."
    cells = [new_code_cell(f"STEPS, UPDATES = {steps}, {updates}"), new_code_cell(LONG), new_code_cell("task = asyncio.ensure_future(feed())\ntask.add_done_callback(lambda t: Path('ended').write_text(repr(t.exception())))")]
    (folder / "long.ipynb").write_text(writes(new_notebook(cells=cells, metadata={"kernelspec": KERNEL})))
    page = Notebook(tab, url, "long.ipynb").open()
    page.run()
    page.button("Start").wait_for(timeout=30_000)
    tab.wait_for_timeout(2000)
    before = memory(tab)
    (folder / "go").touch()
    end = time.monotonic() + 900
    while not (folder / "ended").exists():
        assert time.monotonic() < end, "the batches never came to an end"
        tab.wait_for_timeout(200)
    assert (folder / "ended").read_text() == "None"
    page.panel.locator(".adaptkit-live", has_text=f"batch {steps:,} of {steps:,}").wait_for(timeout=60_000)
    page.idle()
    after = memory(tab)
    page.save()
    page.stop()
    size = (folder / "long.ipynb").stat().st_size / 1e6
    shown = json.loads((folder / "long.ipynb").read_text())["cells"][1]["outputs"]
    return {"before": before, "after": after, "saved_mb": size, "outputs": len(shown), "steps": steps, "updates": updates}
