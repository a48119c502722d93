"What fine-tuning can be told: each setting against an independent implementation, against its control, and against a power cut."

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.datasets import Batch
from adaptkit.data.images import Augment
from adaptkit.heads.heads import build_model
from adaptkit.models.backbones import load_backbone
from adaptkit.models.sources import seeded
from adaptkit.testing import check_method, toy_model
from adaptkit.training.averaging import Averaged, ema_update, ramp
from adaptkit.training.best import Best
from adaptkit.training.control import Control, EarlyStop, When
from adaptkit.training.finder import RateCurve, find_rate, smoothed
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import NonFiniteLoss, fit
from adaptkit.training.losses import Anchor, balanced_weights, l2_sp, smoothed_loss
from adaptkit.training.methods import Network, parts
from adaptkit.training.mixing import Mix, cut_box, cutmix, draw_share, mixed, mixup
from adaptkit.training.session import Plan, fingerprint

PLAN = Plan(epochs=2, batch_size=8, views=2, augment=Augment(hflip=True), accelerator="cpu")
TUNE = FineTune(depth=3, rate=1e-2, head_rate=1e-2)
OPTIONS = {
    "smoothing": {"smoothing": 0.2},
    "weights": {"weights": (1.0, 3.0)},
    "pull": {"pull": 0.5},
    "mixup": {"mix": Mix("mixup", strength=1.0)},
    "cutmix": {"mix": Mix("cutmix", strength=1.0)},
    "mixup above the cut": {"depth": 1, "mix": Mix("mixup", strength=1.0, where="features")},
    "cutmix above the cut": {"depth": 1, "mix": Mix("cutmix", strength=1.0, where="features")},
    "average": {"average": 0.9},
    "all": {"smoothing": 0.1, "weights": (1.0, 2.0), "pull": 0.1, "mix": Mix("cutmix"), "average": 0.9, "gradual": 1},
}
EVERYTHING = dataclasses.replace(TUNE, **{**OPTIONS["all"], "gradual": 0})


pytestmark = pytest.mark.usefixtures("own_cache")


# --- the settings as parts of the contract ---------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_keeps_the_contract_of_methods(name):
    check_method(dataclasses.replace(TUNE, **OPTIONS[name]))


def test_neutral_settings_change_no_bit(data, model, tmp_path):
    class Plain(FineTune):
        "Cross-entropy by PyTorch and a bare step: fine-tuning without any of the settings."

        def loss(self, network, batch):
            return {"cross-entropy": nn.functional.cross_entropy(network(batch.x), batch.y)}

        def step(self, model, optimizer):
            optimizer.step()

        def finish(self, model):
            return model

    plain = fit(model, data, Plain(**dataclasses.asdict(TUNE)), plan=PLAN, out=tmp_path / "plain")
    ours = fit(model, data, TUNE, plan=PLAN, out=tmp_path / "ours")
    assert [e["loss"] for e in ours.events] == [e["loss"] for e in plain.events]
    assert fingerprint(ours.model) == fingerprint(plain.model)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_changes_the_result_and_the_record(name, data, model, tmp_path):
    method = dataclasses.replace(TUNE, **OPTIONS[name])
    neutral = {f.name: f.default for f in dataclasses.fields(FineTune) if f.name in ("smoothing", "weights", "pull", "mix", "average")}
    control = fit(model, data, dataclasses.replace(method, **neutral), plan=PLAN, out=tmp_path / "control")
    run = fit(model, data, method, plan=PLAN, out=tmp_path / "run")
    assert fingerprint(run.model) != fingerprint(control.model) and run.record["request"] != control.record["request"]
    assert run.record["method"] == {"name": "finetune", **json.loads(json.dumps(method.config))}
    assert run.model.state_dict().keys() == model.state_dict().keys()  # no anchor, no average is left in it


def test_mixing_pixels_needs_them_and_mixing_features_does_not(data, model, tmp_path):
    cuts = {}
    for where in ("pixels", "features"):
        method = FineTune(depth=0, mix=Mix(where=where))
        cuts[where] = fit(model, data, method, plan=dataclasses.replace(PLAN, epochs=1), out=tmp_path / where).record["cut"]
    assert cuts == {"pixels": 0, "features": model.n_stages}


