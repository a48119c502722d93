"Trackers hold what the run's own record holds, whatever happened to the run, and touch nothing else."

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.images import Augment
from adaptkit.training.control import Event, ProgressBar, When
from adaptkit.training.copies import (
    TRACKERS,
    Copier,
    Logged,
    borrowed,
    check_tracker,
    flat,
    points,
    rehearse,
    settings_of,
)
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.runs import Run, open_run
from adaptkit.training.session import Plan, fingerprint
from adaptkit.training.trackers import MLflow, TensorBoard, WandB, log_pieces

PLAN = Plan(epochs=3, batch_size=8, views=1, augment=Augment(hflip=False), accelerator="cpu", checkpoint_every=4)
TUNE = FineTune(depth=1, rate=1e-2, head_rate=1e-2)
MAKERS = {
    "tensorboard": TensorBoard,
    "wandb": lambda place: WandB("tests", place),
    "mlflow": lambda place: MLflow(f"sqlite:///{place}/runs.db", "tests"),
}


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    "An empty database of MLflow: making one takes seconds, copying it doesn't."
    folder = tmp_path_factory.mktemp("mlflow")
    MAKERS["mlflow"](folder).read()
    return folder / "runs.db"


@pytest.fixture(params=MAKERS)
def make(request, database):
    "A maker of trackers, by place."

    def mlflow(place):
        if place.parent.is_dir() and not place.exists():
            place.mkdir()
            shutil.copy(database, place)
        return MAKERS["mlflow"](place)

    return mlflow if request.param == "mlflow" else MAKERS[request.param]


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    "Whatever a library would leave at home or in the present folder becomes visible; no network is there."
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    for name, value in {"HOME": "home", "XDG_CONFIG_HOME": "home", "XDG_CACHE_HOME": "home", "ADAPTKIT_CACHE": "cache"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.chdir(tmp_path / "here")


class PowerCut:
    "Raises after so many batches."

    on = (When.STEP,)

    def __init__(self, at):
        self.at = at

    def __call__(self, event):
        if event.step == self.at:
            raise RuntimeError("power cut")


def recorded(run: Run):
    return sorted(p for row in run.events for p in points(row))


# --- each tracker --------------------------------------------------------------------------------


def test_all_are_registered():
    assert set(MAKERS) <= set(TRACKERS) and TRACKERS["mlflow"] is MLflow


def test_the_contract_is_kept(make):
    found = check_tracker(make)
    assert {(logged.name, logged.status) for logged in found} == {("whole", "finished"), ("failed", "failed"), ("resumed", "finished")}


def test_it_holds_exactly_what_the_run_recorded(make, data, model, tmp_path, capfd):
    plain = fit(model, data, TUNE, plan=PLAN, observers=[], out=tmp_path / "plain")
    environment, level = dict(os.environ), logging.getLogger("mlflow.store.db.utils").level
    run = fit(model, data, TUNE, plan=PLAN, observers=[ProgressBar(), make(tmp_path / "place")], out=tmp_path / "run")
    (logged,) = make(tmp_path / "place").read()
    assert sorted(logged.points) == recorded(run) and len(logged.points) == len(set(logged.points))
    assert (logged.name, logged.status) == ("run", "finished")
    assert dict(logged.settings) == flat(settings_of(run.record)) and json.loads(logged.settings["data.classes"]) == ["dark", "bright"]
    assert logged.settings["data.fingerprint"] == data.fingerprint and logged.settings["method.head_rate"] == "0.01"
    assert fingerprint(run.model) == fingerprint(plain.model)
    assert dict(os.environ) == environment and logging.getLogger("mlflow.store.db.utils").level == level
    out, err = capfd.readouterr()
    assert not re.search("wandb|mlflow|alembic|git|login", out + err, re.I)
    assert not list((tmp_path / "here").iterdir())  # nothing beside the place


def test_a_failed_run_that_goes_on(make, data, model, tmp_path):
    place, where = tmp_path / "place", {"plan": PLAN, "out": tmp_path / "run"}
    with pytest.raises(RuntimeError):
        fit(model, data, TUNE, observers=[make(place), PowerCut(11)], **where)
    (logged,) = make(place).read()
    assert logged.status == "failed" and sorted(logged.points) == recorded(Run(tmp_path / "run"))
    run = fit(model, data, TUNE, observers=[make(place)], exists="resume", **where)
    (logged,) = make(place).read()
    assert logged.status == "finished" and sorted(logged.points) == recorded(run)


def test_a_tracker_that_comes_late_is_told_everything(make, data, model, tmp_path):
    with pytest.raises(RuntimeError):
        fit(model, data, TUNE, plan=PLAN, observers=[PowerCut(11)], out=tmp_path / "run")
    run = fit(model, data, TUNE, plan=PLAN, observers=[make(tmp_path / "place")], out=tmp_path / "run", exists="resume")
    (logged,) = make(tmp_path / "place").read()
    assert sorted(logged.points) == recorded(run)


def test_a_run_that_is_replaced_stays_in_the_tracker(make, data, model, tmp_path):
    plan = dataclasses.replace(PLAN, epochs=1)
    for seed in (0, 1):
        tracker = make(tmp_path / "place")
        fit(model, data, TUNE, plan=dataclasses.replace(plan, seed=seed), observers=[tracker], out=tmp_path / "run", exists="replace")
    found = make(tmp_path / "place").read()
    assert sorted(logged.settings["plan.seed"] for logged in found) == ["0", "1"]


def test_one_tracker_for_several_runs(make, data, model, tmp_path):
    tracker, plan = make(tmp_path / "place"), dataclasses.replace(PLAN, epochs=1)
    runs = {n: fit(model, data, TUNE, plan=plan, observers=[tracker], out=tmp_path / n) for n in ("a", "b")}
    assert {logged.name: sorted(logged.points) for logged in tracker.read()} == {n: recorded(run) for n, run in runs.items()}


def test_an_unwritable_place_is_a_sentence(make, data, model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdaptkitError, match="Cannot write to .*file/logs: Not a directory. Choose a folder"):
        fit(model, data, TUNE, plan=PLAN, observers=[make(tmp_path / "file" / "logs")], out=tmp_path / "run")
    assert Run(tmp_path / "run").record["status"] == "failed"
    run = fit(model, data, TUNE, plan=PLAN, observers=[make(tmp_path / "logs")], out=tmp_path / "run", exists="resume")
    assert sorted(make(tmp_path / "logs").read()[0].points) == recorded(run)


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow"), ("mlflow", "sqlalchemy")])
def test_a_missing_package_is_a_sentence(name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AdaptkitError, match=rf"{package}.*pip install 'adaptkit\[trackers\]'"):
        MAKERS[name](tmp_path)


def test_nothing_there_yet(make, tmp_path):
    assert make(tmp_path / "place").read() == []


def test_its_name_is_quiet(make):
    assert "0x" not in repr(make(Path("place"))) and "place" in repr(make(Path("place")))


SCRIPT = """
import sys
from pathlib import Path
from adaptkit.testing import toy_data, toy_model
from adaptkit.training.loop import fit
sys.path.insert(0, sys.argv[3])
from test_trackers import MAKERS, PLAN, TUNE, When

class Tell:
    on = (When.STEP,)
    def __call__(self, event):
        print("step", event.step, flush=True)

data = toy_data(48)
tracker = MAKERS[sys.argv[1]](Path(sys.argv[2]) / "place")
fit(toy_model(data), data, TUNE, plan=PLAN, observers=[tracker, Tell()], out=Path(sys.argv[2]) / "run", exists="resume")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_killed_and_resumed(name, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    for stop in ("step 3", "step 11", None):  # before the first checkpoint, in the second epoch, never
        command = [sys.executable, str(script), name, str(tmp_path), str(Path(__file__).parent)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.strip() == stop:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        assert process.returncode == (0 if stop is None else -signal.SIGKILL)
    (logged,) = MAKERS[name](tmp_path / "place").read()
    assert logged.status == "finished" and sorted(logged.points) == recorded(open_run(tmp_path / "run"))


# --- what they are made of -----------------------------------------------------------------------


class Memory(Copier):
    "Keeps copies in a dictionary; what is broken about it is said in `fault`."

    places: dict[str, dict[str, list]] = {}
    fault = ""

    def __init__(self, place, every=5.0):
        super().__init__(str(place), every=every)
        self.held, self.writes = self.places.setdefault(str(place), {}), 0

    def open(self, name, settings):
        copy = f"{name} {len(self.held)}" if self.fault == "hoards" else name
        self.held[copy] = [name, "running", {} if self.fault == "settings" else flat(settings), []]
        if self.fault == "environment":
            os.environ["TRACKED"] = "yes"
        return copy

    def write(self, rows):
        self.writes += 1
        self.held[self.copy][3] += [(t, s, round(v, 2)) for t, s, v in rows] if self.fault == "rounds" else rows

    def close(self, status, why):
        self.held[self.copy][1] = "finished" if self.fault == "cheerful" else status

    def forget(self, copy):
        None if self.fault == "hoards" else self.held.pop(copy, None)

    def read(self):
        return [Logged(*entry) for entry in self.held.values()]

    def __call__(self, event):
        super().__call__(event)
        if self.fault == "gullible":
            self._known.clear()


FAULTS = {"rounds": "differ in", "settings": "lacks the setting", "cheerful": "should be 'failed'", "hoards": "one copy; found 2", "gullible": "twice", "environment": "TRACKED"}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_trackers_are_caught(fault, monkeypatch):
    check_tracker(Memory)
    monkeypatch.setattr(Memory, "fault", fault)
    monkeypatch.delenv("TRACKED", raising=False)
    with pytest.raises(AdaptkitError, match=FAULTS[fault]):
        check_tracker(Memory)
    os.environ.pop("TRACKED", None)


def test_steps_are_written_in_batches(tmp_path):
    lazy, eager = Memory(tmp_path / "lazy", every=60), Memory(tmp_path / "eager", every=0)
    for tracker in (lazy, eager):
        rehearse(tracker, tmp_path / "run" / str(tracker.every))
    assert lazy.writes == 2 and eager.writes == 8  # two epochs; every row


def test_a_tracker_outside_a_run_says_so(tmp_path):
    with pytest.raises(AdaptkitError, match="record of a run"):
        Memory(tmp_path)(Event(When.START, 0, 0, 9))
    Memory(tmp_path)(Event(When.END, 0, 0, 9))  # nothing was begun, nothing is ended


@pytest.mark.parametrize("wrong", [lambda: TensorBoard("x", every=-1), lambda: WandB(mode="onlin"), lambda: MLflow("runs.db")])
def test_nonsense_is_refused(wrong):
    with pytest.raises(AdaptkitError, match="every=-1|Did you mean 'online'|uri='runs.db'"):
        wrong()


def test_a_copy_cannot_lead_out_of_its_place(tmp_path):
    (tmp_path / "precious").mkdir()
    with pytest.raises(AdaptkitError, match="leaves the folder"):
        TensorBoard(tmp_path / "place").forget("../precious")
    assert (tmp_path / "precious").is_dir()


def test_the_environment_comes_back(monkeypatch):
    monkeypatch.setenv("KEPT", "1")
    before = dict(os.environ)
    with pytest.raises(RuntimeError), borrowed(KEPT="2", NEW="3"):
        os.environ["LEFT"] = "4"
        del os.environ["HOME"]
        raise RuntimeError
    assert dict(os.environ) == before


def test_a_log_that_was_cut_off_and_one_over_several_blocks(tmp_path):
    path = tmp_path / "log"
    first, second = b"a" * 10, b"b" * 70_000
    log = bytearray(b":W&B\xe1\xbe\x00")

    def piece(kind, part):
        log.extend(b"\0\0\0\0" + len(part).to_bytes(2, "little") + bytes([kind]) + part)

    piece(1, first)
    for kind, size in ((2, 32768 - len(log) - 7), (3, 32761)):
        piece(kind, second[:size])
        second = second[size:]
    piece(4, second)
    path.write_bytes(log)
    assert list(log_pieces(path)) == [first, b"b" * 70_000]
    path.write_bytes(log[:-1])
    assert list(log_pieces(path)) == [first]


@pytest.mark.slow
@pytest.mark.parametrize("ours", [True, False])
def test_mlflow_does_not_count_its_users(ours, tmp_path):
    "MLflow's own switch would also be off inside pytest, hence a process that doesn't know of it."
    begin = f"from adaptkit.training.trackers import MLflow; MLflow('sqlite:///{tmp_path}/runs.db').read()" if ours else "import mlflow"
    program = f"{begin}\nfrom mlflow.telemetry.client import get_telemetry_client\nprint(get_telemetry_client() is None)"
    apart = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "MLFLOW", "CI", "DO_NOT_TRACK"))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=apart, check=True)
    assert done.stdout.split()[-1] == str(ours)
