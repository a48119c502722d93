"The training panel without a browser: what can be pressed when, what is refused, what is left where nobody is looking."

from __future__ import annotations

import asyncio
import dataclasses
import json
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from adaptkit.core.files import write_json
from adaptkit.core.registry import AdaptkitError
from adaptkit.data.images import Augment
from adaptkit.testing import toy_data, toy_model
from adaptkit.training.control import Action, When
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import NonFiniteLoss
from adaptkit.training.runs import read_lines
from adaptkit.training.session import Plan, fingerprint
from adaptkit.widgets import training as module
from adaptkit.widgets.curves import Curve
from adaptkit.widgets.still import STATE, bundle
from adaptkit.widgets.training import TrainingPanel, drain
from adaptkit.widgets.worker import busy

PLAN = Plan(epochs=2, batch_size=8, views=1, augment=Augment(hflip=False), accelerator="cpu")
TUNE = FineTune(depth=2, rate=1e-2, head_rate=1e-2)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def data():
    return toy_data(48)


@pytest.fixture(scope="module")
def model(data):
    return toy_model(data)


@pytest.fixture
def make(data, model, tmp_path):
    "Makes panels; whatever still trains at the end of the test is stopped."
    made = []

    def panel(name="run", *, method=TUNE, plan=PLAN, **how):
        made.append(TrainingPanel(how.pop("model", model), data, method, plan=plan, out=tmp_path / name, **how))
        return made[-1]

    yield panel
    for one in made:
        if one.state in ("running", "paused"):
            one.stop()
            one.training.join(60)


class Slow:
    "Somebody who watches so slowly that a run takes its time."

    on = (When.STEP,)

    def __init__(self, seconds=0.05):
        self.seconds = seconds

    def __call__(self, event):
        time.sleep(self.seconds)


def until(what, seconds=60.0):
    end = time.time() + seconds
    while not what():
        assert time.time() < end, "it never came true"
        time.sleep(0.005)


def steps(panel):
    drain(panel)
    return panel.history.step


# --- what it does ------------------------------------------------------------------------------------


def test_it_trains_and_tells(make):
    panel = make()
    assert (panel.state, panel.history.step) == ("idle", 0)
    run = panel.wait()
    assert panel.state == "done" and run is panel.run and panel.history.step == panel.history.total == 12
    assert [e["valid_loss"] for e in panel.history.epochs] == [e["valid_loss"] for e in run.history]
    assert len(panel.facts()["curves"]["loss"]) == 12 and [s["status"] for s in panel.stages()] == ["frozen", "learns", "learns", "learns"]
    json.dumps(panel.facts(), allow_nan=False)


def test_the_panel_changes_nothing(make, data, model, tmp_path):
    from adaptkit.training.loop import fit

    plain = fit(model, data, TUNE, plan=PLAN, observers=[], out=tmp_path / "plain")
    assert fingerprint(make().wait().model) == fingerprint(plain.model)


def test_a_pause_holds_within_a_step_and_a_step_is_one_batch(make):
    panel = make(observers=[Slow()])
    panel.start()
    until(lambda: steps(panel) >= 2)
    panel.pause()
    asked = steps(panel)
    until(lambda: panel.state == "paused")
    held = steps(panel)
    assert held <= asked + 1
    time.sleep(0.3)
    assert steps(panel) == held
    for n in (1, 2):
        panel.step()
        until(lambda n=n: steps(panel) == held + n and panel.state == "paused")
    panel.resume()
    panel.wait()
    assert panel.state == "done"


def test_stepping_starts_what_was_not_started(make):
    panel = make()
    panel.step()
    until(lambda: panel.state == "paused" and steps(panel) == 1)


def test_stepping_after_the_end_starts_anew_and_holds(make):
    panel = make()
    panel.unfreeze()
    panel.wait()
    with pytest.raises(AdaptkitError, match="the training is done"):
        panel.unfreeze()
    panel.step()
    until(lambda: panel.state == "paused" and steps(panel) == 1)
    assert panel.stages()[0]["status"] == "frozen"  # the stage that was unfrozen by hand belonged to the first run


def test_stop_ends_within_a_step_and_keeps_the_model(make, data):
    panel = make(plan=dataclasses.replace(PLAN, epochs=50), observers=[Slow()])
    panel.start()
    until(lambda: steps(panel) >= 3)
    panel.stop()
    asked = steps(panel)
    run = panel.wait()
    assert panel.state == "stopped" and steps(panel) <= asked + 1 and run.model.classes == data.classes


