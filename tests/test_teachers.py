"""Several teachers: the weights against formulas written down once more, the panel as a teacher, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.datasets import Batch
from adaptkit.data.images import Augment
from adaptkit.data.sources import load_data
from adaptkit.distillation.distillation import Distillation, Panel
from adaptkit.distillation.losses import DISTILLATION_LOSSES, soft_targets
from adaptkit.distillation.teachers import (
    WEIGHTINGS,
    Learned,
    Teachers,
    Transfer,
    Uniform,
    answers_of,
    blend,
    check_weighting,
    knowledge,
    pretended,
    shared_out,
    side_by_side,
    stacked,
    transferability,
)
from adaptkit.evaluation.evaluate import predict
from adaptkit.heads.heads import Named, build_model
from adaptkit.robustness.adversarial_training import AdversarialTraining
from adaptkit.robustness.attacks import PGD
from adaptkit.testing import check_method
from adaptkit.training.beside import Beside, Companion
from adaptkit.training.cache import TrunkCache, Views
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.methods import Network
from adaptkit.training.session import Plan, fingerprint

PLAN = Plan(epochs=2, batch_size=12, views=2, augment=Augment(hflip=True), accelerator="cpu")
TUNE = FineTune(depth=3, rate=1e-2, head_rate=1e-2)
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def crew(data):
    "Two small networks of different sizes."
    return [build_model("small_cnn", data, size=size, seed=seed) for size, seed in ((28, 4), (20, 5))]


# --- the formulas, in numpy ------------------------------------------------------------------------------


def probabilities(answers: torch.Tensor) -> np.ndarray:
    z = answers.double().numpy()
    e = np.exp(z - z.max(2, keepdims=True))
    return e / e.sum(2, keepdims=True)


def test_a_blend_is_the_mixture():
    answers, _ = pretended(9, 3)
    w = torch.rand(9, 3).softmax(1)
    w[0] = torch.tensor([1.0, 0.0, 0.0])
    for temperature in (1.0, 4.0):
        mixed = (probabilities(answers / temperature) * w.numpy()[:, :, None]).sum(1)
        found = (blend(answers, w, temperature=temperature) / temperature).softmax(1)
        assert np.allclose(found, mixed, atol=1e-6)


def test_one_voice_teaches_as_all_of_them_would():
    answers, labels = pretended(8, 5)
    w = shared_out(knowledge(answers, labels))
    student = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    each = [w[i, k] * soft_targets(student[i : i + 1], answers[i : i + 1, k], temperature=3.0) for i in range(8) for k in range(3)]
    one = soft_targets(student, blend(answers, w, temperature=3.0), temperature=3.0)
    a, b = (torch.autograd.grad(v, student)[0] for v in (one, torch.stack(each).sum() / 8))
    assert torch.allclose(a, b, atol=1e-6) and float(a.abs().max()) > 1e-3


def test_what_was_known_is_counted_from_chance():
    answers, labels = pretended(30, 5)
    right = probabilities(answers)[np.arange(30), :, labels]
    gains = np.maximum(0, np.log(5 * right))
    expected = np.where(gains.sum(1, keepdims=True) > 0, gains / np.maximum(gains.sum(1, keepdims=True), 1e-12), 1 / 3)
    assert np.allclose(WEIGHTINGS["confidence"]()(answers, labels), expected, atol=1e-5)


def test_transferability_leaves_each_sample_out():
    answers, labels = pretended(24, 3)
    p, y = probabilities(answers), labels.numpy()
    found = np.zeros((24, 3))
    for i in range(24):
        others = np.arange(24) != i
        share = (np.bincount(y[others], minlength=3) + 0.5) / (23 + 1.5)
        for k in range(3):
            given = [(p[others & (y == y[i]), k, z].sum() + share[y[i]]) / (p[others, k, z].sum() + 1) for z in range(3)]
            found[i, k] = np.log(p[i, k] @ given) - np.log(share[y[i]])
    assert np.allclose(transferability(answers, labels), found.mean(0), atol=1e-4)


def test_learned_weights_are_the_optimum():
    answers, labels = pretended(60, 4, seed=3)
    answers[:, 2] += 1.5 * torch.nn.functional.one_hot(labels, 4)  # so that each of them is worth something
    p = np.concatenate([probabilities(answers)[np.arange(60), :, labels], np.full((60, 1), 0.25)], 1)

    def cost(w):
        return -np.log(p @ w).mean()

    sums = {"type": "eq", "fun": lambda w: w.sum() - 1}
    best = minimize(cost, np.full(4, 0.25), bounds=[(0, 1)] * 4, constraints=[sums], tol=1e-12, method="SLSQP").x
    expected = best[:3] / best[:3].sum()
    assert np.allclose(stacked(answers, labels, steps=5000), expected, atol=2e-3)


# --- what a teacher that knows nothing gets ----------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4, 10])
@pytest.mark.parametrize("loud", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", ["transfer", "learned", "confidence"])
def test_who_knows_nothing_gets_next_to_nothing(name, loud, classes):
    answers, labels = pretended(400, classes, seed=classes)
    answers[:, 2] *= loud
    w = WEIGHTINGS[name]().fitted(answers[:200], labels[:200])(answers[200:], labels[200:])
    assert float(w[:, 2].mean()) < (0.05 if name != "confidence" else 0.2 if classes == 2 else 0.1)
    assert WEIGHTINGS["uniform"]()(answers, labels)[:, 2].mean() == pytest.approx(1 / 3)


def test_random_networks_get_next_to_nothing(tmp_path):
    whole = load_data("digits", seed=0)
    data = dataclasses.replace(whole, train=whole.train.take(range(600)))
    start = [build_model("small_cnn", data, size=18, seed=seed) for seed in range(3)]
    plan = Plan(epochs=8, batch_size=20, views=1, augment=Augment(hflip=False), accelerator="cpu")
    crew = [fit(start[0], data, TUNE, plan=plan, out=tmp_path / "run", observers=[]), *start[1:]]
    for name in ("confidence", "transfer", "learned"):
        w = Teachers(crew, name, data).weigh(data.test, data.classes).mean(0)
        assert w[1:].max() < 0.05 and w[0] > 0.9


def test_wrong_names_are_seen_by_all_but_transfer():
    answers, labels = pretended(200, 5)
    answers[:, 1] = answers[:, 0].roll(1, 1)
    got = {name: WEIGHTINGS[name]().fitted(answers, labels)(answers, labels)[:, 1].mean() for name in WEIGHTINGS}
    assert got["transfer"] > 0.3 and got["confidence"] < 0.05 and got["learned"] < 0.05


# --- the contract ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(WEIGHTINGS))
def test_weightings_keep_the_contract(name):
    check_weighting(WEIGHTINGS[name])


@dataclass(frozen=True)
class Broken(Uniform):
    "Weights made by a function of answers and labels."

    how: object = None

    def __call__(self, answers, labels):
        return self.how(answers, labels)


def first(answers, labels):
    "The first teacher knows best."
    return torch.eye(answers.shape[1])[0].expand(answers.shape[:2])


def worst(answers, labels):
    "Who knows least is believed most."
    return shared_out(knowledge(answers, labels).max() - knowledge(answers, labels))


def neighbour(answers, labels):
    "By what was known about the sample before."
    return shared_out(knowledge(answers, labels)).roll(1, 0)


class Guesses(Transfer):
    "Weighs before it has learnt."

    def __call__(self, answers, labels):
        return super().__call__(answers, labels) if self.shares else torch.full_like(answers[:, :, 0], 1 / answers.shape[1])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Broken(how=lambda a, y: a.amax(2)), "sum to 1"),
        (lambda: Broken(how=lambda a, y: torch.full((len(a), 1), 1.0)), "sum to 1"),
        (lambda: Broken(how=lambda a, y: knowledge(a, y) / knowledge(a, y).sum(1, keepdim=True)), "at least 0"),
        (lambda: Broken(how=first), "order of the teachers"),
        (lambda: Broken(how=neighbour), "order of the samples"),
        (lambda: Broken(how=worst), "knows nothing gets"),
        (Guesses, "refuse to weigh"),
    ],
)
def test_broken_weightings_are_caught(make, says):
    with pytest.raises(AdaptkitError, match=says):
        check_weighting(make)


# --- the panel as a teacher ----------------------------------------------------------------------------------


def test_answers_are_matched_by_name(data, crew):
    turned = build_model("small_cnn", Named(data.classes[::-1]), size=28, seed=4)
    turned.backbone.load_state_dict(crew[0].backbone.state_dict())
    turned.head.load_state_dict({k: v.flip(0) for k, v in crew[0].head.state_dict().items()})
    wider = build_model("small_cnn", Named(("grey", *data.classes)), size=20)
    answers = answers_of([crew[0], turned, wider], data.test, data.classes)
    assert torch.allclose(answers[:, 0], answers[:, 1], atol=1e-5)
    assert torch.equal(answers[:, 2], torch.from_numpy(predict(wider, data.test).logits)[:, 1:])
    assert torch.equal(side_by_side(answers.flatten(1), [crew[0]] * 3, data.classes), answers)


@pytest.mark.parametrize("name", list(WEIGHTINGS))
def test_a_taught_student_keeps_the_contract(name, data, crew):
    check_method(Distillation(Teachers(crew, name, data), base=TUNE, weight=0.5), data=data)


@pytest.mark.parametrize("loss", list(DISTILLATION_LOSSES))
def test_a_panel_of_one_is_that_teacher(loss, data, model, crew):
    compare, beside = DISTILLATION_LOSSES[loss](), 3 * torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.rand(6, 3, 32, 32), torch.arange(6) % 2, torch.arange(6), beside)
    ways = [Distillation(t, compare=compare, base=TUNE) for t in (crew[0], Teachers(crew[:1], "learned", data))]
    alone, panel = (float(m.loss(Network(model, model), batch)["distillation"].detach()) for m in ways)
    assert panel == pytest.approx(alone, rel=1e-4) and alone > 0


def test_several_companions_answer_side_by_side(data, model, crew, tmp_path):
    views, rows = Views(model.reader, Augment(rotate=20), count=3), np.arange(30)[::-1].copy()
    cache, companions = TrunkCache(tmp_path), tuple(Companion(m) for m in crew)
    batches = list(Beside(data.train, views, None, cache, companions).batches(rows, 8, view=1, start=1))
    alone = [list(Beside(data.train, views, None, None, c).batches(rows, 8, view=1, start=1)) for c in companions]
    for both, *each in zip(batches, *alone, strict=True):
        assert torch.allclose(both.beside, torch.cat([b.beside for b in each], 1), atol=1e-5) and torch.equal(both.x, each[0].x)
    assert len(list(tmp_path.glob("*.npy"))) == 2  # each has an entry of its own, so another panel finds it


def test_runs_and_folders_may_teach_and_the_record_tells_their_weights(data, model, crew, tmp_path):
    run = fit(model, data, TUNE, plan=PLAN, out=tmp_path / "run", observers=[])
    panel = Teachers([run, str(run.folder), run.model, crew[0]], "learned", data)
    told = fit(model, data, Distillation(panel, base=TUNE), plan=PLAN, out=tmp_path / "taught", observers=[]).record["method"]["teacher"]
    assert len({t["weights"] for t in told["teachers"]}) == 2 and sum(told["weights"]["shares"]) == pytest.approx(1)
    assert told["weights"]["name"] == "learned" and isinstance(panel, Panel) and repr(panel) == "Teachers(4, learned)"


def test_other_weights_are_another_request(data, model, crew, tmp_path):
    fit(model, data, Distillation(Teachers(crew), base=TUNE), plan=PLAN, out=tmp_path / "run", observers=[])
    other = Distillation(Teachers(crew, "confidence"), base=TUNE)
    with pytest.raises(AdaptkitError, match="holds a run with other"):
        fit(model, data, other, plan=PLAN, out=tmp_path / "run", exists="resume", observers=[])


def test_teachers_stay_as_they_are(data, model, crew, tmp_path):
    before = [copy.deepcopy(m.train().state_dict()) for m in crew]
    fit(model, data, Distillation(Teachers(crew, "transfer", data), base=TUNE), plan=PLAN, out=tmp_path / "run", observers=[])
    for m, state in zip(crew, before, strict=True):
        assert m.training and all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in m.parameters())


def test_weight_zero_asks_nobody(data, model, crew, tmp_path):
    silent = Distillation(Teachers(crew), base=TUNE, weight=0.0)
    assert silent.companion is None
    runs = [fit(model, data, m, plan=PLAN, out=tmp_path / str(i), observers=[]) for i, m in enumerate((TUNE, silent))]
    assert fingerprint(runs[0].model) == fingerprint(runs[1].model)


def test_only_the_validation_images_are_looked_at(data, crew):
    blank = dataclasses.replace(data, test=dataclasses.replace(data.test, labels=1 - data.test.labels))
    weights = [Teachers(crew, "learned", d).config["weights"] for d in (data, blank)]
    assert weights[0] == weights[1]
    flipped = dataclasses.replace(data, valid=dataclasses.replace(data.valid, labels=1 - data.valid.labels))
    assert Teachers(crew, "learned", flipped).config["weights"] != weights[0]


# --- together with attacks ----------------------------------------------------------------------------------------


def test_an_attacked_student_hears_the_panel_speak_of_clean_images(data, model, crew):
    panel = Teachers(crew, "confidence")
    beside = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]), torch.arange(4), beside)
    method = AdversarialTraining(PGD(0.05, steps=2), Distillation(panel, weight=1.0, base=TUNE))
    asked = []

    def forward(x):
        asked.append(x)
        return model(x)

    found = method.loss(Network(forward, model), batch)["distillation"]
    said = panel.together(beside, labels=batch.y, classes=model.classes, temperature=4.0)
    assert method.companion == panel.models and not torch.equal(asked[-1], batch.x)
    assert torch.allclose(found, soft_targets(model(asked[-1]), said, temperature=4.0))


def test_a_panel_teaches_under_attack(data, model, crew, tmp_path):
    method = AdversarialTraining(PGD(0.02, steps=1), Distillation(Teachers(crew, "learned", data), base=TUNE))
    told = fit(model, data, method, plan=PLAN, out=tmp_path / "run", observers=[]).record["method"]
    assert told["base"]["teacher"]["weights"]["name"] == "learned" and told["attack"]["name"] == "pgd"


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d, c: Teachers([]), "at least one"),
        (lambda d, c: Teachers("runs/teacher"), "give a list"),
        (lambda d, c: Teachers(c[0]), "give a list"),
        (lambda d, c: Teachers([*c, "nowhere/at/all"]), "holds no trained model"),
        (lambda d, c: Teachers(c, "loud"), "Known: confidence, learned, transfer, uniform"),
        (lambda d, c: Teachers(c, 0.5), "is no weighting"),
        (lambda d, c: Teachers(c, "learned"), "pass data"),
        (lambda d, c: Teachers(c, "transfer", d, "test"), "stays a test"),
        (lambda d, c: Teachers([*c, build_model("bag_of_embeddings", d)]), "images and texts"),
        (lambda d, c: Teachers([*c, build_model("small_cnn", Named(("dark", "blue")))], "learned", d), "can't tell bright"),
        (lambda d, c: Distillation(Teachers([*c, build_model("small_cnn", Named(("dark", "blue")))])).prepare(copy.deepcopy(c[0])), "can't tell bright"),
        (lambda d, c: Learned()(torch.zeros(4, 2, 3), torch.zeros(4, dtype=torch.int64)), "call `fitted`"),
    ],
)
def test_nonsense_is_refused(make, says, data, crew):
    with pytest.raises(AdaptkitError, match=says):
        make(data, crew)
