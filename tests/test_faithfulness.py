"""What maps say, tried: curves, filled gaps, maps under change, and the gate in front of `explain`, beside formulas written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest, spearmanr
from torch import Tensor, nn

from adaptkit.core.registry import AdaptkitError
from adaptkit.explanation.class_activation import GradCAM
from adaptkit.explanation.contract import Found, Settings, slope
from adaptkit.explanation.curves import (
    Curves,
    deletion,
    deletion_frames,
    draw_curves,
    insertion,
    insertion_frames,
    ranking,
    road,
    still_said,
)
from adaptkit.explanation.explain import explain, subject
from adaptkit.explanation.faithfulness import (
    Gate,
    beats_random,
    check_explanation,
    check_explanations,
    fingerprint,
    gains,
    rivals,
    smooth_maps,
    tail,
    wins_needed,
)
from adaptkit.explanation.gradients import GuidedBackprop, IntegratedGradients
from adaptkit.explanation.grounds import blurred, grey_ground, imputed
from adaptkit.explanation.planted import edge_maps, learn_planted, planted
from adaptkit.explanation.solar_physics import agreement, cracks, darkness, inner
from adaptkit.explanation.stability import (
    cascade,
    infidelity,
    likeness,
    maps_of,
    max_sensitivity,
    redrawn,
    steadiness,
    weighted_layers,
)
from adaptkit.heads.heads import Model, Named, build_model
from adaptkit.robustness.measuring import traces

TARGET = torch.tensor([2, 0, 1, 1])


def asked() -> tuple[Model, Tensor, Tensor]:
    "The subject of the contract in mixed modes, its images [4, 3, 22, 18], and a map of each."
    model, x = subject()
    return model, x, torch.rand(4, 22, 18, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained() -> tuple[Model, Tensor]:
    return learn_planted(seed=3), planted(12, seed=4).x


@dataclass(frozen=True)
class Edges(Settings):
    def attribute(self, model: Model, x: Tensor, target: Tensor | None = None, *, generator: torch.Generator | None = None) -> Found:
        values, logits, target = slope(model, x, target)
        return Found(edge_maps(x), logits, target, values)


def share_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    quiet = copy.deepcopy(model).eval()
    with torch.no_grad():
        return quiet(x).double().softmax(1).gather(1, target[:, None])[:, 0]


@pytest.mark.parametrize("kind", ["deletion", "insertion"])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_curves_are_what_a_loop_finds(kind: str, batch: int) -> None:
    model, x, maps = asked()
    ground = torch.rand(x.shape, generator=torch.Generator().manual_seed(2))
    before = traces(model)
    found = (deletion if kind == "deletion" else insertion)(model, x, maps, TARGET, steps=5, ground=ground, batch=batch)
    assert traces(model) == before and found.kind == kind
    first, last = (x, ground) if kind == "deletion" else (ground, x)
    for b in range(4):
        order = maps[b].flatten().argsort(descending=True)
        for s, share in enumerate((0, 0.25, 0.5, 0.75, 1)):
            frame = first[b].flatten(1).clone()
            rows = order[: round(share * 396)]
            frame[:, rows] = last[b].flatten(1)[:, rows]
            hand = share_of(model, frame.view(1, 3, 22, 18), TARGET[b : b + 1])
            assert torch.allclose(found.values[b, s], hand, atol=1e-6)
    assert torch.allclose(found.area, torch.from_numpy(np.trapezoid(found.values.numpy(), dx=0.25, axis=1)))


def test_frames_are_those_of_the_curve() -> None:
    model, x, maps = asked()
    for film, curve in ((deletion_frames, deletion), (insertion_frames, insertion)):
        frames = film(x[1], maps[1], 6)
        assert frames.shape == (6, 3, 22, 18)
        values = curve(model, x, maps, TARGET, steps=6).values[1]
        assert torch.allclose(share_of(model, frames, TARGET[1].expand(6)), values, atol=1e-5)
    assert torch.equal(deletion_frames(x[0], maps[0], 4)[0], x[0]) and torch.equal(insertion_frames(x[0], maps[0], 4)[3], x[0])
    assert torch.allclose(deletion_frames(x[0], maps[0], 4)[3], grey_ground(x[:1])[0])


def test_equal_pixels_come_in_no_order_of_reading() -> None:
    places = ranking(torch.zeros(2, 30, 20))
    assert torch.equal(places[0], places[1]) and abs(float(places[0, :15].double().mean()) - 299.5) < 30
    assert not torch.equal(places, ranking(torch.zeros(2, 30, 20), seed=1))


def test_gaps_are_filled_as_their_equations_say() -> None:
    _, x, _ = asked()
    hidden = torch.rand(4, 22, 18, generator=torch.Generator().manual_seed(5)) < 0.7
    hidden[0] = True
    hidden[0, 3, 4] = False  # one known pixel
    filled = imputed(x.double(), hidden, noise=0.0)
    for b in range(4):
        unknown = hidden[b].nonzero().tolist()
        number = {tuple(p): i for i, p in enumerate(unknown)}
        a, right = np.zeros((len(unknown),) * 2), np.zeros((len(unknown), 3))
        for i, (r, c) in enumerate(unknown):
            for dr, dc in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
                if 0 <= r + dr < 22 and 0 <= c + dc < 18:
                    weight = 1 / 6 if dr * dc == 0 else 1 / 12
                    a[i, i] += weight
                    if (r + dr, c + dc) in number:
                        a[i, number[r + dr, c + dc]] -= weight
                    else:
                        right[i] += weight * x[b, :, r + dr, c + dc].double().numpy()
        hand = np.linalg.solve(a, right).T
        assert np.allclose(filled[b][:, hidden[b]].numpy(), hand, atol=1e-6)
    known = ~hidden[:, None].expand_as(x)
    assert torch.equal(filled[known], x.double()[known])
    noisy = imputed(x.double(), hidden, noise=0.1, generator=torch.Generator().manual_seed(1))
    assert abs(float((noisy - filled)[~known].std()) - 0.1) < 0.01 and torch.equal(noisy[known], x.double()[known])


def test_road_asks_about_filled_images() -> None:
    model, x, maps = asked()
    found = road(model, x, maps, TARGET, shares=(0.2, 0.6), noise=0.0, measure=still_said)
    quiet = copy.deepcopy(model).eval()
    for s, share in enumerate((0.2, 0.6)):
        hidden = ranking(maps) < int(share * 396)
        with torch.no_grad():
            hand = quiet(imputed(x, hidden, noise=0.0)).argmax(1) == TARGET
        assert torch.equal(found.values[:, s], hand.double())
    one, two, other = (road(model, x, maps, TARGET, seed=s, measure=lambda z, t: z.gather(1, t[:, None])[:, 0]) for s in (1, 1, 2))
    assert torch.equal(one.values, two.values) and not torch.equal(one.values, other.values)


def test_blur_keeps_the_mean_of_a_flat_image_and_spreads_a_dot() -> None:
    flat = torch.full((2, 3, 22, 18), 0.3)
    assert torch.allclose(blurred(flat), flat, atol=1e-6)
    dot = torch.zeros(1, 1, 41, 31)
    dot[0, 0, 20, 15] = 1
    out = blurred(dot, width=2.0)[0, 0]
    assert abs(float(out.sum()) - 1) < 1e-5 and torch.allclose(out, out.flip(0), atol=1e-7)
    assert abs(float(out[20, 17] / out[20, 15]) - np.exp(-0.5)) < 1e-4


def test_likeness_is_that_of_scipy() -> None:
    draw = torch.Generator().manual_seed(0)
    one, two = torch.rand(3, 9, 7, generator=draw).round(decimals=1), torch.rand(3, 9, 7, generator=draw).round(decimals=1)
    for b in range(3):
        assert abs(float(likeness(one, two, by_rank=True)[b]) - spearmanr(one[b].flatten(), two[b].flatten()).statistic) < 1e-9
        assert abs(float(likeness(one, two)[b]) - np.corrcoef(one[b].flatten(), two[b].flatten())[0, 1]) < 1e-6
    assert likeness(one, torch.ones(3, 9, 7)).tolist() == [0, 0, 0]
    assert torch.allclose(likeness(one * 1e-30, two), likeness(one, two), atol=1e-5)


def test_weights_are_drawn_anew_in_a_copy_from_above() -> None:
    model, _, _ = asked()
    kept, left, chance = {k: v.clone() for k, v in model.state_dict().items()}, traces(model), torch.get_rng_state()
    for n in (1, 2, 4):
        twin = redrawn(model, layers=n, seed=1)
        pairs = zip(weighted_layers(model), weighted_layers(twin), strict=True)
        moved = [not torch.equal(a.weight, b.weight) for a, b in pairs]
        assert moved == [n == 4, False, n > 1, True]  # the second is a BatchNorm whose weights are all one
    weight, new = model.backbone.stages[0][0].weight, twin.backbone.stages[0][0].weight
    assert abs(float((new.std() / weight.std()).detach()) - 1) < 0.2
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items()) and traces(model) == left
    assert torch.equal(chance, torch.get_rng_state()) and torch.equal(new, redrawn(model, seed=1).backbone.stages[0][0].weight)


def test_edges_survive_random_weights_and_gradients_do_not(trained: tuple[Model, Tensor]) -> None:
    model, x = trained
    assert torch.allclose(cascade(model, x, maps_of(Edges(), 0), draws=1), torch.ones(4, 12).double())
    left = cascade(model, x, maps_of("gradient", 0), draws=2).mean(1)
    assert left[3] < left[0] < 1 and cascade(model, x, maps_of("gradient", 0), depths=(4,), draws=2).shape == (1, 12)


def test_sensitivity_is_its_formula() -> None:
    model, x, _ = asked()
    x = 0.1 + 0.8 * x
    draw = torch.Generator().manual_seed(4)
    own, far = explain(model, x, TARGET, method="gradient").map, []
    for _ in range(3):
        noisy = x + 0.05 * (2 * torch.rand(3, 22, 18, generator=draw) - 1)
        far.append((explain(model, noisy, TARGET, method="gradient").map - own).flatten(1).norm(dim=1) / own.flatten(1).norm(dim=1))
    found = max_sensitivity(model, x, maps_of("gradient", TARGET), radius=0.05, samples=3, seed=4)
    assert torch.allclose(found, torch.stack(far).amax(0).double(), atol=1e-5)
    alone = max_sensitivity(model, x[1:2], maps_of("gradient", TARGET[1:2]), radius=0.05, samples=3, seed=4)
    assert torch.allclose(alone, found[1:2], atol=1e-4)
    flat: Callable[..., Tensor] = lambda m, z: torch.zeros(len(z), 22, 18)  # noqa: E731
    assert max_sensitivity(model, x, flat).tolist() == [0] * 4 and steadiness(model, x, flat).tolist() == [0] * 4


def test_infidelity_of_a_linear_model_is_none_and_a_scale_is_found() -> None:
    line, (_, x, _) = nn.Sequential(nn.Flatten(), nn.Linear(1188, 3)), asked()
    values = explain(line, x, TARGET, method="gradient").values
    assert float(infidelity(line, x, values, TARGET).max()) < 1e-8
    assert float(infidelity(line, x, 3 * values, TARGET).min()) > 1e-3
    assert float(infidelity(line, x, 3 * values, TARGET, scaled=True).max()) < 1e-8
    again = infidelity(line, x, 3 * values, TARGET, batch=3)
    assert torch.allclose(again, infidelity(line, x, 3 * values, TARGET), atol=1e-5)


def test_the_sign_test_is_exact() -> None:
    for n in (7, 13, 40):
        for wins in (0, n // 2, n):
            assert abs(tail(wins, n) - binomtest(wins, n, alternative="greater").pvalue) < 1e-9
        k = wins_needed(n, 0.01)
        assert tail(k, n) <= 0.01 < tail(k - 1, n)
    equal = beats_random(torch.zeros(9), torch.zeros(5, 9), 0.05)
    assert equal.value == 0 and not equal.passed  # ties are no wins


def test_maps_that_know_nothing_pass_as_often_as_the_level_says() -> None:
    draw, runs, count, level = torch.Generator().manual_seed(11), 300, 13, 0.05
    line, x = nn.Sequential(nn.Flatten(), nn.Linear(108, 2)), torch.rand(runs * count, 3, 6, 6, generator=draw)
    gate = Gate(steps=4, cells=3, batch=50_000, level=level)
    own = gains(line, x, smooth_maps(x, cells=3, generator=draw), 1, steps=4, batch=50_000).split(count)
    others = rivals(line, x, 1, gate=gate, seed=12).split(count, dim=1)
    passed = sum(beats_random(a, b, level).passed for a, b in zip(own, others, strict=True))
    low, high = binomtest(passed, runs, 0.05).proportion_ci(0.999)
    assert low <= tail(wins_needed(count, level), count) <= high and 0 < passed < 35


def test_the_gate_lets_sound_methods_through_and_no_others(trained: tuple[Model, Tensor]) -> None:
    model, x = trained
    before, chance = traces(model), torch.get_rng_state()
    methods = {"cam": "cam", "gradcam": GradCAM("high"), "integrated": IntegratedGradients(6, baseline=0.5), "edges": Edges(), "guided": GuidedBackprop()}
    found = check_explanations(model, x, methods, seed=1)
    assert traces(model) == before and torch.equal(chance, torch.get_rng_state())
    assert {n: v.passed for n, v in found.items()} == {"cam": True, "gradcam": True, "integrated": True, "edges": False, "guided": False}
    assert [t.passed for t in found["edges"].trials] == [True, False, True]
    assert repr(found["edges"]) == "Verdict(edges: failed: changes with the weights; 12 images)" and repr(found["cam"]) == "Verdict(cam: passed; 12 images)"
    assert found["edges"].show()._repr_png_()[:4] == b"\x89PNG"
    again = check_explanation(model, x, method="cam", seed=1)
    assert again.trials == found["cam"].trials


def test_only_a_verdict_that_fits_silences_the_warning(trained: tuple[Model, Tensor]) -> None:
    model, x = trained
    good, bad = (check_explanation(model, x, method=m) for m in ("gradcam", Edges()))
    assert explain(model, x, verdict=good).warnings == ()
    assert "check_explanation" in explain(model, x).warnings[0]
    assert "Failed: With random weights" in explain(model, x, method=Edges(), verdict=bad).warnings[0]
    assert "another method" in explain(model, x, method="cam", verdict=good).warnings[0]
    assert "other settings" in explain(model, x, method=GradCAM("low"), verdict=good).warnings[0]
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.head[-1].bias[0] += 1e-3
    assert "other weights" in explain(moved, x, verdict=good).warnings[0]
    assert explain(copy.deepcopy(model), x, verdict=good).warnings == () and fingerprint(moved) != fingerprint(model) != ""
    assert torch.equal(explain(model, x, verdict=good).map, explain(model, x).map)


def test_a_map_that_jumps_fails_under_noise(trained: tuple[Model, Tensor]) -> None:
    model, x = trained

    @dataclass(frozen=True)
    class Jumpy(Edges):
        def attribute(self, model: Model, x: Tensor, target: Tensor | None = None, *, generator: torch.Generator | None = None) -> Found:
            found = super().attribute(model, x, target)
            chance = torch.Generator().manual_seed(int(x.double().sum() * 1e6) % 2**31)
            return Found(smooth_maps(x, generator=chance), found.logits, found.target, found.values)

    verdict = check_explanation(model, x, method=Jumpy())
    assert not verdict.trials[0].passed and not verdict.trials[2].passed


BAD = {
    "Images [4, 3, 22, 18] need maps [4, 22, 18]; found [4, 18, 22]": lambda m, x, s: deletion(m, x, s.transpose(1, 2)),
    "maps have values that are no numbers": lambda m, x, s: insertion(m, x, s / 0),
    "steps = 1": lambda m, x, s: deletion(m, x, s, steps=1),
    "batch = 0": lambda m, x, s: deletion(m, x, s, batch=0),
    "A ground must be like the images": lambda m, x, s: deletion(m, x, s, ground=x[:, :1]),
    "Class 3 was asked for": lambda m, x, s: insertion(m, x, s, 3),
    "must lie in [0, 1]": lambda m, x, s: road(m, 2 * x, s),
    "at least two, rising": lambda m, x, s: road(m, x, s, shares=(0.5, 0.2)),
    "without a known pixel": lambda m, x, s: imputed(x, torch.ones(4, 22, 18, dtype=torch.bool)),
    "width = 0": lambda m, x, s: blurred(x, width=0),
    "one kind of curves": lambda m, x, s: draw_curves({}),
    "must have one shape": lambda m, x, s: likeness(s, s[:2]),
    "layers = 9: this network has 4": lambda m, x, s: redrawn(m, layers=9),
    "can't be drawn anew": lambda m, x, s: redrawn(lambda z: m(z)),
    "radius = 0": lambda m, x, s: max_sensitivity(m, x, maps_of("gradient", 0), radius=0),
    "Infidelity needs values like the images": lambda m, x, s: infidelity(m, x, s),
    "4 images can't show anything at a level of 0.01: give at least 7": lambda m, x, s: check_explanation(m, x),
    "level = 0": lambda m, x, s: wins_needed(9, 0),
    "opponents = 4: an odd number": lambda m, x, s: Gate(opponents=4),
    "hides its network": lambda m, x, s: check_explanation(lambda z: m(z), x.repeat(2, 1, 1, 1), method="gradient"),
    "Did you mean 'gradcam'": lambda m, x, s: check_explanation(m, x.repeat(2, 1, 1, 1), method="gradcan"),
}


@pytest.mark.parametrize("words", list(BAD))
def test_bad_input_is_told(words: str) -> None:
    model, x, maps = asked()
    before = traces(model)
    with pytest.raises(AdaptkitError) as told:
        BAD[words](model, x, maps)
    assert words in str(told.value) and traces(model) == before


def cell(height: int = 64, width: int = 48) -> Tensor:
    "A bright cell with two dark busbars, [1, 3, H, W]."
    x = torch.full((1, 3, height, width), 0.7)
    x[:, :, height // 4 : height // 4 + 2] = 0.2
    x[:, :, 3 * height // 4 : 3 * height // 4 + 2] = 0.2
    return x


def test_physics_sees_cracks_and_stains_and_no_busbars() -> None:
    plain, cracked, stained = cell(), cell(), cell()
    assert float(darkness(plain).max()) < 1e-6 and float(cracks(plain).max()) < 1e-6
    for k in range(20):
        cracked[:, :, 22 + k, 12 + k] = 0.4
    stained[:, :, 36:44, 20:30] = 0.5
    line, spot = cracks(cracked)[0], darkness(stained)[0]
    assert line[32, 22] == line[30:35, 20:25].max() and float(line[32, 22]) > 20 * float(line[32, 34]) and float(line[22:42, 12:32].diagonal().min()) > 0
    assert 36 <= int(spot.argmax()) // 48 < 44 and 20 <= int(spot.argmax()) % 48 < 30
    assert float(cracks(stained)[0, 40, 25]) < 0.2 * float(line[32, 22])
    assert not inner(plain)[0].any() and not inner(plain)[:, 0].any() and inner(plain)[32, 24] and not inner(plain)[5, 5]


def test_agreement_is_a_weighted_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    maps, field = torch.randn(3, 6, 5, generator=draw), torch.rand(3, 6, 5, generator=draw)
    weight = maps.relu().double().numpy()
    hand = (weight * field.numpy()).sum((1, 2)) / weight.sum((1, 2)) / field.numpy().mean((1, 2))
    assert np.allclose(agreement(maps, field), hand) and agreement(-maps.abs(), field).tolist() == [0, 0, 0]
    with pytest.raises(AdaptkitError, match="must have one shape"):
        agreement(maps, field[:2])
    with pytest.raises(AdaptkitError, match="Cells are a batch"):
        darkness(maps)


def test_curves_are_drawn_and_say_little() -> None:
    model, x, maps = asked()
    found = deletion(model, x, maps, TARGET, steps=4)
    assert draw_curves({"a": found, "b": found})._repr_png_()[:4] == b"\x89PNG"
    assert repr(Curves("road", torch.tensor([0.0, 1.0]), torch.ones(2, 2))) == "Curves(road: 2 images, area 1.000)"


def test_many_images_are_counted_exactly() -> None:
    assert tail(600, 1024) == pytest.approx(float(binom.sf(599, 1024, 0.5)), rel=1e-9)
    for n in (7, 20, 1000):
        assert wins_needed(n, 0.01) == int(binom.isf(0.01, n, 0.5)) + 1


def test_images_of_a_size_that_cannot_be_read_are_told() -> None:
    model = build_model("small_cnn", Named(("a", "b")), size=18)
    with pytest.raises(AdaptkitError, match="can't read images"):
        deletion(model, torch.rand(2, 3, 6, 6), torch.rand(2, 6, 6))
    with pytest.raises(AdaptkitError, match="can't read images"):
        check_explanation(model, torch.rand(8, 3, 6, 6))
