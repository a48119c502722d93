"""The lab on explanations without a browser: its pictures, its store, its animation and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Any
from unittest.mock import patch

import comm
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from adaptkit.core.registry import AdaptkitError
from adaptkit.explanation.explain import EXPLAINERS, explain, subject
from adaptkit.robustness.measuring import traces
from adaptkit.widgets.explanation_lab import ExplanationLab
from adaptkit.widgets.maps import Maps, _frames, has_stage, offered, ready_methods

MODEL, X = subject()


@pytest.fixture(autouse=True)
def no_browser() -> Iterator[None]:
    "Widgets find nobody to talk to."
    with patch("comm.create_comm", comm.DummyComm):
        yield


def lab(**settings: Any) -> ExplanationLab:
    return ExplanationLab(MODEL, X, **{"frames": 4, "methods": ("gradcam", "gradient", "cam")} | settings)


@pytest.mark.parametrize("insert", [False, True])
def test_frames_move_the_highest_pixels_first(insert: bool) -> None:
    values = torch.randperm(22 * 18, generator=torch.Generator().manual_seed(0)).view(22, 18).float()
    film = _frames(X[1], values, steps=6, insert=insert)
    empty = X[1].mean((1, 2), keepdim=True).expand_as(X[1])
    for step, frame in enumerate(film):
        n = round(22 * 18 * step / 6)
        moved = values >= 22 * 18 - n  # the n highest
        kept = moved if insert else ~moved
        assert int(moved.sum()) == n and torch.equal(frame, torch.where(kept, X[1], empty))


def test_the_curve_is_what_the_model_says_to_the_frames() -> None:
    store = Maps(MODEL, X, steps=5, seed=0)
    found = explain(MODEL, X[2:3], 1, method="gradcam")
    values = store.map(2, 1, "gradcam", "high")[0]
    assert values is not None and torch.allclose(values, found.map[0], atol=1e-6)
    for insert in (False, True):
        film = _frames(X[2], values, steps=5, insert=insert)
        assert torch.allclose(store.curve(2, 1, "gradcam", "high", insert=insert), explain(MODEL, film, 1).probability, atol=1e-5)


def test_nothing_is_computed_twice_and_the_store_stays_small() -> None:
    passes: list[int] = []
    hook = MODEL.register_forward_hook(lambda module, args, out: passes.append(len(args[0])))
    try:
        it = lab()
        for image in (0, 1):
            it.set(image=image, share=0.5).facts()
        n = len(passes)
        assert n > 0
        for move in ({"image": 0, "share": 0.75}, {"image": 1, "share": 0.25}, {"opacity": 0.2}):
            it.set(**move).facts()
        assert len(passes) == n
        small = Maps(MODEL, X, steps=2, seed=0, most=3)
        for i in range(4):
            small.curve(i, 0, "gradient", "", insert=False)
        assert len(small.known) == 3
    finally:
        hook.remove()


def test_the_model_is_left_as_it_was() -> None:
    before, chance = traces(MODEL), torch.get_rng_state()
    it = lab(methods=())
    for name in it.methods:
        it.set(method=name).set(share=0.25)
    it.picture()
    assert traces(MODEL) == before and torch.equal(torch.get_rng_state(), chance)


def test_a_click_waits_for_no_animation() -> None:
    sizes: list[int] = []
    it = lab(frames=20)
    hook = MODEL.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    try:
        for move in ({"image": 1}, {"target": 2}, {"stage": "low"}):
            it.set(**move).facts()
        assert sizes == [1, 1, 1]  # one map each
        it.set(share=0.05).facts()
        assert sum(sizes) == 3 + 21
    finally:
        hook.remove()


def test_another_map_begins_at_the_beginning() -> None:
    it = lab().set(share=0.75)
    for move in ({"image": 2}, {"target": 1}, {"stage": "low"}, {"method": "gradient"}):
        assert it.set(share=0.5).values["share"] == 0.5 and it.set(**move).values["share"] == 0
    assert it.set(share=0.5).set(opacity=0.0).set(way="inserted").values["share"] == 0.5
    assert it.values["stage"] == "" and it.set(method="gradcam").values["stage"] == "high"


def test_what_is_shown_is_what_was_asked_for() -> None:
    it = lab().set(image=3, target=2, stage="low", share=0.5, way="inserted")
    found = explain(MODEL, X[3:4], 2, method=EXPLAINERS["gradcam"](stage="low"))
    facts, curve = it.facts(), it.film()
    assert facts["map"] == "gradcam at low" and facts["explained"] == f"c, {float(found.probability):.0%}"
    assert facts["50% of the pixels inserted"] == f"c, {float(curve[2]):.0%}" and facts["mean over all steps"] == f"{float(torch.trapezoid(curve)) / 4:.0%}"
    for text in ("gradcam at low", "image 3", "50%"):
        assert text in it.words()


def test_a_method_that_refuses_says_why_in_the_picture() -> None:
    model, x = subject()
    model.head = nn.Sequential(*model.head, nn.ReLU(), nn.Linear(3, 3))  # CAM needs one linear layer
    it = ExplanationLab(model, x, methods=("gradcam", "cam"), frames=4).set(method="cam", share=0.5)
    assert "take gradcam" in it.facts()["refused"] and not it.answer
    assert any("take gradcam" in text.get_text().replace("\n", " ") for text in it.draw().axes[3].texts)


def test_player_and_slider_know_of_each_other() -> None:
    it = lab()
    button, play = it.panel.box.children[-4].children
    assert (button.description, play.max, play.layout.display) == ("Play", 4, "none") and it.player is play
    play.value = 3
    assert it.values["share"] == 0.75 and it.panel.controls["share"].value == 0.75
    it.panel.controls["share"].value = 0.25
    assert play.value == 1
    it.panel.controls["image"].value = 2
    assert play.value == 0 and it.values["share"] == 0


def test_a_click_on_the_curve_moves_the_animation() -> None:
    it = lab()
    view = it.panel.view
    for axes, x, share in ((3, 52.0, 0.5), (0, 5.0, 0.5), (3, 101.5, 1.0)):
        figure = view.figure
        across, up = figure.transFigure.inverted().transform(figure.axes[axes].transData.transform((x, 0.5)))
        view.widget._handle_custom_msg({"across": across, "down": 1 - up}, [])
        assert it.values["share"] == share


def corner(x: Tensor) -> Tensor:
    "A function that looks at one corner."
    bright = x[:, :, :6, :6].mean((1, 2, 3))
    return torch.stack([12 * (bright - 0.6), torch.zeros_like(bright)], 1)


def test_the_answer_is_the_first_step_that_halves() -> None:
    x = X.clone() * 0.4
    x[:, :, :6, :6] = 1.0
    for i in range(2):
        it = ExplanationLab(corner, x, methods=("gradient", "inputxgradient"), frames=40).set(image=i, share=1.0)
        curve = it.film().tolist()
        half = next(k for k, p in enumerate(curve) if p <= curve[0] / 2)
        assert [k for k in range(41) if it.set(share=k / 40).answer] == [half] and 0 < half < 5
        assert not it.set(way="inserted", share=half / 40).answer and "stage" not in it.values


def test_headless_the_picture_is_a_grid_and_alive_it_is_the_position(monkeypatch: pytest.MonkeyPatch) -> None:
    it = lab(methods=())
    monkeypatch.setenv("ADAPTKIT_WIDGETS", "none")
    grid = np.asarray(Image.open(BytesIO(it.picture()._repr_png_())))
    monkeypatch.setenv("ADAPTKIT_WIDGETS", "lab")
    one = np.asarray(Image.open(BytesIO(it.picture()._repr_png_())))
    assert grid.shape[0] > 1.5 * one.shape[0] and len(it.draw().axes) == 4
    monkeypatch.setenv("ADAPTKIT_WIDGETS", "none")
    assert not np.array_equal(np.asarray(Image.open(BytesIO(it.set(opacity=0.0).picture()._repr_png_()))), grid)


def test_what_needs_more_than_an_image_is_left_out() -> None:
    assert "expectedgradients" not in ready_methods() and {"gradcam", "gradient"} <= {*ready_methods()}
    assert {name for name in ready_methods() if has_stage(name)} >= {"gradcam", "layercam", "scorecam"}
    methods, stages = offered(lambda x: MODEL(x), ())
    assert stages == () and methods and not any(has_stage(name) for name in methods)


def many(x: Tensor) -> Tensor:
    "A model of 30 classes that shows no network."
    return torch.linspace(0, 1, 30) * x.mean((1, 2, 3))[:, None]


def test_of_many_classes_the_likeliest_are_offered() -> None:
    it = ExplanationLab(many, X, methods=("gradient",), frames=2)
    assert it.controls()["target"].values == [-1, *range(20, 30)] and it.facts()["explained"].startswith("class 29")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"methods": ("gradcma",)}, "Did you mean 'gradcam'"),
        ({"methods": ("expectedgradients",)}, "needs more than"),
        ({"frames": 1}, "at least 2 steps"),
        ({"classes": ("a", "b")}, "name every class"),
    ],
)
def test_what_it_refuses(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AdaptkitError, match=words):
        lab(**settings)


def test_it_refuses_what_are_no_images() -> None:
    with pytest.raises(AdaptkitError, match="batch of images"):
        ExplanationLab(MODEL, X[0])
    with pytest.raises(AdaptkitError, match="none by name"):
        ExplanationLab(many, X, methods=("gradcam",))