def test_what_was_done_by_hand_is_repeated_bit_by_bit(make, tmp_path):
    panel = make("hand", observers=[Slow(0.01)])
    panel.step()
    until(lambda: panel.state == "paused")
    panel.rate(0.5)
    panel.momentum(0.7)
    panel.unfreeze()
    panel.save()
    panel.resume()
    until(lambda: steps(panel) >= 8)
    panel.go_back()
    panel.rate(2.0)
    run = panel.wait()
    assert {a["name"] for a in run.record["actions"]} == {"step", "rate", "momentum", "unfreeze", "save", "resume", "go_back"}
    for n, replay in enumerate((tmp_path / "hand", str(tmp_path / "hand" / "actions.jsonl"), json.dumps(run.record["actions"]), panel.control.actions)):
        again = make(f"again-{n}", replay=replay).wait()
        assert [e["loss"] for e in again.events] == [e["loss"] for e in run.events] and fingerprint(again.model) == fingerprint(run.model)


def test_the_kernel_stays_responsive_and_the_loop_looks_after_the_run(make):
    async def notebook():
        panel = make(observers=[Slow(0.02)])
        panel.start()
        ticks = 0
        while panel.training.is_alive():
            await asyncio.sleep(0.01)
            ticks += 1
        await panel.follower
        return panel, ticks

    panel, ticks = asyncio.run(notebook())
    assert panel.history.step == 12 and panel.state == "done" and ticks > 10


# --- the desk ----------------------------------------------------------------------------------------


def test_buttons_do_what_methods_do(make):
    panel = make(observers=[Slow()])
    press = {name: button.click for name, button in panel.desk.buttons.items()}
    assert panel.desk.widget
    press["start"]()
    until(lambda: steps(panel) >= 1)
    press["pause"]()
    until(lambda: panel.state == "paused")
    panel.desk.update()
    assert panel.desk.buttons["pause"].disabled and not panel.desk.buttons["resume"].disabled
    panel.desk.sliders["rate"].value = 0.25
    panel.desk.sliders["momentum"].value = 0.5
    press["unfreeze"]()
    press["save"]()
    press["resume"]()
    press["stop"]()
    panel.wait()
    done = [(a.name, a.value) for a in panel.control.actions if a.name != "stop"]
    assert done == [("pause", None), ("rate", 0.25), ("momentum", 0.5), ("unfreeze", "conv1"), ("save", None), ("resume", None)]
    assert panel.desk.refusal == "" and panel.state == "stopped"


def test_every_control_has_a_label(make):
    panel = make()
    assert panel.desk.widget
    controls = [*panel.desk.buttons.values(), *panel.desk.sliders.values()]
    assert all(c.description and c.tooltip for c in controls)
    assert 'role="status"' in panel.desk.shown["message"].value


def test_the_worker_touches_no_widget(make):
    panel = make()
    assert panel.desk.widget
    touched = []
    for one in (*panel.desk.shown.values(), *panel.desk.buttons.values()):
        one.observe(lambda change: touched.append(threading.current_thread()))
    panel.wait()
    panel.desk.update()
    assert touched and set(touched) == {threading.main_thread()}


# --- bad input ---------------------------------------------------------------------------------------


def test_start_twice(make):
    panel = make(observers=[Slow()])
    panel.start()
    with pytest.raises(AdaptkitError, match="running already"):
        panel.start()
    panel.wait()
    assert panel.state == "done"


def test_start_again_goes_into_a_folder_of_its_own(make, tmp_path):
    panel = make()
    first = panel.wait()
    panel.rate(0.5)
    panel.start()
    second = panel.wait()
    assert (first.folder, second.folder) == (tmp_path / "run", tmp_path / "run-2")
    assert [(a["step"], a["name"], a["value"]) for a in second.record["actions"]] == [(0, "rate", 0.5)]
    assert fingerprint(first.model) != fingerprint(second.model)


@pytest.mark.parametrize("what", ["stop", "pause", "resume", "save", "go_back"])
def test_before_the_start_and_after_the_end_there_is_nothing_to_do(make, what):
    panel = make()
    for _ in range(2):
        with pytest.raises(AdaptkitError, match="nothing to .*Start it first"):
            getattr(panel, what)()
        panel.wait()


@pytest.mark.parametrize("factor", [-1, 1e9, float("nan"), "fast"])
def test_rates_that_make_no_sense(make, factor):
    panel = make()
    with pytest.raises(AdaptkitError, match="0 to 100"):
        panel.rate(factor)
    assert panel.asked["rate"] == 1.0


