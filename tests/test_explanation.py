"""Explanations: what they promise, beside formulas written by hand, and what they refuse."""

from __future__ import annotations

import copy
import importlib
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptkit.core.registry import AdaptkitError
from adaptkit.explanation.class_activation import GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM
from adaptkit.explanation.explain import EXPLAINERS, Attribution, check_explainer, explain, subject
from adaptkit.explanation.gradients import ExpectedGradients, IntegratedGradients, SmoothGrad
from adaptkit.explanation.places import as_map, grid_of, places
from adaptkit.explanation.planted import HEIGHT, PATCH, WIDTH, edge_maps, planted, pointing, random_maps, share_inside
from adaptkit.heads.heads import Model, Named, build_model
from adaptkit.models.backbones import load_backbone
from adaptkit.robustness.contract import quiet_model
from adaptkit.robustness.measuring import traces

REFERENCES = torch.rand(6, 3, 22, 18, generator=torch.Generator().manual_seed(3))
MAKERS = {name: (lambda name=name: EXPLAINERS[name]()) for name in EXPLAINERS} | {"expectedgradients": lambda: ExpectedGradients(REFERENCES, samples=6)}
TARGET = torch.tensor([2, 0, 1, 1])
HERE = [name for name in EXPLAINERS if "attention" not in name]  # what a convolutional network can be asked; the others: test_text_explanations.py


def asked() -> tuple[Model, Tensor]:
    "The subject of the contract in evaluation mode, and its images [4, 3, 22, 18]."
    model, x = subject()
    return model.eval(), x


def logit(model: nn.Module, x: Tensor, target: Tensor = TARGET) -> Tensor:
    return model(x).gather(1, target[:, None])[:, 0]


def gradient_of(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(logit(model, x).sum(), x)
    return found


@pytest.mark.parametrize("name", HERE)
def test_each_keeps_the_contract(name: str) -> None:
    check_explainer(MAKERS[name])


def test_each_is_an_entry_point() -> None:
    listed = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]["adaptkit.explainer"]
    for name, place in listed.items():
        module, _, attribute = place.partition(":")
        assert getattr(importlib.import_module(module), attribute) is EXPLAINERS[name] and EXPLAINERS[name]().name == name
    assert {*listed} == {*EXPLAINERS.items}


def test_gradient_is_what_small_steps_say() -> None:
    model, x = asked()
    model, x = model.double(), x.double()
    found = explain(model, x, TARGET, method="gradient").values
    for place in ((0, 3, 5), (2, 21, 17), (1, 10, 0)):
        up, down = x.clone(), x.clone()
        up[(slice(None), *place)] += 1e-6
        down[(slice(None), *place)] -= 1e-6
        with torch.no_grad():
            steps = (logit(model, up) - logit(model, down)) / 2e-6
        assert torch.allclose(found[(slice(None), *place)], steps, atol=1e-6)


def test_input_times_gradient_and_smoothgrad_are_their_formulas() -> None:
    model, x = asked()
    assert torch.allclose(explain(model, x, TARGET, method="inputxgradient").values, x * gradient_of(model, x), atol=1e-6)
    draw, noisy = torch.Generator().manual_seed(5), torch.zeros_like(x)
    for _ in range(7):
        spread = 0.2 * (x.flatten(1).amax(1) - x.flatten(1).amin(1)).view(-1, 1, 1, 1)
        noisy += gradient_of(model, x + spread * torch.randn(3, 22, 18, generator=draw)) / 7
    assert torch.allclose(explain(model, x, TARGET, method=SmoothGrad(7, 0.2, batch=3), seed=5).values, noisy, atol=1e-6)


def test_integrated_gradients_are_a_sum_over_the_way() -> None:
    model, x = asked()
    nodes, weights = np.polynomial.legendre.leggauss(12)
    hand = sum(w / 2 * gradient_of(model, 0.3 + (t + 1) / 2 * (x - 0.3)) for t, w in zip(nodes, weights, strict=True)) * (x - 0.3)
    found = explain(model, x, TARGET, method=IntegratedGradients(12, baseline=0.3))
    assert torch.allclose(found.values, hand.float(), atol=1e-5)


