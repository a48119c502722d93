"""What the widgets look like and do in JupyterLab, in a real browser; and what is left of them when the page is closed."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CURRENT, KERNEL, Notebook, Seven, browser, chromium, lab_server, long_run
from nbformat.v4 import new_code_cell, new_notebook, writes

pytestmark = [pytest.mark.slow, pytest.mark.alone]

DIAL = """
from functools import cached_property

import ipywidgets

from adaptkit.core.figures import Figure
from adaptkit.widgets.still import Still


class Dial(Still):
    turned = 0

    @property
    def state(self):
        return {"turned": self.turned}

    def picture(self):
        figure = Figure(figsize=(3, 1))
        figure.subplots().set_title(f"turned {self.turned} times")
        return figure

    @cached_property
    def widget(self):
        turn, end, said = ipywidgets.Button(description="Turn"), ipywidgets.Button(description="End"), ipywidgets.Label("not yet")

        def go(_):
            self.turned += 1
            said.value = f"turned {self.turned} times"
            self.refresh()

        turn.on_click(go)
        end.on_click(lambda _: self.settle())
        return ipywidgets.VBox([turn, end, said])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "What JupyterLab sees."
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def tab(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    "A tab of a browser, and the address of a JupyterLab."
    chromium()
    with lab_server(folder, tmp_path_factory.mktemp("jupyter")) as url, browser() as started:
        yield started.new_page(viewport={"width": 1280, "height": 1000}), url


def write(folder: Path, name: str, *sources: str) -> Path:
    "A notebook in the folder."
    path = folder / name
    path.write_text(writes(new_notebook(cells=[new_code_cell(s) for s in sources], metadata={"kernelspec": KERNEL})))
    return path


def stored(path: Path) -> list[dict[str, Any]]:
    "The outputs of the last cell, as they were saved."
    return [output["data"] for output in json.loads(path.read_text())["cells"][-1]["outputs"]]


def seen(page: Notebook) -> list[str]:
    "What of the last cell's outputs takes up room: its text, or PICTURE."
    page.tab.wait_for_function("() => !document.body.innerText.includes('Loading widget')", timeout=60_000)
    boxes = page.panel.locator(".jp-CodeCell").last.locator(".jp-OutputArea-child")
    tall = [b for b in boxes.all() if b.is_visible() and b.locator(".jp-OutputArea-output").first.bounding_box()["height"] > 5]
    return ["PICTURE" if b.locator("img").count() else b.inner_text() for b in tall]


def test_a_still_is_live_then_a_picture_and_never_an_apology(tab: tuple[Any, str], folder: Path) -> None:
    path = write(folder, "dial.ipynb", DIAL, "Dial()")
    page = Notebook(*tab, path.name).open()
    page.run()
    page.button("Turn").click()
    page.button("Turn").click()
    page.panel.locator(".widget-label", has_text="turned 2 times").wait_for(timeout=60_000)
    assert [text.split("\n")[0] for text in seen(page)] == ["Turn"]  # the picture behind it is not seen
    page.shoot("still-live", page.button("Turn"))
    page.panel.locator(".adaptkit-still img[alt*='turned 2']").wait_for(state="attached", timeout=60_000)  # the picture follows the label
    page.save()
    assert stored(path)[1]["application/vnd.adaptkit.widget+json"]["state"] == {"turned": 2}
    page.stop()  # closed midway
    page.open()
    page.tab.wait_for_function("() => document.body.textContent.includes('model not found')", timeout=60_000)
    assert seen(page) == ["PICTURE"]
    page.shoot("still-midway", page.panel.locator(".adaptkit-still"))
    page.run()
    page.button("Turn").click()
    page.button("End").click()
    page.panel.locator(".jp-RenderedImage").wait_for(timeout=60_000)
    assert seen(page) == ["PICTURE"]
    page.save()
    assert "image/png" in stored(path)[0] and not any("widget-view" in kind for data in stored(path) for kind in data)
    page.stop()
    page.open()
    assert seen(page) == ["PICTURE"] and "model not found" not in page.panel.inner_text()
    page.shoot("still-settled", page.panel.locator(".jp-RenderedImage"))
    page.stop()


PANEL = """
from adaptkit.testing import toy_data, toy_model
from adaptkit.training.control import When
from adaptkit.training.finetune import FineTune
from adaptkit.training.plan import Plan
from adaptkit.widgets.training import TrainingPanel
import time


class Slow:
    on = (When.STEP,)

    def __call__(self, event):
        time.sleep(0.05)


data = toy_data(96)
model = toy_model(data)
plan = Plan(epochs=200, batch_size=8, views=1, accelerator="cpu")
method = FineTune(depth=2, rate=3e-3, head_rate=3e-3)
"""
MADE = "panel = TrainingPanel(model, data, method, plan=plan, out='run', exists='replace', observers=[Slow()])"


def test_training_is_touched_in_the_browser(tab: tuple[Any, str], folder: Path) -> None:
    path = write(folder, "panel.ipynb", PANEL, MADE, "panel")
    page = Notebook(*tab, path.name).open()

    def step() -> int:
        found = page.panel.locator(".adaptkit-live").inner_text()
        return int(re.search(r"batch ([\d,]+) of 2,400", found)[1].replace(",", ""))

    def until(words: str) -> None:
        page.panel.locator(".adaptkit-live", has_text=re.compile(words)).wait_for(timeout=30_000)

    page.run()
    assert [text.split("\n")[0] for text in seen(page)] == ["Start"]
    page.button("Start").click()
    until("running.*batch [2-9]")
    slider = page.panel.locator(".noUi-handle").first  # the keyboard reaches it
    slider.focus()
    page.tab.keyboard.press("ArrowLeft")
    until("before batch .*: rate 0.95")
    page.tab.evaluate("() => window.jupyterapp.shell.collapseLeft()")
    page.shoot("panel-running", page.button("Start"))
    page.button("Pause").click()
    until("paused")
    held = step()
    page.tab.wait_for_timeout(600)
    assert step() == held > 0
    page.shoot("panel-samples", page.panel.locator("[aria-label=samples]"))
    page.button("Step one batch").click()
    until(f"paused.*batch {held + 1} of")
    page.button("Resume").click()
    until("running")
    before = step()
    page.do("notebook:insert-cell-below")  # another cell runs meanwhile
    page.tab.evaluate(f"() => {{ {CURRENT}.content.activeCell.model.sharedModel.setSource('print(6 * 7, panel.state)') }}")
    page.do("notebook:run-cell")
    page.panel.get_by_text("42 running").wait_for(timeout=60_000)
    page.tab.wait_for_timeout(500)
    end = time.monotonic() + 30  # a slow machine shows it more seldom
    while step() <= before and time.monotonic() < end:
        page.tab.wait_for_timeout(100)
    assert step() > before
    page.do("notebook:delete-cell")
    last = step()
    page.button("Stop").click()
    page.panel.locator(".jp-RenderedImage").wait_for(timeout=30_000)  # the picture takes the place of the widgets
    assert seen(page) == ["PICTURE"]
    page.save()
    (data,) = (d for d in stored(path) if "image/png" in d)
    state = data["application/vnd.adaptkit.widget+json"]["state"]
    assert state["state"] == "stopped" and last <= state["step"] < 2400 and "rate" in [a["name"] for a in state["actions"]]
    stopped = [a["step"] for a in state["actions"] if a["name"] == "stop"]
    assert stopped == [state["step"]]  # not one batch more
    page.stop()
    page.open()
    assert seen(page) == ["PICTURE"] and "model not found" not in page.panel.inner_text()
    page.tab.evaluate("() => window.jupyterapp.shell.collapseLeft()")
    page.shoot("panel-final", page.panel.locator(".jp-RenderedImage"))
    page.stop()


def test_training_is_touched_in_notebook_7(tab: tuple[Any, str], folder: Path, tmp_path: Path) -> None:
    path = write(folder, "seven.ipynb", PANEL, MADE.replace("'run'", "'seven'"), "panel")
    with lab_server(folder, tmp_path, "notebook") as url:
        page = Seven(tab[0].context.browser.new_page(viewport={"width": 1280, "height": 1000}), url, path.name).open()

        def until(words: str) -> None:
            page.panel.locator(".adaptkit-live", has_text=re.compile(words)).wait_for(timeout=60_000)

        page.run()
        assert [text.split("\n")[0] for text in seen(page)] == ["Start"]
        page.button("Start").click()
        until("running.*batch [2-9]")
        page.button("Pause").click()
        until("paused")
        held = page.panel.locator(".adaptkit-live").inner_text()
        page.tab.wait_for_timeout(600)
        assert re.search(r"batch [\d,]+ of", page.panel.locator(".adaptkit-live").inner_text())[0] == re.search(r"batch [\d,]+ of", held)[0]
        page.button("Resume").click()
        until("running")
        page.shoot("panel-seven", page.button("Start"))
        page.button("Stop").click()
        page.panel.locator(".jp-RenderedImage").wait_for(timeout=60_000)
        assert seen(page) == ["PICTURE"]
        page.save()
        page.tab.close()
    state = next(d["application/vnd.adaptkit.widget+json"]["state"] for d in stored(path) if "image/png" in d)
    assert state["state"] == "stopped" and [a["name"] for a in state["actions"]] == ["pause", "resume", "stop"]


KEPT = "panel = TrainingPanel(model, data, method, plan=plan, out='killed', observers=[Slow()])"
PID = "import os\nfrom pathlib import Path\nPath('pid').write_text(str(os.getpid()))"


def losses(folder: Path) -> list[float]:
    "Of the batches of a run, as its record has them."
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["when"] == "step"]


