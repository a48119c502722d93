"""Distilling a finished run: budgets, what they buy, whom to teach, and that the one call does what its parts do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adaptkit.cli import app
from adaptkit.core.registry import AdaptkitError
from adaptkit.data.images import Augment
from adaptkit.data.sources import load_data
from adaptkit.distillation import distil as page
from adaptkit.distillation.distil import (
    Budget,
    Distilled,
    Price,
    distil,
    epochs_of,
    learning,
    plan_of,
    price,
    student_of,
)
from adaptkit.distillation.distillation import Distillation
from adaptkit.distillation.lineage import read_lineage
from adaptkit.distillation.measures import Trial
from adaptkit.evaluation.evaluate import predict
from adaptkit.heads.heads import build_model
from adaptkit.robustness.finished import data_of
from adaptkit.training.beside import model_fingerprint
from adaptkit.training.control import Event, Stop, When
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.plan import Plan
from adaptkit.training.runs import RUN_FILES, Run, open_run

BARE = Trial(corruptions=(), attack=None)
SMALL: dict[str, Any] = {"student": "mobile_tiny", "size": 20, "budget": "2 epochs", "seed": 4, "trial": BARE, "observers": []}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    "A small network for digits, divided as nobody divides them by default."
    data = load_data("digits", seed=3, shares=(0.2, 0.1, 0.7))
    plan = Plan(epochs=2, batch_size=32, views=3, augment=Augment(hflip=False, shift=0.1), accelerator="cpu")
    place = tmp_path_factory.mktemp("distil")
    method = FineTune(depth=3, rate=1e-2, head_rate=1e-2)
    return fit(build_model("small_cnn", data, size=24, seed=0), data, method, plan=plan, out=place / "run", cache=place / "cache", observers=[])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def found(run: Run, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Distilled:
    return distil(run.folder, **SMALL, out=tmp_path_factory.mktemp("found") / "small", cache=cache)


# --- budgets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90 s", 90), ("5 min", 300), ("5min", 300), (" 2 minutes ", 120), ("1 h 30 min", 5400), ("0.5 h", 1800), ("1.5 min 3 sec", 93), ("3 hours", 10800)],
)
def test_a_time_is_read_as_people_write_it(text: str, seconds: float) -> None:
    assert Budget.read(text) == Budget(seconds=seconds)


def test_epochs_are_a_budget_too() -> None:
    assert Budget.read("12 epochs") == Budget(epochs=12) and Budget.read("1 epoch") == Budget(epochs=1)


@pytest.mark.parametrize("text", ["", "5", "five min", "5 parsecs", "-5 min", "1e3 s", "5 min tea", "1.5 epochs", "2 epochs 3 s", "5 mi", "nan s"])
def test_what_is_no_budget_is_told(text: str) -> None:
    with pytest.raises(AdaptkitError, match="can't be read: write 90 s, 5 min"):
        Budget.read(text)


@pytest.mark.parametrize("text", ["0 s", "0 epochs", "0 h 0 min"])
def test_nothing_is_no_budget(text: str) -> None:
    with pytest.raises(AdaptkitError, match="is nothing"):
        Budget.read(text)


@pytest.mark.parametrize("views", [1, 3, 8])
@pytest.mark.parametrize("seconds", [0.5, 7.0, 7.1, 29.0, 200.0])
def test_epochs_are_those_that_one_would_count(views: int, seconds: float) -> None:
    paid, left, epochs = Price(7.0, 2.0), seconds, 0
    while left >= (cost := paid.first if epochs < views else paid.later):
        left, epochs = left - cost, epochs + 1
    assert paid.epochs(seconds, views=views) == epochs


def test_a_price_is_for_all_images_and_dearer_while_the_teacher_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    "A clock that only a teacher's answers and the training's batches move."
    now, told = [0.0], []

    def pretend(student: object, data: Any, method: object, *, plan: Plan, observers: list[Any], **_: object) -> None:
        told.append((len(data.train), len(data.valid), plan.views, plan.epochs))
        for epoch in range(-1, plan.epochs):
            now[0] += 0 if epoch < 0 else len(data.train) * (3 if epoch == 0 else 1)
            observers[0](Event(When.START if epoch < 0 else When.EPOCH, max(epoch, 0), 0, 0))

    monkeypatch.setattr(page, "fit", pretend)
    monkeypatch.setattr(page.time, "perf_counter", lambda: now[0])
    data = data_of(run)
    paid = price(build_model("mobile_tiny", data, size=20), data, FineTune(), plan=Plan(batch_size=20), batches=2)
    n = len(data.train)
    assert told == [(40, round(len(data.valid) * 40 / n), 1, 3)]
    assert paid.first == pytest.approx(3 * n) and paid.later == pytest.approx(n)


@pytest.mark.parametrize(("change", "views"), [(Augment(hflip=True), 2), (Augment(hflip=True, shift=0.1), 5), (None, 2)])
def test_a_budget_pays_for_each_view_once(run: Run, monkeypatch: pytest.MonkeyPatch, change: Augment | None, views: int) -> None:
    monkeypatch.setattr(page, "price", lambda *_, **__: Price(10.0, 1.0))
    data, plan = data_of(run), Plan(views=5, augment=change)
    student = build_model("mobile_tiny", data, size=20)
    assert epochs_of(Budget(60.0), student, data, FineTune(), plan=plan) == views + (60 - 10 * views)
    assert epochs_of(Budget(epochs=7), student, data, FineTune(), plan=plan) == 7
    with pytest.raises(AdaptkitError, match="too short: one epoch over .* images"):
        epochs_of(Budget(9.9), student, data, FineTune(), plan=plan)


class Enough:
    "An observer that ends a run after its first step."

    on = (When.STEP,)

    def __call__(self, event: Event) -> Stop:
        return Stop("seen enough")


def test_a_time_becomes_a_plan_before_the_training(run: Run, tmp_path: Path) -> None:
    told: list[str] = []
    how = {**SMALL, "budget": "1 h", "observers": [Enough()]}
    found = distil(run, **how, alone=False, out=tmp_path / "timed", cache=tmp_path / "cache", say=told.append)
    planned = found.run.record["plan"]["epochs"]
    assert planned > 20 and len(told) == 1 and told[0].endswith(f"epochs: {planned}")


# --- whom to teach ---------------------------------------------------------------------------------


def test_students_by_name_by_cut_and_as_they_are(run: Run) -> None:
    teacher = run.model
    assert student_of("mobile_tiny", teacher).size == teacher.size == 24 and student_of("mobile_tiny", teacher, size=20).size == 20
    cut = student_of("cut 2", teacher)
    assert cut.backbone.stage_names == teacher.backbone.stage_names[:2] and cut.size == teacher.size
    assert len(student_of("cut", teacher).backbone.stages) == len(teacher.backbone.stages) // 2
    assert student_of(cut, teacher) is cut
    assert model_fingerprint(student_of("mobile_tiny", teacher, seed=1)) != model_fingerprint(student_of("mobile_tiny", teacher, seed=2))


def test_all_of_a_student_learns_unless_less_is_wanted(run: Run) -> None:
    student = student_of("mobile_tiny", run.model, size=20)
    assert {g.name for g in learning(student).groups(student)} == {*student.backbone.stage_names, "head"}
    assert {g.name for g in learning(student, 1).groups(student)} == {student.backbone.stage_names[-1], "head"}


def test_the_plan_of_a_run_is_found_again(run: Run) -> None:
    assert plan_of(run, "image") == Plan(epochs=2, batch_size=32, views=3, augment=Augment(hflip=False, shift=0.1), accelerator="cpu")


# --- the call --------------------------------------------------------------------------------------


def test_the_call_does_what_its_parts_do(run: Run, found: Distilled, cache: Path, tmp_path: Path) -> None:
    data = load_data("digits", seed=3, shares=(0.2, 0.1, 0.7))
    plan = replace(plan_of(run, "image"), epochs=2, seed=4)
    begin = build_model("mobile_tiny", data, size=20, seed=4)
    usual = FineTune(depth=4, rate=1e-2, head_rate=1e-2)
    how: dict[str, Any] = {"plan": plan, "observers": [], "cache": cache}
    taught = fit(begin, data, Distillation(run, base=usual), out=tmp_path / "taught", **how)
    by_itself = fit(begin, data, usual, out=tmp_path / "alone", **how)
    assert model_fingerprint(found.model) == model_fingerprint(taught.model)
    assert found.alone is not None and model_fingerprint(found.alone.model) == model_fingerprint(by_itself.model)
    assert model_fingerprint(found.model) != model_fingerprint(found.alone.model)


def test_the_report_is_about_these_models_and_these_images(run: Run, found: Distilled) -> None:
    stored = read_lineage(json.loads((found.run.folder / "lineage.json").read_text()))
    samples = data_of(run).test
    assert found.report is not None and stored.verdict == found.verdict == found.report.verdict and stored.n == len(samples)
    for role, one in (("teacher", run), ("alone", found.alone), ("distilled", found.run)):
        said = predict(one.model, samples)
        assert stored.lines["accuracy"][role].value == pytest.approx((said.predicted == said.labels).mean())
    assert (found.run.folder / "lineage.html").is_file() and {"lineage.html", "lineage.json"} <= {*RUN_FILES}


def test_it_tells_who_taught_whom(found: Distilled) -> None:
    assert repr(found).startswith("Distilled(small: small_cnn has taught mobile_tiny, epochs: 2. The student keeps ")
    assert "<table" in found._repr_html_() and found.alone is not None and found.alone.folder == found.run.folder / "alone"


def test_without_the_student_alone_nothing_is_claimed(run: Run, found: Distilled, cache: Path, tmp_path: Path) -> None:
    half = distil(run, **SMALL, alone=False, out=tmp_path / "half", cache=cache)
    assert half.report is None and half.alone is None and not (tmp_path / "half/alone").exists() and not (tmp_path / "half/lineage.json").exists()
    assert "isn't known" in repr(half) and "times fewer parameters" in half._repr_html_()
    assert model_fingerprint(half.model) == model_fingerprint(found.model)


def test_a_student_teaches_the_next(found: Distilled, cache: Path, tmp_path: Path) -> None:
    next_one = distil(found.run, **SMALL, alone=False, out=tmp_path / "next", cache=cache)
    assert next_one.run.record["method"]["teacher"]["weights"] == model_fingerprint(found.model)


def test_other_data_and_another_split_can_be_given(run: Run, cache: Path, tmp_path: Path) -> None:
    data = data_of(run)
    few = replace(data, train=data.train.take(range(64)))
    found = distil(run, **SMALL, data=few, split="valid", depth=1, out=tmp_path / "few", cache=cache)
    assert found.report is not None and found.report.n == len(data.valid) and found.run.record["data"]["rows"]["train"] == 64
    moved = {row["stage"] for row in found.run.ledger if row["moved"]}
    assert moved == {"high", "head"}


class Fall:
    "An observer that lets a run fall down after its first epoch."

    on = (When.EPOCH,)

    def __call__(self, event: Event) -> None:
        raise KeyboardInterrupt


def test_a_killed_distillation_goes_on_with_as_many_epochs(run: Run, found: Distilled, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        distil(run, **{**SMALL, "observers": [Fall()]}, out=out, cache=cache)
    again = distil(run, **{**SMALL, "budget": "1 h"}, out=out, cache=cache, exists="resume")
    assert len(again.run.history) == 2 and model_fingerprint(again.model) == model_fingerprint(found.model)
    assert again.report is not None and again.verdict == found.verdict


def test_texts_are_distilled_as_images_are(tmp_path: Path) -> None:
    data = load_data("support_topics", seed=0)
    plan = Plan(epochs=1, batch_size=32, accelerator="cpu")
    how: dict[str, Any] = {"observers": [], "cache": tmp_path / "cache"}
    run = fit(build_model("bag_of_embeddings", data, size=24), data, FineTune(depth=1), plan=plan, out=tmp_path / "run", **how)
    found = distil(run, "bag_of_embeddings", size=12, budget="1 epoch", out=tmp_path / "small", **how)
    assert found.model.size == 12 and found.report is not None and "accuracy, attacked" not in found.report.lines


# --- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"run": "no/such/run"}, "not a run folder"),
        ({"student": "mobile_smal"}, "Did you mean 'mobile_small'"),
        ({"student": "cut 9", "size": None}, "give 1 to 3"),
        ({"student": "cut"}, "leave size out"),
        ({"student": "bag_of_embeddings"}, "reads texts"),
        ({"budget": "soon"}, "can't be read"),
        ({"budget": "0.001 s"}, "too short"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"weight": 2.0}, "weight=2.0"),
        ({"size": 5}, "at least 17"),
        ({"plan": Plan(batch_size=5000)}, "takes 5000 images"),
        ({"split": "exam"}, "Unknown split"),
        ({"depth": 7}, "has 4 stages"),
        ({"exists": "perhaps"}, "'refuse', 'replace' or 'resume'"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(run: Run, how: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match=sentence):
        distil(**{"run": run, **SMALL, "out": tmp_path / "small", "cache": tmp_path / "cache", **how})
    assert not (tmp_path / "small").exists()


def test_neither_a_teacher_nor_a_student_is_overwritten(run: Run, found: Distilled, tmp_path: Path) -> None:
    before = model_fingerprint(run.model)
    with pytest.raises(AdaptkitError, match="where the teacher lives"):
        distil(run, **SMALL, out=run.folder, exists="replace")
    with pytest.raises(AdaptkitError, match="holds a run already"):
        distil(run, **{**SMALL, "budget": "1 h"}, out=found.run.folder)
    assert model_fingerprint(run.model) == before


def test_a_run_that_has_not_ended_cannot_teach(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "young")
    (tmp_path / "young/model.json").unlink()
    with pytest.raises(AdaptkitError, match="give a run that has ended"):
        distil(tmp_path / "young", **SMALL)


def test_other_data_are_noticed(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "moved")
    record = open_run(run.folder).record
    for change, sentence in (({"fingerprint": "0"}, "have changed since"), ({"name": "mine"}, "--data")):
        (tmp_path / "moved/run.json").write_text(json.dumps(record | {"data": record["data"] | change}))
        with pytest.raises(AdaptkitError, match=sentence):
            distil(tmp_path / "moved", **SMALL)


# --- the command -----------------------------------------------------------------------------------


def test_the_command(run: Run, tmp_path: Path) -> None:
    words = ["distil", str(run.folder), "--student", "mobile_tiny", "--size", "20", "--budget", "1 epoch", "--out", str(tmp_path / "small")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    first, *_, report, model = done.output.strip().splitlines()
    assert first.startswith("digits: Model(mobile_tiny") and first.endswith("epochs: 1, and as many alone")
    assert "The student keeps" in done.output and report.endswith("lineage.html") and model.endswith("small/model.safetensors")
    quick = CliRunner().invoke(app, [*words[:-1], str(tmp_path / "half"), "--no-alone"])
    assert quick.exit_code == 0 and "isn't known" in quick.output and "lineage.html" not in quick.output
    wrong = CliRunner().invoke(app, ["distil", str(run.folder), "--budget", "soon"])
    assert isinstance(wrong.exception, AdaptkitError) and "can't be read" in str(wrong.exception)