@pytest.mark.parametrize("baseline", [0.0, 1.0, None])
def test_integrated_gradients_are_complete_within_what_they_report(baseline: float | None) -> None:
    model, x = asked()
    start = x.mean((2, 3), keepdim=True).expand_as(x) if baseline is None else torch.full_like(x, baseline)
    found = explain(model, x, TARGET, method=IntegratedGradients(64, baseline=baseline))
    with torch.no_grad():
        gap = found.values.flatten(1).sum(1) - (logit(model, x) - logit(model, start))
    assert torch.allclose(gap, found.error, atol=1e-4) and float(found.error.abs().max()) < 0.1
    coarse = explain(model, x, TARGET, method=IntegratedGradients(2, baseline=baseline))
    assert float(coarse.error.abs().mean()) > float(found.error.abs().mean())


def test_too_few_steps_are_told() -> None:
    model, x = asked()
    assert any("take more steps" in w for w in explain(model, x, TARGET, method=IntegratedGradients(1)).warnings)


@pytest.mark.parametrize("make", [lambda b: IntegratedGradients(9, batch=b), lambda b: SmoothGrad(5, batch=b), lambda b: ExpectedGradients(REFERENCES, 9, batch=b), lambda b: ScoreCAM(batch=b)])
def test_a_batch_size_bounds_what_passes_and_changes_nothing(make) -> None:
    model, x = asked()
    sizes: list[int] = []
    hook = model.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    small = explain(model, x, TARGET, method=make(3)).map
    hook.remove()
    assert max(s for s in sizes[1:]) <= 4 and torch.allclose(small, explain(model, x, TARGET, method=make(64)).map, atol=1e-5)


def test_expected_gradients_of_a_linear_model_are_exact() -> None:
    torch_line = nn.Linear(3 * 22 * 18, 3)
    with torch.no_grad():
        torch_line.weight.copy_(torch.randn(3, 1188, generator=torch.Generator().manual_seed(0)))
    _, x = asked()
    found = explain(nn.Sequential(nn.Flatten(), torch_line), x, TARGET, method=ExpectedGradients(REFERENCES, samples=6))
    hand = torch_line.weight[TARGET].view(4, 3, 22, 18) * (x - REFERENCES.mean(0))
    assert torch.allclose(found.values, hand, atol=1e-4) and float(found.error.abs().max()) < 1e-3


def test_guided_backpropagation_lets_only_positive_gradients_through() -> None:
    first, second = nn.Conv2d(3, 4, 3), nn.Linear(4 * 20 * 16, 3)
    model, (_, x) = nn.Sequential(first, nn.ReLU(inplace=True), nn.Flatten(), second), asked()
    found = explain(model, x, TARGET, method="guidedbackprop")
    with torch.no_grad():
        before = first(x)
        upper = second.weight[TARGET].view_as(before)
        hand = F.conv_transpose2d(upper.clamp_min(0) * (before > 0), first.weight)
    assert torch.allclose(found.values, hand, atol=1e-5) and "don't take it for a reason" in found.warnings[1]


def map_and_gradient(model: Model, x: Tensor, stage: int) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        here = model.backbone(x, stop=stage + 1)
    here.requires_grad_()
    (slopes,) = torch.autograd.grad(logit(lambda m: model(m, start=stage + 1), here).sum(), here)
    return here.detach(), slopes


@pytest.mark.parametrize("stage", ["low", "high"])
def test_class_activation_maps_are_their_formulas(stage: str) -> None:
    model, x = asked()
    here, slopes = (t.numpy() for t in map_and_gradient(model, x, ("low", "high").index(stage)))
    share = slopes**2 / (2 * slopes**2 + here.sum((2, 3), keepdims=True) * slopes**3 + 1e-6)
    plus = (np.where(slopes != 0, share, 0) * np.maximum(slopes, 0)).sum((2, 3), keepdims=True)
    weights = {GradCAM: slopes.mean((2, 3), keepdims=True), GradCAMPlusPlus: plus, LayerCAM: np.maximum(slopes, 0)}
    for make, w in weights.items():
        hand = np.maximum((w * here).sum(1), 0)
        found = explain(model, x, TARGET, method=make(stage))
        assert np.allclose(found.values, hand, atol=1e-5)
        assert torch.allclose(found.map, F.interpolate(torch.from_numpy(hand)[:, None], (22, 18), mode="bilinear")[:, 0], atol=1e-5)


