"A finished run, explained: files and texts, calibrated or not, at the prompt, and what is refused."

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from adaptkit.cli import app
from adaptkit.core.registry import AdaptkitError
from adaptkit.data.sources import load_data
from adaptkit.evaluation.calibration import fit_temperature
from adaptkit.evaluation.evaluate import predict
from adaptkit.evaluation.metrics import Predictions
from adaptkit.explanation.finished import (
    explain_run,
    report_figures,
    surest,
    temperature_of,
    verdict_on,
    write_explained,
)
from adaptkit.heads.heads import build_model
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.plan import Plan
from adaptkit.training.runs import Run

PLAN = Plan(epochs=1, batch_size=16, views=1, accelerator="cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("explained")


@pytest.fixture(scope="module")
def images(place: Path) -> Path:
    "A folder of images: dark ones and bright ones, and some that are neither."
    dice = np.random.default_rng(0)
    for k, name in enumerate(("bright", "dark")):
        (place / "images" / name).mkdir(parents=True)
        for i in range(40):
            grey = dice.normal(150 - 45 * k, 40, (20, 14, 1)).clip(0, 255).repeat(3, 2).astype(np.uint8)
            Image.fromarray(grey).save(place / "images" / name / f"{i:02}.png")
    return place / "images"


@pytest.fixture(scope="module")
def run(place: Path, images: Path) -> Run:
    data = load_data(str(images))
    return fit(build_model("small_cnn", data, size=18), data, FineTune(depth=3), plan=PLAN, out=place / "run", observers=[], cache=place / "cache")


@pytest.fixture(scope="module")
def reader(place: Path) -> Run:
    topics = load_data("support_topics")
    return fit(build_model("bag_of_embeddings", topics, size=16), topics, FineTune(depth=1), plan=PLAN, out=place / "reader", observers=[], cache=place / "cache")


def test_a_file_is_answered_as_the_model_answers_it_in_its_data(run: Run, images: Path) -> None:
    data = load_data(str(images), split=run.folder / "split.json")
    found = explain_run(run.folder, data.test.items)
    said = predict(run.model, data.test)
    assert [data.classes.index(n) for n in found.found.names] == said.predicted.tolist()
    assert found.found.probability.numpy() == pytest.approx(said.probabilities.max(1), abs=1e-5)
    assert "Neither calibrated" in found.remarks[0] and "--data" in found.remarks[0] and "softmax" in found.lines()[0]


def test_with_its_data_probabilities_are_calibrated_and_few_are_told(run: Run, images: Path) -> None:
    data = load_data(str(images), split=run.folder / "split.json")
    spoilt = data.valid.labels.copy()
    said = predict(run.model, data.valid)
    spoilt[:] = said.predicted
    spoilt[:2] = 1 - spoilt[:2]  # two answers are wrong
    some = dataclasses.replace(data, valid=dataclasses.replace(data.valid, labels=spoilt))
    temperature, remark = temperature_of(run.model, some)
    assert temperature == pytest.approx(fit_temperature(Predictions(said.logits, spoilt, said.classes))) and "2 are wrong: that wavers" in remark
    spoilt[:2] = said.predicted[:2]
    assert temperature_of(run.model, some)[0] is None and "0 are wrong" in temperature_of(run.model, some)[1]


def test_at_the_prompt(run: Run, images: Path, tmp_path: Path) -> None:
    files = [str(images / "dark" / "00.png"), str(images / "bright" / "01.png")]
    done = CliRunner().invoke(app, ["explain", str(run.folder), *files, "--target", "dark", "--method", "gradient", "--out", str(tmp_path / "why")])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[0].startswith("00.png  dark ") and "explanation.html" in done.output
    assert sorted(p.name for p in (tmp_path / "why").iterdir()) == ["explanation.html", "explanation.json", "explanation.png"]
    stored = json.loads((tmp_path / "why" / "explanation.json").read_text())
    assert [a["class"] for a in stored["answers"]] == ["dark", "dark"] and stored["method"] == "gradient"


def test_the_page_stands_alone_and_escapes_names(run: Run, images: Path, tmp_path: Path) -> None:
    odd = tmp_path / "<b>odd<b>.png"
    odd.write_bytes((images / "dark" / "00.png").read_bytes())
    page = write_explained(explain_run(run.folder, [odd]), tmp_path / "out").read_text()
    assert "<b>odd" not in page and "&lt;b&gt;odd" in page and "http" not in page.replace("http-equiv", "")


def test_texts_are_inputs_of_a_model_that_reads(reader: Run, tmp_path: Path) -> None:
    found = explain_run(reader.folder, ["What is a <i>robot</i>?", "Who wrote this song? " * 9], seed=3)
    assert found.names[0] == "What is a <i>robot</i>?" and len(found.names[1]) <= 60
    page = write_explained(found, tmp_path).read_text()
    assert "<i>robot" not in page and "calibrated" in page
    with pytest.raises(AdaptkitError, match="not a file that holds it"):
        explain_run(reader.folder, [__file__])
    with pytest.raises(AdaptkitError, match="one text or more"):
        explain_run(reader.folder, [])


def test_the_surest_of_each_class_in_turn() -> None:
    z = np.zeros((7, 3))
    for i, (k, sure) in enumerate(((0, 1.0), (0, 3.0), (1, 2.0), (0, 2.0), (1, 5.0), (2, 0.5), (0, 9.0))):
        z[i, k] = sure
    said = Predictions(z, np.zeros(7, np.int64), ("a", "b", "c"))
    assert surest(said).tolist() == [6, 4, 5, 1, 2, 3]
    assert surest(said, of=1).tolist() == [4, 2] and surest(said, most=2).tolist() == [6, 4]


def test_figures_for_a_report(run: Run, reader: Run, images: Path) -> None:
    data, topics = load_data(str(images), split=run.folder / "split.json"), load_data("support_topics", split=reader.folder / "split.json")
    said = predict(run.model, data.test)
    ((caption, figure),) = report_figures(run.model, data, said, most=2).items()
    assert "test images taken for each class" in caption and figure._repr_png_()[:4] == b"\x89PNG"
    never = Predictions(np.tile([1.0, 0.0], (len(said), 1)), said.labels, said.classes)
    assert report_figures(run.model, data, never, of=1) == {}
    few = topics.test.take(range(20))
    ((caption, _),) = report_figures(reader.model, topics, predict(reader.model, few), most=2).items()
    assert "test texts" in caption


@pytest.mark.parametrize(
    ("inputs", "how", "told"),
    [
        ([], {}, "one image or more"),
        (["nowhere.png"], {}, "Cannot read the image nowhere.png"),
        (["{dark}"], {"target": "drak"}, "Did you mean 'dark'"),
        (["{dark}"], {"method": "gradcm"}, "Did you mean 'gradcam'"),
        (["{folder}"], {}, "Cannot read the image"),
    ],
)
def test_what_is_refused_is_told_in_a_sentence_and_nothing_is_left(run: Run, images: Path, inputs: list[str], how: dict[str, str], told: str) -> None:
    names = {"{dark}": images / "dark" / "00.png", "{folder}": images}
    before = sorted(run.folder.iterdir())
    with pytest.raises(AdaptkitError, match=told):
        explain_run(run.folder, [names.get(i, i) for i in inputs], **how)
    assert sorted(run.folder.iterdir()) == before


def test_a_method_is_tried_on_validation_images_before_it_is_believed(run: Run, images: Path) -> None:
    file = images / "dark" / "00.png"
    blind = explain_run(run.folder, [file])
    seen = explain_run(run.folder, [file], data=str(images), check_method=True)
    assert any("Not checked" in w for w in blind.found.warnings) and not any("Not checked" in w for w in seen.found.warnings)
    data = load_data(str(images), split=run.folder / "split.json")
    with pytest.raises(AdaptkitError, match="give at least 7"):
        verdict_on(run.model, data, n=3)


def test_a_report_is_written_without_a_map_if_there_can_be_none(run: Run, images: Path) -> None:
    data = load_data(str(images), split=run.folder / "split.json")
    said = predict(run.model, data.test)
    with pytest.warns(UserWarning, match="no map: This model has no attention"):
        assert report_figures(run.model, data, said, method="attentionrollout", most=2) == {}
    with pytest.raises(AdaptkitError, match="test"):
        report_figures(run.model, data, said, split="tset")


def test_data_of_other_classes_are_told(run: Run, images: Path) -> None:
    data = load_data(str(images), split=run.folder / "split.json")
    with pytest.raises(AdaptkitError, match="classes differ"):
        temperature_of(run.model, dataclasses.replace(data, classes=data.classes[::-1]))
