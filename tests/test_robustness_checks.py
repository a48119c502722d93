"""Self-checks of a defence and of an attack: planted faults trip the check that is meant for them, honest models trip none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.sources import load_data
from adaptkit.robustness.attacks import FGSM, PGD
from adaptkit.robustness.balls import Ball, lengths
from adaptkit.robustness.checks import ORDER, SelfChecks, as_bytes, check_case, check_defence, within
from adaptkit.robustness.contract import Settings
from adaptkit.robustness.pixels import FAULTS, entering, line_of
from adaptkit.robustness.suspicions import CHECKS, Broken, Case, Verdict, changed

EPS = 0.1


class Normalise(nn.Module):
    "Pixels, normalised."

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 1, 1, 1), 0.3))
        self.register_buffer("std", torch.full((1, 1, 1, 1), 0.4))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def digits() -> tuple[Tensor, Tensor]:
    data = load_data("digits")
    x = torch.from_numpy(data.train.items.copy()).float()[:, None] / float(data.train.items.max())  # [N, 1, 8, 8]
    return x, torch.from_numpy(data.train.labels.copy())


X, Y = digits()
SOME = X[-48:], Y[-48:]


def learnt(seed: int) -> nn.Module:
    "A small CNN with BatchNorm, trained for a moment."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            Normalise(), nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
        )
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for _ in range(8):
            for rows in torch.randperm(len(X) - 48).split(128):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(X[rows]), Y[rows]).backward()
                optimizer.step()
    return net.eval()


NETS = {seed: learnt(seed) for seed in range(3)}


def checked(net: Any, attack: Any = None, **how: Any) -> SelfChecks:
    return check_defence(net, SOME, attack=attack or PGD(EPS, steps=10), n=None, **how)


@pytest.mark.parametrize("seed", NETS)
def test_an_honest_model_trips_no_check(seed: int) -> None:
    report = checked(NETS[seed], seed=seed)
    assert [v.name for v in report.verdicts] == list(ORDER)
    assert report.passed and report.tripped == (), report
    assert report["radius zero"].numbers["clean"] > 0.8


@pytest.mark.parametrize("seed", NETS)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_trips_its_check(fault: str, seed: int) -> None:
    name, plant = FAULTS[fault]
    report = checked(plant(NETS[seed], SOME[0]), checks=[name], seed=seed)
    assert report.tripped == (name,)
    assert report[name].found and report[name].means


def test_a_model_in_training_mode_is_no_fault() -> None:
    net = NETS[0].train()
    try:
        assert checked(net, checks=["neighbours", "unchanged", "randomness"]).passed
        assert net.training and net[2].training
    finally:
        net.eval()


def test_a_function_that_hides_a_network_in_training_mode_trips_neighbours() -> None:
    net = learnt(5).train()
    report = checked(lambda x: net(x), checks=["neighbours", "unchanged"])
    assert report["neighbours"].passed is False and report["unchanged"].passed is None and not report.passed


def test_the_checks_leave_a_model_as_it_was() -> None:
    stuck = FAULTS["BatchNorm in training mode"][1](NETS[0], SOME[0])
    before, chance = {k: v.clone() for k, v in stuck.state_dict().items()}, torch.get_rng_state()
    assert "unchanged" in checked(stuck, checks=["unchanged", "randomness"]).tripped
    assert all(torch.equal(v, before[k]) for k, v in stuck.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)


def test_probabilities_stop_attacks_but_not_the_report() -> None:
    report = checked(FAULTS["softmax at the end"][1](NETS[0], SOME[0]), checks=["logits", "radius", "effort"])
    assert [v.passed for v in report.verdicts] == [False, None, None] and "probabilities" in report["radius"].found


def test_detached_logits_have_no_gradient() -> None:
    report = checked(Broken(NETS[0], before=lambda x: x.detach()), checks=["gradients"])
    assert report.tripped == ("gradients",) and "no gradient reaches" in report["gradients"].found


def test_saturated_logits_have_no_gradient() -> None:
    report = checked(Broken(NETS[0], after=lambda z: 1e4 * z), checks=["gradients", "quantisation"])
    assert report.tripped == ("gradients",)


@dataclass(frozen=True)
class Odd(Settings):
    "PGD with a fault."

    fault: Callable[[PGD, int, float], PGD]
    outside: float = 1.0  # times the radius
    eps: float = EPS
    steps: int = 8
    norm: str = "linf"

    def perturb(self, model: Any, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        attack = self.fault(PGD(min(1.0, self.outside * self.eps), steps=self.steps), self.steps, self.eps)
        return attack.perturb(model, x, y, generator=generator)


def test_faults_of_an_attack_are_found() -> None:
    net, how = NETS[0], {"checks": ["inside", "radius zero", "radius", "effort", "no bounds"]}
    assert checked(net, Odd(lambda a, n, e: a), **how).tripped == ()
    assert checked(net, Odd(lambda a, n, e: a, outside=2.0), **how).tripped == ("inside",)
    tired = Odd(lambda a, n, e: replace(a, steps=1, step=a.eps / (n * n), random_start=False))  # more steps, shorter ones
    assert "effort" in checked(net, tired, **how).tripped
    lost = Odd(lambda a, n, e: replace(a, step=1e-4 / max(e, 1e-3), random_start=False))  # larger radius, shorter steps
    assert {"radius", "no bounds"} & {*checked(net, lost, **how).tripped}
    always = Odd(lambda a, n, e: replace(a, eps=max(a.eps, 0.2)))  # attacks at radius 0, too
    assert {"inside", "radius zero"} <= {*checked(net, always, **how).tripped}


def test_what_an_attack_has_no_setting_for_is_not_run() -> None:
    report = checked(NETS[0], FGSM(EPS), checks=["effort", "radius"])
    assert report["effort"].passed is None and "no steps" in report["effort"].found and report["radius"].passed
    with pytest.raises(AdaptkitError, match="has no setting steps"):
        changed(FGSM(EPS), steps=3)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("linf", 8 / 255), ("l2", 0.6), ("l1", 4.0)])
def test_saved_images_stay_in_the_ball(norm: str, eps: float) -> None:
    x = (255 * torch.rand(6, 3, 9, 7, generator=torch.Generator().manual_seed(0))).round() / 255
    moved = Ball(norm, eps).start(x, generator=torch.Generator().manual_seed(1))
    saved = as_bytes(x, moved, Ball(norm, eps))
    assert saved.dtype == torch.uint8
    assert float(lengths(saved / 255 - x, norm).max()) <= eps * (1 + 1e-4) + 1e-6
    assert float((saved / 255 - moved).abs().max()) <= 1 / 255 + 1e-6
    on_grid = Ball(norm, eps)
    assert torch.equal(as_bytes(x, x, on_grid), (255 * x).round().to(torch.uint8))


def test_a_rise_within_chance_is_allowed_once_in_all() -> None:
    case = Case(NETS[0], *SOME, PGD(EPS))
    step = case.slack
    assert within(case, {"a": 0.5, "b": 0.5 + step}) and not within(case, {"a": 0.5, "b": 0.5 + step, "c": 0.5 + 2 * step})


def test_the_line_from_pixels_to_the_first_layer_is_measured() -> None:
    x = SOME[0]
    out = entering(NETS[0], x)
    assert out is not None
    a, b, far = line_of(x, out)
    assert float(a) == pytest.approx(1 / 0.4, rel=1e-3) and float(b) == pytest.approx(-0.3 / 0.4, abs=1e-3) and far < 1e-3
    assert not any(m._forward_pre_hooks for m in NETS[0].modules())


def test_outsiders_add_a_check_and_it_runs() -> None:
    CHECKS.items["mine"] = lambda case: Verdict("mine", False, "always")
    try:
        assert check_case(Case(NETS[0], *SOME, PGD(EPS)), checks=["mine"]).tripped == ("mine",)
    finally:
        del CHECKS.items["mine"]


def test_bad_input_is_told() -> None:
    x, y = SOME
    for sentence, args, how in [
        ("Unknown robustness_check 'radios'", (x, y), {"checks": ["radios"]}),
        ("nothing to check", (x, y), {"checks": []}),
        ("must lie in", (x * 2, y), {}),
        ("labels go from", (x, y + 10), {}),
        ("batch_size is 0", (x, y), {"batch_size": 0}),
    ]:
        with pytest.raises(AdaptkitError, match=sentence):
            check_defence(NETS[0], args, **how)


def test_a_verdict_is_a_plain_record() -> None:
    report = checked(NETS[0], checks=["logits", "radius"])
    value = report.to_json()
    assert [Verdict(**v) for v in value["verdicts"]] == list(report.verdicts)
    assert repr(report).startswith("SelfChecks(pgd: 2 of 2 run on 48 images") and "✓" in report._repr_html_()