def test_score_cam_is_its_formula() -> None:
    model, x = asked()
    with torch.no_grad():
        here = model.backbone(x)
        masks = F.interpolate(here, (22, 18), mode="bilinear").flatten(2)
        masks = ((masks - masks.amin(2, keepdim=True)) / (masks.amax(2, keepdim=True) - masks.amin(2, keepdim=True)).clamp_min(1e-8)).view(4, 6, 1, 22, 18)
        scores = torch.stack([logit(model, x * masks[:, k]) for k in range(6)], 1).softmax(1)
    hand = (scores[:, :, None, None] * here).sum(1).relu()
    assert torch.allclose(explain(model, x, TARGET, method="scorecam").values, hand, atol=1e-5)


def test_cam_adds_up_and_is_grad_cam_where_the_head_is_linear() -> None:
    model, x = asked()
    found = explain(model, x, TARGET, method="cam")
    with torch.no_grad():
        total = logit(model, x) - model.head[-1].bias[TARGET]
    assert torch.allclose(found.values.flatten(1).sum(1), total, atol=1e-4)
    assert torch.allclose(found.values.relu(), explain(model, x, TARGET).values, atol=1e-5)
    with pytest.raises(AdaptkitError, match="take gradcam"):
        explain(build_model("small_cnn", Named(("a", "b")), head="mlp"), torch.rand(2, 3, 32, 32), method="cam")


@pytest.mark.parametrize("name", HERE)
def test_half_precision_says_about_the_same(name: str) -> None:
    model, x = asked()
    full = explain(model, x, TARGET, method=MAKERS[name]()).map.flatten(1)
    half = explain(copy.deepcopy(model).bfloat16(), x, TARGET, method=MAKERS[name]()).map.flatten(1)
    assert half.dtype == torch.float32 and float(F.cosine_similarity(full, half).min()) > 0.9


def test_frozen_backbones_and_inference_mode_change_nothing() -> None:
    model, x = asked()
    free = {name: explain(model, x, method=MAKERS[name]()).map for name in ("gradcam", "gradient")}
    model.backbone.requires_grad_(False)
    for name, before in free.items():
        with torch.inference_mode():
            assert torch.allclose(explain(model, x, method=name).map, before, atol=1e-6)
    assert not any(p.requires_grad for p in model.backbone.parameters()) and all(p.requires_grad for p in model.head.parameters())


@pytest.mark.parametrize("name", HERE)
def test_a_failure_in_the_middle_leaves_no_trace(name: str) -> None:
    model, x = subject()
    model.head[-1].weight.requires_grad_(False)
    before, passes = traces(model), []

    def fail(module: nn.Module, args: object, out: object) -> None:
        passes.append(1)
        if len(passes) >= (1 if name in ("cam", "gradient", "inputxgradient", "guidedbackprop") or "cam" in name[4:] else 2):
            raise RuntimeError("planned")

    hook = model.head[-1].register_forward_hook(fail)
    with pytest.raises((RuntimeError, AdaptkitError), match="planned"):
        explain(model, x, method=MAKERS[name]())
    hook.remove()
    assert traces(model) == before


@pytest.mark.parametrize(
    ("tokens", "grid"), [(1 + 5 * 4, (1, 5, 4)), (5 * 4, (0, 5, 4)), (2 + 10 * 8, (2, 10, 8)), (5 + 20 * 16, (5, 20, 16))]
)
def test_tokens_find_their_places(tokens: int, grid: tuple[int, int, int]) -> None:
    assert grid_of(tokens, 40, 32) == grid
    front, rows, columns = grid
    out = torch.arange(tokens).float()[None, :, None].expand(1, tokens, 3)
    assert as_map(out, torch.zeros(1, 3, 40, 32))[0, 0].tolist() == torch.arange(front, tokens).view(rows, columns).tolist()


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "torchvision/swin_t"])
def test_transformers_need_no_reshape_of_yours(name: str) -> None:
    model = build_model(load_backbone(name, pretrained=False, size=64 if "timm" in name else 224), Named(("a", "b")))
    side = model.size
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    stage = "blocks.5" if "timm" in name else "features.5"
    assert stage in places(model)
    cells = side // 16
    assert explain(model, x, 1, method=LayerCAM(stage)).values.shape == (1, cells, cells)


