"Adversarial training: losses against formulas written independently, radius 0 as control, resumed runs to the bit, and a guard that bites."

from __future__ import annotations

import copy
import dataclasses
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.datasets import Batch
from adaptkit.data.images import Augment
from adaptkit.data.sources import load_data
from adaptkit.heads.heads import build_model
from adaptkit.models.backbones import load_backbone
from adaptkit.models.sources import seeded
from adaptkit.robustness.adversarial_training import AdversarialTraining, attacked, fast_training, step_generator
from adaptkit.robustness.attacks import FGSM, PGD, robust_accuracy
from adaptkit.robustness.awp import WeightPerturbation, rehearsal, worst_weights
from adaptkit.robustness.free import FreeTraining
from adaptkit.robustness.guard import Guarded, has_fallen, held_out_batch, standing, watch_of
from adaptkit.robustness.split_norm import AdvProp, SplitNorm, adversarial_norms, norms_of, split_norms
from adaptkit.robustness.trades import Mart, Trades, divergence, most_different, unsure, wrong_class_loss
from adaptkit.testing import check_method, toy_data, toy_model
from adaptkit.training.control import Control, Stop
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.methods import METHODS, Network
from adaptkit.training.mixing import Mix
from adaptkit.training.session import Plan, fingerprint

PLAN = Plan(epochs=2, batch_size=8, views=2, augment=Augment(hflip=True), accelerator="cpu")
LONGER = dataclasses.replace(PLAN, epochs=5)
TUNE = FineTune(depth=3, rate=1e-2, head_rate=1e-2)
WEAK = PGD(0.03, steps=2)


pytestmark = pytest.mark.usefixtures("own_cache")


def methods(data) -> dict:
    "One of each kind, cheap."
    return {
        "adversarial": AdversarialTraining(WEAK, TUNE),
        "fast": fast_training(0.03, TUNE),
        "trades": Trades(WEAK, TUNE, beta=2.0),
        "mart": Mart(WEAK, TUNE),
        "free": FreeTraining(0.03, TUNE, replays=2),
        "awp": WeightPerturbation(WEAK, TUNE, gamma=0.002),
        "guarded": Guarded(fast_training(0.03, TUNE), data.valid, probe=WEAK, every=3, images=16),
    }


NAMES = list(methods(toy_data(48)))


# --- the losses, from the papers' formulas ---------------------------------------------------------


def logits_of(seed: int, rows: int = 7, classes: int = 5) -> torch.Tensor:
    return 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 4, 2, 2, 1, 3, 0])


def test_divergence_is_that_of_torch_distributions():
    p, q = (torch.distributions.Categorical(logits=logits_of(s)) for s in (0, 1))
    assert torch.allclose(divergence(logits_of(0), logits_of(1)), torch.distributions.kl_divergence(p, q), atol=1e-5)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_mart_is_what_the_paper_writes():
    "Equation 10 to 12 of Wang et al. (2020), by hand in numpy with 64 bits."
    clean, moved, y = logits_of(2), logits_of(3), LABELS
    p, q, rows = softmax(clean.double().numpy()), softmax(moved.double().numpy()), np.arange(len(LABELS))
    wrong = q.copy()
    wrong[rows, y] = -1
    bce = -np.log(q[rows, y]) - np.log(1 - wrong.max(1))
    weighted = (p * np.log(p / q)).sum(1) * (1 - p[rows, y])
    expected = bce.mean() + 5.0 * weighted.mean()

    answers = [moved.requires_grad_(), clean.requires_grad_()]
    network = Network(lambda x: answers.pop(0), toy_model(toy_data(48)))
    method = Mart(dataclasses.replace(WEAK), FineTune(), beta=5.0)
    x = torch.rand(7, 3, 4, 4)
    quiet = type("Still", (), {"name": "still", "config": {}, "norm": None, "eps": None, "perturb": lambda self, m, x, y, generator=None: x})()
    object.__setattr__(method, "attack", quiet)
    losses = method.loss(network, Batch(x, y, torch.arange(7)))
    assert set(losses) == {"cross-entropy", "wrong class", "mart"}
    assert abs(float(sum(losses.values()).detach()) - expected) < 1e-5


def test_wrong_class_loss_stays_finite_where_a_probability_rounds_to_one():
    z = torch.tensor([[0.0, 80.0, 0.0], [0.0, 0.0, 90.0]], requires_grad=True)
    loss = wrong_class_loss(z, torch.tensor([0, 0]))
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and float(loss.min().detach()) > 70 and bool(z.grad.isfinite().all())
    assert torch.allclose(unsure(z, torch.tensor([1, 2])), torch.zeros(2), atol=1e-6)


