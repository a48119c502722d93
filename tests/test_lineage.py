"The lineage report: shares against numpy, paired intervals, controls, and files that come back."

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from adaptkit.core.registry import AdaptkitError
from adaptkit.distillation.lineage import Lineage, lineage, lineage_page, read_lineage, write_lineage
from adaptkit.distillation.measures import LINES, Trial, alike, calibration, looks_of, maps_of, measures, share, weighed
from adaptkit.evaluation.compare import compare
from adaptkit.evaluation.evaluate import predict
from adaptkit.evaluation.metrics import Predictions
from adaptkit.heads.heads import Named, build_model
from adaptkit.robustness.attacks import PGD, robust_accuracy
from adaptkit.robustness.corrupted import corrupted_accuracy
from adaptkit.testing import toy_data

FEW = Trial(n=9, corruptions=("contrast", "pixelate"), attack=PGD(0.02, steps=2), seed=4)
BARE = Trial(corruptions=(), attack=None, n=9)
BARE_LINES = [name for name in LINES if not name.startswith("accuracy, ")]


def some(seed: int, n: int = 211, classes: int = 5) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = np.random.default_rng(99).integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
    return Predictions(logits, labels, tuple("abcdefg"[:classes]))


@pytest.fixture(scope="module")
def data():
    return toy_data(48)


@pytest.fixture(scope="module")
def models(data):
    return [build_model("small_cnn", data, size=24, seed=s) for s in (1, 2, 3)]


@pytest.fixture(scope="module")
def report(data, models) -> Lineage:
    return lineage(*models, data, trial=FEW, rounds=6, count=200)


# --- measures --------------------------------------------------------------------------------------


def test_weights_are_copies_of_images():
    p, w = some(1), np.random.default_rng(0).integers(0, 3, 211)
    again = Predictions(np.repeat(p.logits, w, 0), np.repeat(p.labels, w), p.classes)
    for m, of in ((calibration(p), calibration(again)), (share(p.predicted == p.labels, p.labels > 0), share(again.predicted == again.labels, again.labels > 0))):
        assert float(m(w.astype(float))) == pytest.approx(float(of(np.ones(len(again)))), abs=1e-12)
        assert np.allclose(m(np.stack([w, w]).astype(float)), float(of(np.ones(len(again)))))


def test_a_share_of_nothing_is_no_number():
    assert np.isnan(float(share([True, False], [False, False])(np.ones(2))))


def test_the_paired_gain_is_that_of_compare_and_seeds_are_averaged():
    t, a, b, c, d = (some(s) for s in range(5))
    right = [[share(p.predicted == p.labels) for p in ps] for ps in ([t], [a, b], [c, d])]
    of = dict(zip(("teacher", "alone", "distilled"), right, strict=True))
    one = {r: ms[:1] for r, ms in of.items()}
    _, gain = weighed(one, t.labels, name="accuracy", count=400, seed=7)
    other = compare(a, c, count=400, seed=7)
    assert (gain.value, gain.low, gain.high) == pytest.approx((other.difference, other.low, other.high), abs=1e-12)
    scores, both = weighed(of, t.labels, name="accuracy", count=400, seed=7)
    pairs = [(y.predicted == y.labels).mean() - (x.predicted == x.labels).mean() for x, y in ((a, c), (b, d))]
    assert both.seeds == pytest.approx(pairs) and both.value == pytest.approx(np.mean(pairs))
    assert scores["alone"].value == pytest.approx(np.mean([(p.predicted == p.labels).mean() for p in (a, b)]))
    assert both.high - both.low < gain.high - gain.low  # two students each: less noise


def test_measures_are_those_of_the_parts(data, models):
    teacher, student = models[:2]
    heard, said = predict(teacher, data.test), predict(student, data.test)
    looks, why = looks_of([teacher, student], data.test, heard, FEW)
    found = measures(student, data.test, teacher=heard, trial=FEW, looks=looks)
    value = {k: float(m(np.ones(len(m.below)))) for k, m in found.items()}
    wrong = heard.predicted != heard.labels
    assert {*found} == {*LINES} and not why
    assert value["accuracy"] == pytest.approx((said.predicted == said.labels).mean())
    assert value["agrees with the teacher"] == pytest.approx((said.predicted == heard.predicted).mean())
    assert value["agrees where the teacher is wrong"] == pytest.approx((said.predicted == heard.predicted)[wrong].mean())
    bad = corrupted_accuracy(student, data.test, corruptions=FEW.corruptions, levels=(3,), n=9, seed=4)
    assert value["accuracy, corrupted"] == pytest.approx(1 - bad.errors().mean())
    assert value["accuracy, attacked"] == pytest.approx(robust_accuracy(student, data.test, FEW.attack, n=9, seed=4).accuracy)


# --- the report ------------------------------------------------------------------------------------


def test_the_report_holds_every_line_and_cost(report):
    assert list(report.lines) == list(LINES) == list(report.gains)
    assert list(report.costs) == ["teacher", "alone", "distilled"]
    for name, by_role in report.lines.items():
        assert all(0 <= s.low <= s.value + 1e-9 and s.high <= 1 + 1e-9 for s in by_role.values()), name
        assert by_role["distilled"].value - by_role["alone"].value == pytest.approx(report.gains[name].value)
    assert report.lines["agrees with the teacher"]["teacher"].value == 1
    assert "times fewer" in report.verdict and report.table().shape == (11, 4)
    assert report.show()._repr_png_()[:4] == b"\x89PNG"


