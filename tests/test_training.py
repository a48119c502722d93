"The loop, its files and its faults."

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.images import Augment, Preprocess
from adaptkit.data.sources import load_data
from adaptkit.models.backbones import load_backbone
from adaptkit.testing import check_method, toy_data, toy_model
from adaptkit.training.cache import Stream, Trunk, TrunkCache, Views
from adaptkit.training.control import Control, EarlyStop, Event, When, check_observers, read_actions
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import NonFiniteLoss, fit
from adaptkit.training.methods import one_cycle
from adaptkit.training.owners import make_next
from adaptkit.training.runs import (
    Run,
    load_checkpoint,
    open_run,
    optimizer_tensors,
    read_lines,
    restore_optimizer,
    save_checkpoint,
)
from adaptkit.training.session import Plan, epoch_order, fingerprint
from adaptkit.training.stored import half

PLAN = Plan(epochs=2, batch_size=8, views=2, augment=Augment(hflip=True), accelerator="cpu")
TUNE = FineTune(depth=3, rate=1e-2, head_rate=1e-2)


pytestmark = pytest.mark.usefixtures("own_cache")


# --- the schedule, against torch's ---------------------------------------------------------------


def test_one_cycle_equals_torch():
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([w], lr=1.0)
    total = 101
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=total, pct_start=0.25, div_factor=25, final_div_factor=1e9)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step() if len(rates) < total else None
    # torch puts the peak at step pct_start * total - 1 and the end at total - 1
    peak, last = 0.25 * total - 1, total - 1
    for step, rate in enumerate(rates):
        progress = 0.25 * step / peak if step <= peak else 0.25 + 0.75 * (step - peak) / (last - peak)
        assert one_cycle(progress, 0.25) == pytest.approx(rate, abs=1e-6)


# --- orders ------------------------------------------------------------------------------------------


def test_order_visits_each_row_once_and_depends_on_seed_and_epoch():
    a = epoch_order(50, 8, seed=0, epoch=0)
    assert len(set(a)) == 48 == len(a)
    assert not np.array_equal(a, epoch_order(50, 8, seed=0, epoch=1))
    assert not np.array_equal(a, epoch_order(50, 8, seed=1, epoch=0))


# --- contracts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [TUNE, FineTune(depth=0, head_rate=1e-2), FineTune(depth=3, gradual=1, falloff=0.5, rate=1e-2, head_rate=1e-2)])
def test_finetune_keeps_the_contract_of_methods(method):
    check_method(method)


def test_frozen_stages_keep_their_bits_and_batchnorm_too(data, tmp_path):
    from adaptkit.heads.heads import build_model

    model = build_model(load_backbone("efficientnet_lite0", pretrained=False, size=32), data, seed=0)
    run = fit(model, data, FineTune(depth=1), plan=dataclasses.replace(PLAN, epochs=1), out=tmp_path / "run")
    before, after = model.backbone, run.model.backbone
    for i, name in enumerate(model.backbone.stage_names[:-1]):
        for k, v in before.stages[i].state_dict().items():
            assert torch.equal(v, after.stages[i].state_dict()[k]), (name, k)
    moved = [not torch.equal(v, after.stages[-1].state_dict()[k]) for k, v in before.stages[-1].state_dict().items()]
    assert all(moved)


def test_statistics_stay_when_asked(data, tmp_path):
    from adaptkit.heads.heads import build_model

    model = build_model(load_backbone("efficientnet_lite0", pretrained=False, size=32), data, seed=0)
    run = fit(model, data, FineTune(depth=1, statistics=False), plan=dataclasses.replace(PLAN, epochs=1), out=tmp_path / "run")
    for (k, v), w in zip(model.backbone.stages[-1].state_dict().items(), run.model.backbone.stages[-1].state_dict().values(), strict=True):
        assert torch.equal(v, w) == ("running" in k or "num_batches" in k), k


# --- metamorphic -----------------------------------------------------------------------------------


def test_accumulated_batches_equal_one_large_batch(data, model, tmp_path):
    def weights(batch_size, accumulate):
        plan = Plan(epochs=2, batch_size=batch_size, accumulate=accumulate, optimizer="sgd", views=1, accelerator="cpu")
        run = fit(model, data, TUNE, plan=plan, out=tmp_path / f"{batch_size}-{accumulate}")
        return torch.cat([p.flatten() for p in run.model.parameters()])

    large, small, other = weights(16, 1), weights(4, 4), weights(4, 1)
    assert (large - small).norm() / large.norm() < 1e-4
    assert (large - other).norm() / large.norm() > 1e-3


