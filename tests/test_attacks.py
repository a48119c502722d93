"""Attacks: balls, contract, FGSM and PGD, and what each of them refuses."""

from __future__ import annotations

import importlib
import math
import signal
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adaptkit import testing
from adaptkit.core.registry import AdaptkitError
from adaptkit.robustness.attacks import ATTACKS, FGSM, PGD, RFGSM, climb, robust_accuracy
from adaptkit.robustness.autopgd import APGD, APGDT, checkpoints, dlr, stalled
from adaptkit.robustness.balls import NORMS, Ball, lengths, project, random_point, steepest
from adaptkit.robustness.contract import input_gradient, quiet_model
from adaptkit.robustness.ensemble import CORES, AutoAttack, map_packs, packs, worker_count
from adaptkit.robustness.fab import FABT, onto_plane
from adaptkit.robustness.measuring import check_attack, traces, victim
from adaptkit.robustness.minimal import CarliniWagner, DeepFool
from adaptkit.robustness.square import Square
from adaptkit.robustness.transfer import Transfer, Universal, learn_patch, learn_universal, pasted, random_places
from adaptkit.testing import toy_data, toy_model

RADII = {"linf": 0.1, "l2": 1.0, "l1": 8.0}


def some(n: int = 5, *, seed: int = 0) -> tuple[Tensor, torch.Generator]:
    "Images [n, 3, 9, 7] and a generator."
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 9, 7, generator=generator), generator


@pytest.mark.parametrize("norm", NORMS)
def test_points_stay_in_the_ball_and_in_the_box(norm: str) -> None:
    x, generator = some()
    ball = Ball(norm, RADII[norm])
    for moved in (ball.start(x, generator=generator), ball.inside(x, x + 3 * torch.randn(x.shape, generator=generator))):
        assert float(lengths(moved - x, norm).max()) <= ball.eps * (1 + 1e-5)
        assert 0 <= float(moved.min()) and float(moved.max()) <= 1