def test_a_rate_of_nothing_and_a_huge_one(make):
    panel = make()
    assert panel.desk.widget
    panel.rate(0)
    run = panel.wait()
    assert all(e["rate"] == 0 for e in run.events if e["when"] == "step") and panel.state == "done"
    panel.rate(100)
    panel.desk.update()
    assert panel.desk.sliders["rate"].value == 100


def test_a_run_is_there_already(make):
    make().wait()
    with pytest.raises(AdaptkitError, match="holds a run already"):
        make()
    assert make(exists="replace").wait().record["status"] == "done"


def test_nothing_left_to_unfreeze(make):
    panel = make()
    panel.unfreeze()
    with pytest.raises(AdaptkitError, match="Every stage learns already"):
        panel.unfreeze()
    with pytest.raises(AdaptkitError, match="Unknown stage 'conv7'"):
        panel.unfreeze("conv7")


def test_waiting_for_a_paused_run_would_be_for_ever(make):
    panel = make()
    panel.start()
    panel.pause()
    with pytest.raises(AdaptkitError, match="resume\\(\\) it first"):
        panel.wait()
    panel.resume()
    panel.wait()
    assert panel.state == "done"


def test_patience_has_an_end(make):
    panel = make(observers=[Slow(0.2)])
    with pytest.raises(AdaptkitError, match="goes on in the background"):
        panel.wait(0.2)
    assert panel.state == "running"


class Fails:
    on = (When.STEP,)

    def __init__(self):
        self.fails = True

    def __call__(self, event):
        if self.fails and event.step == 3:
            raise RuntimeError("the disk has gone <away>")


def test_an_error_inside_is_told_and_the_controls_recover(make):
    panel = make(observers=[somebody := Fails()])
    assert panel.desk.widget
    with pytest.raises(RuntimeError, match="gone"):
        panel.wait()
    panel.desk.update()
    assert panel.state == "failed" and panel.facts()["why"] == "the disk has gone <away>"
    told = panel.desk.shown["message"].value
    assert "RuntimeError: the disk has gone &lt;away&gt;" in told
    assert not panel.desk.buttons["start"].disabled and panel.desk.buttons["pause"].disabled
    with pytest.raises(RuntimeError):
        _ = panel.run
    somebody.fails = False
    panel.desk.buttons["start"].click()
    assert panel.wait().record["status"] == "done"
    panel.desk.update()
    assert "gone" not in panel.desk.shown["message"].value


def test_a_loss_that_explodes_names_the_module(make, data):
    import torch

    poisoned = toy_model(data)
    with torch.no_grad():
        next(poisoned.head.parameters()).view(-1)[0] = float("nan")
    panel = make(model=poisoned)
    with pytest.raises(NonFiniteLoss, match="head"):
        panel.wait()
    assert "Lower the learning rate" in panel.facts()["why"]


def test_a_validation_that_is_not_a_number_can_be_shown_and_stored(make):
    panel = make()
    panel.wait()
    row = {"when": "epoch", "epoch": 2, "step": 18, "total": 18, "now": 1.0, "loss": 0.5, "valid_accuracy": 0.5, "valid_loss": float("nan")}
    panel.history.add({**row, "looks": [[0.0, 0.0]] * 8})
    assert panel.desk.widget
    assert panel.desk.shown["table"].value.count("best") == 1 and "not a number" in panel.desk.shown["samples"].value
    assert bundle(panel.desk)[STATE]["state"]["epochs"][-1]["valid_loss"] is None


def test_a_method_that_does_not_fit_is_refused_at_once(make):
    with pytest.raises(AdaptkitError, match="depth=9"):
        make(method=FineTune(depth=9))


def test_the_cell_is_closed_while_it_trains(make):
    panel = make(observers=[Slow(0.02)])
    assert panel.desk.widget
    panel.start()
    until(lambda: steps(panel) >= 2)
    panel.desk.widget.close()
    for one in panel.desk.shown.values():
        one.close()
    panel.desk.update()
    assert panel.wait().record["status"] == "done"


def test_running_the_cell_again_stops_the_first_run_cleanly(make, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "cell_id", lambda: "cell 7")
    first = make("first", plan=dataclasses.replace(PLAN, epochs=50), observers=[Slow()])
    first.start()
    until(lambda: steps(first) >= 2)
    second = make("second")
    assert first.state == "stopped" and first.run.record["why"] == "its cell was run again" and first.run.model is not None
    assert second.wait().record["status"] == "done" and busy(cell="cell 7") == []


def test_another_panel_for_the_same_folder_stops_the_first(make):
    first = make(plan=dataclasses.replace(PLAN, epochs=50), observers=[Slow()])
    first.step()
    until(lambda: first.state == "paused")
    second = make(exists="replace")
    assert first.state == "stopped"
    assert second.wait().record["status"] == "done"


