"""Training images as the stages see them, and stage by stage: beside formulas written by hand, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adaptkit.core.registry import AdaptkitError
from adaptkit.explanation.explain import subject
from adaptkit.explanation.gallery import Gallery, gallery, prototypes, stages_of, typical, watched
from adaptkit.explanation.hierarchy import hierarchy
from adaptkit.explanation.places import as_map, places
from adaptkit.heads.heads import Model, Named, build_model
from adaptkit.models.backbones import load_backbone
from adaptkit.robustness.contract import quiet_model
from adaptkit.robustness.measuring import traces
from adaptkit.testing import toy_data

KNOWN = torch.rand(23, 3, 22, 18, generator=torch.Generator().manual_seed(7))
LABELS = torch.arange(23) % 3
PAIR = (KNOWN, LABELS)


@pytest.fixture(scope="module")
def asked() -> tuple[Model, Tensor]:
    "The subject of the contract, in mixed modes, and its images [4, 3, 22, 18]."
    return subject()


def by_hand(model: Model, x: Tensor, stage: int) -> Tensor:
    with quiet_model(model), torch.no_grad():
        return model.backbone(x, stop=stage + 1).mean((2, 3))


@pytest.mark.parametrize("batch_size", [1, 5, 23, 64])
def test_a_gallery_holds_the_means_and_passes_no_more_at_once(asked: tuple[Model, Tensor], batch_size: int) -> None:
    model, _ = asked
    sizes: list[int] = []
    hook = model.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    shelf = gallery(model, PAIR, batch_size=batch_size)
    hook.remove()
    assert max(sizes) <= batch_size and list(shelf.features) == ["low", "high"] and shelf.classes == ("a", "b", "c")
    for k, name in enumerate(shelf.features):
        assert torch.allclose(shelf.features[name], by_hand(model, KNOWN, k), atol=1e-5)
    assert torch.equal(shelf.labels, LABELS) and torch.equal(shelf.pictures(shelf.rows[3:5]), KNOWN[3:5])


def test_the_model_is_as_it_was_also_when_it_fails(asked: tuple[Model, Tensor]) -> None:
    model, x = asked
    before, weights, chance = traces(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    hierarchy(model, PAIR, x, [0, 1, 2, 0])

    def fail(module: nn.Module, args: Any, out: Any) -> None:
        raise KeyError("planned")

    hook = model.head.register_forward_hook(fail)
    for call in (lambda: gallery(model, PAIR), lambda: hierarchy(model, PAIR, x)):
        with pytest.raises(KeyError):
            call()
    hook.remove()
    assert traces(model) == before and torch.equal(torch.get_rng_state(), chance)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_nearest_are_those_of_numpy(asked: tuple[Model, Tensor]) -> None:
    model, x = asked
    shelf = gallery(model, PAIR)
    for k, name in enumerate(shelf.features):
        known, new = shelf.features[name].double().numpy(), by_hand(model, x, k).double().numpy()
        a, b = (v - known.mean(0) for v in (new, known))
        cosine = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
        at, found = shelf.nearest(name, torch.tensor(new).float(), 6)
        assert np.allclose(found, -np.sort(-cosine, axis=1)[:, :6], atol=1e-4)
        assert np.allclose(np.take_along_axis(cosine, at.numpy(), 1), found, atol=1e-4)
    assert shelf.nearest("low", shelf.features["low"], 999)[0].shape == (23, 23)


def test_prototypes_are_in_the_middle_and_find_the_parts_of_a_class() -> None:
    rng = torch.Generator().manual_seed(0)
    ways = nn.functional.normalize(torch.randn(3, 12, generator=rng), dim=1)
    part = torch.tensor([0] * 9 + [1] * 5 + [2] * 3)
    unit = nn.functional.normalize(ways[part] + 0.1 * torch.randn(17, 12, generator=rng), dim=1)
    assert int(typical(unit, 1)[0]) == int((unit @ unit.mean(0)).argmax())
    three = typical(unit, 3)
    assert part[three].tolist() == [0, 1, 2]  # the one that stands for most comes first
    for k, at in enumerate(three.tolist()):
        own = (part == k).nonzero()[:, 0]
        assert at == int(own[(unit[own] @ unit[own].mean(0)).argmax()])
    assert sorted(typical(unit[:4], 9).tolist()) == [0, 1, 2, 3]
    assert len(typical(unit[:1].expand(5, -1), 3).unique()) == 3  # the same image five times


def test_a_class_without_images_has_no_prototype() -> None:
    shelf = Gallery({"s": torch.randn(5, 4, generator=torch.Generator().manual_seed(0))}, torch.tensor([0, 0, 2, 2, 2]), torch.arange(5), ("a", "b", "c"), lambda rows: torch.zeros(len(rows), 3, 2, 2))
    found = prototypes(shelf, "s", 3)
    assert found[1].tolist() == [-1] * 3 and found[0, 2] == -1 and sorted(found[2].tolist()) == [2, 3, 4]


@pytest.mark.parametrize("stage", ["low", "high"])
def test_contributions_are_map_times_gradient(asked: tuple[Model, Tensor], stage: str) -> None:
    model, x = asked
    target = torch.tensor([2, 0, 1, 1])
    found = hierarchy(model, PAIR, x, target, channels=4, batch_size=3).levels[stage]
    k = model.backbone.stage_names.index(stage)
    with quiet_model(model):
        with torch.no_grad():
            here = model.backbone(x, stop=k + 1)
        here.requires_grad_()
        chosen = model(here, start=k + 1).gather(1, target[:, None]).sum()
        (slopes,) = torch.autograd.grad(chosen, here)
    here = here.detach()
    adds = (here * slopes).sum((2, 3))
    assert found.chosen_by == "contribution" and torch.allclose(found.strength, adds.topk(4, dim=1).values, atol=1e-4)
    assert torch.allclose(found.response, here.abs().mean(1), atol=1e-5)
    assert all(torch.allclose(found.maps[i, 0], here[i, found.channels[i, 0]], atol=1e-5) for i in range(4))
    if stage == "high":  # the head is linear
        with quiet_model(model), torch.no_grad():
            logits = model(x).gather(1, target[:, None])[:, 0]
        assert torch.allclose(adds.sum(1) + model.head[-1].bias[target], logits, atol=1e-4)


def test_where_there_is_no_gradient_channels_are_chosen_by_response() -> None:
    vit = build_model(load_backbone("timm/vit_tiny_patch16_224", pretrained=False, size=32), Named(("a", "b"))).eval()
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = hierarchy(vit, (x, torch.arange(5) % 2), x[:2], stages=["blocks.1", "blocks.11"])
    first, last = found.levels.values()
    assert (first.chosen_by, last.chosen_by) == ("contribution", "response") and "class token" in found.warnings[0]
    with torch.no_grad(), watched({"b": places(vit)["blocks.11"]}, lambda out: as_map(out, x)) as kept:
        vit(x)
    means = kept["b"].mean((2, 3))
    unusual = (means - means.mean(0)) / means.std(0, correction=0).clamp_min(1e-6)
    assert torch.allclose(last.strength, unusual[:2].topk(3, dim=1).values, atol=1e-3) and last.maps.shape == (2, 3, 2, 2)
    assert not any(m._forward_hooks for m in vit.modules())


def test_by_default_all_stages_with_positions() -> None:
    vit = build_model(load_backbone("timm/vit_tiny_patch16_224", pretrained=False, size=32), Named(("a", "b")))
    assert list(stages_of(vit, None)) == [f"blocks.{i}" for i in range(11)]
    lite = build_model(load_backbone("efficientnet_lite0", pretrained=False), Named(("a", "b")))
    assert list(stages_of(lite, None)) == list(lite.backbone.stage_names)
    assert list(stages_of(lite, ["conv_head", "blocks.2"])) == ["blocks.2", "conv_head"]


def test_a_data_set_is_drawn_from_and_its_images_are_found_again() -> None:
    data = toy_data(30)
    model = build_model("small_cnn", data, size=32, seed=0)
    shelf, again, other = (gallery(model, data, n=9, seed=s) for s in (3, 3, 4))
    assert torch.equal(shelf.rows, again.rows) and not torch.equal(shelf.rows, other.rows) and len(shelf.labels) == 9
    assert shelf.labels.tolist() == data.train.labels[shelf.rows.numpy()].tolist() and shelf.classes == tuple(data.classes)
    whole = gallery(model, data.test, n=None)
    found = hierarchy(model, whole, whole.pictures(whole.rows[2:4]))
    assert all(v.nearest[:, 0].tolist() == [2, 3] and bool((v.cosine[:, 0] > 0.999).all()) for v in found.levels.values())
    assert {*found.agreement()} == {*whole.features} and "share the class" in repr(found)


def test_it_can_be_looked_at(asked: tuple[Model, Tensor]) -> None:
    model, x = asked
    found = hierarchy(model, PAIR, x, "b", channels=2, nearest=3)
    figure = found.show(3, classes=2)
    assert len(figure.axes) == 2 * (1 + 2 + 3 + 2) and figure._repr_png_().startswith(b"\x89PNG")
    assert len(found.show(stages=["high"], classes=1).axes) == 1 + 2 + 3 + 1
    for wrong, words in (({"image": 4}, "0 to 3"), ({"stages": ["hihg"]}, "'high'")):
        with pytest.raises(AdaptkitError, match=words):
            found.show(**wrong)  # type: ignore[arg-type]


class Twice(nn.Module):
    "One stage that runs twice."

    def __init__(self) -> None:
        super().__init__()
        self.same, self.end = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.end(self.same(self.same(x)).mean((2, 3)))
        return out


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: gallery(m, PAIR, stages=["hihg"]), "Did you mean 'high'"),
        (lambda m, x: gallery(m, PAIR, stages=[]), "list of names"),
        (lambda m, x: gallery(m, PAIR, stages="high"), "list of names"),
        (lambda m, x: gallery(m, (KNOWN[:0], LABELS[:0])), "no training images"),
        (lambda m, x: gallery(m, (KNOWN, LABELS[:4])), "as many labels"),
        (lambda m, x: gallery(m, (KNOWN, LABELS - 1)), "whole numbers"),
        (lambda m, x: gallery(m, KNOWN), "found Tensor"),
        (lambda m, x: gallery(m, PAIR, n=0), "at least one image"),
        (lambda m, x: gallery(m, PAIR, batch_size=0), "batch_size"),
        (lambda m, x: gallery(m, toy_data(9), split="trian"), "Did you mean 'train'"),
        (lambda m, x: gallery(lambda images: m(images), PAIR), "hides it"),
        (lambda m, x: gallery(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), PAIR), "no named stages"),
        (lambda m, x: gallery(Twice(), PAIR, stages=["same"]), "runs twice"),
        (lambda m, x: hierarchy(m, PAIR, x, 3), "0 to 2"),
        (lambda m, x: hierarchy(m, PAIR, x, "d"), "Unknown class"),
        (lambda m, x: hierarchy(m, PAIR, x[0]), "batch of images"),
        (lambda m, x: hierarchy(m, PAIR, x, nearest=0), "nearest = 0"),
        (lambda m, x: hierarchy(m, gallery(m, PAIR, stages=["low"]), x, stages=["high"]), "stage of the gallery"),
    ],
)
def test_what_is_refused(asked: tuple[Model, Tensor], call: Callable[[Model, Tensor], Any], words: str) -> None:
    with pytest.raises(AdaptkitError, match=words):
        call(*asked)


def test_a_gallery_of_other_weights_is_noticed(asked: tuple[Model, Tensor]) -> None:
    model, x = asked
    shelf, other = gallery(model, PAIR), copy.deepcopy(model)
    with torch.no_grad():
        other.backbone.stages[1][0].weight.mul_(1.2)
    with pytest.raises(AdaptkitError, match="high says so"):
        hierarchy(other, shelf, x)
    assert hierarchy(other, shelf, x, stages=["low"]).levels.keys() == {"low"}  # where nothing has changed


def test_data_of_other_classes_make_no_gallery() -> None:
    data = toy_data(12)
    model = build_model("small_cnn", Named(data.classes[::-1]), size=18)
    with pytest.raises(AdaptkitError, match="classes differ"):
        gallery(model, data)