@pytest.mark.parametrize("norm", NORMS)
def test_each_image_is_treated_for_itself(norm: str) -> None:
    x, generator = some()
    wild = torch.randn(x.shape, generator=generator) * torch.tensor([0.01, 0.1, 1, 3, 10]).view(-1, 1, 1, 1)
    for one in (lambda d: project(d, norm, 0.5), lambda d: steepest(d, norm), lambda d: lengths(d, norm)):
        assert torch.allclose(one(wild), torch.cat([one(wild[i : i + 1]) for i in range(5)]), atol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_random_points_are_uniform_over_the_volume(norm: str) -> None:
    generator = torch.Generator().manual_seed(1)
    radii = lengths(random_point(torch.zeros(20000, 1, 3, 2), norm, 2.0, generator=generator), norm) / 2
    for share in (0.5, 0.8, 0.9):  # within `share` of the radius lies share ** 6 of the volume
        assert abs(float((radii <= share).float().mean()) - share**6) < 0.012
    assert float(radii.max()) <= 1 + 1e-6


def test_l1_projection_is_the_nearest_point_of_ball_and_box() -> None:
    import scipy.optimize

    rng = np.random.default_rng(0)
    for _ in range(4):
        x, far = rng.random(12), rng.normal(size=12)
        room = torch.from_numpy(np.where(far > 0, 1 - x, x))
        ours = project(torch.from_numpy(far)[None], "l1", 1.5, room=room[None])[0].numpy()
        bounds = [(0, r) for r in room.tolist()]  # sizes in the direction of `far`
        best = scipy.optimize.minimize(
            lambda s, f=far: ((s - np.abs(f)) ** 2).sum(),
            np.zeros(12),
            jac=lambda s, f=far: 2 * (s - np.abs(f)),
            bounds=bounds,
            constraints={"type": "ineq", "fun": lambda s: 1.5 - s.sum()},
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert best.success and np.abs(np.abs(ours) - best.x).max() < 1e-4


@pytest.mark.parametrize(
    ("norm", "eps", "told"),
    [("linf", 8, "8/255, not 8"), ("linf", -0.1, "at least 0"), ("l2", math.nan, "at least 0"), ("l1", math.inf, "finite"), ("l0", 1, "Did you mean")],
)
def test_wrong_radii_are_refused(norm: str, eps: float, told: str) -> None:
    for make in (Ball, lambda n, e: PGD(e, n), lambda n, e: FGSM(e, n), lambda n, e: RFGSM(e, n)):
        with pytest.raises(AdaptkitError, match=told):
            make(norm, eps)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", [FGSM, RFGSM, PGD, lambda e, n: PGD(e, n, restarts=2, momentum=0.9, loss="margin", early_stop=False)])
def test_attacks_keep_the_contract(make, norm: str) -> None:
    assert check_attack(lambda: make(RADII[norm], norm)) > 0


def test_registered_attacks_are_found_by_name() -> None:
    assert {"fgsm", "rfgsm", "pgd"} <= set(ATTACKS) and ATTACKS["pgd"] is PGD
    with pytest.raises(AdaptkitError, match="Did you mean 'pgd'"):
        ATTACKS["pdg"]


def test_each_is_an_entry_point_and_the_check_is_among_the_others() -> None:
    listed = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]["adaptkit.attack"]
    for name, place in listed.items():
        module, _, attribute = place.partition(":")
        assert getattr(importlib.import_module(module), attribute) is ATTACKS[name] and ATTACKS[name]().name == name
    assert {*listed} == {*ATTACKS.items} and testing.check_attack is check_attack


class Broken(nn.Module):
    "A network with a fault behind it."

    def __init__(self, net: nn.Module, fault) -> None:
        super().__init__()
        self.net, self.fault = net, fault

    def forward(self, x: Tensor) -> Tensor:
        return self.fault(self.net(x))


@pytest.mark.parametrize("attack", [FGSM(0.1), RFGSM(0.1), PGD(0.1, steps=2)], ids=lambda a: a.name)
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda z: z.softmax(1), "probabilities"),
        (lambda z: z[:, :1], r"at least two logits.*\[5, 1\]"),
        (lambda z: z + (z - z).sqrt(), "no numbers"),
        (lambda z: z.detach(), "Square"),
    ],
)
def test_broken_models_are_told_and_left_alone(attack, fault, told: str) -> None:
    net, x, y = victim()
    before = traces(net)
    with pytest.raises(AdaptkitError, match=told):
        attack.perturb(Broken(net, fault), x, y)
    assert traces(net) == before


@pytest.mark.parametrize("attack", [FGSM(0.1), RFGSM(0.1), PGD(0.1, steps=2)], ids=lambda a: a.name)
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x, y: (x + 0.5, y), "must lie in"),
        (lambda x, y: (x - 0.5, y), "must lie in"),
        (lambda x, y: (x * math.nan, y), "must lie in"),
        (lambda x, y: ((255 * x).byte(), y), "divide bytes by 255"),
        (lambda x, y: (x[:0], y[:0]), "empty"),
        (lambda x, y: (x[0], y[:1]), r"\[B, C, H, W\]"),
        (lambda x, y: (x, y + 4), "4 classes"),
        (lambda x, y: (x, y - 9), "4 classes"),
        (lambda x, y: (x, y.float()), "whole numbers"),
        (lambda x, y: (x, y[:3]), "as many labels"),
    ],
)
def test_bad_input_is_told(attack, change, told: str) -> None:
    net, x, y = victim()
    with pytest.raises(AdaptkitError, match=told):
        attack.perturb(net, *change(x, y))


def test_targets() -> None:
    net, x, y = victim()
    targets = (y + 1) % 4
    moved = PGD(0.3, steps=40, early_stop=False).perturb(net, x, y, targets=targets)
    with quiet_model(net), torch.no_grad():
        before, after = (net(p).log_softmax(1).gather(1, targets[:, None]) for p in (x, moved))
    assert bool((after > before).all())
    for wrong, told in ((y, "label itself"), (targets + 4, "targets go from"), (targets[:2], "as many targets")):
        with pytest.raises(AdaptkitError, match=told):
            PGD(0.3).perturb(net, x, y, targets=wrong)