def test_trades_attack_is_that_of_the_authors():
    "Their loop (github.com/yaodongyu/TRADES), written anew: start beside the image, climb the divergence by its sign, project."
    net, y = toy_model(toy_data(48)).eval().double(), torch.tensor([0, 1, 1, 0, 1])  # in 64 bits: beside the image the slope is tiny
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    eps, steps, size = 0.05, 6, 0.02
    found = most_different(PGD(eps, steps=steps, step=size), Network(net, net), Batch(x, y, y), generator=torch.Generator().manual_seed(3))
    z = (x + 0.001 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))).clamp(0, 1)
    criterion = nn.KLDivLoss(reduction="sum")
    for _ in range(steps):
        z.requires_grad_()
        slope = torch.autograd.grad(criterion(net(z).log_softmax(1), net(x).softmax(1)), z)[0]
        z = torch.min(torch.max(z.detach() + size * slope.sign(), x - eps), x + eps).clamp(0, 1)
    assert float(((found - z).abs() > 1e-9).double().mean()) < 1e-4


def test_trades_adds_beta_times_the_divergence(model):
    x, y = torch.rand(6, 3, 32, 32), torch.tensor([0, 1, 0, 1, 1, 0])
    network, batch = Network(model, model), Batch(x, y, y)
    with seeded(5):
        losses = Trades(WEAK, TUNE, beta=3.0).loss(network, batch)
    with seeded(5):
        moved = most_different(WEAK, network, batch, generator=step_generator())
    p, q = (torch.distributions.Categorical(logits=model(z)) for z in (x, moved))
    assert torch.allclose(losses["trades"], 3.0 * torch.distributions.kl_divergence(p, q).mean(), atol=1e-6)
    assert torch.equal(losses["cross-entropy"], nn.functional.cross_entropy(model(x), y))


def test_weights_move_by_their_share_and_uphill():
    w, g = [torch.randn(4, 3, 2), torch.randn(6, 5)], [torch.randn(4, 3, 2), torch.zeros(6, 5)]
    moves = worst_weights(w, g, gamma=0.1)
    assert torch.allclose(moves[0], 0.1 * w[0].norm() * g[0] / g[0].norm()) and not moves[1].any()


# --- what training attacks, and how -------------------------------------------------------------------


def test_training_attacks_every_image_to_the_end():
    assert AdversarialTraining(PGD(0.1, steps=7)).attack.early_stop is False
    assert AdversarialTraining(FGSM(0.1)).attack == FGSM(0.1)


def test_an_attack_in_a_loss_leaves_everything_as_it_was(data):
    net = build_model(load_backbone("efficientnet_lite0", pretrained=False, size=64), data, seed=0)
    net.train()
    net.backbone.stages[0].eval().requires_grad_(False)
    modes, learning = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = torch.rand(3, 3, 64, 64), torch.tensor([0, 1, 1])
    with seeded(1):
        before = torch.get_rng_state()
        moved = attacked(WEAK, Network(net, net), Batch(x, y, y))
        assert torch.equal(before, torch.get_rng_state())
    assert [m.training for m in net.modules()] == modes and [p.requires_grad for p in net.parameters()] == learning
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and all(p.grad is None for p in net.parameters())
    assert 0 < float((moved.x - x).abs().max()) <= 0.03 + 1e-6


def test_attack_numbers_belong_to_the_step_and_to_nobody_else():
    def draw(seed: int) -> torch.Tensor:
        with seeded(seed):
            return torch.rand(4, generator=step_generator())

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    with seeded(3):
        assert not torch.equal(draw(3), torch.rand(4))


def test_the_network_that_learns_is_attacked_not_its_average(data, model):
    method = AdversarialTraining(WEAK, dataclasses.replace(TUNE, average=0.9))
    ready = method.prepare(copy.deepcopy(model))
    with torch.no_grad():
        for p in ready.average.parameters():
            p.zero_()  # an average without a gradient: an attack on it would go nowhere
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    with seeded(0):
        moved = attacked(WEAK, Network(ready, ready), Batch(x, y, y)).x
    with seeded(0):
        expected = attacked(WEAK, Network(model, model), Batch(x, y, y)).x
    assert torch.equal(moved, expected)


# --- the contract, the control, and the record -----------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_keeps_the_contract_of_methods(name):
    toy = toy_data()
    check_method(methods(toy)[name], data=toy)