def test_other_cells_train_on(make, monkeypatch):
    monkeypatch.setattr(module, "cell_id", lambda: "one")
    first = make("first", observers=[Slow(0.02)])
    first.start()
    monkeypatch.setattr(module, "cell_id", lambda: "two")
    make("second").wait()
    first.wait()
    assert first.state == "done"


# --- a run that broke off ----------------------------------------------------------------------------

KILLED = """
import os, signal, sys, threading
from adaptkit.data.images import Augment
from adaptkit.testing import toy_data, toy_model
from adaptkit.training.control import When
from adaptkit.training.finetune import FineTune
from adaptkit.training.session import Plan
from adaptkit.widgets.training import TrainingPanel


class Kills:
    "Ends this process, as the system would when the memory is full, while the panel trains."

    on = (When.STEP,)

    def __call__(self, event):
        if event.step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)


data = toy_data(48)
plan = Plan(epochs=2, batch_size=8, views=1, augment=Augment(hflip=False), accelerator="cpu")
panel = TrainingPanel(toy_model(data), data, FineTune(depth=2, rate=1e-2, head_rate=1e-2), plan=plan, out=sys.argv[1], observers=[Kills()])
panel.rate(0.5)
panel.unfreeze("conv1")
panel.wait()
"""


def killed(folder: Path, at: int) -> None:
    "What a kernel leaves that is killed after a batch of its panel's run."
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(at)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
def test_a_killed_kernel_is_told_of_and_resumed_bit_by_bit(make, tmp_path):
    killed(tmp_path / "run", 9)
    panel = make()
    assert panel.state == "idle" and "broke off on" in panel.left.sentence and "in epoch 2 of 2, after batch 9 of 12" in panel.left.sentence
    assert panel.asked == {"rate": 0.5, "momentum": 0.9} and panel.stages()[0]["status"] == "learns"
    assert len(panel.history.curves["loss"].rows) == panel.history.step == 6 and panel.facts()["left"] == panel.left.sentence
    assert panel.desk.widget and "Resume goes on from its checkpoint, which holds 6 batches" in panel.desk.shown["message"].value
    assert "broken off" in panel.desk.shown["status"].value and "broken off" in panel.words() and panel.desk.picture()._repr_png_()
    assert not panel.desk.buttons["resume"].disabled
    for start in (panel.start, panel.step, panel.wait):
        with pytest.raises(AdaptkitError, match="Beginning anew loses the 6 batches .*resume\\(\\) it, or make the panel with exists='replace'"):
            start()
    panel.desk.buttons["resume"].click()
    resumed = panel.wait()
    whole = make("whole")
    whole.rate(0.5)
    whole.unfreeze("conv1")
    wanted = whole.wait()
    losses = [[(e["when"], e["loss"]) for e in run.events] for run in (resumed, wanted)]
    assert losses[0] == losses[1] and fingerprint(resumed.model) == fingerprint(wanted.model)
    drain(panel)
    assert len(panel.history.curves["loss"].rows) == 12 and [e["epoch"] for e in panel.history.epochs] == [0, 1]
    assert panel.left is None and panel.state == "done" and panel.desk.shown["message"].value.count("broke off") == 0


@pytest.mark.slow
def test_beginning_anew_says_what_it_loses_and_is_pressed_twice(make, tmp_path):
    killed(tmp_path / "run", 9)
    panel = make(exists="replace")
    assert panel.desk.widget
    panel.desk.buttons["start"].click()
    assert panel.state == "idle" and "Beginning anew loses the 6 batches" in panel.desk.shown["message"].value
    assert (tmp_path / "run" / "checkpoint.safetensors").exists()
    panel.desk.buttons["start"].click()
    run = panel.wait()
    assert [e["step"] for e in run.events if e["when"] == "step"] == [*range(1, 13)] and panel.stages()[0]["status"] == "frozen"
    assert [(a["name"], a["value"]) for a in run.record["actions"]] == [("rate", 0.5)]  # what the slider showed


@pytest.mark.slow
def test_without_a_checkpoint_there_is_nothing_to_lose(make, tmp_path):
    killed(tmp_path / "run", 2)
    panel = make()
    assert "no checkpoint yet" in panel.left.sentence and panel.desk.widget and panel.desk.buttons["resume"].disabled
    panel.desk.buttons["start"].click()
    assert panel.wait().record["status"] == "done"