def test_a_model_that_rolls_dice_is_refused() -> None:
    net, x, y = victim()
    with pytest.raises(AdaptkitError, match="random in evaluation mode"):
        robust_accuracy(Broken(net, lambda z: z + torch.randn_like(z)), (x, y), FGSM(0.1))


def test_leaving_the_batch_changes_only_the_time() -> None:
    net, x, y = victim()
    with quiet_model(net):
        ways = {"start": x, "ball": Ball("linf", 0.05), "size": 0.01, "steps": 8}
        stay, leave = (climb(net, x, y, leave=leave, **ways) for leave in (False, True))
        with torch.no_grad():
            fell = net(leave).argmax(1) != y
            assert bool((fell | (net(stay).argmax(1) == y)).all())  # whoever is wrong at the end is wrong for both
    assert 0 < int(fell.sum()) < 5, "some fall, some don't: else this test says nothing"
    assert torch.equal(stay[~fell], leave[~fell])


def test_one_step_is_what_it_says() -> None:
    net, x, y = victim()
    with quiet_model(net):
        slope = input_gradient(net, x, y)[2]
    assert torch.equal(FGSM(0.1).perturb(net, x, y), (x + 0.1 * slope.sign()).clamp(0, 1))
    assert torch.allclose(PGD(0.1, steps=1, step=0.1, random_start=False).perturb(net, x, y), FGSM(0.1).perturb(net, x, y), atol=1e-6)


def test_restarts_never_help_the_model() -> None:
    net, x, y = victim()
    few, many = (robust_accuracy(net, (x, y), PGD(0.04, steps=3, restarts=r)) for r in (1, 6))
    assert not (few.fallen & ~many.fallen).any() and many.accuracy <= few.accuracy


@pytest.mark.parametrize("norm", NORMS)
def test_robust_accuracy_counts_what_it_sees(norm: str) -> None:
    data = toy_data()
    model = toy_model(data)
    nothing = robust_accuracy(model, data, PGD(0.0, norm, steps=1), batch_size=7)
    found = robust_accuracy(model, data, PGD(RADII[norm], norm, steps=4), batch_size=7, keep=True, n=20)
    assert nothing.accuracy == nothing.clean and nothing.n == 32
    assert found.n == 20 == len(found.fallen) == len(found.adversarial) and len(set(found.rows)) == 20
    with quiet_model(model), torch.no_grad():
        right = model(found.adversarial).argmax(1).numpy() == data.test.labels[found.rows]
    assert (right == ~found.fallen).all() and found.accuracy == right.mean()
    assert found.low <= found.accuracy <= found.high and found.config["eps"] == RADII[norm]


def test_measurements_refuse_nonsense() -> None:
    net, x, y = victim()
    data = toy_data()
    for call, told in (
        (lambda: robust_accuracy(net, data, FGSM(0.1)), "no reader"),
        (lambda: robust_accuracy(net, (x, y), FGSM(0.1), n=0), "at least 1"),
        (lambda: robust_accuracy(net, (x, y), FGSM(0.1), batch_size=0), "at least 1"),
        (lambda: robust_accuracy(net, (x[:0], y[:0]), FGSM(0.1)), "empty"),
        (lambda: robust_accuracy(toy_model(data), data, FGSM(0.1), split="tst"), "Did you mean 'test'"),
        (lambda: PGD(0.1, steps=0), "at least 1"),
        (lambda: PGD(0.1, loss="dlr"), "Unknown loss"),
        (lambda: PGD(0.1, restarts=3, random_start=False), "3 times the same"),
    ):
        with pytest.raises(AdaptkitError, match=told):
            call()


BUDGET = {"steps": 6, "targets": 2}
SEARCHING = {
    "apgd": lambda e, n: APGD(e, n, steps=8, restarts=2),
    "apgd-dlr": lambda e, n: APGD(e, n, steps=8, loss="dlr"),
    "apgdt": lambda e, n: APGDT(e, n, **BUDGET),
    "fabt": lambda e, n: FABT(e, n, **BUDGET),
    "square": lambda e, n: Square(e, n, queries=30),
    "autoattack": lambda e, n: AutoAttack(e, n, **BUDGET, queries=10, pack=3),
}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", SEARCHING)
def test_searching_attacks_keep_the_contract(name: str, norm: str) -> None:
    assert check_attack(lambda: SEARCHING[name]({"linf": 0.15, "l2": 1.5}[norm], norm)) > 0