# --- losses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("weights", [None, (0.2, 3.0, 1.0, 0.7)])
def test_smoothed_loss_equals_torch(smoothing, weights):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(7, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([0, 3, 3, 1, 2, 0, 3])
    w = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    ours = smoothed_loss(logits, labels, smoothing=smoothing, weights=w)
    theirs = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing, weight=w)
    assert torch.allclose(ours, theirs, rtol=1e-12)
    (a,), (b,) = torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits)
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_balanced_weights_equal_scikit_learns(data):
    from sklearn.utils.class_weight import compute_class_weight

    few = dataclasses.replace(data.train, items=data.train.items[:9], labels=np.array([0, 1, 0, 0, 1, 0, 0, 0, 0]), names=())
    uneven = dataclasses.replace(data, train=few)
    theirs = compute_class_weight("balanced", classes=np.arange(2), y=few.labels)
    assert balanced_weights(uneven) == pytest.approx(theirs, rel=1e-12)
    with pytest.raises(AdaptkitError, match="no training image shows bright"):
        balanced_weights(dataclasses.replace(data, train=dataclasses.replace(few, labels=np.zeros(9, np.int64))))


def test_weights_of_the_wrong_length_are_refused(data, model, tmp_path):
    with pytest.raises(AdaptkitError, match="weights has 3 numbers, but there are 2 classes: dark, bright"):
        fit(model, data, FineTune(weights=(1.0, 2.0, 3.0)), plan=PLAN, out=tmp_path / "run")


def test_the_pull_has_the_gradient_of_the_paper(data, model):
    method = dataclasses.replace(TUNE, pull=0.25)
    ready = method.prepare(toy_model(data)).requires_grad_(True)
    for p in ready.backbone.stages[0].parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        for p in ready.parameters():
            p.add_(0.1 * torch.ones_like(p))
    start = dict(model.named_parameters())
    batch = Batch(torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 1]), torch.arange(3))
    penalty = method.loss(Network(ready, ready), batch)["l2-sp"]
    penalty.backward()
    expected = 0.0
    for name, p in ready.named_parameters():
        if name.startswith("backbone.") and p.requires_grad:
            assert torch.allclose(p.grad, 0.25 * (p - start[name])), name
            expected += 0.125 * float((p - start[name]).detach().square().sum())
        else:
            assert p.grad is None, name  # frozen, or the head, which has no start worth going back to
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_pull_instead_of_decay_and_on_the_stages_only(model):
    groups = {g.name: g.decay for g in dataclasses.replace(TUNE, decay=0.3, pull=0.1).groups(model)}
    assert groups.pop("head") == 0.3 and set(groups.values()) == {0.0}


def test_a_strong_pull_holds_the_stages_where_they_were(data, model, tmp_path):
    plan = dataclasses.replace(PLAN, epochs=3, optimizer="sgd")
    moved = {}
    for pull in (0.0, 5.0):
        run = fit(model, data, dataclasses.replace(TUNE, pull=pull, decay=0.0), plan=plan, out=tmp_path / str(pull))
        moved[pull] = [r["moved"] for r in run.ledger if r["epoch"] == 2 and r["stage"] != "head"]
    assert all(held < free for held, free in zip(moved[5.0], moved[0.0], strict=True))


def test_the_distance_of_nothing_is_zero():
    frozen = nn.Linear(2, 3).requires_grad_(False)
    assert float(l2_sp(frozen.parameters(), Anchor(frozen).buffers(), pull=1.0)) == 0.0


# --- mixing ----------------------------------------------------------------------------------------


def soft(pairs, classes):
    "The labels of a mixed batch as probabilities, [B, classes]."
    return sum(share * nn.functional.one_hot(y, classes) for share, y in pairs)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_equals_torchvision(kind, seed):
    from torchvision.transforms import v2

    with seeded(seed):
        x, y = torch.rand(5, 3, 17, 24), torch.tensor([0, 2, 1, 1, 3])
        theirs = (v2.MixUp if kind == "mixup" else v2.CutMix)(alpha=1.0, num_classes=4)
        params = {**theirs.make_params([x]), "labels": y, "batch_size": 5}
        images, labels = theirs.transform(x, params), theirs.transform(y, params)
    order = torch.arange(5).roll(1)
    if kind == "mixup":
        share = params["lam"]
        ours = mixup(x, order, share=share)
    else:
        x1, y1, x2, y2 = params["box"]
        ours, share = cutmix(x, order, box=(slice(y1, y2), slice(x1, x2)))
        assert share == pytest.approx(params["lam_adjusted"], abs=1e-9)
    assert torch.allclose(ours, images, atol=1e-6)
    assert torch.allclose(soft([(share, y), (1 - share, y[order])], 4), labels, atol=1e-6)