def test_a_killed_kernel_is_told_of_and_its_run_resumed(tab: tuple[Any, str], folder: Path) -> None:
    short = PANEL.replace("epochs=200", "epochs=6")
    path = write(folder, "killed.ipynb", PID, short, KEPT, "panel")
    page = Notebook(*tab, path.name).open()

    def until(words: str) -> None:
        page.panel.locator(".adaptkit-live", has_text=re.compile(words)).wait_for(timeout=60_000)

    page.run()
    page.button("Start").click()
    until("running.*epoch [3-6] of 6")
    page.save()
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
    page.tab.locator(".jp-Dialog", has_text="appears to have died").wait_for(timeout=60_000)
    page.tab.locator(".jp-Dialog button.jp-mod-accept").click()
    page.idle()
    page.shoot("killed-behind", page.panel.locator(".jp-CodeCell").last)
    page.save()
    page.open()  # somebody reloads: the picture is there, the gap is not
    assert seen(page) == ["PICTURE"] and re.search("running, batch [1-9]", page.panel.locator(".adaptkit-still img").get_attribute("alt"))
    page.shoot("killed-reloaded", page.panel.locator(".adaptkit-still"))
    made = losses(folder / "killed")
    page.run()
    until("broke off on .* in epoch [3-6] of 6, after batch .*Resume goes on from its checkpoint")
    page.shoot("killed-offer", page.button("Start"))
    page.button("Start").click()
    until("Beginning anew loses the")
    assert losses(folder / "killed") == made  # nothing was touched
    page.button("Resume").click()
    page.panel.locator(".jp-RenderedImage").wait_for(timeout=60_000)
    assert seen(page) == ["PICTURE"]
    page.save()
    state = next(d["application/vnd.adaptkit.widget+json"]["state"] for d in stored(path) if "image/png" in d)
    again = losses(folder / "killed")
    assert state["state"] == "done" and state["step"] == len(again) == 72 and again[: len(made)] == made  # what had been made was made again, to the bit
    page.stop()


