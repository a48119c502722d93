"""Learning from features: the losses against published formulas, stages in pairs against everything tried, and the method."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from torch import nn

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.datasets import Batch
from adaptkit.data.images import Augment
from adaptkit.data.sources import load_data
from adaptkit.distillation import feature_losses
from adaptkit.distillation.distillation import Distillation
from adaptkit.distillation.feature_losses import FEATURE_LOSSES, Contrastive, Hints, Relational, check_feature_loss
from adaptkit.distillation.features import FeatureDistillation, Witness, overheard
from adaptkit.distillation.pairs import (
    aligned,
    as_map,
    draw_pairs,
    in_parts,
    listening,
    measured,
    points,
    projections,
    seen,
    stage_pairs,
)
from adaptkit.heads.heads import build_model, load_model
from adaptkit.models.backbones import load_backbone
from adaptkit.models.tokens import WordDropout
from adaptkit.robustness.adversarial_training import AdversarialTraining
from adaptkit.robustness.attacks import PGD
from adaptkit.testing import check_method
from adaptkit.training.beside import Companion, model_fingerprint
from adaptkit.training.control import When
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.methods import Network
from adaptkit.training.mixing import Mix
from adaptkit.training.session import Plan, fingerprint

ROOT = Path(__file__).parents[1]
PLAN = Plan(epochs=2, batch_size=12, views=2, augment=Augment(hflip=True), accelerator="cpu")
TUNE = FineTune(depth=3, rate=1e-2, head_rate=1e-2)
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def teacher(data):
    "A small network of another kind and size."
    return build_model(load_backbone("timm/test_resnet", pretrained=False, size=48, seed=4), data, seed=4)


def maps(b: int, c: int, d: int, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    "Random maps of a student (with a gradient) and a teacher."
    rng = torch.Generator().manual_seed(1000 * b + c)
    s, t = (torch.randn(b, n, h, w, generator=rng) for n in (c, d))
    return s.requires_grad_(), t


# --- the published formulas, in numpy, image by image -----------------------------------------------------


def romero(s, t):
    return ((s - t) ** 2).sum() / s.size


def zagoruyko(s, t):
    def q(x):
        each = (x**2).sum(1).reshape(len(x), -1)
        return each / np.sqrt((each**2).sum(1, keepdims=True))

    return ((q(s) - q(t)) ** 2).mean()


def tung(s, t):
    def g(x):
        q = np.array([[(a * b).sum() for b in x] for a in x])
        return q / np.linalg.norm(q, axis=1, keepdims=True)

    return np.linalg.norm(g(s) - g(t), "fro") ** 2 / len(s) ** 2


def huber(a, b):
    d = np.abs(a - b)
    return np.where(d < 1, 0.5 * d**2, d - 0.5).mean()


def park(s, t, distance=25.0, angle=50.0):
    def constellation(x):
        v = x.mean((2, 3))
        far = np.array([[np.linalg.norm(a - b) for b in v] for a in v])
        cosines = np.zeros((len(v),) * 3)
        for i, j, k in itertools.product(range(len(v)), repeat=3):
            if i not in (j, k):
                a, b = v[j] - v[i], v[k] - v[i]
                cosines[i, j, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        return far / far[far > 0].mean(), cosines

    (far_s, cos_s), (far_t, cos_t) = constellation(s), constellation(t)
    return distance * huber(far_s, far_t) + angle * huber(cos_s, cos_t)


def infonce(s, t, temperature=0.1):
    a, b = (x.mean((2, 3)) / np.linalg.norm(x.mean((2, 3)), axis=1, keepdims=True) for x in (s, t))
    z = np.exp(a @ b.T / temperature)
    own = np.diag(z)
    return -(np.log(own / z.sum(1)).mean() + np.log(own / z.sum(0)).mean()) / 2


PAPERS = {"hints": romero, "attention": zagoruyko, "similarity": tung, "relational": park, "contrastive": infonce}
SIZES = [(5, 3, 4, 6, 2), (4, 7, 6, 2, 3), (3, 2, 5, 4, 7)]


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("sizes", SIZES)
def test_loss_and_gradient_are_the_papers(name, sizes):
    b, c, d, h, w = sizes
    loss = Hints(relative=False) if name == "hints" else FEATURE_LOSSES[name]()
    s, t = maps(b, c, c if loss.same == "channels" else d, h, w)
    value = loss(s, t)
    (grad,) = torch.autograd.grad(value, s)
    x, y = s.detach().double().numpy(), t.double().numpy()
    assert value.item() == pytest.approx(PAPERS[name](x, y), rel=1e-5, abs=1e-5)
    rng = np.random.default_rng(b)
    for _ in range(12):
        at = tuple(int(rng.integers(n)) for n in x.shape)
        e = np.zeros_like(x)
        e[at] = 1e-5
        slope = (PAPERS[name](x + e, y) - PAPERS[name](x - e, y)) / 2e-5
        assert grad[at].item() == pytest.approx(slope, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_torchdistill():
    try:
        python = oracles.interpreter(oracles.TEACHING)
    except RuntimeError as e:
        pytest.skip(f"NOT COMPARED: {e}")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(python), str(ROOT / "tests/compare_features.py")], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 9
    for row in rows:
        assert row["value"] > 1e-3 and row["apart"] <= 1e-5 and row["gradients_apart"] <= 1e-2 * row["slope"], row


@pytest.mark.parametrize("name", ["hints", "attention", "similarity", "relational"])
def test_equal_features_cost_nothing(name):
    _, t = maps(5, 3, 4, 6, 2)
    assert FEATURE_LOSSES[name]()(t, t).item() == pytest.approx(0, abs=1e-9)


def test_relative_hints_dont_depend_on_the_networks_volume():
    s, t = maps(4, 3, 3, 5, 2)
    assert Hints()(7 * s, 7 * t).item() == pytest.approx(Hints()(s, t).item())
    assert Hints()(0 * s, t).item() == pytest.approx(1)


def test_a_guess_costs_the_logarithm_of_the_batch():
    t = torch.eye(6)[:, :5]
    assert feature_losses.contrastive(torch.ones(6, 5), t).item() > np.log(6) - 1e-4
    assert feature_losses.contrastive(torch.eye(6), torch.eye(6), temperature=0.01).item() == pytest.approx(0, abs=1e-6)


# --- plugins and their contract -----------------------------------------------------------------------------


def test_every_registered_loss_keeps_the_contract():
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["adaptkit.feature_loss"]
    assert {*FEATURE_LOSSES} == {*entries}
    for name, place in entries.items():
        assert getattr(feature_losses, place.split(":")[1]) is FEATURE_LOSSES[name]
        made = check_feature_loss(FEATURE_LOSSES[name])
        assert made.name == name and json.loads(json.dumps(made.config)) == made.config


@dataclass(frozen=True)
class Leaky(Hints):
    "Lets a gradient through to the teacher."

    def __call__(self, student, teacher):
        return super().__call__(student, teacher) + 1e-3 * teacher.square().sum()


@dataclass(frozen=True)
class Ordered(Hints):
    "Finds the first image more important."

    def __call__(self, student, teacher):
        return super().__call__(student, teacher) + (student - teacher.detach())[0].square().mean()


@dataclass(frozen=True)
class Uphill(Hints):
    "Has its sign wrong."

    def __call__(self, student, teacher):
        value = super().__call__(student, teacher)
        return value.detach() * 2 - value if student.requires_grad else value


@dataclass(frozen=True)
class Elsewhere(Hints):
    "Wants the negative of what the teacher sees."

    def __call__(self, student, teacher):
        return super().__call__(student, -teacher)


@dataclass(frozen=True)
class Stretching(Hints):
    "Compares what can't be compared."

    def __call__(self, student, teacher):
        n = min(len(student), len(teacher))
        return super().__call__(student[:n], teacher[:n].detach().expand_as(student[:n]) if teacher.ndim == student.ndim and teacher.shape[1] == 1 else teacher[:n])


@dataclass(frozen=True)
class Lonely(Relational):
    "Says nothing about too few images."

    def __call__(self, student, teacher):
        return super().__call__(student, teacher) if len(student) > 2 else student.sum() * 0


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (Leaky, "reaches the teacher"),
        (Ordered, "order of the images"),
        (Uphill, "against the gradient"),
        (Elsewhere, "have to cost least"),
        (Stretching, "other images must be refused"),
        (Lonely, "2 images are too few"),
    ],
)
def test_a_broken_promise_is_found(bad, says):
    with pytest.raises(AdaptkitError, match=says):
        check_feature_loss(bad)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda s, t: feature_losses.hints(s, t[:, :2]), r"as many channels .* student \[5, 3, 6, 2\], teacher \[5, 2, 6, 2\]"),
        (lambda s, t: feature_losses.hints(s, t[:4]), "found student"),
        (lambda s, t: feature_losses.attention(s, t[..., :1]), "as many places"),
        (lambda s, t: feature_losses.attention(s[..., :1, :1], t[..., :1, :1]), "more than one place"),
        (lambda s, t: feature_losses.similarity(s[:1], t[:1]), "at least 2 of them; found 1"),
        (lambda s, t: feature_losses.relational(s[:2], t[:2]), "at least 3"),
        (lambda s, t: feature_losses.contrastive(s, t, temperature=0), "above 0"),
        (lambda s, t: Relational(-1, 1), "at least 0"),
        (lambda s, t: Relational(0, 0), "one of them above"),
    ],
)
def test_nonsense_is_refused(call, says):
    s, t = maps(5, 3, 3, 6, 2)
    with pytest.raises(AdaptkitError, match=says):
        call(s, t)


# --- what a network shows inside --------------------------------------------------------------------------


def test_parts_of_texts_are_means_over_their_own_tokens():
    rng = np.random.default_rng(0)
    hidden, lengths = rng.normal(size=(3, 9, 4)), (9, 5, 2)
    mask = np.arange(9) < np.array(lengths)[:, None]
    got = in_parts(torch.tensor(np.concatenate([hidden, mask[..., None]], 2)), 3)
    for i, n in enumerate(lengths):
        for k in range(3):
            rows = hidden[i, int(np.floor(k * n / 3)) : int(np.ceil((k + 1) * n / 3))]
            assert got[i, :, k, 0].numpy() == pytest.approx(rows.mean(0))


def test_maps_come_in_one_form():
    grid = torch.randn(2, 5, 3, 3)
    tokens = torch.cat([torch.randn(2, 4, 5), grid.flatten(2).transpose(1, 2)], 1)  # four tokens without a place
    assert torch.equal(as_map(tokens, "image"), grid) and torch.equal(as_map(grid.permute(0, 2, 3, 1), "image"), grid)
    assert torch.equal(as_map(grid, "image"), grid) and as_map(torch.ones(2, 7), "text").shape == (2, 7, 1, 1)
    assert seen(grid.double(), "image", 2).shape == (2, 5, 2, 2) and seen(grid, "image", 9).shape == grid.shape
    with pytest.raises(AdaptkitError, match="name other stages"):
        as_map(torch.ones(2), "image")


def test_hooks_are_gone_even_after_an_error():
    net = load_backbone("timm/test_vit", pretrained=False)
    with pytest.raises(KeyboardInterrupt), listening(points(net)) as heard:
        net(net.example(1))
        raise KeyboardInterrupt
    assert not any(m._forward_hooks for m in net.modules())
    assert [name.split(".")[-1] for name in heard] == ["0", "1", "2", "3", "4", "5", "all"]


@pytest.mark.parametrize("name", ["small_cnn", "timm/test_resnet", "timm/test_vit", "timm/test_convnext", "minilm", "character_cnn", "bag_of_embeddings"])
def test_shapes_are_those_of_the_maps(name):
    net = load_backbone(name, pretrained=False)
    before = fingerprint(net), [m.training for m in net.modules()]
    found = measured(net)
    with torch.no_grad(), listening(points(net)) as heard:
        net.eval()(net.example(2))
    for p in found:
        m = seen(heard[p.name], net.kind, 4)
        assert m.shape[:2] == (2, p.channels) and m.shape[2] == (4 if net.kind == "text" and p.height > 1 else min(4, p.height))
    assert before[0] == fingerprint(net) and found[-1].depth == 1 and len({p.name for p in found}) == len(found)


# --- stages in pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 3), (3, 6), (4, 7)])
def test_no_alignment_is_cheaper(shape):
    for seed in range(5):
        costs = np.random.default_rng(seed).random(shape)
        ours = aligned(costs)
        tried = [sum(costs[i, j] for i, j in enumerate(columns)) for columns in itertools.combinations(range(shape[1]), shape[0])]
        assert sum(costs[i, j] for i, j in ours) == pytest.approx(min(tried))
        assert [i for i, _ in ours] == list(range(shape[0])) and np.all(np.diff([j for _, j in ours]) > 0)


NETS = ["small_cnn", "timm/test_resnet", "timm/test_vit", "timm/test_efficientnet"]


@pytest.mark.parametrize(("a", "b"), list(itertools.product(NETS, NETS)))
def test_any_two_networks_can_be_compared(a, b):
    student, teacher = (load_backbone(n, pretrained=False, size=64 if n == "small_cnn" else None) for n in (a, b))
    for name in FEATURE_LOSSES:
        loss = FEATURE_LOSSES[name]()
        pairs = stage_pairs(student, teacher, same=loss.same, every=loss.every)
        layers = projections(pairs, loss.same)
        with torch.no_grad(), listening(points(student)) as mine, listening(points(teacher)) as theirs:
            student.eval()(student.example(3)), teacher.eval()(teacher.example(3))
        for p, layer in zip(pairs, layers, strict=True):
            s, t = (nn.functional.adaptive_avg_pool2d(seen(m, "image", 4), p.places) for m in (mine[p.student.name], theirs[p.teacher.name]))
            assert loss(layer(s), t).isfinite()
    assert a != b or all(p.student == p.teacher for p in pairs)


def test_stages_of_one_size_are_paired():
    student, teacher = (load_backbone(n, pretrained=False, size=96) for n in ("timm/test_efficientnet", "timm/test_resnet"))
    pairs = stage_pairs(student, teacher)
    assert len(pairs) == 5 and all(p.student.height == p.teacher.height for p in pairs[:-1])
    deep = stage_pairs(teacher, student, every=False)
    assert [(p.student.name, p.teacher.name) for p in deep] == [("layer4", "conv_head")]


def test_texts_are_paired_by_depth():
    student, teacher = load_backbone("character_cnn"), load_backbone("minilm", pretrained=False)
    pairs = stage_pairs(student, teacher, side=5)
    assert [p.teacher.name for p in pairs] == ["layer1", "layer4", "layer6"]
    assert [p.places for p in pairs] == [(5, 1), (5, 1), (1, 1)]


def test_projections_come_from_their_seed_alone():
    pairs = stage_pairs(*(load_backbone(n, pretrained=False) for n in ("timm/test_resnet", "timm/test_vit")))
    state = torch.get_rng_state()
    a, b, c = (projections(pairs, "channels", seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a[0].weight, b[0].weight) and not torch.equal(a[0].weight, c[0].weight)
    assert not list(projections(pairs, "images").parameters())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"teacher": "bag_of_embeddings"}, "reads texts, the student images: their features can't be matched"),
        ({"named": [("conv9", "all")]}, "Unknown stage of the student 'conv9'. Did you mean 'conv"),
        ({"named": [("conv1", "blocks.0"), ("conv2", "head")]}, "Unknown stage of the teacher"),
        ({"named": [("conv1", "all")], "among": ["conv3"]}, "conv1 of the student doesn't learn"),
        ({"among": []}, "No stage of small_cnn learns"),
        ({"named": [("conv3", "all")], "same": "places"}, "can't be matched: this loss compares places, and conv3 - all"),
        ({"side": 1, "same": "places"}, "can't be matched"),
        ({"side": 0}, "at least 1 place"),
    ],
)
def test_what_cant_be_matched_gets_a_sentence(settings, says):
    asked = {"student": "small_cnn", "teacher": "timm/test_vit", **settings}
    nets = {k: load_backbone(asked.pop(k), pretrained=False) for k in ("student", "teacher")}
    with pytest.raises(AdaptkitError, match=says):
        stage_pairs(**nets, **asked)


def test_pairs_are_drawn():
    a, b = (load_backbone(n, pretrained=False) for n in ("small_cnn", "timm/test_resnet"))
    ax = draw_pairs(stage_pairs(a, b), measured(a), measured(b), title="both").axes[0]
    assert ax.get_title() == "both" and len(ax.lines) == 3 and len(ax.texts) == 3 + 3 + 5


# --- the method ---------------------------------------------------------------------------------------------


def test_a_witness_tells_what_its_stages_return(teacher):
    witness = Witness(teacher, side=3)
    x = teacher.example(2)
    with torch.no_grad(), listening(points(teacher.backbone)) as heard:
        answers = teacher.eval()(x)
    told, said = witness.unpacked(Companion(witness)(x))
    assert torch.allclose(said, answers, atol=1e-4) and set(told) == set(heard)
    for name, m in told.items():
        assert torch.allclose(m, seen(heard[name], "image", 3), atol=1e-3 * float(m.abs().max()))
    assert len({model_fingerprint(Witness(teacher, side)) for side in (2, 3)}) == 2


@pytest.mark.parametrize("name", list(FEATURE_LOSSES))
def test_the_method_keeps_the_contract(name, data, teacher):
    check_method(FeatureDistillation(teacher, name, base=TUNE), data=data)


def test_weight_zero_is_the_method_inside_to_the_bit(data, model, teacher, tmp_path):
    methods = TUNE, FeatureDistillation(teacher, base=TUNE, weight=0.0)
    runs = [fit(model, data, m, plan=PLAN, out=tmp_path / str(i), observers=[]) for i, m in enumerate(methods)]
    assert fingerprint(runs[0].model) == fingerprint(runs[1].model)


def test_translators_learn_and_are_not_saved(data, model, teacher, tmp_path):
    class Watch(FeatureDistillation):
        "Keeps the weights of the translators before and after."

        def prepare(self, model):
            ready = super().prepare(model)
            before.update({k: v.clone() for k, v in ready.translators.state_dict().items()})
            return ready

        def finish(self, model):
            after.update({k: v.clone() for k, v in model.translators.state_dict().items()})
            return super().finish(model)

    before, after = {}, {}
    run = fit(model, data, Watch(teacher, base=TUNE), plan=PLAN, out=tmp_path / "run", observers=[])
    assert before and all(not torch.equal(before[k], after[k]) for k in before)
    assert load_model(run.folder).state_dict().keys() == model.state_dict().keys()


def test_the_teacher_stays_as_it_is_in_whatever_mode(data, model, teacher, tmp_path):
    before, runs = copy.deepcopy(teacher.state_dict()), []
    for mode in (True, False):
        method = FeatureDistillation(teacher.train(mode), base=TUNE)
        runs.append(fit(model, data, method, plan=PLAN, out=tmp_path / str(mode), observers=[]))
        assert all(m.training == mode for m in teacher.modules())
    assert fingerprint(runs[0].model) == fingerprint(runs[1].model)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_the_student_feels_its_teacher(data, model, teacher, tmp_path):
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in other.backbone.stages[0].parameters():
            p.mul_(1.5)
    runs = [fit(model, data, m, plan=PLAN, out=tmp_path / str(i), observers=[]) for i, m in enumerate([TUNE, *(FeatureDistillation(t, base=TUNE) for t in (teacher, other))])]
    assert len({fingerprint(r.model) for r in runs}) == 3


def test_kept_and_asked_teachers_teach_the_same(data, model, teacher, tmp_path):
    plans = [dataclasses.replace(PLAN, cache=cache) for cache in (True, False)]
    runs = [fit(model, data, FeatureDistillation(teacher, base=TUNE), plan=p, out=tmp_path / str(p.cache), observers=[]) for p in plans]
    pairs = zip(*(run.model.state_dict().values() for run in runs), strict=True)
    assert all(torch.allclose(a.float(), b.float(), atol=1e-3) for a, b in pairs)


def test_a_killed_training_goes_on_to_the_same_bits(data, model, teacher, tmp_path):
    method, plan = FeatureDistillation(teacher, base=TUNE), dataclasses.replace(PLAN, checkpoint_every=4)
    whole = fit(model, data, method, plan=plan, out=tmp_path / "whole", observers=[])

    class Cut:
        "Pulls the plug between two checkpoints."

        on = (When.STEP,)

        def __call__(self, event):
            if event.step == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, data, method, plan=plan, out=tmp_path / "cut", observers=[Cut()])
    again = fit(model, data, method, plan=plan, out=tmp_path / "cut", exists="resume", observers=[])
    assert fingerprint(again.model) == fingerprint(whole.model)


def test_only_stages_that_learn_are_taught(data, model, teacher, tmp_path):
    for depth, names in ((1, ["conv3"]), (2, ["conv2", "conv3"])):
        ready = FeatureDistillation(teacher, base=FineTune(depth=depth)).prepare(copy.deepcopy(model))
        assert [p.student.name for p in ready.translators.pairs] == names
    method = FeatureDistillation(teacher, base=FineTune(depth=1, gradual=1))
    trained = fit(model, data, method, plan=PLAN, out=tmp_path / "run", observers=[]).model
    first = model.backbone.stages[0].state_dict()
    assert all(torch.equal(v, first[k]) for k, v in trained.backbone.stages[0].state_dict().items())


@pytest.mark.parametrize("base", [dataclasses.replace(TUNE, average=0.5), dataclasses.replace(TUNE, pull=0.1), dataclasses.replace(TUNE, mix=Mix("mixup"))])
def test_it_goes_around_other_methods(base, data, model, teacher, tmp_path):
    run = fit(model, data, FeatureDistillation(teacher, base=base), plan=PLAN, out=tmp_path / "run", observers=[])
    assert load_model(run.folder).state_dict().keys() == model.state_dict().keys()
    assert "features" == run.record["method"]["name"] and run.record["method"]["base"]["name"] == "finetune"


def test_answers_and_features_come_from_one_teacher(data, model, teacher, tmp_path):
    both = FeatureDistillation(teacher, "relational", base=Distillation(copy.deepcopy(teacher), base=TUNE))
    fit(model, data, both, plan=PLAN, out=tmp_path / "run", observers=[])
    ready, x, y = both.prepare(copy.deepcopy(model)), model.example(4), torch.tensor([0, 1, 1, 0])
    row = Companion(both.companion)(teacher.example(4))
    losses = both.loss(Network(ready, ready), Batch(x, y, torch.arange(4), row))
    alone = both.base.loss(Network(ready, ready), Batch(x, y, torch.arange(4), Companion(teacher)(teacher.example(4))))
    assert set(losses) == {"cross-entropy", "distillation", "features"}
    assert torch.allclose(losses["distillation"], alone["distillation"], atol=1e-4)


def test_the_student_is_asked_once_and_attacks_dont_count(data, model, teacher):
    method = FeatureDistillation(teacher, base=TUNE)
    ready, asked = method.prepare(copy.deepcopy(model)), []
    batch = Batch(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]), torch.arange(4), Companion(method.witness)(teacher.example(4)))

    def forward(x):
        asked.append(x)
        return ready(x)

    assert set(method.loss(Network(forward, ready), batch)) == {"cross-entropy", "features"} and len(asked) == 1
    around = AdversarialTraining(PGD(0.05, steps=2), method)
    assert around.companion is method.witness
    around.loss(Network(forward, ready), batch)
    inside = FeatureDistillation(teacher, base=AdversarialTraining(PGD(0.05, steps=2), TUNE))
    inside.loss(Network(forward, ready), batch)
    assert asked[-1] is batch.x  # asked once more about the clean image


def test_the_gradient_reaches_student_and_translators_only(model, teacher):
    method = FeatureDistillation(teacher, base=TUNE)
    ready = method.prepare(copy.deepcopy(model))
    row = Companion(method.witness)(teacher.example(3)).requires_grad_()
    batch = Batch(model.example(3), torch.tensor([0, 1, 0]), torch.arange(3), row)
    method.loss(Network(ready, ready), batch)["features"].backward()
    assert row.grad is None or not row.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in ready.translators.parameters())
    assert all(any(p.grad.any() for p in s.parameters()) for s in ready.backbone.stages)
    assert all(p.grad is None for p in ready.head.parameters())


def test_a_transformer_learns_from_one_and_from_convolutions(data, teacher, tmp_path):
    vit = load_backbone("timm/test_vit", pretrained=False, seed=1)
    smaller = copy.deepcopy(vit)
    smaller.stages[0].blocks = nn.Sequential(*list(smaller.stages[0].blocks)[:3])
    student = build_model(smaller, data, seed=0)
    student.config.clear()
    for i, t in enumerate((vit, teacher)):
        method = FeatureDistillation(t, base=FineTune(depth=1))
        ready = method.prepare(copy.deepcopy(student))
        assert len(ready.translators.pairs) >= 3
        x, batch_of = student.example(4), Companion(method.witness)(t.example(4))
        losses = method.loss(Network(ready, ready), Batch(x, torch.tensor([0, 1, 0, 1]), torch.arange(4), batch_of))
        losses["features"].backward()
        assert all(any(p.grad is not None and p.grad.any() for p in b.parameters()) for b in ready.backbone.stages[0].blocks), i


def test_texts_are_taught_by_an_encoder_with_other_tokens(tmp_path):
    texts = load_data("support_topics")
    texts = dataclasses.replace(texts, train=texts.train.take(range(48)), valid=texts.valid.take(range(12)))
    student = build_model("character_cnn", texts, seed=1)
    encoder = load_backbone("minilm", pretrained=False, size=32, seed=0)
    plan = Plan(epochs=1, batch_size=12, views=1, augment=WordDropout(0.0), accelerator="cpu")
    method = FeatureDistillation(encoder, base=FineTune(depth=3))
    run = fit(student, texts, method, plan=plan, out=tmp_path / "run", observers=[])
    assert load_model(run.folder).state_dict().keys() == student.state_dict().keys()


def test_another_teacher_is_another_request(data, model, teacher, tmp_path):
    fit(model, data, FeatureDistillation(teacher, base=TUNE), plan=PLAN, out=tmp_path / "run", observers=[])
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        next(other.backbone.parameters()).mul_(1.001)
    with pytest.raises(AdaptkitError, match="holds a run with other"):
        fit(model, data, FeatureDistillation(other, base=TUNE), plan=PLAN, out=tmp_path / "run", exists="resume", observers=[])


def test_a_stage_that_cant_be_overheard_is_told(model, teacher):
    method = FeatureDistillation(teacher, base=TUNE)
    ready = method.prepare(copy.deepcopy(model))
    mute = Network(lambda x: torch.zeros(len(x), 2, requires_grad=True) + 0, ready)
    batch = Batch(model.example(2), torch.tensor([0, 1]), torch.arange(2), Companion(method.witness)(teacher.example(2)))
    with pytest.raises(AdaptkitError, match="nothing that could be overheard"):
        method.loss(mute, batch)


def test_nothing_is_heard_without_gradients(model):
    x = model.example(2)
    network, found = overheard(Network(model, model), x)
    with torch.no_grad():
        network(x)
    network(x.clone())
    assert not found


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda t: FeatureDistillation(t, "hint"), "Did you mean 'hints'"),
        (lambda t: FeatureDistillation(t, 3), "is no loss of features"),
        (lambda t: FeatureDistillation(t, weight=-1), "0 or more"),
        (lambda t: FeatureDistillation(t, weight=float("nan")), "0 or more"),
        (lambda t: FeatureDistillation(t, side=0), "at least 1"),
        (lambda t: FeatureDistillation(3), "give a model, a run"),
        (lambda t: FeatureDistillation("nowhere/at/all"), "holds no trained model"),
        (lambda t: FeatureDistillation(t.backbone, base=Distillation(t)), "give both the same"),
        (lambda t: FeatureDistillation(build_model("bag_of_embeddings", t)).prepare(t), "can't be matched"),
        (lambda t: FeatureDistillation(t, base=FineTune(depth=0)).prepare(copy.deepcopy(t)), "train at least one"),
        (lambda t: FeatureDistillation(t).loss(Network(t, t), Batch(t.example(2), torch.tensor([0, 1]), torch.arange(2))), "Nothing of the teacher"),
    ],
)
def test_what_cant_teach_is_refused(make, says, teacher):
    with pytest.raises(AdaptkitError, match=says):
        make(teacher)


def test_settings_are_told(teacher):
    method = FeatureDistillation(teacher, Contrastive(temperature=0.2), pairs=[("conv3", "layer4")], base=TUNE)
    told = json.loads(json.dumps(method.config))
    assert told["compare"] == {"name": "contrastive", "temperature": 0.2} and told["pairs"] == [["conv3", "layer4"]]
    assert method.faster(2.0).base.speed == 2.0 and method.faster(2.0).weight == method.weight == 0.1