@pytest.mark.parametrize(
    "nothing",
    [
        lambda base: AdversarialTraining(PGD(0.0, steps=3), base),
        lambda base: AdversarialTraining(FGSM(0.0), base),
        lambda base: fast_training(0.0, base),
        lambda base: Trades(WEAK, base, beta=0.0),
        lambda base: FreeTraining(0.0, base, replays=1),
        lambda base: WeightPerturbation(PGD(0.0, steps=1), base, gamma=0.0),
    ],
    ids=["pgd", "fgsm", "fast", "trades", "free", "awp"],
)
def test_radius_zero_is_the_method_inside_to_the_bit(nothing, data, model, tmp_path):
    rich = dataclasses.replace(TUNE, smoothing=0.1, weights=(1.0, 2.0), pull=0.1, average=0.9)
    runs = [fit(model, data, m, plan=PLAN, out=tmp_path / str(i), observers=[]) for i, m in enumerate((rich, nothing(rich)))]
    assert fingerprint(runs[0].model) == fingerprint(runs[1].model)


def test_radius_zero_is_the_method_inside_also_with_dropout_and_batchnorm(data, tmp_path):
    with seeded(0):
        backbone = load_backbone("timm/test_resnet", pretrained=False, size=32)
    net = build_model(backbone, data, head="mlp", dropout=0.5, seed=0)
    kinds = {type(m).__name__ for m in net.modules()}
    assert "Dropout" in kinds and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    everything = len(net.backbone.stages)  # were some frozen, fine-tuning would read their outputs from the cache, rounded to 16 bits
    base, plan = FineTune(depth=everything, rate=1e-3), dataclasses.replace(PLAN, epochs=1)
    runs = [fit(net, data, m, plan=plan, out=tmp_path / str(i), observers=[]) for i, m in enumerate((base, AdversarialTraining(PGD(0.0, steps=2), base)))]
    assert fingerprint(runs[0].model) == fingerprint(runs[1].model)


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_goes_on_to_the_same_bits(name, data, model, tmp_path):
    method, plan = methods(data)[name], dataclasses.replace(PLAN, checkpoint_every=4)
    whole = fit(model, data, method, plan=plan, out=tmp_path / "whole", observers=[])

    class Cut:
        "Pulls the plug between two checkpoints."

        from adaptkit.training.control import When

        on = (When.STEP,)

        def __call__(self, event):
            if event.step == 10:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, data, method, plan=plan, out=tmp_path / "cut", observers=[Cut()])
    again = fit(model, data, method, plan=plan, out=tmp_path / "cut", exists="resume", observers=[])
    assert fingerprint(again.model) == fingerprint(whole.model)
    told = [[{k: v for k, v in e.items() if k != "seconds"} for e in run.events] for run in (whole, again)]
    assert told[0] == told[1]


def test_the_record_tells_attack_and_method_inside(data, model, tmp_path):
    run = fit(model, data, AdversarialTraining(WEAK, TUNE), plan=PLAN, out=tmp_path / "run", observers=[])
    told = json.loads((run.folder / "run.json").read_text())
    assert told["method"]["attack"]["eps"] == 0.03 and told["method"]["base"]["depth"] == 3 and told["cut"] == 0
    with pytest.raises(AdaptkitError, match="holds a run with other"):
        fit(model, data, AdversarialTraining(PGD(0.04, steps=2), TUNE), plan=PLAN, out=tmp_path / "run", exists="resume", observers=[])


def test_names_lead_to_methods():
    assert {"adversarial", "fast", "trades", "mart", "free", "awp"} <= set(METHODS)
    points = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]["adaptkit.method"]
    for name, place in points.items():
        module, attribute = place.split(":")
        assert getattr(__import__(module, fromlist=[attribute]), attribute) is METHODS[name]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: AdversarialTraining(8 / 255), "give one, e.g. PGD"),
        (lambda d: AdversarialTraining(PGD(8)), "8/255, not 8"),
        (lambda d: Trades(FGSM(0.1)), "give a PGD"),
        (lambda d: Mart(PGD(0.1), beta=-1.0), "at least 0"),
        (lambda d: FreeTraining(0.1, replays=0), "at least once"),
        (lambda d: FreeTraining(-0.1), "at least 0"),
        (lambda d: WeightPerturbation(gamma=2.0), "share of the weights' length"),
        (lambda d: fast_training(0.1, stride=0.0), "above 0"),
        (lambda d: Guarded(TUNE, d.valid, images=2), "at least 8"),
        (lambda d: Guarded(TUNE, d.valid, every=0), "at least 1"),
        (lambda d: Guarded(TUNE, d.valid, drop=0.0), "above 0"),
        (lambda d: AdversarialTraining(WEAK, FineTune(mix=Mix("mixup"))).prepare(toy_model(d)), "Leave mix out"),
        (lambda d: AdversarialTraining(WEAK).prepare(build_model("bag_of_embeddings", d)), "choose a backbone for images"),
        (lambda d: AdvProp(WEAK, TUNE).prepare(toy_model(d)), "none of the parts that learn has one"),
    ],
)
def test_nonsense_is_refused(make, says, data):
    with pytest.raises(AdaptkitError, match=says):
        make(data)