def test_cached_training_equals_uncached_training(data, tmp_path):
    from adaptkit.heads.heads import build_model

    model = build_model(load_backbone("efficientnet_lite0", pretrained=False, size=32), data, seed=0)
    plan = Plan(epochs=2, batch_size=8, views=2, optimizer="sgd", accelerator="cpu")
    method = FineTune(depth=0, head_rate=1e-2)
    runs = [fit(model, data, method, plan=dataclasses.replace(plan, cache=on), out=tmp_path / str(on)) for on in (True, False)]
    for a, b in zip(*(r.events for r in runs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)


def test_mixed_precision_trains(data, model, tmp_path):
    run = fit(model, data, TUNE, plan=dataclasses.replace(PLAN, epochs=4, precision="bf16-mixed"), out=tmp_path / "run")
    assert run.history[-1]["valid_accuracy"] > 0.9
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


# --- the cache ---------------------------------------------------------------------------------------


@pytest.fixture
def trunk():
    return Trunk(load_backbone("efficientnet_lite0", pretrained=False, size=32).eval(), 3)


VIEWS = Views(Preprocess(32), Augment(hflip=True, vflip=True, brightness=0.2), 3)


def test_cache_is_exact_within_half_precision(data, trunk, tmp_path):
    order = np.random.default_rng(0).permutation(len(data.train))
    live, stored = Stream(data.train, VIEWS, trunk), Stream(data.train, VIEWS, trunk, TrunkCache(tmp_path))
    for view in (0, 2):
        for a, b in zip(live.batches(order, 7, view=view), stored.batches(order, 7, view=view), strict=True):
            assert torch.equal(a.index, b.index) and torch.equal(a.y, b.y)
            assert torch.allclose(a.x, b.x, rtol=2**-11, atol=1e-4)


def test_cache_starts_in_the_middle_of_an_epoch(data, trunk, tmp_path):
    order = np.arange(len(data.train))
    stream = Stream(data.train, VIEWS, trunk, TrunkCache(tmp_path))
    assert torch.equal(next(stream.batches(order, 8, start=3)).index, torch.arange(24, 32))


def test_a_changed_weight_image_transform_or_view_is_another_entry(data, trunk, tmp_path):
    cache = TrunkCache(tmp_path)
    entries = {cache.entry(data.train, VIEWS, 1, trunk)}
    backbone = load_backbone("efficientnet_lite0", pretrained=False, size=32).eval()
    with torch.no_grad():
        next(backbone.stages[2].parameters()).view(-1)[0] += 1e-3
    entries.add(cache.entry(data.train, VIEWS, 1, Trunk(backbone, 3)))
    pixels = data.train.items.copy()
    pixels[5, 0, 0, 0] ^= 1
    entries.add(cache.entry(dataclasses.replace(data.train, items=pixels), VIEWS, 1, trunk))
    entries.add(cache.entry(data.train, dataclasses.replace(VIEWS, change=Augment(hflip=True)), 1, trunk))
    entries.add(cache.entry(data.train, dataclasses.replace(VIEWS, spec=Preprocess(32, "pad")), 1, trunk))
    entries.add(cache.entry(data.train, dataclasses.replace(VIEWS, seed=1), 1, trunk))
    entries.add(cache.entry(data.train, VIEWS, 2, trunk))
    assert len(entries) == 7 and None not in entries


def test_a_half_written_entry_is_never_used(data, trunk, tmp_path, monkeypatch):
    cache = TrunkCache(tmp_path)
    import adaptkit.training.cache as module

    def dies(path, *args, **how):
        path.write_bytes(b"\x93NUMPY half")
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(module, "write_features", dies)
        with pytest.raises(KeyboardInterrupt):
            cache.entry(data.train, VIEWS, 1, trunk)
    assert list(tmp_path.iterdir()) == []
    assert np.load(cache.entry(data.train, VIEWS, 1, trunk)).shape[0] == len(data.train)


def test_an_entry_that_was_cut_short_is_made_again(data, trunk, tmp_path):
    cache = TrunkCache(tmp_path)
    path = cache.entry(data.train, VIEWS, 1, trunk)
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:20], b""):
        path.write_bytes(damaged)
        assert cache.entry(data.train, VIEWS, 1, trunk).read_bytes() == whole


def test_an_entry_that_is_evicted_while_it_is_read(data, trunk, tmp_path):
    order = np.arange(len(data.train))
    stream = Stream(data.train, VIEWS, trunk, TrunkCache(tmp_path)).batches(order, 8)
    first = next(stream)
    for path in tmp_path.glob("*.npy"):
        path.unlink()
    assert len(first) == 8 and [len(batch) for batch in stream] == [8] * 5


def test_equal_weights_in_another_architecture_are_another_entry(trunk):
    from adaptkit.training.cache import trunk_fingerprint

    backbone = load_backbone("efficientnet_lite0", pretrained=False, size=32).eval()
    before = trunk_fingerprint(backbone, 3)
    conv = next(m for m in backbone.stages[2].modules() if isinstance(m, torch.nn.Conv2d))
    conv.padding = (3, 3)
    assert trunk_fingerprint(backbone, 3) != before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_falls_back_with_a_sentence(data, trunk, tmp_path, monkeypatch, code):
    import adaptkit.training.cache as module

    def full(path, *args, **how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module, "write_features", full)
    stream = Stream(data.train, VIEWS, trunk, TrunkCache(tmp_path))
    with pytest.warns(UserWarning, match="No room for the trunk cache"):
        batch = next(stream.batches(np.arange(8), 8))
    assert batch.x.shape[0] == 8 and list(tmp_path.iterdir()) == []


def test_a_really_full_file_system(data, model):
    "An unprivileged quota isn't at hand everywhere: /dev/full refuses every write on Linux."
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(OSError) as e:
        with open("/dev/full", "w") as f:
            f.write("x" * 100_000)
    from adaptkit.training.cache import _disk_full

    assert _disk_full(e.value)


def test_other_errors_of_the_cache_are_not_hidden(data, trunk, tmp_path):
    blocked = tmp_path / "a-file"
    blocked.write_text("not a folder")
    with pytest.raises((AdaptkitError, OSError)), warnings.catch_warnings():
        warnings.simplefilter("error")
        TrunkCache(blocked).entry(data.train, VIEWS, 1, trunk)