def test_a_hundred_thousand_batches_stay_small_in_the_file_and_in_the_browser(tab: tuple[Any, str], folder: Path) -> None:
    found = long_run(*tab, folder, steps=100_000, updates=500)
    assert found["saved_mb"] < 5 and found["outputs"] == 2
    assert found["after"]["heap"] - found["before"]["heap"] < 50 and found["after"]["nodes"] < 2 * found["before"]["nodes"]
    print({name: round(found["after"][name] - found["before"][name], 1) for name in found["after"]}, found["saved_mb"])


FORM = """
from adaptkit.notebooks.forms import form
"""


def test_a_form_that_was_filled_in_is_a_table_when_it_is_reopened(tab: tuple[Any, str], folder: Path) -> None:
    told = new_code_cell("epochs: int = 2  # passes\nfast: bool = False  # leave out what takes longest", metadata={"tags": ["parameters"]})
    (folder / "page.ipynb").write_text(writes(new_notebook(cells=[told], metadata={"kernelspec": KERNEL})))
    path = write(folder, "form.ipynb", FORM, "form('page.ipynb')")
    page = Notebook(*tab, path.name).open()
    page.run()
    page.panel.locator(".widget-text input:visible").fill("7")
    page.tab.keyboard.press("Tab")
    page.panel.locator(".adaptkit-still td", has_text=re.compile("^7$")).wait_for(state="attached", timeout=60_000)
    page.save()
    page.stop()
    page.open()
    page.tab.wait_for_function("() => document.body.textContent.includes('model not found')", timeout=60_000)
    (left,) = seen(page)
    assert "filled in" in left and "7" in left and "model not found" not in left
    page.shoot("form-reopened", page.panel.locator(".adaptkit-still"))
    page.stop()