# --- the guard ----------------------------------------------------------------------------------------


def test_a_fall_is_a_large_and_certain_loss():
    assert has_fallen(0, 20, 64, drop=0.5) and not has_fallen(12, 20, 64, drop=0.5)
    assert not has_fallen(0, 3, 64, drop=0.5) and not has_fallen(0, 64, 64, drop=1.0)


class Saboteur(FineTune):
    "Ruins the weights in one step, as catastrophic overfitting does in a few."

    def step(self, model, optimizer):
        super().step(model, optimizer)
        if int(watch_of(model).steps) == 19:
            with torch.no_grad():
                model.head.weight.neg_() if hasattr(model.head, "weight") else [p.neg_() for p in model.head.parameters()]


def test_the_guard_goes_back_and_stops(data, model, tmp_path):
    guard = Guarded(Saboteur(depth=3, rate=1e-2, head_rate=1e-2), data.valid, probe=PGD(0.01, steps=2), every=2, images=16)
    run = fit(model, data, guard, plan=LONGER, out=tmp_path / "run", observers=[])
    looks = [e["held_out_robust"] for e in run.events if "held_out_robust" in e]
    assert run.record["status"] == "stopped" and "catastrophic overfitting" in run.record["why"]
    assert [(a["name"], a["step"]) for a in run.record["actions"]] == [("stop", 20)]
    batch = held_out_batch(data.valid, run.model, 16)
    assert standing(run.model, batch, guard.probe) == round(max(looks) * 16) > 8
    again = fit(model, data, guard, plan=LONGER, control=Control(replay=run.record["actions"]), out=tmp_path / "again", observers=[])
    assert fingerprint(again.model) == fingerprint(run.model)


def test_the_cure_takes_over(data, model, tmp_path):
    class Cure(FineTune):
        def loss(self, network, batch):
            asked.append(int(watch_of(network.model).steps))
            return super().loss(network, batch)

    asked: list[int] = []
    bad, good = Saboteur(depth=3, rate=1e-2, head_rate=1e-2), Cure(depth=3, rate=1e-2, head_rate=1e-2)
    guard = Guarded(bad, data.valid, probe=PGD(0.01, steps=2), cure=good, every=2, images=16)
    run = fit(model, data, guard, plan=LONGER, out=tmp_path / "run", observers=[])
    assert run.record["status"] == "done" and asked == list(range(20, 30))
    assert [e["fallen"] for e in run.events if "fallen" in e] == [0.0] * 9 + [1.0] * 6


def test_a_step_may_tell_numbers_or_stop(data, model, tmp_path):
    class Talker(FineTune):
        def step(self, net, optimizer):
            super().step(net, optimizer)
            steps.append(1)
            return Stop("enough") if len(steps) == 5 else {"told": float(len(steps))}

    steps: list[int] = []
    run = fit(model, data, Talker(depth=3), plan=dataclasses.replace(PLAN, accumulate=2), out=tmp_path / "run", observers=[])
    assert [e["told"] for e in run.events if "told" in e] == [1.0, 2.0, 3.0, 4.0]
    assert [e["step"] for e in run.events if "told" in e] == [2, 4, 6, 8]
    assert run.record["why"] == "enough" and len(steps) == 5


@pytest.mark.slow
def test_catastrophic_overfitting_happens_and_the_guard_catches_it(tmp_path):
    "One step that is too long: the loss falls, clean accuracy rises, robustness goes; with a guard it doesn't."
    data, eps = load_data("digits"), 0.17
    usual, judge = FineTune(depth=3, rate=2e-2, head_rate=2e-2), PGD(eps, steps=10)
    bad = fast_training(eps, usual, stride=2.0)
    eyes = {"held_out": data.valid, "probe": PGD(eps, steps=8), "every": 18}
    seen = False
    for seed in range(6):  # it strikes often, not always, and the guard's few images can miss a mild fall
        model = build_model("small_cnn", data, size=18, seed=seed)
        plan = Plan(epochs=10, batch_size=32, views=1, augment=Augment(hflip=False), seed=seed, accelerator="cpu")
        fallen = fit(model, data, bad, plan=plan, out=tmp_path / f"fallen {seed}", observers=[])
        broken = robust_accuracy(fallen.model, data, judge, n=200)
        if broken.accuracy >= 0.15:
            continue
        caught = fit(model, data, Guarded(bad, cure=AdversarialTraining(PGD(eps, steps=3), usual), **eyes), plan=plan, out=tmp_path / f"caught {seed}", observers=[])
        whole = robust_accuracy(caught.model, data, judge, n=200)
        if seen := max(e.get("fallen", 0) for e in caught.events) >= 1:
            break
    assert seen and fallen.history[-1]["loss"] < fallen.history[3]["loss"] and fallen.history[-1]["valid_accuracy"] > 0.85
    assert broken.high < whole.low, (broken, whole)