def test_the_oldest_entries_make_room(data, trunk, tmp_path):
    cache = TrunkCache(tmp_path)
    first = cache.entry(data.train, VIEWS, 0, trunk)
    size = first.stat().st_size
    os.utime(first, (1, 1))
    small = TrunkCache(tmp_path, limit=1.5 * size / 1e9)
    second = small.entry(data.train, VIEWS, 1, trunk)
    assert second.exists() and not first.exists()


def test_half_keeps_large_values_finite():
    assert half(torch.tensor([1e6, -1e6, 1.0])).tolist() == [65504.0, -65504.0, 1.0]


# --- control ---------------------------------------------------------------------------------------


def test_unfreezing_while_it_runs_is_replayed_bit_by_bit(data, tmp_path):
    from adaptkit.heads.heads import build_model

    model = build_model(load_backbone("efficientnet_lite0", pretrained=False, size=32), data, seed=0)
    lowest = model.backbone.stage_names[-2]

    class Somebody:
        on = (When.STEP,)

        def __init__(self, control):
            self.control = control

        def __call__(self, event):
            if event.step == 3:
                self.control.unfreeze(lowest)
                self.control.rate(0.5)

    hand = Control()
    run = fit(model, data, FineTune(depth=1), plan=PLAN, control=hand, observers=[Somebody(hand)], out=tmp_path / "a")
    assert [a["name"] for a in run.record["actions"]] == ["unfreeze", "rate"]
    assert any(r["stage"] == lowest and r["moved"] > 0 for r in run.ledger)
    again = fit(model, data, FineTune(depth=1), plan=PLAN, control=Control(replay=run.record["actions"]), out=tmp_path / "b")
    assert [e["loss"] for e in again.events] == [e["loss"] for e in run.events]
    assert fingerprint(again.model) == fingerprint(run.model)


class PausedInValidation(Control):
    "Asks for a pause when the validation of the first epoch is about to begin."

    def rest(self):
        if not any(a.name == "pause" for a in self.actions) and not self.paused:
            self.pause()
        super().rest()


def waits_for(condition):
    "Whether something becomes true within a minute."
    until = time.monotonic() + 60
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("wish", ["resume", "save"])
def test_a_pause_holds_in_the_middle_of_a_validation(wish, data, model, tmp_path):
    plan, control, epochs = Plan(epochs=2, batch_size=8, augment=Augment(), views=1), PausedInValidation(), []

    class Notes:
        on = (When.EPOCH,)

        def __call__(self, event):
            epochs.append(event.epoch)

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(fit, model, data, FineTune(), plan=plan, control=control, observers=[Notes()], out=tmp_path / "held")
        assert waits_for(lambda: control.holding) and epochs == [] and control.actions == []
        getattr(control, wish)()
        if wish == "save":  # it needs the end of the epoch; there the pause goes on
            assert waits_for(lambda: control.holding and len(control.actions) == 2)
            assert epochs == [0] and (tmp_path / "held/checkpoint.safetensors").exists()
            control.resume()
        held = coming.result(timeout=60)
    steps = len(data.train) // 8
    assert [(a.name, a.step) for a in control.actions][:2] == [("pause", steps), (wish, steps)] and epochs == [0, 1]
    plain = fit(model, data, FineTune(), plan=plan, observers=[], out=tmp_path / "plain")
    assert [{**e, "seconds": 0} for e in held.history] == [{**e, "seconds": 0} for e in plain.history] and control.held > 0


def test_stopping_keeps_the_model(data, model, tmp_path):
    run = fit(model, data, TUNE, plan=PLAN, control=Control(replay=[{"step": 4, "name": "stop", "value": "enough"}]), out=tmp_path / "run")
    assert run.record["status"] == "stopped" and run.record["why"] == "enough"
    assert len([e for e in run.events if e["when"] == "step"]) == 4 and run.model.classes == data.classes


def test_early_stop_needs_a_number_that_exists():
    with pytest.raises(AdaptkitError, match="valid_acuracy.*valid_loss"):
        EarlyStop("valid_acuracy")(Event(When.EPOCH, 0, 0, 1, {"valid_loss": 1.0}))


@pytest.mark.parametrize("on, words", [((), "never called"), (("stpe",), "When.STEP")])
def test_observers_that_would_never_fire_are_refused(on, words):
    class Deaf:
        def __call__(self, event):
            return None

    Deaf.on = on
    with pytest.raises(AdaptkitError, match=words):
        check_observers([Deaf()])


# --- crashes -----------------------------------------------------------------------------------------

SCRIPT = """
import sys, time
from pathlib import Path
from adaptkit.data.images import Augment
from adaptkit.testing import toy_data, toy_model
from adaptkit.training.control import When
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.session import Plan, fingerprint
import torch
torch.set_num_threads(1)

class Slow:
    on = (When.STEP,)
    def __call__(self, event):
        print("step", event.step, flush=True)
        time.sleep(0.05)

data = toy_data(48)
plan = Plan(epochs=2, batch_size=8, views=2, checkpoint_every=4, accelerator="cpu")
run = fit(toy_model(data), data, FineTune(depth=3, rate=1e-2, head_rate=1e-2), plan=plan, observers=[Slow()], out=sys.argv[1], exists="resume")
print("fingerprint", fingerprint(run.model), [e["loss"] for e in run.events])
"""


