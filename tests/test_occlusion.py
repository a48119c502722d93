"""Hiding, sharing out and changing: occlusion, Shapley values and counterfactuals beside loops that are written by hand."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import Tensor, nn

from adaptkit.core.registry import AdaptkitError
from adaptkit.explanation.counterfactual_texts import TextCounterfactual, counterfactual_text, left_out, what_stays
from adaptkit.explanation.counterfactuals import counterfactual, pruned, smallest_change
from adaptkit.explanation.explain import check_explainer, explain, subject
from adaptkit.explanation.occlusion import CACHED, Occlusion, at_once, blurred, emptied, grid_regions, numbered, strips
from adaptkit.explanation.shapley import Shapley, by_orders, exact_values, paired_orders, shapley_values
from adaptkit.heads.heads import Model, Named, build_model
from adaptkit.robustness.measuring import traces
from adaptkit.robustness.words import asked as answers_of
from adaptkit.robustness.words import cut

TARGET = torch.tensor([2, 0, 1, 1])
CELLS = grid_regions(22, 18, cells=(4, 3))


def asked() -> tuple[Model, Tensor]:
    "The subject of the contract in evaluation mode, and its images [4, 3, 22, 18]."
    model, x = subject()
    return model.eval(), x


def undecided() -> tuple[Model, Tensor]:
    "The same in its mixed modes, with a bias that brings the images near the borders between the classes."
    model, x = asked()
    with torch.no_grad():
        model.head[-1].bias.sub_(model(x).mean(0))
    training, _ = subject()
    training.load_state_dict(model.state_dict())
    return training, x


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logit(model: nn.Module, x: Tensor, target: Tensor = TARGET) -> Tensor:
    with torch.no_grad():
        return model(x).gather(1, target[:, None])[:, 0]


def starts(side: int, window: int, stride: int) -> list[int]:
    "Until a window has reached the far rim."
    found = [0]
    while found[-1] + window < side:
        found.append(found[-1] + stride)
    return found


@pytest.mark.parametrize(("window", "stride"), [((5, 4), (3, 3)), ((8, 8), (4, 4)), ((30, 7), (2, 7))])
@pytest.mark.parametrize("baseline", [0.3, None, "blur"])
def test_occlusion_is_a_loop_over_windows(window: tuple[int, int], stride: tuple[int, int], baseline: float | str | None) -> None:
    model, x = asked()
    empty = emptied(x, baseline).expand_as(x)
    total, count = torch.zeros(4, 22, 18), torch.zeros(22, 18)
    for top, left in itertools.product(starts(22, window[0], stride[0]), starts(18, window[1], stride[1])):
        part = (..., slice(top, top + window[0]), slice(left, left + window[1]))
        hidden = x.clone()
        hidden[part] = empty[part]
        total[part] += (logit(model, x) - logit(model, hidden))[:, None, None]
        count[part] += 1
    found = explain(model, x, TARGET, method=Occlusion(window, stride, baseline=baseline))
    assert float(count.min()) >= 1 and torch.allclose(found.map, total / count, atol=1e-5)


def test_every_pixel_is_hidden_whatever_the_sizes() -> None:
    for side, window in itertools.product(range(1, 12), range(1, 14)):
        for stride in range(1, window + 1):
            assert strips(side, window=window, stride=stride).any(0).all()
    assert strips(224, window=None, stride=None).shape == (15, 224)


@pytest.mark.parametrize("method", [Occlusion, Shapley])
def test_regions_of_each_image_are_its_own(method: type) -> None:
    model, x = asked()
    each = torch.stack([CELLS, CELLS * 7 + 3, CELLS.flip(0), CELLS // 4])
    each[1, :3] = -5
    found = explain(model, x, TARGET, method=method(baseline=0.2, regions=each))
    for i in range(4):
        if method is Occlusion:
            alone = explain(model, x[i : i + 1], TARGET[i : i + 1], method=method(baseline=0.2, regions=each[i]))
            assert torch.allclose(alone.map[0], found.map[i], atol=1e-5)
        for label in each[i].unique():
            inside = found.map[i][each[i] == label]
            assert float(inside.max() - inside.min()) == 0 and (label >= 0 or not inside.any())


def test_a_region_is_hidden_as_a_whole() -> None:
    model, x = asked()
    found = explain(model, x, TARGET, method=Occlusion(baseline=0.5, regions=CELLS))
    for k in range(12):
        hidden = torch.where(CELLS == k, 0.5, x)
        assert torch.allclose(found.values[:, k], logit(model, x) - logit(model, hidden), atol=1e-5)


class Recorder(nn.Module):
    "A linear model of tokens, or of anything, that keeps what it was given."

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, *shape, generator=draw(1)))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return torch.einsum("bchw,kchw->bk", x, self.weight)


@pytest.mark.parametrize("shape", [(1, 6, 5, 1), (2, 1, 1, 9), (1, 384, 7, 1), (3, 4, 2, 3)])
def test_embeddings_are_images_too(shape: tuple[int, int, int, int]) -> None:
    x = 5 * torch.randn(shape, generator=draw(0))
    words = torch.arange(shape[2])[:, None] // 2 + torch.zeros(shape[2:], dtype=torch.int64) - (1 if shape[2] > 2 else 0)
    target = torch.arange(shape[0]) % 2
    for method in (Occlusion(baseline=0.0, regions=words), Shapley(4, baseline=0.0, regions=words)):
        net = Recorder(shape[1:])
        found = method.attribute(net, x, target, generator=draw(0))
        each = (net.weight.detach()[target] * x).sum(1)
        hand = torch.stack([torch.where(words == k, each, 0).sum((1, 2)) for k in range(int(words.max()) + 1)], 1)
        assert torch.allclose(found.values, hand, atol=1e-3) and found.map.shape == (shape[0], *shape[2:])
        assert all(bool(torch.isin(seen.flatten(), torch.cat([x.flatten(), torch.zeros(1)])).all()) for seen in net.seen)
        assert not found.map[:, words < 0].any()
    windows = Occlusion(3, 1).attribute(Recorder(shape[1:]), x, target)
    assert windows.map.shape == (shape[0], *shape[2:]) and windows.map.isfinite().all()


@pytest.mark.parametrize("make", [lambda b: Occlusion(5, 2, batch=b), lambda b: Occlusion(regions=CELLS, batch=b), lambda b: Shapley(4, cells=(3, 2), batch=b)])
def test_a_batch_size_bounds_what_passes_and_changes_nothing(make) -> None:
    model, x = asked()
    sizes: list[int] = []
    hook = model.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    small = explain(model, x, TARGET, method=make(3)).map
    hook.remove()
    assert max(sizes) == 3 and torch.allclose(small, explain(model, x, TARGET, method=make(64)).map, atol=1e-5)


def test_large_images_pass_a_few_at_a_time() -> None:
    threads = torch.get_num_threads()
    assert at_once(torch.zeros(1, 3, 22, 18), 32) == 32 and at_once(torch.zeros(1, 1, 4000, 3000), 32) <= threads
    assert at_once(torch.zeros(1, 3, 224, 224), 10**6) == CACHED * threads // 224**2 and at_once(torch.zeros(1, 3, 224, 224, device="meta"), 64) == 64
    assert at_once(torch.zeros(1, 1, 9000, 9000), 8) >= 1


class Box(nn.Module):
    "A model without a way back."

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.classes = model, model.classes

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).detach()


@pytest.mark.parametrize("method", [Occlusion(5, 3), Shapley(4, cells=(3, 2))])
def test_no_gradient_is_needed(method) -> None:
    model, x = asked()
    assert torch.equal(explain(Box(model), x, TARGET, method=method).map, explain(model, x, TARGET, method=method).map)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Occlusion((6, 4), (3, 4), baseline="blur", batch=5),
        lambda: Occlusion(4, 4, baseline=torch.rand(3, 22, 18, generator=draw(0))),
        lambda: Occlusion(baseline=0.0, regions=CELLS),
        lambda: Shapley(4, cells=(4, 3), batch=7),
        lambda: Shapley(6, baseline=torch.zeros(3, 1, 1), regions=CELLS),
        lambda: Shapley(8, cells=(2, 2)),
    ],
)
def test_each_keeps_the_contract(make) -> None:
    check_explainer(make)
    json.dumps(dict(make().config))


def test_focus_is_lost_evenly() -> None:
    x = torch.rand(2, 3, 11, 7, generator=draw(0))
    assert torch.allclose(blurred(torch.full((1, 2, 9, 1), 3.5)), torch.tensor(3.5))
    assert torch.allclose(blurred(x.flip(2, 3)), blurred(x).flip(2, 3), atol=1e-6)
    assert float(blurred(x).std()) < float(blurred(x, width=0.02 * max(x.shape[2:])).std()) < float(x.std())
    assert blurred(x.bfloat16()).dtype == torch.bfloat16 and blurred(x).amin() >= x.amin() and blurred(x).amax() <= x.amax()


def random_game(players: int, worlds: int, seed: int):
    "A table of what each coalition is worth."
    table = torch.randn(2**players, worlds, generator=draw(seed)).double()
    return lambda members: table[(members * 2 ** torch.arange(players)).sum(1)]


def by_hand(value, players: int) -> Tensor:
    "Over all orders."
    total = 0
    for order in itertools.permutations(range(players)):
        members = torch.zeros(players + 1, players, dtype=torch.bool)
        for k, player in enumerate(order):
            members[k + 1 :, player] = True
        total = total + value(members).diff(dim=0)[torch.tensor(order).argsort()]
    return total / math.factorial(players)


@pytest.mark.parametrize("players", [1, 2, 5])
def test_exact_values_are_the_mean_of_all_orders(players: int) -> None:
    value = random_game(players, 3, players)
    found = exact_values(value, players)
    assert torch.allclose(found.values, by_hand(value, players)) and found.coalitions == 2**players
    assert found.deviation is None and float(found.error.abs().max()) < 1e-12


def test_shares_are_fair() -> None:
    def value(members: Tensor) -> Tensor:  # 0 and 1 alike, 2 idle, 3 alone worth 5
        return (members[:, 0] & members[:, 1]).double() + 5 * members[:, 3]

    assert exact_values(value, 4).values.tolist() == pytest.approx([0.5, 0.5, 0, 5])
    sampled = by_orders(value, paired_orders(4, 4, generator=draw(0)))
    assert sampled.values.tolist() == pytest.approx([0.5, 0.5, 0, 5]) and float(sampled.deviation.max()) == 0


def test_few_orders_add_up_and_are_about_as_far_off_as_they_say() -> None:
    value = random_game(8, 6, 0)
    truth = exact_values(value, 8)
    runs = [by_orders(value, paired_orders(8, 12, generator=draw(seed))) for seed in range(60)]
    assert all(float(run.error.abs().max()) < 1e-12 and torch.equal(run.total, truth.total) for run in runs)
    off = torch.stack([run.values - truth.values for run in runs])
    told = torch.stack([run.deviation for run in runs])
    assert 0.85 < float(off.square().mean().sqrt() / told.square().mean().sqrt()) < 1.15
    assert float(off.mean(0).abs().max()) < 5 * float(told.mean()) / math.sqrt(60)  # unbiased


def test_reverses_make_pairs_exact_and_others_better() -> None:
    friends = torch.randn(7, 7, generator=draw(0)).double()
    pairs = lambda members: torch.einsum("ni,ij,nj->n", members.double(), friends, members.double())  # noqa: E731
    assert torch.allclose(by_orders(pairs, paired_orders(7, 4, generator=draw(1))).values, exact_values(pairs, 7).values)

    def most(members: Tensor) -> Tensor:  # saturates: the largest of those who are there
        return (members * torch.arange(1, 8).double()).amax(1).sqrt()

    truth, chance = exact_values(most, 7).values, draw(2)
    plain = [by_orders(most, torch.stack([torch.randperm(7, generator=chance) for _ in range(8)]), together=1) for _ in range(40)]
    paired = [by_orders(most, paired_orders(7, 8, generator=draw(seed))) for seed in range(40)]
    mine, other = (torch.stack([run.values - truth for run in runs]).square().mean() for runs in (paired, plain))
    assert float(mine) < 0.8 * float(other)


def test_no_coalition_is_asked_twice() -> None:
    rows: list[Tensor] = []
    value = random_game(5, 1, 0)
    found = by_orders(lambda members: rows.append(members) or value(members), paired_orders(5, 20, generator=draw(0)))
    asked_for = torch.cat(rows)
    assert len(asked_for) == len(asked_for.unique(dim=0)) == found.coalitions <= 32
    assert shapley_values(value, 5, permutations=20).deviation is None and shapley_values(value, 5, permutations=4).deviation is not None


def test_shares_of_a_linear_model_are_what_its_regions_add() -> None:
    _, x = asked()
    line = Recorder((3, 22, 18))
    found = explain(line, x, torch.tensor([1, 0, 1, 0]), method=Shapley(4, baseline=0.25, regions=CELLS))
    each = (line.weight.detach()[[1, 0, 1, 0]] * (x - 0.25)).sum(1)
    assert torch.allclose(found.values, torch.stack([(each * (CELLS == k)).sum((1, 2)) for k in range(12)], 1), atol=1e-3)
    assert float(found.error.abs().max()) < 1e-3 and float(found.deviation.max()) < 1e-3 and found.deviation.shape == (4, 12)


def test_the_seed_decides_and_large_errors_are_told() -> None:
    model, x = asked()
    rough = [explain(model, x, TARGET, method=Shapley(4), seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(rough[0].map, rough[1].map) and not torch.equal(rough[0].map, rough[2].map)
    assert float(rough[0].error.abs().max()) < 1e-4  # adds up, however few
    chaos = nn.Sequential(nn.Flatten(), nn.Linear(1188, 64), nn.Tanh(), nn.Linear(64, 2))
    with torch.no_grad():
        for i, layer in enumerate((chaos[1], chaos[3])):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw(i)))
    assert any("take more permutations" in w for w in explain(chaos, x, 1, method=Shapley(4)).warnings)


def tangled(players: int, seed: int):
    own, pairs = torch.randn(players, generator=draw(seed)), torch.randn(players, players, generator=draw(seed + 1))
    return lambda sets: sets.float() @ own + ((sets.float() @ pairs) * sets).sum(1) - 3


def test_a_small_change_turns_and_can_spare_nothing() -> None:
    every, best, turned = (torch.arange(64)[:, None] >> torch.arange(6)) % 2 == 1, 0, 0
    for seed in range(60):
        gap = tangled(6, seed)
        over, found = every[gap(every) > 0], smallest_change(gap, 6)
        assert found is not None or len(over) == 0 or float(gap(torch.ones(1, 6, dtype=torch.bool))[0]) <= 0
        if found is None:
            continue
        assert float(gap(found[None])[0]) > 0 and int(found.sum()) >= int(over.sum(1).min())
        for i in found.nonzero()[:, 0].tolist():
            less = found.clone()
            less[i] = False
            assert int(found.sum()) == 1 or float(gap(less[None])[0]) <= 0
        turned, best = turned + 1, best + (int(found.sum()) == int(over.sum(1).min()))
    assert turned > 20 and best / turned > 0.8


def test_the_smallest_is_found_where_changes_only_add_up() -> None:
    every = (torch.arange(256)[:, None] >> torch.arange(8)) % 2 == 1
    for seed in range(20):
        own = torch.randn(8, generator=draw(seed))
        gap = lambda sets, own=own: sets.float() @ own - 2  # noqa: E731
        over, found = every[gap(every) > 0], smallest_change(gap, 8)
        assert (found is None) == (len(over) == 0) and (found is None or int(found.sum()) == int(over.sum(1).min()))
    assert smallest_change(gap, 8, most=1) is None or own.max() > 2
    assert pruned(lambda sets: sets.float() @ torch.tensor([3.0, 1.0, 1.0]) - 2, torch.ones(3, dtype=torch.bool)).tolist() == [True, False, False]


@pytest.mark.parametrize("baseline", ["blur", 0.0, None])
def test_changed_images_are_taken_for_something_else(baseline) -> None:
    model, x = undecided()
    before = traces(model)
    found = counterfactual(model, x, baseline=baseline, regions=CELLS)
    assert traces(model) == before and model.training
    model.eval()
    with torch.no_grad():
        was, now = model(x).argmax(1), model(found.changed).argmax(1)
    assert torch.equal(found.found, was != now) and bool(found.found.any())
    assert [model.classes[k] for k in was] == list(found.before) and [model.classes[k] for k in now] == list(found.after)
    assert torch.equal(torch.where(found.mask[:, None], 0, found.changed), torch.where(found.mask[:, None], 0, x))
    soft = emptied(x, baseline).expand_as(x)
    for i in found.found.nonzero()[:, 0].tolist():
        used = CELLS[found.mask[i]].unique()
        assert torch.equal(found.mask[i], torch.isin(CELLS, used))  # whole regions
        assert float(found.share[i]) == float(found.mask[i].float().mean()) > 0
        for k in used.tolist():
            fewer = torch.where(found.mask[i] & (k != CELLS), soft[i], x[i])
            with torch.no_grad():
                assert len(used) == 1 or model(fewer[None]).argmax(1)[0] == was[i]  # none can be spared


def test_a_class_by_name_and_what_is_not_found() -> None:
    model, x = undecided()
    with torch.no_grad():
        said = model.eval()(x).argmax(1)
    found = counterfactual(model, x, "b", baseline=x[0], regions=CELLS, most=2)
    for i in range(4):
        assert bool(found.found[i]) == (found.after[i] == "b")
        assert bool(found.found[i]) or (torch.equal(found.changed[i], x[i]) and not found.mask[i].any() and found.after[i] == found.before[i])
    already = counterfactual(model, x, [int(k) for k in said])
    assert already.found.all() and not already.mask.any() and torch.equal(already.changed, x)
    with torch.no_grad():
        model.head[-1].weight.zero_()
        model.head[-1].bias.copy_(torch.tensor([2.0, 0.0, 0.0]))
    never = counterfactual(model, x, cells=(2, 2))
    assert not never.found.any() and torch.equal(never.changed, x) and repr(never) == "Counterfactual(found for 0 of 4 images)"
    for result in (found, already, never):
        assert result.show()._repr_png_()[:4] == b"\x89PNG"


def test_half_precision_is_verified_on_the_images_that_are_returned() -> None:
    model, x = undecided()
    model = model.eval().bfloat16()
    found = counterfactual(model, x, regions=CELLS)
    assert found.found.any()
    with torch.no_grad():
        now = model(found.changed.bfloat16()).argmax(1)
    assert found.changed.dtype == torch.float32 and [model.classes[k] for k in now] == list(found.after)


TEXTS = ("Where is my new card?", "it's late; the <b>bold</b> one, please", "Why, oh why does the app crash", "one", "pay  the bill twice")


@pytest.fixture(scope="module")
def reader() -> Model:
    return build_model("bag_of_embeddings", Named(("a", "b", "c")), seed=2).train()


def test_left_out_words_turn_the_real_text(reader: Model) -> None:
    predict, before = answers_of(reader, reader.reader), traces(reader)
    turned = 0
    for text in TEXTS:
        found = counterfactual_text(reader, text)
        said, now = predict([text, found.changed]).argmax(1).tolist()
        assert (found.before, found.after) == (reader.classes[said], reader.classes[now]) and found.found == (said != now)
        assert "".join(p for p, _ in found.pieces) == text and (found.found or (found.changed == text and not found.removed))
        assert 0 <= found.share < 1 and found.probability_before == pytest.approx(float(predict([text]).softmax(1).max()), abs=1e-5)
        turned += found.found
    assert turned >= 2 and traces(reader) == before


def test_no_fewer_words_would_do(reader: Model) -> None:
    predict = answers_of(reader, reader.reader)
    same = 0
    for text in TEXTS[:3]:
        found, pieces = counterfactual_text(reader, text), cut(text)
        places = [i for i, p in enumerate(pieces) if p[0].isalnum()]
        sizes = [
            len(gone)
            for k in range(1, len(places))
            for gone in itertools.combinations(places, k)
            if reader.classes[int(predict([what_stays(left_out(pieces, gone))]).argmax())] != found.before
        ]
        assert found.found == bool(sizes) and (not sizes or len(found.removed) >= min(sizes))
        same += not sizes or len(found.removed) == min(sizes)
        gone = [i for i, (p, yes) in enumerate(found.pieces) if yes and p.strip()]
        for back in gone if len(gone) > 1 else ():
            rest = what_stays(left_out(pieces, [i for i in gone if i != back]))
            assert reader.classes[int(predict([rest]).argmax())] == found.before
    assert same >= 2


def test_texts_are_shown_as_they_are(reader: Model) -> None:
    assert what_stays(left_out(cut("Is it open, now?"), [0, 4])) == "it , now?" and what_stays(left_out(cut(" a "), [])) == " a "
    shown = TextCounterfactual("<i> x", "x", (("<i>", True), (" ", True), ("x", False)), True, "<a>", "b", 0.9, 0.8)._repr_html_()
    assert "<del>&lt;i&gt;</del>" in shown and "&lt;a&gt; 90%" in shown and "<i>" not in shown and "<a>" not in shown
    assert not counterfactual_text(reader, "one").found
    wanted = counterfactual_text(reader, TEXTS[0], "c")
    assert wanted.found == (wanted.after == "c")


BAD = {
    "stride = 5: a step must be": lambda m, x: explain(m, x, method=Occlusion(4, 5)),
    "window = 0: a whole number": lambda m, x: Occlusion(0),
    "stride = 2.5": lambda m, x: Occlusion(4, 2.5),
    "batch = 0": lambda m, x: Occlusion(batch=0),
    "baseline = 'blurr'": lambda m, x: Occlusion(baseline="blurr"),
    "baseline = nan": lambda m, x: Occlusion(baseline=math.nan),
    "divide bytes by 255": lambda m, x: explain(m, x, method=Occlusion(baseline=128)),
    "found [3, 9, 9]": lambda m, x: explain(m, x, method=Occlusion(baseline=torch.zeros(3, 9, 9))),
    "Leave out one of them": lambda m, x: Occlusion(4, regions=CELLS),
    "need regions [22, 18], or [4, 22, 18]; found [18, 22]": lambda m, x: explain(m, x, method=Occlusion(regions=CELLS.T)),
    "found [2, 22, 18]": lambda m, x: explain(m, x, method=Shapley(regions=CELLS.expand(2, 22, 18))),
    "Regions are whole numbers": lambda m, x: explain(m, x, method=Occlusion(regions=CELLS.float())),
    "nothing can be hidden": lambda m, x: explain(m, x, method=Occlusion(regions=CELLS * 0 - 1)),
    "permutations = 5": lambda m, x: Shapley(5),
    "cells[1] = 0": lambda m, x: Shapley(cells=(3, 0)),
    "players = 17": lambda m, x: exact_values(lambda members: members.sum(1), 17),
    "must have as many rows": lambda m, x: shapley_values(lambda members: torch.zeros(1), 3),
    "is no number": lambda m, x: shapley_values(lambda members: members.sum(1) / 0, 3),
    "Unknown class 'bb'": lambda m, x: counterfactual(m, x, "bb"),
    "Class 3 was asked for": lambda m, x: counterfactual(m, x, 3),
    "most = 0": lambda m, x: counterfactual(m, x, most=0),
    "must lie in [0, 1]": lambda m, x: counterfactual(m, x * 2),
    "can't read images of the shape": lambda m, x: counterfactual(m, x[:, :2]),
    "take counterfactual for images": lambda m, x: counterfactual_text(m, "a text"),
}


@pytest.mark.parametrize("words", list(BAD))
def test_bad_input_is_told(words: str) -> None:
    model, x = asked()
    before = traces(model)
    with pytest.raises(AdaptkitError) as told:
        BAD[words](model, x)
    assert words in str(told.value) and traces(model) == before


def test_bad_texts_are_told(reader: Model) -> None:
    for text, words in ((["a", "b"], "found list"), ("?!", "no words"), ("", "no words")):
        with pytest.raises(AdaptkitError, match=words):
            counterfactual_text(reader, text)


def test_numbers_of_regions_have_no_gaps() -> None:
    labels, n = numbered(torch.tensor([[-3, 9], [4, 4]]), torch.zeros(2, 1, 2, 2))
    assert n == 2 and labels.tolist() == [[[-1, 1], [0, 0]]] * 2
    assert grid_regions(2, 1, cells=(6, 6)).tolist() == [[0], [1]]