def test_the_same_student_twice_gains_exactly_nothing(data, models):
    found = lineage(models[0], models[1], models[1], data, trial=FEW, rounds=6, count=100)
    assert all((g.value, g.low, g.high) == (0, 0, 0) for g in found.gains.values())
    assert "chance alone" in found.verdict


def test_models_are_left_as_they_are_and_seeds_come_in_lists(data, models):
    for m in models:
        m.train()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    found = lineage(models[0], models[1:], [models[2], models[1]], data, trial=BARE, rounds=6, count=100)
    assert found.gains["accuracy"].seeds[0] == pytest.approx(-found.gains["accuracy"].seeds[1])
    assert list(found.lines) == BARE_LINES
    assert all(m.training for m in models)
    assert all(torch.equal(v, b[k]) for m, b in zip(models, before, strict=True) for k, v in m.state_dict().items())


def test_the_same_call_gives_the_same_numbers(data, models, report):
    again = lineage(*models, data, trial=FEW, rounds=6, count=200)
    assert again.lines == report.lines and again.gains == report.gains


def test_a_teacher_without_errors_is_told(data, models):
    p = predict(models[0], data.test)
    perfect = dataclasses.replace(data, test=dataclasses.replace(data.test, labels=p.predicted))
    found = lineage(*models, perfect, trial=BARE, rounds=6, count=100)
    assert "agrees where the teacher is wrong" not in found.lines and "wrong nowhere" in found.remarks[0]


def test_files_come_back_and_the_page_stands_alone(report, tmp_path):
    nasty = dataclasses.replace(report, data="<script>alert(1)</script>")
    page = write_lineage(nasty, tmp_path).read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "") and 'src="data:image/png;base64,' in page
    stored = json.loads((tmp_path / "lineage.json").read_text())
    again = read_lineage(stored)
    assert again.rows() == report.rows() and again.verdict == report.verdict and again.gains == report.gains
    assert lineage_page(again) == page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lineage.html", "lineage.json"]


@pytest.mark.parametrize("spoil", [{}, {"lines": 3}, {"gains": {"accuracy": {"value": 1}}}, {"costs": {"teacher": {}}}])
def test_a_damaged_report_is_an_error(report, spoil):
    value = {} if not spoil else {**report.to_json(), **spoil}
    with pytest.raises(AdaptkitError, match="damaged"):
        read_lineage(value)


def test_texts_are_neither_corrupted_nor_attacked():
    from adaptkit.data.sources import load_data

    texts = load_data("support_topics", seed=0)
    texts = dataclasses.replace(texts, test=texts.test.take(range(30)))
    models = [build_model("bag_of_embeddings", texts, size=16, seed=s) for s in range(3)]
    found = lineage(*models, texts, rounds=6, count=100)
    assert list(found.lines) == [n for n in BARE_LINES if n != "looks where the teacher looks"]
    assert "neither corrupted" in found.remarks[-2] and "isn't compared" in found.remarks[-1]


def test_what_does_not_belong_together_is_refused(data, models):
    turned = build_model("small_cnn", Named(data.classes[::-1]), size=24)
    with pytest.raises(AdaptkitError, match="in another order"):
        lineage(models[0], models[1], turned, data)
    with pytest.raises(AdaptkitError, match="teacher model knows cat, dog"):
        lineage(build_model("small_cnn", Named(("cat", "dog")), size=24), models[1], models[2], data)
    with pytest.raises(AdaptkitError, match="come in pairs"):
        lineage(models[0], models[1:], models[2], data)
    with pytest.raises(AdaptkitError, match="come in pairs"):
        lineage(models[0], [], [], data)
    with pytest.raises(AdaptkitError, match="reads texts"):
        lineage(models[0], models[1], build_model("bag_of_embeddings", data), data)
    with pytest.raises(AdaptkitError, match="Did you mean 'test'"):
        lineage(*models, data, split="tests")
    with pytest.raises(AdaptkitError, match="count=9"):
        lineage(*models, data, count=9)


def test_where_models_look_is_a_correlation_and_flat_maps_dont_count(data, models):
    teacher, student = models[:2]
    heard = predict(teacher, data.test)
    looks, _ = looks_of([teacher, student], data.test, heard, FEW)
    assert looks is not None and len(looks.rows) == 9
    line = alike(student, data.test, looks)
    maps = maps_of(student, data.test, looks.rows, looks.target)
    flat = (looks.maps.flatten(1).amax(1) == looks.maps.flatten(1).amin(1)).numpy()
    pooled = [torch.nn.functional.adaptive_avg_pool2d(m[:, None], 16).flatten(1).numpy() for m in (looks.maps, maps)]
    rho = [max(0.0, spearmanr(a, b).statistic) if np.ptp(b) else 0.0 for a, b in zip(*pooled, strict=True)]
    assert (line.below == ~flat).all() and line.above[0] == pytest.approx(np.where(flat, 0, rho), abs=1e-6)
    assert looks_of([teacher], data.test, heard, dataclasses.replace(FEW, maps=False)) == (None, "")