# --- weight perturbation, free training, split BatchNorm ---------------------------------------------


def test_weights_come_home_to_the_bit(data, model):
    method = WeightPerturbation(WEAK, TUNE, gamma=0.1)
    ready = method.prepare(copy.deepcopy(model)).train()
    before = {k: v.clone() for k, v in ready.state_dict().items()}
    method.loss(Network(ready, ready), Batch(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]), torch.arange(4)))
    away = [k for k, v in ready.state_dict().items() if not torch.equal(v, before[k])]
    assert away and all(ready.state_dict()[k].ndim > 1 for k in away)
    ready.get_submodule("home").come_back()
    assert all(torch.equal(v, before[k]) for k, v in ready.state_dict().items())


def test_a_rehearsal_leaves_no_trace():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before, chance = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    with rehearsal(net):
        net(torch.zeros(4, 3, 8, 6) + 3)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and torch.equal(chance, torch.get_rng_state())


def test_free_training_is_the_loop_of_the_paper(data, model, tmp_path):
    "The same numbers from twenty lines without the kit: SGD, one epoch, delta moved by the gradient of the same backward pass."
    plan = Plan(epochs=1, batch_size=16, views=1, augment=Augment(hflip=False), optimizer="sgd", accelerator="cpu")
    method = FreeTraining(0.05, FineTune(depth=3, rate=1e-2, head_rate=1e-2, decay=0.0), replays=3)
    batches = []

    class Spy(FreeTraining):
        def loss(self, network, batch):
            losses = super().loss(network, batch)
            batches.append((batch.x, batch.y, network.model.get_submodule("replay").kept[0][2].detach().clone()))
            return losses

    run = fit(model, data, Spy(method.eps, method.base, replays=3), plan=plan, out=tmp_path / "run", observers=[])
    rates = [e["rate"] for e in run.events if e["when"] == "step"]
    net = copy.deepcopy(model).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    for (x, y, delta), rate in zip(batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = 1e-2 * rate
        for _ in range(3):
            delta = delta.detach().requires_grad_()
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x + delta), y).backward()
            optimizer.step()
            delta = ((x + (delta.detach() + 0.05 * delta.grad.sign()).clamp(-0.05, 0.05)).clamp(0, 1) - x)
    for a, b in zip(net.parameters(), run.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_split_norms_keep_two_books():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    split_norms(net)
    assert norms_of(net) == [] and isinstance(net[1], SplitNorm) and split_norms(net) == 0
    net(torch.ones(2, 3, 6, 5))
    with pytest.raises(RuntimeError), adversarial_norms(net):
        net(torch.ones(2, 3, 6, 5))
        raise RuntimeError
    net(torch.ones(2, 3, 6, 5))
    assert (int(net[1].main.num_batches_tracked), int(net[1].other.num_batches_tracked)) == (2, 1)


def test_advprop_attacks_and_learns_with_its_own_norms(data, tmp_path):
    net = build_model(load_backbone("efficientnet_lite0", pretrained=False, size=64), data, seed=0)
    run = fit(net, data, AdvProp(PGD(0.03, steps=1), FineTune(depth=1)), plan=dataclasses.replace(PLAN, epochs=1), out=tmp_path / "run", observers=[])
    assert run.model.state_dict().keys() == net.state_dict().keys()
    method = AdvProp(PGD(0.03, steps=1), FineTune(depth=1))
    ready = method.prepare(copy.deepcopy(net)).eval()
    pair = next(m for m in ready.modules() if isinstance(m, SplitNorm))
    seen = []
    for layer in (pair.main, pair.other):
        layer.register_forward_hook(lambda m, a, o: seen.append(m is pair.other))
    losses = method.loss(Network(ready, ready), Batch(torch.rand(3, 3, 64, 64), torch.tensor([0, 1, 0]), torch.arange(3)))
    assert seen == [True, True, False] and set(losses) == {"cross-entropy", "adversarial cross-entropy"}
