"""Planted faults: each breaks what it says and nothing else, leaves no trace, and is caught by the page that is there to be broken."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.datasets import Data
from adaptkit.data.sources import load_data
from adaptkit.evaluation.evaluate import evaluate, predict
from adaptkit.heads.heads import Model, build_model
from adaptkit.models.stages import ImageBackbone, WeightSource
from adaptkit.notebooks.baselines import Baseline, learn, rebuilt
from adaptkit.notebooks.faults import FAULTS, check_fault, plant, planting, swapped
from adaptkit.notebooks.gates import Verdict
from adaptkit.notebooks.matrix import CLEAN, Matrix, fault_matrix
from adaptkit.notebooks.records import Record
from adaptkit.notebooks.runner import run_page
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.runs import Run
from adaptkit.training.session import Plan, Session

TARGET = "8_notebooks/31_target.ipynb"


@pytest.fixture(scope="module")
def digits() -> Data:
    data = load_data("digits")
    return replace(data, train=data.train.take(range(0, 320)), valid=data.valid.take(range(64)), test=data.test.take(range(65)))


def small_model(data: Data) -> Model:
    "Two stages with BatchNorm, and a normalisation that matters."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stages = {
            "low": nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()),
            "high": nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        }
        norm: dict[str, Any] = {"mean": (0.4, 0.3, 0.2), "std": (0.5, 0.4, 0.3)}
        backbone = ImageBackbone(stages, name="small", size=16, source=WeightSource("small", "", ""), **norm)
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    model = build_model("small_cnn", data, size=18)
    return Model(backbone, head, classes=data.classes, config=model.config)


def trained(data: Data, folder: Path, *, depth: int = 1, rate: float = 1e-2) -> Run:
    "A short run, read from its folder: the records of a run are enough here."
    method = FineTune(depth=depth, rate=rate)
    return fit(small_model(data), data, method, plan=Plan(epochs=1, views=1), observers=[], out=folder / "run", cache=folder / "cache")


def moved(run: Run) -> dict[str, bool]:
    "By part: whether its weights moved."
    return {row["stage"]: row["moved"] > 0 for row in run.ledger}


@pytest.mark.parametrize("name", list(FAULTS))
def test_every_fault_keeps_the_contract(name: str) -> None:
    check_fault(FAULTS[name])


def test_the_contract_bites() -> None:
    @contextmanager
    def silent() -> Iterator[None]:
        with swapped(Data, "describe", lambda real: lambda self: None):
            yield

    @contextmanager
    def idle() -> Iterator[None]:
        "Does nothing."
        yield

    @contextmanager
    def sloppy() -> Iterator[None]:
        "Cleans up only when all goes well."
        kept = Data.describe
        Data.describe = lambda self: None  # type: ignore[method-assign, assignment]
        yield
        Data.describe = kept  # type: ignore[method-assign]

    whole = Data.describe
    for fault, told in ((silent, "docstring of one sentence"), (idle, "changes nothing"), (sloppy, "leaves adaptkit.data.datasets.Data.describe")):
        with pytest.raises(AdaptkitError, match=told):
            check_fault(fault)
        Data.describe = whole  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("fault", "head", "high"),
    [("", True, True), ("head_frozen", False, True), ("backbone_frozen", True, False), ("rate_zero", False, False), ("gradients_kept", True, True)],
)
def test_who_learns(fault: str, head: bool, high: bool, digits: Data, tmp_path: Path) -> None:
    with plant(fault) if fault else nullcontext():
        run = trained(digits, tmp_path)
    assert moved(run) == {"low": False, "high": high, "head": head}


def test_gradients_pile_up(digits: Data, tmp_path: Path) -> None:
    def losses(folder: Path) -> list[float]:
        return [e["loss"] for e in trained(digits, folder).events if e["when"] == "step"]

    clean = losses(tmp_path / "a")
    with plant("gradients_kept"):
        kept = losses(tmp_path / "b")
    assert clean[:2] == kept[:2] and clean[2:] != kept[2:], "the second step is the first to be taken with two gradients"
    assert losses(tmp_path / "c") == clean


def test_a_tenth_of_the_labels_is_shuffled(digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    real = Session.__init__

    def spy(self: Any, model: Any, data: Data, *rest: Any) -> None:
        seen.append(data.train.labels)
        real(self, model, data, *rest)

    monkeypatch.setattr(Session, "__init__", spy)
    before = digits.train.labels.copy()
    with plant("labels_shuffled"):
        trained(digits, tmp_path)
    assert (digits.train.labels == before).all() and sorted(seen[0]) == sorted(before)
    assert 0.05 * len(before) < (seen[0] != before).sum() <= len(before) // 10


def test_normalisation_is_dropped(digits: Data) -> None:
    backbone = small_model(digits).backbone
    x = backbone.example(2)
    with plant("normalisation_dropped"):
        assert torch.equal(backbone.entered(x), x)
    assert torch.allclose(backbone.entered(x), (x - backbone.mean) / backbone.std) and not torch.equal(backbone.entered(x), x)


def overlap(data: Data) -> int:
    "How many test samples are also training samples."
    train = {data.train.image(i).tobytes() for i in range(len(data.train))}
    return sum(data.test.image(i).tobytes() in train for i in range(len(data.test)))


@pytest.mark.parametrize("options", [{}, {"seed": 3}])
def test_the_test_split_leaks(options: dict[str, int]) -> None:
    clean = load_data("digits", **options)
    with plant("test_leaked"):
        leaking = load_data("digits", **options)
        again = replace(leaking, name="again")
    assert overlap(clean) == 0 and overlap(leaking) == (len(clean.test) + 1) // 2 == overlap(again)
    assert len(leaking.test) == len(clean.test) and leaking.train.fingerprint == clean.train.fingerprint
    assert again.test.fingerprint == leaking.test.fingerprint and len(np.unique(leaking.test.labels)) == 10


def test_texts_leak_too() -> None:
    with plant("test_leaked"):
        data = load_data("support_topics")
    train = {data.train.text(i) for i in range(len(data.train))}
    assert sum(data.test.text(i) in train for i in range(len(data.test))) >= len(data.test) // 2


def test_batchnorm_looks_at_the_neighbours(digits: Data) -> None:
    model = small_model(digits)

    def first(rows: list[int], size: int = 64) -> np.ndarray:
        return predict(model, digits.test.take(rows), batch_size=size).logits[0]

    alone, among = first([0, 1, 2, 3]), first([0, 9, 10, 11])
    assert np.allclose(alone, among, atol=1e-5)
    state, mode = {k: v.clone() for k, v in model.state_dict().items()}, model.training
    with plant("batchnorm_training"):
        assert np.abs(first([0, 1, 2, 3]) - first([0, 9, 10, 11])).max() > 1e-3
        assert np.isfinite(first([0, 1, 2], size=2)).all(), "the last batch has one image"
    assert np.allclose(first([0, 1, 2, 3]), alone) and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.training == mode


def test_batchnorm_is_broken_at_test_only(digits: Data, tmp_path: Path) -> None:
    clean = trained(digits, tmp_path / "a")
    with plant("batchnorm_training"):
        other = trained(digits, tmp_path / "b")
    assert [e["loss"] for e in clean.events if "loss" in e] == [e["loss"] for e in other.events if "loss" in e]


def test_classes_are_reversed(digits: Data) -> None:
    model = small_model(digits)
    clean = predict(model, digits.test).logits
    with plant("classes_reversed"):
        assert np.allclose(predict(model, digits.test).logits, clean[:, ::-1], atol=1e-6)
        assert np.allclose(evaluate(model, digits, count=100).predictions.logits, clean[:, ::-1], atol=1e-6)


def test_a_broken_library_leaves_nothing_in_the_cache(digits: Data, tmp_path: Path) -> None:
    with plant("normalisation_dropped"):
        trained(digits, tmp_path / "a")
    assert not list((tmp_path / "a").rglob("*.npy"))
    trained(digits, tmp_path / "b")
    assert list((tmp_path / "b").rglob("*.npy")), "without a fault, the cache is where it was asked for"


def test_unknown_faults() -> None:
    for ask in (planting, lambda name: plant(name).__enter__()):
        with pytest.raises(AdaptkitError, match="Did you mean 'head_frozen'?"):
            ask("head_frosen")


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_planted_fault_lasts_as_long_as_the_process(order: str) -> None:
    imports = "from adaptkit.data.sources import load_data\nfrom adaptkit.data.datasets import Data\n"
    look = "import gc; gc.collect()\nd = load_data('digits')\nprint(len({i.tobytes() for i in d.test.items} & {i.tobytes() for i in d.train.items}))\n"
    parts = [imports, planting("test_leaked")][:: 1 if order == "before" else -1]
    done = subprocess.run([sys.executable, "-c", "\n".join([*parts, look])], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and int(done.stdout) > 200, done.stderr


def test_faults_of_others_reach_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_faults.py").write_text(
        "from contextlib import contextmanager\nfrom adaptkit.notebooks.faults import FAULTS, swapped\nimport math\n\n\n"
        "@FAULTS.register('pi_is_three')\n@contextmanager\ndef pi_is_three():\n    'Pi is three.'\n    with swapped(math, 'pi', lambda real: 3.0):\n        yield\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    import my_faults  # type: ignore[import-not-found]

    try:
        check_fault(my_faults.pi_is_three, within=("math",))
        page = write(tmp_path / "page.ipynb", "import math\nfrom adaptkit.notebooks.records import record\nrecord('pi', math.pi)")
        learnt = learn({s: {"pi": Record("pi", math.pi)} for s in range(3)}, page="page.ipynb")
        matrix = fault_matrix(page, learnt, ["pi_is_three"])
        assert matrix.complete and matrix.caught("pi_is_three") == ["pi"]
    finally:
        del FAULTS.items["pi_is_three"]


def write(path: Path, *sources: str) -> Path:
    "Save a page of code cells."
    spec = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources], metadata=spec), path)
    return path


def test_a_page_that_breaks_down_has_noticed(tmp_path: Path) -> None:
    page = write(
        tmp_path / "page.ipynb",
        "from adaptkit.data.sources import load_data\nfrom adaptkit.notebooks.records import record\nd = load_data('digits')",
        "assert not {i.tobytes() for i in d.test.items} & {i.tobytes() for i in d.train.items}, 'leak'\nrecord('rows', len(d.test))",
    )
    learnt = learn({s: {"rows": Record("rows", 449)} for s in range(3)}, page="page.ipynb")
    matrix = fault_matrix(page, learnt, ["test_leaked"])
    assert matrix.complete and "leak" in matrix.stopped["test_leaked"] and "1 of 1" in repr(matrix)
    assert Matrix.from_json(json.loads(json.dumps(matrix.to_json(), allow_nan=False))) == matrix
    assert matrix.show()._repr_png_().startswith(b"\x89PNG") and "leak" in matrix._repr_html_()
    assert [p.name for p in tmp_path.iterdir()] == ["page.ipynb"]


def verdict(name: str, passed: bool) -> Verdict:
    return Verdict(name, 1.0 if passed else 3.0, 0.0, 2.0, passed=passed, why="" if passed else "worse")


def test_what_a_matrix_says() -> None:
    whole = Matrix("p", "cpu", 5, {CLEAN: (verdict("a", True),), "f": (verdict("a", False),), "g": (verdict("a", True),)})
    assert whole.missed == ["g"] and not whole.complete and "1 of 2 faults caught" in repr(whole)
    assert list(whole.table()["verdict"]) == ["passed", "a", "MISSED"]
    assert Matrix("p", "cpu", 5, {CLEAN: (verdict("a", True),), "f": (verdict("a", False),)}).complete
    assert not Matrix("p", "cpu", 5, {CLEAN: (verdict("a", False),), "f": (verdict("a", False),)}).complete
    assert not Matrix("p", "cpu", 5, {CLEAN: (), "f": (verdict("a", False),)}, {CLEAN: "broke down"}).complete


def test_the_stored_matrix_is_complete_and_current() -> None:
    stored = json.loads((ROOT / "benchmarks/results/fault_matrix.json").read_text())
    matrix = Matrix.from_json(stored["matrix"])
    assert set(matrix.runs) == {CLEAN, *FAULTS} and matrix.complete and matrix.seeds >= 5
    source = "".join("".join(c["source"]) for c in json.loads((ROOT / "nbs" / TARGET).read_text())["cells"])
    assert all(f'record("{gate}"' in source for gate in matrix.gates)


def stored_baseline() -> Baseline:
    "The baseline that the benchmark has recorded."
    return rebuilt(json.loads((ROOT / "benchmarks/results/fault_matrix.json").read_text())["baseline"])


@pytest.mark.slow
def test_every_fault_turns_the_target_red() -> None:
    matrix = fault_matrix(ROOT / "nbs" / TARGET, stored_baseline(), parameters={"seed": 100})
    assert matrix.complete, (matrix.missed, matrix.caught(CLEAN), matrix.stopped)
    assert "test_images_in_train" in matrix.caught("test_leaked") and "head_moved" in matrix.caught("head_frozen")


@pytest.mark.slow
def test_a_baseline_of_the_target_can_be_learnt_here(tmp_path: Path) -> None:
    runs = {s: run_page(ROOT / "nbs" / TARGET, tmp_path / f"{s}.ipynb", {"seed": s}, progress=False) for s in range(3)}
    learnt = learn(runs, page=TARGET)
    assert learnt.limits().keys() == stored_baseline().limits().keys()