def test_rectangles_equal_torchvisions():
    from torchvision.transforms import v2

    for seed in range(50):
        theirs, images = v2.CutMix(alpha=1.0, num_classes=4), torch.zeros(2, 3, 17, 24)
        with seeded(seed):
            x1, y1, x2, y2 = theirs.make_params([images])["box"]
        with seeded(seed):  # the same draws, in the order in which torchvision makes them
            share = float(theirs._dist.sample(()))
            column, row = int(torch.randint(24, (1,))), int(torch.randint(17, (1,)))
        assert cut_box(17, 24, share=share, centre=(row, column)) == (slice(y1, y2), slice(x1, x2)), seed


def test_mixed_losses_equal_those_of_soft_labels():
    with seeded(3):
        x, logits, y = torch.rand(6, 3, 8, 9), torch.randn(6, 4), torch.tensor([0, 2, 1, 1, 3, 0])
        _, pairs = mixed(Batch(x, y, torch.arange(6)), Mix("mixup", strength=1.0))
    ours = sum(share * smoothed_loss(logits, labels, smoothing=0.1) for share, labels in pairs)
    theirs = nn.functional.cross_entropy(logits, soft(pairs, 4), label_smoothing=0.1)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_mixing_draws_from_torchs_generator_only():
    batch = Batch(torch.rand(6, 3, 8, 9), torch.arange(6) % 4, torch.arange(6))
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    drawn = []
    for seed in (0, 0, 1):
        with seeded(seed):
            drawn.append(mixed(batch, Mix("cutmix", strength=1.0))[0])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("strength", [0.01, 0.2, 1.0, 100])
def test_shares_are_shares(strength):
    with seeded(0):
        shares = [draw_share(strength) for _ in range(500)]
    assert all(0 <= s <= 1 for s in shares) and np.mean(shares) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(("x", "kind"), [(torch.zeros(4, 9, dtype=torch.int64), "mixup"), (torch.zeros(4, 7, 5), "cutmix")])
def test_what_cannot_be_mixed_is_refused(x, kind):
    with pytest.raises(AdaptkitError, match=f"{kind} needs floats with . dimensions.*at the cut there are"):
        mixed(Batch(x, torch.arange(4), torch.arange(4)), Mix(kind))


def test_maps_too_small_to_cut_from_are_refused_instead_of_left_unmixed():
    batch = Batch(torch.rand(4, 6, 2, 3), torch.arange(4), torch.arange(4))
    with pytest.raises(AdaptkitError, match="cutmix needs maps of 4 x 4.*2 x 3"):
        mixed(batch, Mix("cutmix", where="features"))


# --- averaging ---------------------------------------------------------------------------------------


def test_the_average_equals_torchs():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    with seeded(0):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))
        net(torch.rand(2, 3, 6, 7))
        ours = toy_copy(net)
        theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
        theirs.update_parameters(net)  # its first update copies
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(6):
            net(torch.rand(4, 3, 6, 7)).square().mean().backward()
            optimizer.step()
            ema_update(ours, net, decay=0.8)
            theirs.update_parameters(net)
    for (name, a), b in zip(ours.state_dict().items(), theirs.module.state_dict().values(), strict=True):
        if a.is_floating_point():
            assert torch.allclose(a, b, atol=1e-6), name
    assert int(ours[1].num_batches_tracked) == int(net[1].num_batches_tracked)


def toy_copy(net):
    import copy

    return copy.deepcopy(net)


def test_the_decay_rises_to_what_was_asked():
    assert [round(ramp(t, 0.9), 3) for t in (0, 1, 10, 80, 1000)] == [0.1, 0.182, 0.55, 0.9, 0.9]


def test_frozen_stages_of_the_average_keep_their_bits(data, tmp_path):
    model = build_model(load_backbone("efficientnet_lite0", pretrained=False, size=32), data, seed=0)
    run = fit(model, data, FineTune(depth=1, average=0.7, statistics=False), plan=PLAN, out=tmp_path / "run")
    after = run.model.state_dict()
    still = {k for k, v in model.state_dict().items() if torch.equal(v, after[k])}
    last = f"backbone.stages.{model.n_stages - 1}."
    for name in after:
        learns = name.startswith(("head.", last)) and "running" not in name and "num_batches" not in name
        assert (name in still) == (not learns), name


