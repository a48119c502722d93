"""Labs and stills without a browser: every lab of ours keeps the promises, and what is stored can be read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import comm
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbformat.v4 import new_code_cell, new_notebook, new_output
from torch import nn

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.checks import DataReport
from adaptkit.data.findings import Finding
from adaptkit.evaluation.metrics import Predictions
from adaptkit.explanation.planted import learn_planted, planted
from adaptkit.heads.heads import Model, Named, build_model
from adaptkit.testing import toy_data
from adaptkit.training.finder import RateCurve
from adaptkit.widgets.data_labs import ChecksLab, ConfusionLab, corrected, export
from adaptkit.widgets.distillation_lab import DistillationLab, doubt, relatives, soft_labels
from adaptkit.widgets.explanation_lab import ExplanationLab
from adaptkit.widgets.head_lab import HeadLab
from adaptkit.widgets.labs import LABS, Lab, check_lab, steps
from adaptkit.widgets.robustness_lab import RobustnessLab
from adaptkit.widgets.still import STATE, VIEW, handed_down, states
from adaptkit.widgets.training_labs import FreezeLab, RateLab

DATA = toy_data(30)
ROWS = tuple(("train", i) for i in range(4))


@pytest.fixture(autouse=True)
def no_browser() -> Iterator[None]:
    "Widgets find nobody to talk to, and IPython has a shell to display with."
    InteractiveShell.instance()
    with patch("comm.create_comm", comm.DummyComm):
        yield
    InteractiveShell.clear_instance()


def rate_lab() -> Lab:
    x = np.linspace(-3, 3, 60)
    losses = 0.7 - 0.5 / (1 + np.exp(-4 * x)) + np.exp(3 * (x - 1.8))
    return RateLab(RateCurve(tuple((10**x).tolist()), tuple(losses.tolist()), {"head": 3e-3}))


def freeze_lab() -> Lab:
    return FreezeLab(build_model("small_cnn", DATA, size=32, seed=0))


def head_lab() -> Lab:
    return HeadLab(build_model("small_cnn", Named(tuple("abcdef")), size=32, seed=0).backbone, tuple("abcdef"))


def confusion_lab() -> Lab:
    labels = np.arange(30) % 3
    said = np.where(np.arange(30) % 5 == 1, 2, labels)
    return ConfusionLab(Predictions(np.eye(3, dtype=np.float32)[said], labels, ("a", "b", "c")), DATA.train.image)


def robustness_lab() -> RobustnessLab:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 9 * 7, 3))
    x = torch.rand(8, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return RobustnessLab(net, x, net(x).argmax(1), classes=("a", "b", "c"))


def distillation_lab() -> DistillationLab:
    lab = robustness_lab()
    return DistillationLab(lab.case.model, lab.case.x, lab.case.y, classes=lab.classes)


@cache
def striped() -> Model:
    "A network that tells lying stripes from standing ones."
    return learn_planted(images=256, epochs=5)


def explanation_lab() -> ExplanationLab:
    return ExplanationLab(striped(), planted(2, seed=1).x, methods=("gradcam", "gradient"), frames=10)


def checks_lab() -> ChecksLab:
    two = (Finding("doubtful labels", "warning", "Doubted: 4 labels.", ROWS), Finding("copies within a split", "note", "Copies.", ROWS[:2]))
    return ChecksLab(DATA, DataReport("toy", DATA.fingerprint, two))


def keep_all(lab: Lab) -> None:
    for i in range(4):
        lab.set(item=i, decision="keep")


OURS = {"rate": rate_lab, "freezing": freeze_lab, "head": head_lab, "confusion": confusion_lab, "checks": checks_lab, "robustness": robustness_lab, "distillation": distillation_lab, "explanation": explanation_lab}


def click(lab: Lab, axes: int, x: float, y: float) -> None:
    "What the browser says when somebody clicks at a place of some axes."
    figure = lab.panel.view.figure
    across, up = figure.transFigure.inverted().transform(figure.axes[axes].transData.transform((x, y)))
    lab.panel.view.widget._handle_custom_msg({"across": across, "down": 1 - up}, [])


def test_a_click_on_the_curve_chooses_the_rate() -> None:
    lab = rate_lab()
    before = lab.panel.view.widget.png
    click(lab, 0, 0.5, 0.4)
    assert abs(np.log10(lab.values["factor"] / 0.5)) < 0.06 and lab.panel.controls["factor"].value == lab.values["factor"]
    assert lab.panel.view.widget.png != before and lab.panel.view.widget.words == lab.words()
    click(lab, 0, 1e-3, 0.4)
    assert lab.values["factor"] == lab.controls()["factor"].values[0]


def test_a_click_moves_the_border_between_frozen_and_trained() -> None:
    lab = freeze_lab()
    n = len(lab.parts)  # type: ignore[attr-defined]
    for border in range(n):
        for axes in range(3):
            click(lab, axes, lab.panel.view.figure.axes[axes].get_xlim()[1] / 2, border - 0.4)
            assert lab.values["depth"] == n - 1 - border
    assert lab.panel.controls["depth"].value == 0


def test_a_click_chooses_a_cell_and_beside_the_matrix_nothing() -> None:
    lab = confusion_lab()
    click(lab, 0, 2.3, 0.8)
    assert lab.values == {"truth": "b", "said": "c"} and lab.panel.controls["said"].value == "c"
    click(lab, 2, 5, 5)  # one of the images
    assert lab.values == {"truth": "b", "said": "c"}
    lab.panel.view.widget._handle_custom_msg({"across": 0.001, "down": 0.001}, [])  # between the axes
    assert lab.values == {"truth": "b", "said": "c"}


def test_whatever_is_moved_quickly_the_last_picture_is_stored() -> None:
    lab = freeze_lab()
    with capture_output() as shown, patch.dict("os.environ", {"ADAPTKIT_WIDGETS": "lab"}):
        lab._ipython_display_()
        for depth in (2, 1, 0):
            lab.set(depth=depth)
    assert shown.outputs[-1].data[STATE]["state"]["values"] == {"depth": 0} and len(shown.outputs) == 5


def test_what_can_be_clicked_has_its_controls_beside_it_and_a_still() -> None:
    for make in (rate_lab, freeze_lab, confusion_lab):
        lab = make()
        assert lab.panel.controls and lab.panel.view.widget.words == lab.words()
    with capture_output() as shown, patch.dict("os.environ", {"ADAPTKIT_WIDGETS": "none"}):
        lab.panel.view._ipython_display_()
    assert set(shown.outputs[0].data) == {"image/png", "text/plain", STATE}


def test_the_script_in_the_browser_stays_small_and_loads_nothing() -> None:
    from adaptkit.widgets.clicks import SCRIPT

    assert SCRIPT.count("\n") < 60 and "http" not in SCRIPT and "import " not in SCRIPT


@pytest.mark.parametrize("name", OURS)
def test_ours_keep_the_promises(name: str) -> None:
    assert isinstance(OURS[name](), LABS[name])  # type: ignore[arg-type]
    check_lab(OURS[name], solve=keep_all if name == "checks" else None)


@pytest.mark.parametrize("make", OURS.values(), ids=OURS)
def test_every_control_has_a_label_and_a_keyboard(make: Callable[[], Lab]) -> None:
    lab = make()
    assert [type(c).__name__ in ("Dropdown", "SelectionSlider") and bool(c.description) for c in lab.panel.controls.values()] == [True] * len(lab.values)


def test_the_button_gives_the_verdict_and_moving_takes_it_away() -> None:
    lab = freeze_lab()
    lab.panel.button.click()
    assert "Not yet" in lab.panel.verdict.value
    lab.panel.controls["depth"].value = 1
    assert lab.values == {"depth": 1} and lab.panel.verdict.value == ""
    lab.panel.button.click()
    assert "Right" in lab.panel.verdict.value


@pytest.mark.parametrize("value", [-1, 1.01, float("nan"), "high", None, [0.5]])
def test_a_slider_refuses_what_it_does_not_offer(value: object) -> None:
    with pytest.raises(AdaptkitError, match="threshold"):
        steps("threshold", [0.0, 1.0], start=0.0).fit(value)


@pytest.mark.parametrize(("front", "kinds"), [("none", [{"image/png", "text/plain", STATE}]), ("voila", [{VIEW, "text/plain"}]), ("code", [{VIEW, "text/plain"}])])
def test_what_is_displayed_depends_on_who_looks(front: str, kinds: list[set[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTKIT_WIDGETS", front)
    with capture_output() as shown:
        freeze_lab()._ipython_display_()
    assert [set(o.data) for o in shown.outputs] == kinds


def test_headless_what_happens_later_reaches_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTKIT_WIDGETS", "none")
    lab = freeze_lab()
    with capture_output() as shown:
        lab._ipython_display_()
        lab.set(depth=1)
    nb = new_notebook(cells=[new_code_cell("lab", outputs=[new_output("display_data", data=o.data) for o in shown.outputs])])
    assert [s["state"]["values"]["depth"] for s in states(nb)] == [3, 1] and states(nb)[-1]["state"]["right"]
    assert len({o.transient["display_id"] for o in shown.outputs if o.transient}) == 1


def test_what_our_own_parent_has_is_handed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTKIT_NEW", "1")
    assert not handed_down("ADAPTKIT_NEW") and handed_down("PATH") in (True, False)


def test_decisions_are_exported_whole_and_applied(tmp_path: Path) -> None:
    lab = checks_lab()
    lab.set(item=0, decision="drop").set(item=1, decision="is bright").set(item=2, decision="keep").set(item=3, decision="keep").set(decision="undecided")
    with (export(lab.records(), tmp_path / "c.csv")).open() as file:
        assert [row["decision"] for row in csv.DictReader(file)] == ["drop", "is bright", "keep"]
    assert len(json.loads(export(lab.records(), tmp_path / "c.json").read_text())) == 3
    better = corrected(DATA, lab.marks)
    assert len(better.train) == 29 and better.train.labels[0] == 1 and better.train.name(0) == "train 1"
    assert DATA.train.labels[1] == 1 and len(DATA.train) == 30
    for path, rows in (("c.txt", lab.records()), ("c.csv", [])):
        with pytest.raises(AdaptkitError):
            export(rows, tmp_path / path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.csv", "c.json"]


def test_the_export_button_says_what_is_wrong(tmp_path: Path) -> None:
    lab = checks_lab()
    row, said = lab.extras()
    row.children[0].value = str(tmp_path / "x.csv")
    row.children[1].click()
    assert "Nothing is decided" in said.value
    lab.set(decision="keep")
    row.children[1].click()
    assert "1 decisions are in" in said.value and (tmp_path / "x.csv").exists()


@pytest.mark.parametrize("given, words", [({"temperatures": (0.0, 1.0)}, "above 0"), ({"temperatures": (4.0, 1.0)}, "in order"), ({"temperatures": ()}, "in order"), ({"classes": ("a",)}, "name every class"), ({"temperatures": (1e-4,)}, "beyond")])
def test_what_a_distillation_lab_refuses(given: dict[str, Any], words: str) -> None:
    lab = robustness_lab()
    with pytest.raises(AdaptkitError, match=words):
        DistillationLab(lab.case.model, lab.case.x, lab.case.y, **{"classes": lab.classes} | given)


def test_soft_labels_are_those_of_scipy() -> None:
    logits = 5 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    soft = soft_labels(logits, 3.0)
    assert np.allclose(soft, scipy.special.softmax(logits.numpy() / 3, axis=1), atol=1e-6)
    assert np.allclose(doubt(soft), scipy.stats.entropy(soft.numpy(), axis=1) / np.log(4), atol=1e-5)
    with pytest.raises(AdaptkitError, match="above 0"):
        soft_labels(logits, 0)


def test_relatives_leave_the_right_class_out() -> None:
    table = relatives(torch.tensor([[0.8, 0.15, 0.05], [0.6, 0.1, 0.3], [0.5, 0.5, 0.0]]), torch.tensor([0, 0, 1]))
    assert torch.allclose(table, torch.tensor([[0, 0.25 / 0.6, 0.35 / 0.6], [1, 0, 0], [0, 0, 0]]))
