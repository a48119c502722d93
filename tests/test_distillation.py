"""Learning from a teacher: the losses against published formulas, what is kept of a teacher's answers, and the method."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracles
import pytest
import torch
from PIL import Image

from adaptkit import testing
from adaptkit.core.registry import AdaptkitError
from adaptkit.data.datasets import Batch, make_batch
from adaptkit.data.images import Augment
from adaptkit.data.sources import load_data
from adaptkit.distillation import losses
from adaptkit.distillation.distillation import Distillation, unlabelled
from adaptkit.distillation.losses import (
    DISTILLATION_LOSSES,
    Correlation,
    Decoupled,
    SoftTargets,
    check_distillation_loss,
)
from adaptkit.evaluation.evaluate import predict
from adaptkit.heads.heads import Named, build_model
from adaptkit.models.backbones import load_backbone
from adaptkit.models.sources import seeded
from adaptkit.models.tokens import WordDropout
from adaptkit.robustness.adversarial_training import AdversarialTraining
from adaptkit.robustness.attacks import PGD
from adaptkit.testing import check_method, toy_model
from adaptkit.training.beside import Beside, Companion, companion_of, model_fingerprint
from adaptkit.training.cache import TrunkCache, Views
from adaptkit.training.control import When
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.losses import smoothed_loss
from adaptkit.training.methods import Network
from adaptkit.training.session import Plan, fingerprint

ROOT = Path(__file__).parents[1]
PLAN = Plan(epochs=2, batch_size=12, views=2, augment=Augment(hflip=True), accelerator="cpu")
TUNE = FineTune(depth=3, rate=1e-2, head_rate=1e-2)
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def teacher(data):
    "A small network of another size."
    return build_model("small_cnn", data, size=28, seed=4)


def logits(images: int, classes: int, *, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "Random logits of a student (with a gradient) and a teacher, in double precision, and labels."
    rng = torch.Generator().manual_seed(100 * images + classes)
    s, t = (scale * torch.randn(images, classes, generator=rng) for _ in "st")
    return s.requires_grad_(), t, torch.randint(classes, (images,), generator=rng)


# --- the published formulas, in numpy ------------------------------------------------------------------


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kl(p, q):
    return np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0).sum(1).mean()


def hinton(s, t, y, temperature):
    return temperature**2 * kl(softmax(t / temperature), softmax(s / temperature))


def zhao(s, t, y, temperature, alpha=1.0, beta=8.0):
    "As published: softmax over all, summed into two; then softmax with the right class's logit lowered by 1000."
    right = np.eye(s.shape[1], dtype=bool)[y]

    def two(z):
        p = softmax(z / temperature)
        return np.stack([p[right], (p * ~right).sum(1)], 1)

    rest = [softmax(z / temperature - 1000 * right) for z in (t, s)]
    return temperature**2 * (alpha * kl(two(t), two(s)) + beta * kl(*rest))


def sun(s, t, y, temperature):
    s, t = ((z - z.mean(1, keepdims=True)) / (1e-7 + z.std(1, keepdims=True, ddof=1)) for z in (s, t))
    return hinton(s, t, y, temperature)


def huang(s, t, y, temperature):
    a, b = softmax(s / temperature), softmax(t / temperature)

    def pearson(u, v):
        return np.mean([np.corrcoef(i, j)[0, 1] for i, j in zip(u, v, strict=True)])

    return temperature**2 * ((1 - pearson(a, b)) + (1 - pearson(a.T, b.T)))


PAPERS = {"soft": hinton, "decoupled": zhao, "standardised": sun, "correlation": huang}


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize(("images", "classes", "temperature"), [(5, 3, 4.0), (7, 11, 1.0), (2, 6, 2.5)])
def test_loss_and_gradient_are_the_papers(name, images, classes, temperature):
    s, t, y = logits(images, classes)
    loss = DISTILLATION_LOSSES[name]()(s, t, labels=y, temperature=temperature)
    (grad,) = torch.autograd.grad(loss, s)
    a, b, k = s.detach().double().numpy(), t.double().numpy(), y.numpy()
    formula = PAPERS[name]
    assert loss.item() == pytest.approx(formula(a, b, k, temperature), rel=1e-5, abs=1e-5)
    for i in range(images):
        for j in range(classes):
            e = np.zeros_like(a)
            e[i, j] = 1e-5
            slope = (formula(a + e, b, k, temperature) - formula(a - e, b, k, temperature)) / 2e-5
            assert grad[i, j].item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_torchdistill():
    try:
        python = oracles.interpreter(oracles.TEACHING)
    except RuntimeError as e:
        pytest.skip(f"NOT COMPARED: {e}")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(python), str(ROOT / "tests/compare_distillation.py")], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 9
    for row in rows:
        assert row["value"] > 0.1 and row["apart"] <= 1e-5 and row["gradients_apart"] <= 1e-5, row


# --- reductions and the square of the temperature -----------------------------------------------------


@pytest.mark.parametrize("name", ["soft", "decoupled", "standardised", "correlation"])
def test_identical_logits_cost_nothing(name):
    _, t, y = logits(6, 5)
    for temperature in (0.5, 1.0, 4.0, 50.0):
        assert abs(DISTILLATION_LOSSES[name]()(t, t, labels=y, temperature=temperature).item()) <= 1e-6 * temperature**2


@pytest.mark.parametrize("name", ["soft", "decoupled", "standardised", "uninformed"])
def test_the_gradient_does_not_depend_on_a_high_temperature(name):
    s, t, y = logits(6, 5)
    lengths = [float(torch.autograd.grad(DISTILLATION_LOSSES[name]()(s, t, labels=y, temperature=k), s)[0].norm()) for k in (50.0, 100.0, 200.0)]
    assert max(lengths) / min(lengths) < 1.1


def test_a_soft_label_of_nothing_is_label_smoothing():
    s, t, y = logits(6, 5)
    mixed = 0.8 * torch.nn.functional.cross_entropy(s, y) + 0.2 * losses.uninformed(s, t, temperature=1.0)
    assert torch.allclose(mixed, smoothed_loss(s, y, smoothing=0.2) - 0.2 * np.log(5), atol=1e-6)


def test_half_precision_is_compared_in_single():
    s, t, y = logits(4, 6)
    assert torch.allclose(losses.soft_targets(s.half(), t.half()), losses.soft_targets(s.half().float(), t.half().float()))


# --- plugins and their contract ------------------------------------------------------------------------


def test_every_registered_loss_keeps_the_contract():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["adaptkit.distillation_loss"]
    assert {*DISTILLATION_LOSSES} == {*points} and testing.check_distillation_loss is check_distillation_loss
    for name, place in points.items():
        assert getattr(losses, place.split(":")[1]) is DISTILLATION_LOSSES[name]
        made = check_distillation_loss(DISTILLATION_LOSSES[name])
        assert made.name == name and json.loads(json.dumps(made.config)) == made.config


@dataclass(frozen=True)
class Leaky(SoftTargets):
    "Lets a gradient through to the teacher."

    def __call__(self, student, teacher, *, labels, temperature):
        return super().__call__(student, teacher, labels=labels, temperature=temperature) + 0 * teacher.sum() + 1e-3 * teacher.square().sum()


@dataclass(frozen=True)
class Summed(SoftTargets):
    "Forgets to divide by the batch."

    def __call__(self, student, teacher, *, labels, temperature):
        return super().__call__(student, teacher, labels=labels, temperature=temperature) * len(student)


@dataclass(frozen=True)
class Ranked(SoftTargets):
    "Finds later classes more important."

    def __call__(self, student, teacher, *, labels, temperature):
        s, t = losses.two_logits(student, teacher, temperature=temperature)
        return ((s - t).square() * torch.arange(s.shape[1])).mean()


@dataclass(frozen=True)
class Uphill(SoftTargets):
    "Has its sign wrong."

    def __call__(self, student, teacher, *, labels, temperature):
        value = super().__call__(student, teacher, labels=labels, temperature=temperature)
        return value.detach() * 2 - value if student.requires_grad else value


@dataclass(frozen=True)
class Careless(SoftTargets):
    "Accepts any temperature."

    def __call__(self, student, teacher, *, labels, temperature):
        return super().__call__(student, teacher, labels=labels, temperature=abs(temperature) or 1.0)


@pytest.mark.parametrize(
    ("bad", "says"),
    [(Leaky, "reaches the teacher"), (Summed, "doubled batch"), (Ranked, "order of the classes"), (Uphill, "downhill|against the gradient"), (Careless, "temperature 0")],
)
def test_a_broken_promise_is_found(bad, says):
    with pytest.raises(AdaptkitError, match=says):
        check_distillation_loss(bad)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda s, t, y: losses.soft_targets(s, t, temperature=0), "above 0"),
        (lambda s, t, y: losses.soft_targets(s, t, temperature=-4), "above 0"),
        (lambda s, t, y: losses.soft_targets(s, t[:, :2]), r"student \[6, 5\], teacher \[6, 2\]"),
        (lambda s, t, y: losses.correlation(s[:0], t[:0]), "batch is empty"),
        (lambda s, t, y: Decoupled(alpha=-1), "at least 0"),
        (lambda s, t, y: Correlation(0, 0), "one of them above"),
    ],
)
def test_nonsense_is_refused(call, says):
    s, t, y = logits(6, 5)
    with pytest.raises(AdaptkitError, match=says):
        call(s, t, y)


# --- what a companion says, kept and asked ---------------------------------------------------------------


def gap(kept: Beside, asked: Beside, rows: np.ndarray, *, view: int) -> float:
    "Largest relative difference between what is kept and what is computed."
    pairs = list(zip(kept.batches(rows, 8, view=view), asked.batches(rows, 8, view=view), strict=True))
    assert all(torch.equal(a.index, b.index) and torch.equal(a.x, b.x) for a, b in pairs)
    return max(float((a.beside - b.beside).abs().max() / b.beside.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", ["small_cnn", "efficientnet_lite0", "timm/test_vit"])
def test_kept_answers_are_the_computed_ones(name, data, model, tmp_path):
    with seeded(0):
        backbone = load_backbone(name, pretrained=False, **({"size": 40} if name != "timm/test_vit" else {}))
    companion = Companion(build_model(backbone, data, seed=1))
    views = Views(model.reader, Augment(rotate=30, shift=0.2, brightness=0.1), count=3, seed=5)
    rows = np.random.default_rng(0).permutation(len(data.train))[:21]
    streams = [Beside(data.train, views, None, cache, companion) for cache in (TrunkCache(tmp_path), None)]
    assert max(gap(*streams, rows, view=view) for view in range(3)) <= 1e-6
    batch = next(streams[0].batches(rows, 8, view=1))
    seen = dataclasses.replace(views, spec=companion.reader)
    shown = seen.make(make_batch(data.train, rows[:8], spec=companion.reader), 1)
    assert torch.allclose(companion.whole(shown), batch.beside, atol=1e-5) and batch.beside.dtype == torch.float32


def test_kept_answers_to_texts_are_the_computed_ones(tmp_path):
    texts = load_data("support_topics")
    companion, student = (build_model(name, texts, seed=1) for name in ("bag_of_embeddings", "character_cnn"))
    views = Views(student.reader, WordDropout(0.0))
    rows = np.arange(20)[::-1].copy()
    streams = [Beside(texts.train, views, None, cache, Companion(companion)) for cache in (TrunkCache(tmp_path), None)]
    assert gap(*streams, rows, view=0) <= 1e-6


def test_two_tokenisers_dont_lose_the_same_words():
    texts = load_data("support_topics")
    bag, letters = (build_model(name, texts, seed=1) for name in ("bag_of_embeddings", "character_cnn"))
    views = Views(letters.reader, WordDropout(0.2))
    with pytest.raises(AdaptkitError, match="tokenise"):
        Beside(texts.train, views, None, None, Companion(bag))
    Beside(texts.train, Views(bag.reader, WordDropout(0.2)), None, None, Companion(bag))


def test_answers_are_never_stale(data, model, tmp_path):
    cache, rows = TrunkCache(tmp_path), np.arange(9)
    teacher = build_model("small_cnn", data, size=24, seed=3)
    views = Views(model.reader, Augment(rotate=20), count=3)

    def answers(teacher=teacher, views=views, samples=data.train, view=1) -> torch.Tensor:
        "From the cache, and at once compared with what a fresh companion says."
        kept, asked = (Beside(samples, views, None, c, Companion(teacher)) for c in (cache, None))
        assert gap(kept, asked, rows, view=view) <= 1e-6
        return next(kept.batches(rows, 9, view=view)).beside

    first = answers()
    bumped, larger, other = (copy.deepcopy(teacher) for _ in range(3))
    with torch.no_grad():
        bumped.head[-1].bias[0] += 1e-3
        next(other.backbone.stages[0].parameters()).mul_(1.01)
    larger.preprocess["size"] = 30
    changed = [answers(t) for t in (bumped, larger, other)]
    changed += [answers(views=dataclasses.replace(views, seed=1)), answers(views=dataclasses.replace(views, change=Augment(rotate=21))), answers(view=2)]
    changed += [answers(samples=data.train.take(np.arange(12)[::-1]))]
    assert all(not torch.equal(first, v) for v in changed)
    assert torch.equal(first, answers()) and len(list(tmp_path.glob("*.npy"))) == 8


def test_a_companion_is_a_frozen_copy(data):
    with seeded(0):
        backbone = load_backbone("timm/test_resnet", pretrained=False, size=32)
    teacher = build_model(backbone, data, head="mlp", dropout=0.5, seed=0).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    companion = Companion(teacher)
    x = teacher.example(6)
    first = companion(x)
    assert torch.equal(first, companion(x)) and not first.requires_grad  # no dropout, no gradient
    assert teacher.training and all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    with torch.no_grad():
        for p in teacher.parameters():
            p.zero_()
    assert torch.equal(first, companion(x))


def test_a_batch_takes_its_companion_along():
    batch = Batch(torch.rand(2, 3, 4, 5), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    assert batch.to("cpu").beside is None
    assert dataclasses.replace(batch, beside=torch.ones(2, 7)).to("cpu").beside.shape == (2, 7)


def test_what_is_no_model_is_no_companion():
    with pytest.raises(AdaptkitError, match="is no model"):
        companion_of(SimpleNamespace(companion="teacher"))
    assert companion_of(object()) is None


# --- the method --------------------------------------------------------------------------------------------


def test_the_method_keeps_the_contract(data):
    teacher = build_model("small_cnn", data, size=20, seed=4)
    check_method(Distillation(teacher, base=TUNE, weight=0.5), data=data)


def test_weight_zero_is_the_method_inside_to_the_bit(data, model, teacher, tmp_path):
    runs = [fit(model, data, m, plan=PLAN, out=tmp_path / str(i), observers=[]) for i, m in enumerate((TUNE, Distillation(teacher, base=TUNE, weight=0.0)))]
    assert fingerprint(runs[0].model) == fingerprint(runs[1].model)


def test_kept_and_asked_teachers_teach_the_same(data, model, teacher, tmp_path):
    plans = [dataclasses.replace(PLAN, cache=cache) for cache in (True, False)]
    runs = [fit(model, data, Distillation(teacher, base=TUNE), plan=p, out=tmp_path / str(p.cache), observers=[]) for p in plans]
    pairs = zip(*(run.model.state_dict().values() for run in runs), strict=True)
    assert all(torch.allclose(a.float(), b.float(), atol=1e-4) for a, b in pairs)


def test_a_teacher_in_training_mode_teaches_the_same_and_stays_as_it_is(data, model, tmp_path):
    with seeded(0):
        teacher = build_model(load_backbone("timm/test_resnet", pretrained=False, size=32), data, head="mlp", dropout=0.5, seed=0)
    before, runs = copy.deepcopy(teacher.state_dict()), []
    for mode in (True, False):
        runs.append(fit(model, data, Distillation(teacher.train(mode), base=TUNE), plan=PLAN, out=tmp_path / str(mode), observers=[]))
        assert all(m.training == mode for m in teacher.modules())
    assert fingerprint(runs[0].model) == fingerprint(runs[1].model)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_classes_are_matched_by_name(data, model, teacher, tmp_path):
    turned = build_model("small_cnn", Named(data.classes[::-1]), size=28, seed=4)
    turned.backbone.load_state_dict(teacher.backbone.state_dict())
    turned.head.load_state_dict({k: v.flip(0) for k, v in teacher.head.state_dict().items()})
    wider = Named(("grey", *data.classes))
    runs = [fit(model, data, Distillation(t, base=TUNE), plan=PLAN, out=tmp_path / str(i), observers=[]) for i, t in enumerate((teacher, turned))]
    pairs = zip(*(run.model.state_dict().values() for run in runs), strict=True)
    assert all(torch.allclose(a.float(), b.float(), atol=1e-5) for a, b in pairs)
    Distillation(build_model("small_cnn", wider, size=28)).prepare(copy.deepcopy(model))


def test_a_killed_distillation_goes_on_to_the_same_bits(data, model, teacher, tmp_path):
    method, plan = Distillation(teacher, base=TUNE), dataclasses.replace(PLAN, checkpoint_every=4)
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


def test_another_teacher_is_another_request(data, model, teacher, tmp_path):
    fit(model, data, Distillation(teacher, base=TUNE), plan=PLAN, out=tmp_path / "run", observers=[])
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.head[-1].bias[0] += 1e-3
    with pytest.raises(AdaptkitError, match="holds a run with other"):
        fit(model, data, Distillation(other, base=TUNE), plan=PLAN, out=tmp_path / "run", exists="resume", observers=[])


def test_the_student_is_asked_once_and_attacks_dont_count(data, model, teacher):
    batch = Batch(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]), torch.arange(4), torch.randn(4, 2))
    asked = []

    def forward(x):
        asked.append(x)
        return model(x)

    losses = Distillation(teacher, base=TUNE).loss(Network(forward, model), batch)
    assert len(asked) == 1 and set(losses) == {"cross-entropy", "distillation"}
    asked.clear()
    around = AdversarialTraining(PGD(0.05, steps=2), Distillation(teacher, base=TUNE))
    assert around.companion is teacher
    around.loss(Network(forward, model), batch)
    assert not torch.equal(asked[-1], batch.x)  # the attacked student gives the answers to the clean image
    Distillation(teacher, base=AdversarialTraining(PGD(0.05, steps=2), TUNE)).loss(Network(forward, model), batch)
    assert asked[-1] is batch.x


def test_an_adversarial_student_is_taught(data, model, teacher, tmp_path):
    method = AdversarialTraining(PGD(0.02, steps=1), Distillation(teacher, base=TUNE))
    told = fit(model, data, method, plan=PLAN, out=tmp_path / "run", observers=[]).record["method"]
    assert told["base"]["teacher"]["weights"] == model_fingerprint(teacher) and told["base"]["compare"]["name"] == "soft"


def test_a_run_or_its_folder_may_teach(data, model, tmp_path):
    run = fit(model, data, TUNE, plan=PLAN, out=tmp_path / "run", observers=[])
    marks = {model_fingerprint(Distillation(t).companion) for t in (run, run.folder, str(run.folder), run.model)}
    assert len(marks) == 1


def test_a_larger_student_is_allowed_and_told(data, model):
    tiny = copy.deepcopy(model)
    tiny.backbone.stages[-1] = torch.nn.Identity()
    with pytest.warns(UserWarning, match="its teacher"):
        Distillation(tiny).prepare(copy.deepcopy(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Distillation(model).prepare(copy.deepcopy(model))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d, t: Distillation(t, temperature=0), "above 0"),
        (lambda d, t: Distillation(t, temperature=-1), "above 0"),
        (lambda d, t: Distillation(t, temperature=float("nan")), "above 0"),
        (lambda d, t: Distillation(t, weight=1.5), "0 to 1"),
        (lambda d, t: Distillation(t, compare="soft"), "e.g. SoftTargets"),
        (lambda d, t: Distillation(t, base=Distillation(t)), "one companion"),
        (lambda d, t: Distillation(3), "give a model, a run"),
        (lambda d, t: Distillation("nowhere/at/all"), "holds no trained model"),
        (lambda d, t: Distillation(build_model("small_cnn", Named(("dark", "blue")))).prepare(toy_model(d)), "can't tell bright"),
        (lambda d, t: Distillation(build_model("bag_of_embeddings", d)).prepare(toy_model(d)), "reads texts, the student images"),
        (lambda d, t: Distillation(t).loss(Network(t, t), Batch(t.example(2), torch.tensor([0, 1]), torch.arange(2))), "No teacher's answers"),
        (lambda d, t: unlabelled("nowhere/at/all", t), "no folder"),
    ],
)
def test_a_teacher_that_cant_teach_is_refused(make, says, data, teacher):
    with pytest.raises(AdaptkitError, match=says):
        make(data, teacher)


def test_images_without_labels_are_taught(data, model, teacher, tmp_path):
    (tmp_path / "pictures/deep").mkdir(parents=True)
    for i in range(30):
        Image.fromarray(data.train.image(i)).save(tmp_path / f"pictures/deep/{i}.png")
    (tmp_path / "pictures/notes.txt").write_text("not an image")
    longer = dataclasses.replace(PLAN, epochs=10, batch_size=8)
    knows = fit(model, data, TUNE, plan=longer, out=tmp_path / "teacher", observers=[])
    found = unlabelled(tmp_path / "pictures", knows.model)
    assert [len(s) for s in found.splits.values()] == [24, 3, 3] and found.classes == data.classes
    for samples in found.splits.values():
        assert [data.train.labels[int(Path(samples.name(i)).stem)] for i in range(len(samples))] == samples.labels.tolist()
    fresh = toy_model(data)
    run = fit(fresh, found, Distillation(knows, weight=1.0, base=TUNE), plan=longer, out=tmp_path / "run", observers=[])
    assert (predict(run.model, data.test).predicted == data.test.labels).mean() > 0.9
    with pytest.raises(AdaptkitError, match="at least 10"):
        unlabelled(tmp_path / "teacher", teacher, max_unreadable=1.0)