def killed_at(step: int | None, folder: Path, tmp_path: Path) -> str:
    "Run the script and kill it at a step; None: let it end. Returns its last line."
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen([sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True)
    last = ""
    for line in process.stdout:
        last = line.strip()
        if step is not None and last == f"step {step}":
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert process.returncode == (0 if step is None else -signal.SIGKILL)
    return last


def test_killed_twice_and_resumed_gives_the_same_bits(tmp_path):
    whole = killed_at(None, tmp_path / "whole", tmp_path)
    killed_at(6, tmp_path / "cut", tmp_path)  # after the checkpoint of step 4
    assert open_run(tmp_path / "cut").record["status"] == "running"
    killed_at(11, tmp_path / "cut", tmp_path)  # in the second epoch
    assert killed_at(None, tmp_path / "cut", tmp_path) == whole
    assert whole.startswith("fingerprint")


def test_killed_while_the_model_is_kept(data, model, tmp_path, monkeypatch):
    "A model file alone doesn't make a finished run: what died between two files is finished by resuming."
    import adaptkit.training.loop as module

    def dies(*_):
        raise KeyboardInterrupt

    whole = fit(model, data, TUNE, plan=PLAN, out=tmp_path / "whole")
    with monkeypatch.context() as m:
        real = module.describe_run
        m.setattr(module, "describe_run", lambda s, c, status, why="": dies() if status in ("done", "failed") else real(s, c, status, why))
        with pytest.raises(KeyboardInterrupt):
            fit(model, data, TUNE, plan=PLAN, out=tmp_path / "cut")
    assert (tmp_path / "cut" / "model.safetensors").exists() and Run(tmp_path / "cut").record["status"] == "running"
    again = fit(model, data, TUNE, plan=PLAN, out=tmp_path / "cut", exists="resume")
    assert again.record["status"] == "done" and fingerprint(again.model) == fingerprint(whole.model)
    assert [e["loss"] for e in again.events] == [e["loss"] for e in whole.events] and again.ledger == whole.ledger


class PowerCut:
    "Raises after so many batches; somebody has turned the knobs a little before."

    on = (When.STEP,)

    def __init__(self, control, at):
        self.control, self.at = control, at

    def __call__(self, event):
        if event.step == 3:
            self.control.pause()
            self.control.resume()
        if event.step == 7:
            self.control.rate(0.25)
        if event.step == self.at:
            raise RuntimeError("power cut")


def test_what_was_done_after_the_last_checkpoint_is_done_again(data, model, tmp_path):
    plan = dataclasses.replace(PLAN, checkpoint_every=5)
    hand, other = Control(), Control()
    whole = fit(model, data, TUNE, plan=plan, control=hand, observers=[PowerCut(hand, at=99)], out=tmp_path / "whole")
    with pytest.raises(RuntimeError):
        fit(model, data, TUNE, plan=plan, control=other, observers=[PowerCut(other, at=9)], out=tmp_path / "cut")
    again = fit(model, data, TUNE, plan=plan, out=tmp_path / "cut", exists="resume", observers=[])
    assert fingerprint(again.model) == fingerprint(whole.model)
    assert again.record["actions"] == whole.record["actions"] and [a["name"] for a in again.record["actions"]] == ["pause", "resume", "rate"]


def test_a_stop_that_is_due_at_once_after_resuming(data, model, tmp_path):
    plan, hand = dataclasses.replace(PLAN, checkpoint_every=3), Control()
    with pytest.raises(RuntimeError):
        fit(model, data, TUNE, plan=plan, control=hand, observers=[PowerCut(hand, at=4)], out=tmp_path / "run")
    again = Control()
    again.stop("enough")
    run = fit(model, data, TUNE, plan=plan, control=again, out=tmp_path / "run", exists="resume")
    assert run.record["status"] == "stopped" and len([e for e in run.events if e["when"] == "step"]) == 3

class Steps:
    "Somebody who does something after certain steps; the power may fail."

    on = (When.STEP,)

    def __init__(self, control, *, fails=0, **at):
        self.control, self.at, self.fails = control, {int(k[1:]): v for k, v in at.items()}, fails

    def __call__(self, event):
        for name, *value in self.at.get(event.step, ()):
            getattr(self.control, name)(*value)
        if event.step == self.fails:
            raise RuntimeError("power cut")


TOUCHED = dict(s2=[("momentum", 0.5)], s5=[("rate", 2.0), ("save",)], s8=[("go_back",), ("rate", 0.5)], s10=[("momentum", 0.95), ("save",)])


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_action_is_replayed_bit_by_bit(data, model, tmp_path, optimizer):
    plan, hand = dataclasses.replace(PLAN, optimizer=optimizer), Control()
    run = fit(model, data, TUNE, plan=plan, control=hand, observers=[Steps(hand, **TOUCHED)], out=tmp_path / "a")
    again = fit(model, data, TUNE, plan=plan, control=Control(replay=read_actions(tmp_path / "a")), observers=[], out=tmp_path / "b")
    assert [a["name"] for a in run.record["actions"]] == ["momentum", "rate", "save", "go_back", "rate", "momentum", "save"]
    assert again.record["actions"] == run.record["actions"] == read_lines(tmp_path / "b" / "actions.jsonl")
    assert [e["loss"] for e in again.events] == [e["loss"] for e in run.events] and fingerprint(again.model) == fingerprint(run.model)
    for name in ("momentum", "go_back"):  # each of them matters
        less = Control(replay=[a for a in run.record["actions"] if a["name"] != name])
        assert fingerprint(fit(model, data, TUNE, plan=plan, control=less, observers=[], out=tmp_path / name).model) != fingerprint(run.model)


@pytest.mark.parametrize("fails", [3, 6, 9, 11])
def test_a_steered_run_that_is_cut_off_anywhere_goes_on_to_the_same_bits(data, model, tmp_path, fails):
    hand, other = Control(), Control()
    whole = fit(model, data, TUNE, plan=PLAN, control=hand, observers=[Steps(hand, **TOUCHED)], out=tmp_path / "whole")
    with pytest.raises(RuntimeError):
        fit(model, data, TUNE, plan=PLAN, control=other, observers=[Steps(other, fails=fails, **TOUCHED)], out=tmp_path / "cut")
    after = Control()
    later = {k: v for k, v in TOUCHED.items() if int(k[1:]) >= fails}  # what the power cut kept from happening
    again = fit(model, data, TUNE, plan=PLAN, control=after, observers=[Steps(after, **later)], out=tmp_path / "cut", exists="resume")
    assert fingerprint(again.model) == fingerprint(whole.model) and [e["loss"] for e in again.events] == [e["loss"] for e in whole.events]
    assert again.record["actions"] == whole.record["actions"] == read_lines(tmp_path / "cut" / "actions.jsonl")


def test_save_now_is_where_a_killed_run_goes_on(data, model, tmp_path):
    hand = Control()
    with pytest.raises(RuntimeError):
        fit(model, data, TUNE, plan=PLAN, control=hand, observers=[Steps(hand, fails=5, s3=[("save",)])], out=tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] == 3


def test_save_now_waits_for_whole_steps(data, model, tmp_path):
    hand, plan = Control(), dataclasses.replace(PLAN, batch_size=4, accumulate=3)
    with pytest.raises(RuntimeError):
        fit(model, data, TUNE, plan=plan, control=hand, observers=[Steps(hand, fails=8, s4=[("save",)])], out=tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] == 6


def test_going_back_before_there_is_a_best_epoch_starts_again(data, model, tmp_path):
    hand = Control(replay=[{"step": 3, "name": "go_back"}, {"step": 3, "name": "stop", "value": "here"}])
    run = fit(model, data, TUNE, plan=PLAN, control=hand, observers=[], out=tmp_path / "run")
    assert fingerprint(run.model) == fingerprint(model)


def test_a_line_of_actions_that_was_cut_off_does_not_spoil_the_next(data, model, tmp_path):
    hand = Control()
    with pytest.raises(RuntimeError):
        fit(model, data, TUNE, plan=PLAN, control=hand, observers=[Steps(hand, fails=5, s1=[("rate", 0.5)])], out=tmp_path / "run")
    with (tmp_path / "run" / "actions.jsonl").open("a") as f:
        f.write('{"step": 4, "na')
    after = Control()
    run = fit(model, data, TUNE, plan=PLAN, control=after, observers=[Steps(after, s7=[("rate", 0.2)])], out=tmp_path / "run", exists="resume")
    assert [(a["step"], a["value"]) for a in read_lines(tmp_path / "run" / "actions.jsonl")] == [(1, 0.5), (7, 0.2)] and run.record["status"] == "done"


def test_one_batch_at_a_time(data, model, tmp_path):
    import threading

    control = Control()
    control.pause()
    worker = threading.Thread(target=fit, args=(model, data, TUNE), kwargs=dict(plan=PLAN, control=control, observers=[], out=tmp_path / "run"))
    worker.start()
    for n in (1, 2, 3):
        control.step()
        deadline = time.time() + 60
        while not (control.holding and len(read_lines(tmp_path / "run" / "events.jsonl")) >= n):
            assert time.time() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(Run(tmp_path / "run").events) == n
    control.save()
    while not (tmp_path / "run" / "checkpoint.safetensors").exists():  # at once, not when it goes on
        assert time.time() < deadline
        time.sleep(0.01)
    control.stop()
    worker.join(60)
    assert Run(tmp_path / "run").record["status"] == "stopped"
    assert len([e for e in Run(tmp_path / "run").events if e["when"] == "step"]) == 3


@pytest.mark.parametrize("value", [-0.1, 1.0, 2, float("nan"), "much", None, True])
def test_momentum_that_makes_no_sense(value):
    with pytest.raises(AdaptkitError, match="momentum of .*0 to 0.999"):
        Control().momentum(value)


@pytest.mark.parametrize("factor", [-1, 101, float("nan"), float("inf"), "fast", None])
def test_a_rate_that_makes_no_sense(factor):
    with pytest.raises(AdaptkitError, match="learning rate factor of .*0 to 100"):
        Control().rate(factor)


@pytest.mark.parametrize("text, words", [('[{"step": 1}]', "list of actions can't be read"), ("[", "list of actions"), ("nowhere.jsonl", "no actions at nowhere.jsonl"), ('[{"step": 1, "name": "jump"}]', "Unknown action 'jump'"), ('[{"step": 1, "name": "rate", "value": -3}]', "0 to 100")])
def test_actions_that_cannot_be_read(text, words):
    with pytest.raises(AdaptkitError, match=words):
        read_actions(text)


def test_a_replay_of_another_network_is_refused_before_it_starts(data, model, tmp_path):
    with pytest.raises(AdaptkitError, match="Unknown stage 'blocks.5'"):
        fit(model, data, TUNE, plan=PLAN, control=Control(replay=[{"step": 3, "name": "unfreeze", "value": "blocks.5"}]), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_observer_may_ask_and_changes_nothing(data, model, tmp_path):
    class Asker:
        on = (When.START, When.STEP, When.EPOCH)
        said = []

        def __call__(self, event):
            x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            self.said.append(event.predict(x))

    quiet = fit(model, data, TUNE, plan=PLAN, observers=[], out=tmp_path / "a")
    asked = fit(model, data, TUNE, plan=PLAN, observers=[Asker()], out=tmp_path / "b")
    assert fingerprint(asked.model) == fingerprint(quiet.model)
    assert Asker.said[0].shape == (3, 2) and not torch.equal(Asker.said[0], Asker.said[-1])


def test_observers_know_after_resuming_what_they_would_know(data, model, tmp_path):
    class Listener:
        on = (When.START, When.EPOCH, When.END)

        def __init__(self, dies=False):
            self.heard, self.dies = [], dies

        def __call__(self, event):
            self.heard.append((event.when.value, event.epoch))
            if self.dies and event.epoch == 1:
                raise RuntimeError("power cut")

    first, second = Listener(dies=True), Listener()
    with pytest.raises(RuntimeError):
        fit(model, data, TUNE, plan=dataclasses.replace(PLAN, epochs=3), observers=[first], out=tmp_path / "run")
    assert first.heard[-1][0] == "end"  # however the run ended
    fit(model, data, TUNE, plan=dataclasses.replace(PLAN, epochs=3), observers=[second], out=tmp_path / "run", exists="resume")
    assert [e for e in second.heard if e[0] == "epoch"] == [("epoch", 0), ("epoch", 1), ("epoch", 2)]


def test_early_stop_ends_a_run_and_forgets_it(data, model, tmp_path):
    patience = EarlyStop("valid_loss", patience=1, lower_is_better=False)  # a falling loss is no improvement here
    for name in "ab":
        run = fit(model, data, TUNE, plan=dataclasses.replace(PLAN, epochs=6), observers=[patience], out=tmp_path / name)
        assert run.record["status"] == "stopped" and "valid_loss has not improved" in run.record["why"]
        assert 1 < len(run.history) < 6


def test_a_pause_holds_the_run_and_not_the_program(data, model, tmp_path):
    import threading

    control = Control()
    control.pause()
    worker = threading.Thread(target=fit, args=(model, data, TUNE), kwargs=dict(plan=PLAN, control=control, observers=[], out=tmp_path / "run"))
    worker.start()
    while not (tmp_path / "run" / "run.json").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    assert Run(tmp_path / "run").events == [] and worker.is_alive()
    with pytest.raises(AdaptkitError, match="Unknown stage"):
        control.unfreeze("no such stage")  # refused where it was typed; the run is unharmed
    control.resume()
    worker.join(60)
    assert Run(tmp_path / "run").record["status"] == "done"


def test_one_control_steers_one_run(data, model, tmp_path):
    control = Control()
    fit(model, data, TUNE, plan=dataclasses.replace(PLAN, epochs=1), control=control, out=tmp_path / "a")
    with pytest.raises(AdaptkitError, match="steered a run already"):
        fit(model, data, TUNE, plan=PLAN, control=control, out=tmp_path / "b")


def test_it_trains_on_whatever_device_is_there(data, model, tmp_path):
    "On a machine with a GPU this is the test that the ledger, the checkpoint and the cache live with it."
    run = fit(model, data, TUNE, plan=dataclasses.replace(PLAN, accelerator="auto", checkpoint_every=4), out=tmp_path / "run")
    assert run.record["status"] == "done" and run.record["device"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    assert run.ledger and run.record["seconds"] > 0


def test_killed_before_the_first_checkpoint(tmp_path):
    killed_at(2, tmp_path / "cut", tmp_path)
    assert killed_at(None, tmp_path / "cut", tmp_path).split()[1] == killed_at(None, tmp_path / "whole", tmp_path).split()[1]


def test_resuming_something_else_is_refused(data, model, tmp_path):
    class Crash:
        on = (When.EPOCH,)

        def __call__(self, event):
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fit(model, data, TUNE, plan=dataclasses.replace(PLAN, checkpoint_every=2), observers=[Crash()], out=tmp_path / "run")
    with pytest.raises(AdaptkitError, match="other data, model, method or plan"):
        fit(model, data, TUNE, plan=dataclasses.replace(PLAN, epochs=5), out=tmp_path / "run", exists="resume")


def test_a_finished_run_is_not_taken_for_another(data, model, tmp_path):
    run = fit(model, data, TUNE, plan=PLAN, out=tmp_path / "run")
    assert fit(model, data, TUNE, plan=PLAN, out=tmp_path / "run", exists="resume").record == run.record
    with pytest.raises(AdaptkitError, match="other data, model, method or plan"):
        fit(model, data, TUNE, plan=dataclasses.replace(PLAN, epochs=5), out=tmp_path / "run", exists="resume")


def test_the_division_is_stored_with_the_run(tmp_path):
    data = load_data("digits", seed=3)
    run = fit(toy_model(data), data, FineTune(depth=0), plan=dataclasses.replace(PLAN, epochs=1, batch_size=64), out=tmp_path / "run")
    again = load_data("digits", seed=4, split=run.folder / "split.json")
    assert again.fingerprint == data.fingerprint == run.record["data"]["fingerprint"]


def test_the_optimizers_memory_comes_back_in_the_layout_of_its_parameter(tmp_path):
    def made():
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        return conv, torch.optim.AdamW(conv.parameters(), lr=0.1, fused=True)

    def step(conv, optimizer):
        conv(torch.linspace(0, 1, 2 * 3 * 6 * 7).reshape(2, 3, 6, 7)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    conv, optimizer = made()
    step(conv, optimizer)
    save_checkpoint(tmp_path / "c.safetensors", {**conv.state_dict(), **optimizer_tensors(optimizer)}, {})
    again, fresh = made()
    tensors, _ = load_checkpoint(tmp_path / "c.safetensors")
    again.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("optimizer.")})
    restore_optimizer(fresh, tensors)
    for pair in ((conv, optimizer), (again, fresh)):
        step(*pair)
    assert torch.equal(conv.weight, again.weight) and torch.equal(conv.bias, again.bias)


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, {"w": torch.ones(3)}, {"step": 1})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdaptkitError, match="checkpoint.safetensors.*damaged"):
        load_checkpoint(path)


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"a": 1}\n{"a": 2')
    assert read_lines(tmp_path / "events.jsonl") == [{"a": 1}]


def test_non_finite_loss_names_step_rows_and_module(data, model, tmp_path):
    with torch.no_grad():
        list(model.backbone.stages[1].parameters())[0].view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteLoss, match=r"step 0 .*rows \[.*backbone\.stages\.1"):
        fit(model, data, TUNE, plan=PLAN, out=tmp_path / "run")
    assert Run(tmp_path / "run").record["status"] == "failed" and not (tmp_path / "run" / "model.safetensors").exists()


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"epochs": -1}, {"epochs": 0}, {"epochs": 1.5}, {"batch_size": 0}, {"accumulate": 0}, {"views": 0}, {"seed": -1}, {"warmup": 1.0}, {"precision": "float8"}, {"accelerator": "gpus"}, {"fit": "stretch"}])
def test_a_nonsense_plan_is_refused_by_name(setting):
    with pytest.raises(AdaptkitError, match=next(iter(setting))):
        Plan(**setting)