def test_a_class_token_alone_is_no_map() -> None:
    model = build_model(load_backbone("timm/vit_tiny_patch16_224", pretrained=False, size=32), Named(("a", "b")))
    with pytest.raises(AdaptkitError, match="only its class token"):
        explain(model, torch.rand(2, 3, 32, 32), method=GradCAM("blocks.11"))


def test_targets_by_name_and_number_are_the_same() -> None:
    model, x = asked()
    for target in ("b", 1, ["b", 1, "b", 1], torch.tensor([1, 1, 1, 1])):
        found = explain(model, x, target, method="gradient")
        assert found.names == ("b",) * 4 and found.target.tolist() == [1] * 4
    said = explain(model, x, method="gradient").target
    with torch.no_grad():
        assert torch.equal(said, model(x).argmax(1))


def test_the_probability_is_calibrated_where_a_temperature_is_given() -> None:
    model, x = asked()
    with torch.no_grad():
        logits = model(x)
    plain, calm = explain(model, x, TARGET), explain(model, x, TARGET, temperature=3.0)
    assert torch.allclose(plain.probability, logits.softmax(1).gather(1, TARGET[:, None])[:, 0], atol=1e-5) and not plain.calibrated
    assert torch.allclose(calm.probability, (logits / 3).softmax(1).gather(1, TARGET[:, None])[:, 0], atol=1e-5) and calm.calibrated
    assert torch.equal(plain.map, calm.map)


def test_a_picture_is_drawn_whatever_the_map() -> None:
    model, x = asked()
    for name in ("gradcam", "inputxgradient", "guidedbackprop"):
        found = explain(model, x, method=name)
        assert isinstance(found, Attribution) and found.show()._repr_png_()[:4] == b"\x89PNG"


class After(nn.Module):
    "A model with something behind it."

    def __init__(self, model: Model, after) -> None:
        super().__init__()
        self.model, self.after, self.classes = model, after, model.classes

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(x))


def spoilt(x: Tensor) -> Tensor:
    x = x.clone()
    x[2, 1, 4, 4] = torch.nan
    return x


BAD = {
    "Image 2 of the batch": lambda m, x: explain(m, spoilt(x)),
    "Did you mean 'gradcam'": lambda m, x: explain(m, x, method="gradcan"),
    "Class 3 was asked for, but the model has 3": lambda m, x: explain(m, x, 3),
    "Class -1 was asked for": lambda m, x: explain(m, x, -1),
    "Unknown class 'bb'. Did you mean 'b'": lambda m, x: explain(m, x, "bb"),
    "4 images need one target, or 4; found 2": lambda m, x: explain(m, x, [0, 1]),
    "number or the name": lambda m, x: explain(m, x, [0, 1, 0.5, 1]),
    "divide bytes by 255": lambda m, x: explain(m, (x * 255).byte()),
    "must lie in": lambda m, x: explain(m, x * 2),
    "one image is x": lambda m, x: explain(m, x[0]),
    "batch is empty": lambda m, x: explain(m, x[:0]),
    "can't read images of the shape [2, 22, 18]": lambda m, x: explain(m, x[:, :2]),
    "made for 32 x 32": lambda m, x: explain(build_model("small_cnn", Named(("a", "b"))), x[:, :, :5, :5]),
    "Did you mean 'high'": lambda m, x: explain(m, x, method=GradCAM("hihg")),
    "turn it into two": lambda m, x: explain(After(m, lambda z: z[:, :1]), x, method="gradient"),
    "take the softmax off": lambda m, x: explain(After(m, lambda z: z.softmax(1)), x, method="gradient"),
    "e.g. occlusion": lambda m, x: explain(After(m, lambda z: z.detach()), x, method="gradient"),
    "logits are no numbers": lambda m, x: explain(After(m, lambda z: z / 0), x, method="gradient"),
    "no named stages": lambda m, x: explain(After(m, lambda z: z), x),
    "none that are modules": lambda m, x: explain(nn.Sequential(nn.Flatten(), nn.Linear(1188, 2)), x, method="guidedbackprop"),
    "give some the model has learnt from": lambda m, x: explain(m, x, method="expectedgradients"),
    "References must be images like": lambda m, x: explain(m, x, method=ExpectedGradients(REFERENCES[:, :, :9])),
    "steps = 0": lambda m, x: IntegratedGradients(0),
    "baseline = 2": lambda m, x: IntegratedGradients(baseline=2),
    "noise = 0": lambda m, x: SmoothGrad(noise=0),
    "temperature = 0": lambda m, x: explain(m, x, temperature=0),
}