LAB = """
from adaptkit.heads.heads import Named, build_model
from adaptkit.widgets.training_labs import FreezeLab
"""


def test_a_lab_is_moved_with_the_keyboard_and_checks_the_answer(tab: tuple[Any, str], folder: Path) -> None:
    path = write(folder, "freezing.ipynb", LAB, "FreezeLab(build_model('small_cnn', Named(tuple('ab')), size=32, seed=0))")
    page = Notebook(*tab, path.name).open()
    page.run()
    page.button("Check my answer").click()
    page.panel.locator(".wrong", has_text="Not yet").wait_for(timeout=60_000)
    slider = page.panel.locator(".noUi-handle").first
    slider.focus()
    slider.press("ArrowLeft")
    slider.press("ArrowLeft")
    page.panel.locator(".widget-readout", has_text="1 stage").wait_for(timeout=60_000)
    page.panel.locator("img[alt*='1 stage']:visible").first.wait_for(timeout=60_000)
    page.button("Check my answer").click()
    page.panel.locator(".right", has_text="Right").wait_for(timeout=60_000)
    page.shoot("lab-freezing", page.panel.locator(".right"))
    page.save()
    page.stop()
    assert stored(path)[1]["application/vnd.adaptkit.widget+json"]["state"]["values"] == {"depth": 1}


EXPLAINED = """
from adaptkit.explanation.planted import learn_planted, planted
from adaptkit.widgets.explanation_lab import ExplanationLab

lab = ExplanationLab(learn_planted(), planted(3, seed=1).x, methods=("gradcam", "gradient"), frames=10)
"""


def test_an_explanation_is_chosen_with_the_keyboard_and_played(tab: tuple[Any, str], folder: Path) -> None:
    path = write(folder, "explained.ipynb", EXPLAINED, "lab")
    page = Notebook(*tab, path.name).open()
    page.run()
    menus, readout = page.panel.locator(".widget-dropdown select:visible"), page.panel.locator(".widget-readout:visible").last
    for menu, way, text in ((0, "ArrowDown", "image: image 1"), (3, "ArrowUp", "stage: middle")):  # image, class, method, stage, way
        menus.nth(menu).focus()
        for key in ("Space", way, "Enter"):
            menus.nth(menu).press(key)
        page.panel.locator(f"img[alt*='{text}']:visible").first.wait_for(timeout=60_000)
    play = page.button("Play")
    play.focus()
    play.press("Enter")
    page.panel.locator(".mod-active", has_text="Play").wait_for(timeout=60_000)
    page.panel.locator("img[alt*='share of pixels: 100%']:visible").first.wait_for(timeout=60_000)
    page.panel.locator("button.jupyter-button:not(.mod-active)", has_text="Play").wait_for(timeout=60_000)
    page.shoot("lab-explanation-played", page.panel.locator("[role=application]:visible"))
    play.press("Enter")  # once more, from the beginning, and stopped on the way
    page.tab.wait_for_function("e => !['0%', '100%'].includes(e.textContent)", arg=readout.element_handle(), timeout=60_000)
    play.press("Enter")
    page.panel.locator("button.jupyter-button:not(.mod-active)", has_text="Play").wait_for(timeout=60_000)
    page.tab.wait_for_timeout(1000)
    page.idle()
    stopped = readout.text_content()
    page.tab.wait_for_timeout(2000)
    assert readout.text_content() == stopped and stopped not in ("0%", "100%")
    slider = page.panel.locator(".noUi-handle").last
    slider.focus()
    slider.press("Home")
    page.panel.locator("img[alt*='share of pixels: 0%']:visible").first.wait_for(timeout=60_000)
    for step in range(1, 11):
        slider.press("ArrowRight")
        page.panel.locator(f"img[alt*='share of pixels: {10 * step}%']:visible").first.wait_for(timeout=60_000)
        page.button("Check my answer").click()
        page.panel.locator(".right, .wrong").first.wait_for(timeout=60_000)
        if page.panel.locator(".right").count():
            break
    assert page.panel.locator(".right", has_text="of the pixels gone").count() == 1
    page.shoot("lab-explanation-answered", page.panel.locator(".right"))
    page.save()
    page.stop()
    kept = stored(path)[1]["application/vnd.adaptkit.widget+json"]["state"]
    assert kept["right"] and kept["values"]["image"] == 1 and kept["values"]["stage"] == "middle"