def test_validation_measures_the_average_that_is_kept(data, model, tmp_path):
    run = fit(model, data, dataclasses.replace(TUNE, average=0.9), plan=PLAN, out=tmp_path / "run")
    from adaptkit.evaluation.evaluate import predict

    assert float(predict(run.model, data.valid).losses.mean()) == pytest.approx(run.history[-1]["valid_loss"], rel=1e-4)
    assert run.model.preprocess == {"size": model.size, "fit": "squash"}


def test_a_stage_that_somebody_unfreezes_is_averaged_too(data, model, tmp_path):
    lowest = model.backbone.stage_names[0]
    control = Control(replay=[{"step": 3, "name": "unfreeze", "value": lowest}])
    run = fit(model, data, dataclasses.replace(TUNE, depth=1, average=0.5, pull=0.1), plan=PLAN, control=control, out=tmp_path / "run")
    assert not torch.equal(parts(run.model)[lowest].state_dict()["0.weight"], parts(model)[lowest].state_dict()["0.weight"])


def test_in_training_mode_the_learner_answers_and_else_the_average(model):
    both = Averaged(toy_copy(model))
    with torch.no_grad():
        for p in both.head.parameters():
            p.add_(1.0)
    x = torch.rand(2, 3, both.size, both.size)
    both.eval()
    average = both(x)
    both.head.train()
    assert not torch.allclose(both(x), average) and torch.equal(both.eval()(x), average)


# --- power cuts --------------------------------------------------------------------------------------

SCRIPT = """
import sys
from adaptkit.testing import toy_data, toy_model
from adaptkit.training.control import When
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.mixing import Mix
from adaptkit.training.session import Plan, fingerprint
import torch
torch.set_num_threads(1)

class Slow:
    on = (When.STEP,)
    def __call__(self, event):
        print("step", event.step, flush=True)
        sys.stdin.readline() if event.step == int(sys.argv[2]) else None

data = toy_data(48)
plan = Plan(epochs=3, batch_size=8, views=2, checkpoint_every=4, accelerator="cpu", keep="best")
method = FineTune(depth=3, rate=1e-2, head_rate=1e-2, average=0.9, pull=0.1, mix=Mix("cutmix", strength=1.0), smoothing=0.1)
run = fit(toy_model(data), data, method, plan=plan, observers=[Slow()], out=sys.argv[1], exists="resume")
print("fingerprint", fingerprint(run.model), run.record["kept_epoch"], [e["loss"] for e in run.events])
"""