@pytest.mark.parametrize("make", [DeepFool, lambda: CarliniWagner(steps=30, searches=3, rate=0.1)], ids=["deepfool", "carliniwagner"])
def test_minimal_attacks_keep_the_contract_and_fool(make) -> None:
    assert check_attack(make) > 0
    net, x, y = victim()
    moved = make().perturb(net, x, y)
    with quiet_model(net), torch.no_grad():
        assert bool((net(moved).argmax(1) != y).all())


@pytest.mark.parametrize("name", [*SEARCHING, "deepfool", "carliniwagner"])
@pytest.mark.parametrize(
    ("fault", "change", "told"),
    [
        (lambda z: z.softmax(1), None, "probabilities"),
        (lambda z: z[:, :1], None, "at least two logits"),
        (None, lambda x, y: (x + 0.5, y), "must lie in"),
        (None, lambda x, y: ((255 * x).byte(), y), "divide bytes by 255"),
        (None, lambda x, y: (x[:0], y[:0]), "empty"),
        (None, lambda x, y: (x, y + 4), "4 classes"),
    ],
)
def test_searching_attacks_tell_bad_input(name: str, fault, change, told: str) -> None:
    net, x, y = victim()
    attack = SEARCHING[name](0.1, "linf") if name in SEARCHING else ATTACKS[name]()
    with pytest.raises(AdaptkitError, match=told):
        attack.perturb(Broken(net, fault) if fault else net, *(change(x, y) if change else (x, y)))


def test_the_ensemble_refuses_dice_and_other_settings() -> None:
    net, x, y = victim()
    with pytest.raises(AdaptkitError, match="random in evaluation mode"):
        AutoAttack(0.1, **BUDGET, queries=2).perturb(Broken(net, lambda z: z + torch.randn_like(z)), x, y)
    for make in (APGD, APGDT, FABT, Square, AutoAttack):
        for eps, norm, told in ((8, "linf", "8/255, not 8"), (-1, "l2", "at least 0"), (1.0, "l1", "for l1 use PGD")):
            with pytest.raises(AdaptkitError, match=told):
                make(eps, norm)
    with pytest.raises(AdaptkitError, match="at least 1 is needed"):
        AutoAttack(0.1, queries=0)


@pytest.fixture
def threads() -> Iterator[None]:
    "Whatever a test does to the number of PyTorch's threads is undone."
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Seen(nn.Module):
    "A network that remembers which threads have asked it."

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.asked = net, set()

    def forward(self, x: Tensor) -> Tensor:
        self.asked.add(threading.get_ident())
        return self.net(x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_ensemble_finds_the_same_on_one_core_and_on_several(norm: str, threads: None) -> None:
    net, x, y = victim()
    attack, found, here = AutoAttack(RADII[norm] / 2, norm, **BUDGET, queries=20, pack=2), [], threading.get_ident()
    for n in (1, 2, 3):
        seen = Seen(net)
        torch.set_num_threads(n)
        found.append(attack.perturb(seen, x.requires_grad_(), y, generator=torch.Generator().manual_seed(4)))
        assert torch.get_num_threads() == n and bool(seen.asked - {here}) == (n > 1) and not found[-1].requires_grad
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], attack.perturb(net, x, y, generator=torch.Generator().manual_seed(5)))


def test_packs_keep_to_the_calling_thread_where_others_would_not_inherit_its_settings(threads: None) -> None:
    net, x, y = victim()
    attack, seen = AutoAttack(0.1, **BUDGET, queries=2, pack=2), Seen(net)
    torch.set_num_threads(2)
    with torch.autocast("cpu", torch.bfloat16):
        attack.perturb(seen, x, y)
    assert seen.asked == {threading.get_ident()}
    with torch.inference_mode():
        assert worker_count(5, x.device) == 1
    assert worker_count(5, x.device) == 2 and worker_count(1, x.device) == 1 and worker_count(0, x.device) == 1 and worker_count(5, torch.device("meta")) == 1