@pytest.mark.slow
def test_what_was_asked_to_resume_is_resumed_without_a_question(make, tmp_path):
    killed(tmp_path / "run", 9)
    panel = make(exists="resume")
    panel.step()
    until(lambda: panel.state == "paused" and steps(panel) == 7)
    panel.resume()
    assert panel.wait().record["status"] == "done" and len(panel.history.curves["loss"].rows) == 12


def test_a_run_of_another_plan_is_not_offered(make):
    with pytest.raises(RuntimeError):
        make(observers=[Fails()]).wait()
    with pytest.raises(AdaptkitError, match="holds a run already"):
        make(plan=dataclasses.replace(PLAN, epochs=3))
    panel = make()
    assert "with the error 'RuntimeError: the disk has gone" in panel.left.sentence


def test_a_run_of_another_process_in_the_same_folder_is_noticed(make, tmp_path):
    from adaptkit.training.owners import Owner

    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        owner = Owner(other.pid, psutil.Process(other.pid).create_time(), platform.node())
        write_json(tmp_path / "run" / "process.json", dataclasses.asdict(owner))
        for exists in ("refuse", "replace", "resume"):
            with pytest.raises(AdaptkitError, match=f"is in use: process {other.pid} of this machine"):
                make(exists=exists)
    finally:
        other.kill()
        other.wait()
    assert make().wait().record["status"] == "done"  # a dead one holds nothing up


# --- what is left ------------------------------------------------------------------------------------


def test_a_long_run_stays_small(make):
    panel = make()
    panel.wait()
    for name in ("loss", "valid_loss", "valid_accuracy"):
        long = panel.history.curves[name] = Curve()
        for step in range(100_000):
            long.add(step, 1.0 / (1 + step % 97))
    panel.history.epochs = [dict(panel.history.epochs[-1], epoch=i) for i in range(100)]
    whole = bundle(panel.desk)
    assert len(json.dumps(whole)) < 500_000 and len(whole[STATE]["state"]["curves"]["loss"]) <= 400


PAGE = """
import sys
from adaptkit.testing import toy_data, toy_model
from adaptkit.training.finetune import FineTune
from adaptkit.training.session import Plan
from adaptkit.widgets.training import TrainingPanel
out, actions, depth = "run", "", 2
data = toy_data(48)
model = toy_model(data)
"""
SHOWN = "panel = TrainingPanel(model, data, FineTune(depth=depth, head_rate=rate), plan=Plan(epochs=2, batch_size=8, views=1, accelerator='cpu'), out=out, replay=actions)\npanel"


def executed(tmp_path: Path, *sources: str, **parameters):
    tagged = new_code_cell("actions = ''\nrate = 0.01", metadata={"tags": ["parameters"]})
    cells = [new_code_cell(PAGE), tagged, *map(new_code_cell, sources)]
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "in.ipynb")
    try:
        papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", cwd=tmp_path, progress_bar=False, parameters=parameters)
    finally:
        tmp_path.joinpath("left").write_text((tmp_path / "out.ipynb").read_text())
    return nbformat.read(tmp_path / "out.ipynb", 4)


def test_where_nobody_looks_one_picture_and_one_state_are_left(tmp_path):
    wishes = [Action(3, "rate", 0.5), Action(7, "stop", "enough")]
    nb = executed(tmp_path, SHOWN, "panel.state, panel.run.record['why']", actions=json.dumps([dataclasses.asdict(a) for a in wishes]))
    shown = [o for c in nb.cells if c.source == SHOWN for o in c.outputs]
    assert len(shown) == 1 and set(shown[0].data) == {"image/png", "text/plain", STATE}
    state = shown[0].data[STATE]["state"]
    assert state["state"] == "stopped" and [(a["step"], a["name"]) for a in state["actions"]] == [(3, "rate"), (7, "stop")]
    assert "('stopped', 'enough')" in nb.cells[-1].outputs[0].data["text/plain"]
    assert [a["name"] for a in read_lines(tmp_path / "run" / "actions.jsonl")] == ["rate", "stop"]
    text = (tmp_path / "out.ipynb").read_text()
    assert "Loading widget" not in text and "widget-view" not in text and len(text) < 200_000


def test_where_nobody_looks_an_error_fails_the_page_and_the_picture_stays(tmp_path):
    bad = "import torch\nwith torch.no_grad():\n    next(model.head.parameters()).view(-1)[0] = float('nan')"
    with pytest.raises(papermill.PapermillExecutionError, match="NonFiniteLoss"):
        executed(tmp_path, bad, SHOWN)
    nb = nbformat.read(tmp_path / "left", 4)
    kinds = [set(o.get("data", {})) for c in nb.cells if c.source == SHOWN for o in c.outputs]
    assert {"image/png", "text/plain", STATE} in kinds