def killed_at(step: int, folder: Path, tmp_path: Path) -> str:
    "Run the script, which waits at a step to be killed; 0: let it end. Returns its last line."
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen([sys.executable, str(script), str(folder), str(step)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    last = ""
    for line in process.stdout:
        last = line.strip()
        if last == f"step {step}":
            os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == (-signal.SIGKILL if step else 0)
    return last


@pytest.mark.slow
def test_killed_and_resumed_with_all_settings_gives_the_same_bits(tmp_path):
    whole = killed_at(0, tmp_path / "whole", tmp_path)
    killed_at(15, tmp_path / "cut", tmp_path)  # in the third epoch, when one has been kept
    assert killed_at(0, tmp_path / "cut", tmp_path) == whole and whole.startswith("fingerprint")


class PowerCut:
    "Raises after so many batches."

    on = (When.STEP,)

    def __init__(self, at):
        self.at = at

    def __call__(self, event):
        if event.step == self.at:
            raise RuntimeError("power cut")


@pytest.mark.parametrize("name", ["pull", "mixup", "cutmix above the cut", "average"])
def test_each_setting_survives_a_power_cut(name, data, model, tmp_path):
    method, plan = dataclasses.replace(TUNE, **OPTIONS[name]), dataclasses.replace(PLAN, checkpoint_every=4)
    whole = fit(model, data, method, plan=plan, observers=[], out=tmp_path / "whole")
    with pytest.raises(RuntimeError):
        fit(model, data, method, plan=plan, observers=[PowerCut(9)], out=tmp_path / "cut")
    again = fit(model, data, method, plan=plan, observers=[], out=tmp_path / "cut", exists="resume")
    assert [e["loss"] for e in again.events] == [e["loss"] for e in whole.events]
    assert fingerprint(again.model) == fingerprint(whole.model)


# --- the best epoch ----------------------------------------------------------------------------------


@pytest.fixture
def turning(data):
    "A task whose validation loss turns: half of the training labels are wrong."
    labels = data.train.labels.copy()
    labels[::2] = 1 - labels[::2]
    labels[1::8] = 1 - labels[1::8]
    return dataclasses.replace(data, train=dataclasses.replace(data.train, labels=labels))


BEST = dataclasses.replace(PLAN, epochs=6, views=1, keep="best")


def test_the_best_epoch_is_what_is_kept(turning, model, tmp_path):
    best = fit(model, turning, TUNE, plan=BEST, out=tmp_path / "best")
    losses = [e["valid_loss"] for e in best.history]
    kept = losses.index(min(losses))
    assert best.record["kept_epoch"] == kept < 5, "this test needs a run whose last epoch isn't its best"
    step = (kept + 1) * 6
    upto = fit(model, turning, TUNE, plan=dataclasses.replace(BEST, keep="last"), out=tmp_path / "last", control=Control(replay=[{"step": step, "name": "stop", "value": "here"}]))
    assert fingerprint(best.model) == fingerprint(upto.model)
    last = fit(model, turning, TUNE, plan=dataclasses.replace(BEST, keep="last"), out=tmp_path / "to the end")
    assert last.record["kept_epoch"] == 5 and last.history[-1]["valid_loss"] == losses[-1]
    assert fingerprint(last.model) != fingerprint(best.model)


def test_early_stop_with_the_best_epoch(turning, model, tmp_path):
    run = fit(model, turning, TUNE, plan=BEST, observers=[EarlyStop(patience=1)], out=tmp_path / "run")
    losses = [e["valid_loss"] for e in run.history]
    assert run.record["status"] == "stopped" and run.record["kept_epoch"] == losses.index(min(losses)) == len(losses) - 2


def test_a_power_cut_after_the_best_epoch_loses_nothing(turning, model, tmp_path):
    whole = fit(model, turning, TUNE, plan=BEST, observers=[], out=tmp_path / "whole")
    with pytest.raises(RuntimeError):
        fit(model, turning, TUNE, plan=BEST, observers=[PowerCut(33)], out=tmp_path / "cut")
    again = fit(model, turning, TUNE, plan=BEST, observers=[], out=tmp_path / "cut", exists="resume")
    assert fingerprint(again.model) == fingerprint(whole.model) and again.record["kept_epoch"] == whole.record["kept_epoch"]


def test_the_average_of_the_best_epoch_is_kept(turning, model, tmp_path):
    from adaptkit.evaluation.evaluate import predict

    run = fit(model, turning, dataclasses.replace(TUNE, average=0.8), plan=BEST, out=tmp_path / "run")
    best = min(e["valid_loss"] for e in run.history)
    assert float(predict(run.model, turning.valid).losses.mean()) == pytest.approx(best, rel=1e-4)


def test_a_run_without_an_epoch_keeps_what_there_is(data, model, tmp_path):
    control = Control()
    control.stop("at once")
    run = fit(model, data, TUNE, plan=BEST, control=control, out=tmp_path / "run")
    assert fingerprint(run.model) == fingerprint(model) and run.record["kept_epoch"] is None


def test_not_a_number_is_never_the_best():
    best, net = Best(), nn.Linear(1, 1)
    best.offer(0, float("nan"), net)
    assert best.epoch == -1 and best.weights == {}


# --- the finder --------------------------------------------------------------------------------------


def test_the_finder_leaves_everything_alone(data, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, mode = fingerprint(model), model.training
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    curve = find_rate(model, data, TUNE, plan=PLAN, steps=20)
    assert torch.equal(torch.rand(3), expected)
    assert fingerprint(model) == before and model.training == mode
    assert list(tmp_path.iterdir()) == []  # no run folder, no cache
    assert len(curve.factors) == len(curve.losses) and curve.rates["head"] == 1e-2


def test_the_finder_is_repeatable_and_uses_the_cache(data, tmp_path):
    model = build_model(load_backbone("efficientnet_lite0", pretrained=False, size=32), data, seed=0)
    method = FineTune(depth=0)
    plan = dataclasses.replace(PLAN, views=1)
    live, again = (find_rate(model, data, method, plan=plan, steps=12) for _ in range(2))
    cached = find_rate(model, data, method, plan=plan, steps=12, cache=tmp_path / "features")
    assert live == again and list((tmp_path / "features").glob("*.npy"))
    assert cached.losses == pytest.approx(live.losses, rel=1e-2)


@pytest.mark.parametrize("method", [FineTune(depth=2, gradual=3, average=0.9, pull=0.1), FineTune(depth=3, mix=Mix("cutmix"))])
def test_the_finder_takes_every_setting(method, data, model):
    curve = find_rate(model, data, method, plan=PLAN, steps=15)
    assert 1e-3 <= curve.suggestion <= 1e3


def test_the_finder_stops_when_it_explodes(data, model):
    curve = find_rate(model, data, TUNE, plan=dataclasses.replace(PLAN, optimizer="sgd"), high=1e6, steps=60)
    assert len(curve.factors) < 60 and max(curve.losses) > 2 * curve.losses[0]


def test_a_broken_model_is_an_error_for_the_finder_too(data, model):
    with torch.no_grad():
        next(model.head.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteLoss, match="step 0"):
        find_rate(model, data, TUNE, plan=PLAN)


def valley(noise: float, seed: int, *, steps: int = 100) -> RateCurve:
    "A made-up curve: flat, falling around factor 1, lowest at 10, exploding beyond."
    factors = np.geomspace(1e-3, 1e3, steps)
    x = np.log10(factors)
    losses = 0.7 - 0.5 / (1 + np.exp(-4 * x)) + np.exp(3 * (x - 1.8))
    losses += noise * np.random.default_rng(seed).normal(size=steps)
    rows = losses < 3
    return RateCurve(tuple(factors[rows]), tuple(losses[rows]), {"head": 1e-3})


def test_the_suggestion_lies_where_the_curve_falls():
    assert 0.4 < valley(0.0, 0).suggestion < 4


@pytest.mark.parametrize("noise", [0.02, 0.06, 0.1])
def test_noise_does_not_move_the_suggestion_far(noise):
    found = [valley(noise, seed).suggestion for seed in range(40)]
    assert np.mean([0.2 < f < 8 for f in found]) >= 0.95, sorted(found)


def test_a_curve_that_never_falls_says_so():
    with pytest.raises(AdaptkitError, match="never falls"):
        _ = RateCurve(tuple(np.geomspace(0.1, 100, 20)), tuple(np.linspace(0.5, 2, 20)), {"head": 1e-3}).suggestion


@pytest.mark.parametrize(("setting", "words"), [({"low": 0}, "low=0"), ({"low": 2.0, "high": 1.0}, "high=1.0"), ({"steps": 2}, "steps=2")])
def test_nonsense_for_the_finder_is_refused_by_name(setting, words, data, model):
    with pytest.raises(AdaptkitError, match=words):
        find_rate(model, data, TUNE, plan=PLAN, **setting)


def test_smoothing_a_curve_invents_nothing_at_its_ends():
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert smoothed(values, 2) == pytest.approx(values) and smoothed(values, 0) == values
    assert smoothed([0.0, 3.0, 0.0, 0.0], 1) == [0.0, 1.0, 1.0, 0.0]


def test_faster_scales_both_rates():
    quick = TUNE.faster(0.5)
    assert quick.speed == 0.5 and quick.depth == TUNE.depth


# --- bad input ---------------------------------------------------------------------------------------

NONSENSE = [
    {"smoothing": -0.1},
    {"smoothing": 1.0},
    {"smoothing": float("nan")},
    {"weights": (1.0, -2.0)},
    {"weights": (1.0, 0.0)},
    {"weights": (1.0, float("inf"))},
    {"pull": -1},
    {"pull": float("inf")},
    {"average": 1.0},
    {"average": -0.5},
    {"mix": "mixup"},
    {"rate": float("nan")},
    {"decay": float("inf")},
]


@pytest.mark.parametrize("setting", NONSENSE, ids=str)
def test_nonsense_is_refused_by_name(setting):
    with pytest.raises(AdaptkitError, match=next(iter(setting))):
        FineTune(**setting)


@pytest.mark.parametrize(("setting", "words"), [({"kind": "mixpu"}, "mixup"), ({"where": "pixel"}, "pixels"), ({"strength": 0}, "strength=0"), ({"strength": 1e9}, "strength")])
def test_a_nonsense_mix_is_refused_by_name(setting, words):
    with pytest.raises(AdaptkitError, match=words):
        Mix(**setting)


def test_a_plan_keeps_the_last_or_the_best():
    with pytest.raises(AdaptkitError, match="Did you mean 'best'"):
        Plan(keep="bets")