@pytest.mark.parametrize("setting", [{"rate": 0}, {"head_rate": -1}, {"falloff": 0}, {"falloff": 2}, {"decay": -1}, {"depth": -1}, {"gradual": -1}])
def test_a_nonsense_method_is_refused_by_name(setting):
    with pytest.raises(AdaptkitError, match=next(iter(setting))):
        FineTune(**setting)


def test_unknown_optimizer_suggests():
    with pytest.raises(AdaptkitError, match="Did you mean 'adamw'"):
        Plan(optimizer="adam")


def test_a_batch_larger_than_the_data(data, model, tmp_path):
    with pytest.raises(AdaptkitError, match="takes 64 images.*only 48"):
        fit(model, data, TUNE, plan=Plan(batch_size=64), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_for_other_classes(data, model, tmp_path):
    with pytest.raises(AdaptkitError, match="built for the classes"):
        fit(model, dataclasses.replace(data, classes=("yes", "no")), TUNE, out=tmp_path / "run")


def test_an_existing_run_is_never_overwritten_unasked(data, model, tmp_path):
    run = fit(model, data, TUNE, plan=PLAN, out=tmp_path / "run")
    before = fingerprint(run.model)
    with pytest.raises(AdaptkitError, match="holds a run already"):
        fit(model, data, TUNE, plan=PLAN, out=tmp_path / "run")
    assert fingerprint(run.model) == before
    assert fingerprint(fit(model, data, TUNE, plan=PLAN, out=tmp_path / "run", exists="replace").model) == before


def test_no_permission_to_write(data, model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdaptkitError, match="Cannot make the run folder"):
        fit(model, data, TUNE, plan=PLAN, out=tmp_path / "file" / "run")


def test_no_right_to_write(data, model, tmp_path, monkeypatch):
    "Whoever runs the tests may be root, who may write anywhere: so the refusal is played."

    def refused(self, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(AdaptkitError, match="Cannot make the run folder .*Permission denied.*may write to"):
        fit(model, data, TUNE, plan=PLAN, out=tmp_path / "run")
    with pytest.raises(AdaptkitError, match="Cannot make the cache folder .*Permission denied.*ADAPTKIT_CACHE"):
        TrunkCache(tmp_path / "no").entry(data.train, VIEWS, 1, Trunk(load_backbone("efficientnet_lite0", pretrained=False, size=32).eval(), 3))


def test_a_run_that_cannot_start_leaves_the_old_one_alone(data, model, tmp_path):
    run = fit(model, data, TUNE, plan=PLAN, out=tmp_path / "run")
    before = run.record
    with pytest.raises(AdaptkitError, match="has 3 stages"):
        fit(model, data, FineTune(depth=40), plan=PLAN, out=tmp_path / "run", exists="replace")
    assert run.record == before and run.model.classes == data.classes


def test_resuming_nothing_in_particular_is_refused(data, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdaptkitError, match="say which one with out"):
        fit(model, data, TUNE, plan=PLAN, exists="resume")


def test_a_disk_that_fills_up_while_weights_are_written(tmp_path):
    from safetensors import SafetensorError

    from adaptkit.models.sources import write_weights

    write_weights(tmp_path / "w.safetensors", {"w": torch.ones(3)})
    with pytest.MonkeyPatch.context() as m:
        m.setattr("safetensors.torch.save_file", lambda *_, **__: (_ for _ in ()).throw(SafetensorError("I/O error: No space left on device (os error 28)")))
        with pytest.raises(AdaptkitError, match="w.safetensors.*No space left.*untouched"):
            write_weights(tmp_path / "w.safetensors", {"w": torch.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(("augment", "views"), [(Augment(hflip=False), [0, 0, 0]), (Augment(hflip=True), [0, 1, 0]), (Augment(hflip=True, vflip=True), [0, 1, 2]), (Augment(hflip=False, rotate=5), [0, 1, 2])])
def test_no_view_is_stored_twice(augment, views):
    assert [Views(Preprocess(32), augment, 4).number(epoch) for epoch in range(3)] == views


def test_parts_of_killed_processes_are_swept_away(data, trunk, tmp_path):
    for name, age in ((".old.npy.abcd.part", 2 * 24 * 3600), (".new.npy.abcd.part", 60)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    TrunkCache(tmp_path).entry(data.train, VIEWS, 0, trunk)
    assert [p.name for p in tmp_path.glob(".*.part")] == [".new.npy.abcd.part"]


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(AdaptkitError, match="not a run folder"):
        open_run(tmp_path)


def test_fit_leaves_the_global_generator_alone(data, model, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(model, data, TUNE, plan=dataclasses.replace(PLAN, epochs=1), out=tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)


def test_the_run_is_a_readable_record(data, model, tmp_path):
    started = time.time()
    run = fit(model, data, TUNE, plan=PLAN, out=tmp_path / "run")
    record = run.record
    assert record["data"]["fingerprint"] == data.fingerprint and record["plan"]["epochs"] == 2
    assert 0 < record["seconds"] < time.time() - started + 1
    assert {p.name for p in run.folder.iterdir()} == {"run.json", "split.json", "events.jsonl", "ledger.json", "model.safetensors", "model.json"}


# --- two processes, one folder -----------------------------------------------------------------------


ELSEWHERE = """
import sys, time
from pathlib import Path
from adaptkit.testing import toy_data, toy_model
from adaptkit.training.control import When
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.session import Plan


class Waits:
    on = (When.STEP,)

    def __call__(self, event):
        if event.step == 3:
            print("waits", flush=True)
            sys.stdin.readline()


data = toy_data(48)
plan = Plan(epochs=2, batch_size=8, views=1, accelerator="cpu", checkpoint_every=2)
fit(toy_model(data), data, FineTune(depth=2, head_rate=1e-2), plan=plan, observers=[Waits()], out=sys.argv[1], exists=sys.argv[2])
"""


@contextmanager
def another_process(folder, exists="refuse"):
    "A run of another process that waits after its third batch; it is killed in the end."
    process = subprocess.Popen([sys.executable, "-c", ELSEWHERE, str(folder), exists], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "waits\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_folder_in_which_another_process_trains_is_refused_until_it_is_dead(tmp_path):
    data, plan = toy_data(48), Plan(epochs=2, batch_size=8, views=1, accelerator="cpu", checkpoint_every=2)
    work = (toy_model(data), data, FineTune(depth=2, head_rate=1e-2))
    with another_process(tmp_path / "run") as other:
        events = read_lines(tmp_path / "run" / "events.jsonl")
        for exists in ("refuse", "replace", "resume"):
            with pytest.raises(AdaptkitError, match=f"is in use: process {other.pid} of this machine has been training there"):
                fit(*work, plan=plan, observers=[], out=tmp_path / "run", exists=exists)
        assert read_lines(tmp_path / "run" / "events.jsonl") == events  # nothing was touched
        other.kill()
        assert other.wait() and (tmp_path / "run" / "process.json").exists()
        resumed = fit(*work, plan=plan, observers=[], out=tmp_path / "run", exists="resume")
    whole = fit(*work, plan=plan, observers=[], out=tmp_path / "whole")
    assert [e["loss"] for e in resumed.events] == [e["loss"] for e in whole.events] and not (tmp_path / "run" / "process.json").exists()


def test_runs_that_begin_at_once_get_a_folder_each(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: make_next(Path("runs/toy-1")), range(40)))
    assert sorted(found) == sorted(Path(f"runs/toy-{n}") for n in range(1, 41))


def test_a_run_that_never_began_leaves_no_folder(data, model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    class Refuses(FineTune):
        def prepare(self, model):
            raise AdaptkitError("not with me")

    with pytest.raises(AdaptkitError, match="not with me"):
        fit(model, data, Refuses(), plan=PLAN, observers=[])
    assert not Path("runs").exists()


def test_a_folder_has_one_run_of_this_process_at_a_time(data, model, tmp_path):
    class Second:
        on = (When.END,)

        def __call__(self, event):
            with pytest.raises(AdaptkitError, match="another run of this process"):
                fit(model, data, TUNE, plan=PLAN, observers=[], out=tmp_path / "run", exists="replace")

    assert fit(model, data, TUNE, plan=PLAN, observers=[Second()], out=tmp_path / "run").record["status"] == "done"


def test_a_run_that_fails_gives_its_folder_back(data, model, tmp_path):
    class Fails:
        on = (When.STEP,)

        def __call__(self, event):
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        fit(model, data, TUNE, plan=PLAN, observers=[Fails()], out=tmp_path / "run")
    assert fit(model, data, TUNE, plan=PLAN, observers=[], out=tmp_path / "run", exists="resume").record["status"] == "done"


def test_only_one_of_many_that_ask_at_once_gets_the_folder(tmp_path):
    from adaptkit.training.owners import take

    def ask(_):
        try:
            take(tmp_path / "run")
        except AdaptkitError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(ask, range(64))) == 1
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["process.json"]
