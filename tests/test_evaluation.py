"Evaluation of models, its stored form, and the report."

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.datasets import Data, Samples, Source
from adaptkit.data.images import Preprocess
from adaptkit.evaluation.evaluate import Evaluation, evaluate, predict, untrained_head
from adaptkit.evaluation.intervals import scores
from adaptkit.evaluation.metrics import Predictions
from adaptkit.evaluation.report import ledger_rows, write_report
from adaptkit.evaluation.summary import data_card, duration, seek, summary_lines
from adaptkit.heads.heads import Model, build_model

EVIL = "<img src=x onerror=alert(1)>\"'&{{ 7*7 }}"
CLASSES = ("plain", EVIL, "名前 $x$")


def samples(n: int, seed: int) -> Samples:
    rng = np.random.default_rng(seed)
    return Samples(rng.integers(0, 255, (n, 20, 26), dtype=np.uint8), np.arange(n) % 3, [f"{EVIL}{i}.png" for i in range(n)])


@pytest.fixture(scope="module")
def data() -> Data:
    source = Source(EVIL, f"licence {EVIL}", f"citation {EVIL}", "javascript:alert(1)")
    parts = (samples(31, 0), samples(9, 1), samples(23, 2))
    return Data(EVIL, CLASSES, *parts, source, 3, ((f"{EVIL}.png", "empty"),))


@pytest.fixture(scope="module")
def model(data: Data) -> Model:
    return build_model("small_cnn", data, head="conv", size=20, seed=1)


@pytest.fixture(scope="module")
def evaluation(model: Model, data: Data) -> Evaluation:
    return evaluate(model, data, count=200)


def test_predictions_are_those_of_the_plain_model(model: Model, data: Data) -> None:
    model.eval()
    x = data.test.load(range(23), spec(model)).float() / 255
    with torch.no_grad():
        expected = model(x).numpy()
    assert np.allclose(predict(model, data.test, batch_size=5).logits, expected, atol=1e-4)


def spec(model: Model) -> Preprocess:
    return Preprocess(**model.preprocess)


def test_the_model_is_left_as_it_was(model: Model, data: Data) -> None:
    model.train()
    model.backbone.stages[0].eval()
    before, modes = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    grads, rng = [p.requires_grad for p in model.parameters()], torch.random.get_rng_state()
    evaluate(model, data, "valid", count=100)
    assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == grads
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(torch.random.get_rng_state(), rng)
    model.eval()


def test_the_mode_is_restored_after_a_failure(model: Model, data: Data) -> None:
    model.train()
    with pytest.raises(AdaptkitError, match="batch_size"):
        predict(model, data.test, batch_size=0)
    assert all(m.training for m in model.modules())
    model.eval()


def test_controls(evaluation: Evaluation, model: Model, data: Data) -> None:
    assert evaluation.controls["majority class"]["accuracy"].value == pytest.approx(8 / 23)
    assert evaluation.controls["majority class"]["auroc"].value == 0.5
    assert evaluation.controls["untrained head"] == evaluate(model, data, count=200).controls["untrained head"]
    z = predict(Model(model.backbone, untrained_head(model), classes=data.classes), data.test)
    assert scores(z, count=200)["accuracy"] == evaluation.controls["untrained head"]["accuracy"]
    assert list(evaluation.table().columns) == ["model", "95 % interval", "n", "majority class", "untrained head"]
    assert set(evaluation.table()["n"]) == {23}


def test_a_model_made_by_hand_gets_a_linear_control(data: Data) -> None:
    made = build_model("small_cnn", data, size=20)
    bare = Model(made.backbone, made.head, classes=data.classes)
    assert "untrained head" in evaluate(bare, data, count=100).controls


def test_a_diverged_model_is_named(data: Data) -> None:
    made = build_model("small_cnn", data, size=20)
    with torch.no_grad():
        next(made.head.parameters()).fill_(float("nan"))
    with pytest.raises(AdaptkitError, match="23 of 23 images are not finite"):
        evaluate(made, data)


def test_wrong_names(model: Model, data: Data) -> None:
    with pytest.raises(AdaptkitError, match="Did you mean 'test'"):
        evaluate(model, data, "tset")
    other = Data("x", ("a", "b", "c"), data.train, data.valid, data.test, data.source, 0)
    with pytest.raises(AdaptkitError, match="The model knows the classes"):
        evaluate(model, other)
    nothing = Data("x", CLASSES, data.train, data.valid, data.test.take([]), data.source, 0)
    with pytest.raises(AdaptkitError, match="the split is empty"):
        evaluate(model, nothing)


def test_stored_and_read_back(evaluation: Evaluation) -> None:
    value = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    back = Evaluation.from_json(value)
    assert back.to_json() == evaluation.to_json() and back.scores == evaluation.scores and back.controls == evaluation.controls
    assert (back.predictions.logits == evaluation.predictions.logits).all() and back.samples is None
    assert isinstance(back.show(), Figure) and back.table().equals(evaluation.table())