@pytest.mark.parametrize("words", list(BAD))
def test_bad_input_is_told(words: str) -> None:
    model, x = asked()
    before = traces(model)
    with pytest.raises(AdaptkitError) as told:
        BAD[words](model, x)
    assert words in str(told.value) and traces(model) == before


def test_a_detached_model_can_still_be_asked_by_score_cam() -> None:
    model, x = asked()
    found = explain(After(model, lambda z: z.detach()), x, TARGET, method=ScoreCAM("model.backbone.stages.1"))
    assert torch.allclose(found.map, explain(model, x, TARGET, method="scorecam").map, atol=1e-5)


def test_a_flat_map_is_told() -> None:
    model, x = asked()
    with torch.no_grad():
        model.head[-1].weight.fill_(-1)
    assert any("Nothing speaks for the class: the map of image 0, 1, 2, 3" in w for w in explain(model, x, 0).warnings)


def test_planted_causes_decide_and_frames_are_steeper() -> None:
    found = planted(64, seed=3)
    assert (found.cause.sum((1, 2)) == PATCH**2).all() and found.x.shape == (64, 3, HEIGHT, WIDTH)
    stripes = found.x[:, 0] * found.cause
    for row, cause, y in zip(stripes, found.cause, found.y, strict=True):
        inner = row[cause].view(PATCH, PATCH)
        down, across = inner.mean(1).std(), inner.mean(0).std()
        assert (down > across) == (y == 0)
    assert pointing(edge_maps(found.x), found.cause).float().mean() < 0.1
    assert abs(float(share_inside(random_maps(found.x), found.cause).mean()) - PATCH**2 / (HEIGHT * WIDTH)) < 0.01


def test_maps_are_scored_as_they_lie() -> None:
    cause = planted(8).cause
    assert share_inside(cause.float(), cause).tolist() == [1.0] * 8 and pointing(cause.float(), cause).all()
    assert not pointing(torch.zeros(8, HEIGHT, WIDTH), cause).any() and not share_inside(-cause.float(), cause).any()


def test_the_contract_turns_an_edge_detector_down() -> None:
    gradient = EXPLAINERS["gradient"]

    class Edges(gradient):
        def attribute(self, model, x, target=None, *, generator=None):
            found = super().attribute(model, x, target)
            return type(found)(edge_maps(x), found.logits, found.target, found.values)

    with pytest.raises(AdaptkitError, match="the same maps for every class"):
        check_explainer(Edges)


def test_a_quiet_model_is_what_is_explained() -> None:
    model, x = subject()
    loud = explain(model, x, TARGET)
    with quiet_model(model):
        assert torch.equal(loud.map, explain(model, x, TARGET).map)
    assert model.training


def test_labels_as_data_have_them_are_targets_and_a_class_is_made_one_of() -> None:
    model, x = asked()
    found = explain(model, x, TARGET.numpy(), method=SmoothGrad)
    assert torch.equal(found.target, TARGET) and torch.equal(explain(model, x, np.int64(2), method="gradient").target, torch.tensor([2] * 4))
    with pytest.raises(AdaptkitError, match="number or the name"):
        explain(model, x, [0.5] * 4, method="gradient")


def test_class_names_are_no_formulas() -> None:
    model, x = asked()
    model.classes = ("$0-$50", "US$ 5_{ to $10", "$^$")
    assert explain(model, x, method="gradient").show()._repr_png_()[:4] == b"\x89PNG"
