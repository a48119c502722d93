"""The tutorial on CIFAR-10: which data it takes, which networks it can run, and what it says about the rest."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from torchvision.models import get_model, get_model_weights

from adaptkit.core.registry import AdaptkitError
from adaptkit.models.sources import write_weights
from adaptkit.notebooks.parameters import declared
from adaptkit.notebooks.records import records
from adaptkit.notebooks.runner import run_page

PAGE = ROOT / "nbs/tutorials/cifar10.ipynb"


def step_one(**parameters: object) -> dict[str, Any]:
    "The names that the cells in front of step 2 leave behind."
    names: dict[str, Any] = {}
    with pd.option_context("display.max_colwidth", 50):
        for cell in nbformat.read(PAGE, as_version=4).cells:
            if cell.source.startswith("## Step 2"):
                break
            if cell.cell_type == "code" and "eval: false" not in cell.source:
                exec(compile(cell.source, str(PAGE), "exec"), names)
            if "parameters" in cell.metadata.get("tags", []):
                names.update(parameters)
    return names


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    "A folder with the files of CIFAR-10, two hundred images in each, of noise."
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        table = rng.integers(0, 256, (200, 3073), dtype=np.uint8)
        table[:, 0] = np.arange(200) % 10
        (tmp_path / "cifar-10-batches-bin").mkdir(exist_ok=True)
        table.tofile(tmp_path / "cifar-10-batches-bin" / f"{name}.bin")
    return tmp_path


def test_cifar10_is_taken_where_it_is(cifar: Path) -> None:
    found = step_one(root=str(cifar), images=100, tested=50)
    assert found["taken"] == "cifar10" and found["mirror"]
    assert [len(s) for s in found["few"].splits.values()] == [100, 33, 50]
    assert set(np.bincount(found["few"].train.labels)) == {10} and set(np.bincount(found["few"].test.labels)) == {5}


def test_another_data_set_is_taken_only_with_a_word(tmp_path: Path) -> None:
    found = step_one(root=str(tmp_path))
    assert found["taken"] == "digits" and not found["mirror"]
    assert [(f.name, bool(f.found)) for f in found["looked"]] == [("cifar10", False), ("fashion_mnist", False), ("digits", True)]
    assert "download=True" in found["looked"][0].mend


def test_what_was_named_is_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match="CIFAR-10 is not in"):
        step_one(data="cifar10", root=str(tmp_path))


def test_the_default_run_downloads_nothing() -> None:
    values = declared(PAGE)
    assert [values[name].default for name in ("download", "weights", "data")] == [False, "", "auto"]


def solved(page: Path) -> Path:
    "A copy of the tutorial, with each folded solution and its check as cells at the end."
    nb = nbformat.read(PAGE, as_version=4)
    text = nb.cells[-1].source
    found = re.findall(r"Check: `(\w+\(\w+\))`.*?```python\n(.*?)```", text, re.S)
    assert len(found) == len(re.findall(r"^\d\. ", text, re.M)) == 5
    for check, code in found:
        lines = "\n".join(line.removeprefix("   ") for line in code.split("\n"))
        nb.cells += [nbformat.v4.new_code_cell(lines), nbformat.v4.new_code_cell(check)]
    nbformat.write(nb, page)
    return page


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    "The page on a few digits: ResNet-18 from a file, SqueezeNet from torch's cache (random numbers, both), the others absent."
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "weights").mkdir()
    (folder / "torch/hub/checkpoints").mkdir(parents=True)
    write_weights(folder / "weights/resnet18.safetensors", get_model("resnet18", weights=None).state_dict())
    cached = Path(get_model_weights("squeezenet1_1").DEFAULT.url).name
    torch.save(get_model("squeezenet1_1", weights=None).state_dict(), folder / "torch/hub/checkpoints" / cached)
    names = "torchvision/vgg16, torchvision/resnet18, torchvision/inception_v3, torchvision/squeezenet1_1"
    tiny = dict(data="digits", images=60, tested=60, size=64, epochs=1, scratch_epochs=1, depth=1, networks=names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        run_page(solved(folder / "page.ipynb"), folder / "out.ipynb", {**tiny, "weights": str(folder / "weights")}, cwd=folder, progress=False)
    return nbformat.read(folder / "out.ipynb", as_version=4)


def table(nb: Any, start: str) -> dict[str, dict[str, str]]:
    "The table that the cell holding `start` shows: by row, then by column."
    (html,) = [o.data["text/html"] for c in nb.cells if start in c.source for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    texts = [[unescape(t) for t in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.S)] for line in re.findall(r"<tr.*?</tr>", html, re.S)]
    head = texts[0][1:]
    return {row[0]: dict(zip(head, row[1:], strict=True)) for row in texts[1:] if any(row[1:])}


@pytest.mark.slow
def test_the_table_has_every_network(executed: Any) -> None:
    rows = table(executed, "def row(")
    ours = ["never looks", "small CNN", "frozen", "random weights", "fine-tuned"]
    assert [*rows] == [*ours, "resnet18", "squeezenet1_1", "vgg16", "inception_v3"]
    for name in ("vgg16", "inception_v3"):
        assert rows[name]["accuracy, %"] == "weights not here" and f"load_backbone('torchvision/{name}')" in rows[name]["weights"]
        assert not rows[name]["seconds"] and not rows[name]["95 % interval"]
    for name in ("resnet18", "squeezenet1_1", *ours):
        assert 0 <= float(rows[name]["accuracy, %"]) <= 100 and " to " in rows[name]["95 % interval"]


@pytest.mark.slow
def test_the_table_says_whose_weights(executed: Any) -> None:
    rows = table(executed, "def row(")
    assert rows["resnet18"]["weights"] == "resnet18.safetensors" and rows["random weights"]["weights"] == "random initialisation"
    assert rows["squeezenet1_1"]["weights"].startswith("torchvision") and "efficientnet" in rows["fine-tuned"]["weights"]
    offers = table(executed, "def at_hand(")
    assert offers["torchvision/resnet18"]["weights"] == "your file resnet18.safetensors"
    assert offers["torchvision/squeezenet1_1"]["weights"] == "torch's cache"
    assert offers["torchvision/inception_v3"]["pixels here"] == "75" and offers["torchvision/vgg16"]["pixels here"] == "64"


@pytest.mark.slow
def test_the_table_counts_right(executed: Any) -> None:
    rows = table(executed, "def row(")
    assert rows["small CNN"]["trainable"] == "122570" and rows["frozen"]["trainable"] == str(1280 * 10 + 10)
    assert {rows[name]["images seen"] for name in ("small CNN", "frozen", "fine-tuned", "resnet18")} == {"60"}


@pytest.mark.slow
def test_each_accuracy_is_recorded_once(executed: Any) -> None:
    rows, kept = table(executed, "def row("), records(executed)
    trained = {name: row for name, row in rows.items() if row["accuracy, %"] != "weights not here"}
    assert len(kept) == len(trained)
    for name, row in trained.items():
        value = kept[f"test_accuracy_{name.replace(' ', '_').replace('-', '_')}"].value
        assert abs(100 * value - float(row["accuracy, %"])) < 0.051


@pytest.mark.slow
def test_pairs_go_over_all_test_images(executed: Any) -> None:
    rows = table(executed, "pairs = [")
    assert "fine-tuned → resnet18" in rows and "fine-tuned → vgg16" not in rows
    for row in rows.values():
        difference = (int(row["only the second right"]) - int(row["only the first right"])) / 60
        assert abs(100 * difference - float(row["difference, points"])) < 0.051