@pytest.mark.parametrize("damage", [
    lambda v: v.pop("scores"), lambda v: v.update(logits="!!"), lambda v: v.update(logits=v["logits"][:-8]),
    lambda v: v.update(labels=[99] * 23), lambda v: v.update(classes=[]), lambda v: v.update(controls=[1]), lambda v: v["scores"]["f1"].pop("n"),
])
def test_damaged_evaluations_are_refused(evaluation: Evaluation, damage) -> None:
    value = json.loads(json.dumps(evaluation.to_json()))
    damage(value)
    with pytest.raises(AdaptkitError):
        Evaluation.from_json(value)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object"), tag
        assert not [k for k, _ in attrs if k.startswith("on") or k == "href"], attrs
        self.sources += [v or "" for k, v in attrs if k in ("src", "srcset")]
        if tag not in ("meta", "img", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


RECORD = {
    "status": EVIL, "seconds": 254.3, "method": {"name": EVIL}, "plan": {"seed": 7, EVIL: [EVIL, {"a": EVIL}]}, "device": EVIL,
    "data": {"secret": "not shown twice"}, "versions": {"adaptkit": "0.1.0"}, "git": None,
}
HISTORY = [{"epoch": e, "loss": 1 / (e + 1), "valid_loss": 1 / (e + 1), "valid_accuracy": 0.5, "seconds": 1.0} for e in range(3)]
LEDGER = [{"epoch": e, "stage": EVIL, "parameters": 12, "trainable": e > 0, "moved": 0.25, "rate": 0.1} for e in range(3)]


@pytest.fixture(scope="module")
def report(evaluation: Evaluation, data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fig = Figure(figsize=(2, 1))
    fig.add_subplot().plot([1, 2])
    folder = tmp_path_factory.mktemp("a folder with spaces é")
    return write_report(folder, record=RECORD, history=HISTORY, evaluation=evaluation, ledger=LEDGER, figures={EVIL: fig}, data=data)


def test_a_report_is_one_file_and_loads_nothing(report: Path) -> None:
    html = report.read_text()
    page = Page(html)
    assert page.stack == [] and [p.name for p in report.parent.iterdir()] == ["report.html"]
    assert len(page.sources) == 2 + 1 + 8 and all(s.startswith("data:image/png;base64,") for s in page.sources)
    bare = re.sub(r"data:image/png;base64,[\w+/=]+", "", html)
    assert not re.search(r"url\(|@import|https?:", bare) and "default-src 'none'" in bare


def test_a_report_escapes_everything(report: Path) -> None:
    html = report.read_text()
    assert "<img src=x" not in html and EVIL in Page(html).text and "49" not in Page(html).text.split("Limits")[1]
    assert not re.search(r"onerror=alert\(1\)>(?!\")", html.replace("&gt;", ""))


def test_a_report_holds_the_numbers(report: Path, evaluation: Evaluation) -> None:
    text = Page(report.read_text()).text
    a = evaluation.scores["accuracy"]
    for words in (f"{100 * a.value:.1f} %", f"{100 * a.low:.1f} to {100 * a.high:.1f} %", "23 test images", "4 min 14 s", "25.00 %", "frozen", "1 set aside as unusable"):
        assert words in text, words
    assert "majority class" in text and "untrained head" in text and "not shown twice" not in text and "Limits" in text


def test_a_report_of_next_to_nothing(evaluation: Evaluation, tmp_path: Path) -> None:
    text = Page(write_report(tmp_path / "new" / "folder", record={}, evaluation=evaluation.to_json()).read_text()).text
    assert "not recorded" in text and "None" not in text and "Highest losses" not in text and "Freeze ledger" not in text


def test_a_report_of_many_classes(tmp_path: Path) -> None:
    y = np.arange(400) % 40
    p = Predictions(np.random.default_rng(0).normal(size=(400, 40)), y, tuple(f"class {i}" for i in range(40)))
    page = Page(write_report(tmp_path, record={}, evaluation=Evaluation(scores(p, count=100), {}, p)).read_text())
    assert len(page.sources) == 1 and "compared with no control" in page.text


def test_a_report_that_cannot_be_written_leaves_the_old_one(report: Path, evaluation: Evaluation) -> None:
    before = report.read_bytes()
    with pytest.raises(AdaptkitError):
        write_report(report, record=RECORD, evaluation=evaluation)
    with pytest.raises(AdaptkitError):
        write_report(report.parent, record=RECORD, evaluation={"scores": {}})
    assert report.read_bytes() == before and [p.name for p in report.parent.iterdir()] == ["report.html"]


def test_summary_pieces(evaluation: Evaluation, data: Data) -> None:
    card = data_card(data)
    assert json.loads(json.dumps(card)) == card and card["rows"] == {"train": 31, "valid": 9, "test": 23}
    assert len(summary_lines(RECORD, HISTORY, evaluation, card=card)) == len(summary_lines({}, [], evaluation, card={})) == 5
    assert seek(RECORD, "seed") == 7 and seek({"a": {"seed": 0}}, "seed") == 0 and seek({}, "seed") is None
    assert [duration(s) for s in (0, 59.96, 60, 3600)] == ["0.0 s", "1 min 0 s", "1 min 0 s", "1 h 0 min"]
    assert ledger_rows([]) == [] and ledger_rows(LEDGER)[0]["epoch 1"] == "frozen"