POINTED = """
import json
from pathlib import Path

import numpy as np

from adaptkit.evaluation.metrics import Predictions
from adaptkit.heads.heads import Named, build_model
from adaptkit.testing import toy_data
from adaptkit.training.finder import RateCurve
from adaptkit.widgets.data_labs import ConfusionLab
from adaptkit.widgets.training_labs import FreezeLab, RateLab


def place(lab, axes, x, y):
    figure = lab.panel.view.figure
    across, up = figure.transFigure.inverted().transform(figure.axes[axes].transData.transform((x, y)))
    return across, 1 - up


x = np.linspace(-3, 3, 61)
rate = RateLab(RateCurve(tuple((10**x).tolist()), tuple((0.7 - 0.5 / (1 + np.exp(-4 * x))).tolist()), {"head": 3e-3}))
freezing = FreezeLab(build_model("small_cnn", Named(tuple("ab")), size=32, seed=0))
labels = np.arange(30) % 3
said = np.where(np.arange(30) % 5 == 1, 2, labels)
confusion = ConfusionLab(Predictions(np.eye(3, dtype=np.float32)[said], labels, ("a", "b", "c")), toy_data(30).train.image)
places = [place(rate, 0, 0.1, 0.5), place(freezing, 1, 0, 0.5), place(freezing, 1, 0, 1.4), place(confusion, 0, 1, 1)]
"""
SAVED = "json.dump(places, Path('places.json').open('w'))"


def test_a_place_in_a_picture_is_clicked_dragged_and_typed(tab: tuple[Any, str], folder: Path) -> None:
    path = write(folder, "pointed.ipynb", POINTED, SAVED, "rate", "freezing", "confusion")
    page = Notebook(*tab, path.name).open()
    page.run()
    boxes = page.panel.locator("[role=application]:visible")
    boxes.nth(2).wait_for(timeout=60_000)
    curve, top, aim, cell = json.loads((folder / "places.json").read_text())

    def spot(n: int, place: list[float]) -> tuple[float, float]:
        page.idle()
        boxes.nth(n).scroll_into_view_if_needed()
        box, before = boxes.nth(n).locator("img").bounding_box(), None
        while box != before:  # until nothing moves any more
            page.tab.wait_for_timeout(1000)
            box, before = boxes.nth(n).locator("img").bounding_box(), box
        return box["x"] + place[0] * box["width"], box["y"] + place[1] * box["height"]

    page.tab.mouse.click(*spot(0, curve))
    page.panel.locator(".widget-readout", has_text=re.compile(r"^0\.1$")).wait_for(timeout=60_000)
    page.shoot("lab-rate-clicked", boxes.nth(0))
    page.tab.mouse.move(*spot(1, top))
    page.tab.mouse.down()
    page.tab.mouse.move(*spot(1, aim), steps=5)
    page.shoot("lab-freezing-dragged", boxes.nth(1))
    page.tab.mouse.move(*spot(1, aim))
    page.tab.mouse.up()
    page.panel.locator(".widget-readout", has_text="1 stage").wait_for(timeout=60_000)
    menus = page.panel.locator(".widget-dropdown select:visible")
    page.tab.mouse.click(*spot(2, cell))
    page.tab.wait_for_function("([a, b]) => a.value === 'b' && b.value === 'b'", arg=[m.element_handle() for m in menus.all()], timeout=60_000)
    for _ in range(6):  # from where it was clicked, about a cell further down
        boxes.nth(2).press("Shift+ArrowDown")
    boxes.nth(2).press("Enter")
    page.tab.wait_for_function("a => a.value === 'c'", arg=menus.first.element_handle(), timeout=60_000)
    page.shoot("lab-confusion-typed", boxes.nth(2))
    page.panel.locator(".adaptkit-still img[alt*='it was: c']").wait_for(state="attached", timeout=60_000)  # the picture follows
    page.save()
    page.stop()
    assert stored(path)[1]["application/vnd.adaptkit.widget+json"]["state"]["values"] == {"truth": "c", "said": "b"}
    page.open()
    page.tab.wait_for_function("() => document.body.textContent.includes('model not found')", timeout=60_000)
    assert seen(page) == ["PICTURE"]  # of the last one; no apology, whatever the widget was made of
    page.stop()