@pytest.mark.parametrize("n, packs, workers", [(3, 2, 1), (3, 8, 3), (4, 8, 4), (6, 8, 3), (7, 8, 1), (8, 8, 4), (16, 3, 2)])
def test_as_many_cores_as_possible_are_busy(n: int, packs: int, workers: int, threads: None) -> None:
    torch.set_num_threads(n)
    assert worker_count(packs, torch.device("cpu")) == workers


def shared(work, n: int = 2) -> list[Tensor]:
    "What `map_packs` makes of n parts."
    rows = [torch.tensor([k]) for k in range(n)]
    return map_packs(work, lambda x: x, rows, [torch.Generator() for _ in rows], workers=2)


def test_two_packs_are_under_way_at_once_unless_somebody_else_has_the_cores(threads: None) -> None:
    torch.set_num_threads(2)
    both = threading.Barrier(2, timeout=20)

    def meet(model, rows: Tensor, generator: torch.Generator) -> Tensor:
        both.wait()
        assert torch.get_num_threads() == 1
        return model(rows)

    assert [int(r) for r in shared(meet, 4)] == [0, 1, 2, 3] and torch.get_num_threads() == 2
    with CORES:
        assert {int(r) for r in shared(lambda *_: torch.tensor(threading.get_ident()))} == {threading.get_ident()}
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("fault", [ZeroDivisionError, KeyboardInterrupt])
def test_a_fault_or_ctrl_c_ends_the_packs_that_are_under_way(fault: type[BaseException], threads: None) -> None:
    torch.set_num_threads(2)
    both, asked, before = threading.Barrier(2, timeout=20), [], signal.signal(signal.SIGINT, signal.default_int_handler)

    def work(model, rows: Tensor, generator: torch.Generator) -> Tensor:
        both.wait()
        if int(rows) == 1 and fault is ZeroDivisionError:
            raise fault
        if int(rows) == 1:
            time.sleep(0.2)  # until the other thread waits
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        while len(asked) < 10_000:
            asked.append(model(rows))
            time.sleep(0.001)
        return rows

    try:
        with pytest.raises(fault):
            shared(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert torch.get_num_threads() == 2 and not CORES.locked() and len(asked) < 10_000


@pytest.mark.parametrize("n, size, expected", [(0, 4, []), (1, 4, [1]), (4, 4, [4]), (5, 4, [3, 2]), (9, 4, [3, 2, 2, 2]), (3, 1, [1, 1, 1]), (293, None, [49] * 5 + [48])])
def test_packs_are_alike_and_an_even_number(n: int, size: int | None, expected: list[int]) -> None:
    found = packs(torch.arange(n), size)
    assert [len(p) for p in found] == expected
    assert not found or torch.equal(torch.cat(found), torch.arange(n))


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_are_enough(classes: int) -> None:
    net, x, y = victim()
    few = Broken(net, lambda z: z[:, :classes])
    with quiet_model(few), torch.no_grad():
        labels = few(x).argmax(1)
    found = robust_accuracy(few, (x, labels), AutoAttack(0.3, steps=10, queries=10))
    assert found.clean == 1 and found.accuracy < 1


def test_the_published_schedule_of_steps() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    shares = [0.0, 0.22]
    while shares[-1] < 1:  # the paper's own recursion
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    assert checkpoints(100) == [math.ceil(round(100 * s, 6)) for s in shares[1:] if s < 1]


def test_steps_are_halved_for_the_published_reasons() -> None:
    rises, best, then = torch.tensor([16, 17, 17, 17]), torch.tensor([2.0, 2.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    halved = torch.tensor([False, False, False, True])
    # too few rises; enough of them; none of the bests is higher; as before, but it was halved last time
    assert stalled(rises, 22, best, then, halved).tolist() == [True, False, True, False]


def test_the_box_and_the_plane_agree_with_a_solver() -> None:
    import scipy.optimize

    rng = np.random.default_rng(0)
    for _ in range(5):
        x, w, g = rng.random(8), rng.normal(size=8), 0.4 * rng.normal()
        way = {n: onto_plane(*(torch.from_numpy(v).view(1, 1, 4, 2) for v in (x, w)), torch.tensor([g]), n).flatten().numpy() for n in ("linf", "l2")}
        # Linf as a linear programme over (d, size)
        limits = np.block([[np.eye(8), -np.ones((8, 1))], [-np.eye(8), -np.ones((8, 1))]])
        best = scipy.optimize.linprog([0] * 8 + [1], limits, np.zeros(16), [[*w, 0]], [-g], bounds=[*zip(-x, 1 - x, strict=True), (0, None)])
        assert best.success and abs(best.fun - np.abs(way["linf"]).max()) < 1e-5
        near = scipy.optimize.minimize(lambda d: d @ d, np.zeros(8), jac=lambda d: 2 * d, bounds=[*zip(-x, 1 - x, strict=True)], constraints={"type": "eq", "fun": lambda d, w=w, g=g: w @ d + g}, options={"ftol": 1e-10, "maxiter": 1000})
        assert near.success and abs(near.fun**0.5 - np.linalg.norm(way["l2"])) < 1e-4


def test_dlr_ignores_scale_and_tells_who_has_fallen() -> None:
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 5
    assert torch.allclose(dlr(1e3 * logits - 5, labels), dlr(logits, labels), atol=1e-3)
    assert torch.equal(dlr(logits, labels) > 0, logits.argmax(1) != labels)
    with pytest.raises(AdaptkitError, match="three classes"):
        dlr(logits[:, :2], labels % 2)


def test_square_breaks_what_hides_its_gradient() -> None:
    net, x, y = victim()

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, images: Tensor) -> Tensor:
            return self.net((images * 15).round() / 15)

    rounded = Rounded()
    with quiet_model(rounded), torch.no_grad():
        labels = rounded(x).argmax(1)
    blind, seeing = (robust_accuracy(rounded, (x, labels), a).accuracy for a in (PGD(0.2, random_start=False), Square(0.2, queries=300)))
    assert blind == 1 and seeing < 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_perturbation_for_all(norm: str) -> None:
    assert check_attack(lambda: Universal(RADII[norm], norm, steps=10)) > 0
    net, x, y = victim()
    ball = Ball(norm, RADII[norm])
    delta = learn_universal(net, x, y, ball=ball, steps=10, batch_size=3)
    assert delta.shape == x[:1].shape and float(lengths(delta, norm)) <= ball.eps * (1 + 1e-5)
    many, one = (learn_universal(net, p, q, ball=ball, steps=10) for p, q in ((x, y), (x[:1], y[:1])))
    assert not torch.equal(many, one)


def test_transfer_asks_the_other_model_only() -> None:
    net, x, y = victim()
    attack = Transfer(net, PGD(0.1, steps=3))
    moved = attack.perturb(Broken(net, lambda z: 1 / 0), x, y)
    assert torch.equal(moved, PGD(0.1, steps=3, early_stop=False).perturb(net, x, y))
    assert (attack.norm, attack.eps, attack.config["steps"]) == ("linf", 0.1, 3)


def test_patches_lie_where_they_should_and_pull_to_the_target() -> None:
    net, x, y = victim()
    places = random_places(x, 3, torch.Generator().manual_seed(0))
    assert places.min() >= 0 and bool((places + 3 <= torch.tensor([9, 7])).all())
    out = pasted(x, torch.ones(3, 3, 3), places)
    assert [int((out[i] != x[i]).any(0).sum()) for i in range(5)] == [9] * 5
    patch, left = learn_patch(net, x, y, target=1, side=4, steps=20), traces(net)
    grey = torch.full_like(patch, 0.5)
    places = random_places(x, 4, torch.Generator().manual_seed(1))
    with quiet_model(net), torch.no_grad():
        ours, control = (float(net(pasted(x, p, places)).softmax(1)[:, 1].mean()) for p in (patch, grey))
    assert ours > control and traces(net) == left
    for wrong, told in (({"target": 9, "side": 3}, "targets go from 9"), ({"target": 1, "side": 8}, "doesn't fit"), ({"target": 1, "side": 0}, "doesn't fit")):
        with pytest.raises(AdaptkitError, match=told):
            learn_patch(net, x, y, **wrong)
