"What people type: names, adapt, run."

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import adaptkit
from adaptkit.training.runs import open_run

ROOT = Path(__file__).parents[1]


def shell(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    "Run the command line as a user does."
    command = [sys.executable, "-c", "from adaptkit.cli import main; main()", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Red pictures and blue ones, with noise, in a folder with a name that isn't ASCII."
    root = tmp_path_factory.mktemp("données") / "mes images"
    rng = np.random.default_rng(0)
    for k, name in enumerate(("rouge", "bleu")):
        (root / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 90, (26 + i % 3, 30, 3), np.uint8)
            pixels[..., 2 * k] += 120
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return root


def test_names_for_the_type_checker_are_the_names_that_exist():
    tree = ast.parse(inspect.getsource(adaptkit))
    block = next(n for n in tree.body if isinstance(n, ast.If))
    told = {(f"{n.module}".removeprefix("adaptkit."), a.name) for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert told == {(module, name) for module, names in adaptkit._HOME.items() for name in names}
    assert all(getattr(adaptkit, name).__name__ == name for _, name in told)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="evalute.*evaluate"):
        adaptkit.evalute  # noqa: B018


def test_adapt_a_folder(folder, tmp_path):
    done = shell("adapt", folder, "--backbone", "small_cnn", "--epochs", "6", "--batch-size", "8", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "95 % interval" in done.stdout and "report    out/report.html" in done.stdout
    run = open_run(tmp_path / "out")
    assert run.record["status"] == "done" and run.model.classes == ("bleu", "rouge")
    assert run.history[-1]["valid_accuracy"] > 0.9
    again = shell("adapt", folder, "--backbone", "small_cnn", "--batch-size", "8", "--out", "out", cwd=tmp_path)
    assert again.returncode == 1 and "holds a run already" in again.stderr


@pytest.mark.parametrize(
    "words, told",
    [
        (["no/such/folder"], "no/such/folder"),
        (["epvl"], "elpv"),
        (["digits", "--backbone", "eficientnet_lite0"], "Did you mean 'efficientnet_lite0'"),
        (["digits", "--backbone", "small_cnn", "--epochs", "-2"], "epochs=-2"),
        (["digits", "--backbone", "small_cnn", "--batch-size", "5000"], "takes 5000 images"),
        (["digits", "--backbone", "small_cnn", "--depth", "40"], "has 3 stages"),
    ],
)
def test_bad_input_gets_one_sentence_and_leaves_nothing(words, told, tmp_path):
    done = shell("adapt", *words, cwd=tmp_path)
    assert done.returncode == 1 and told in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_run_refuses_a_misspelt_parameter_before_it_starts(tmp_path):
    done = shell("run", ROOT / "nbs/seven_steps.ipynb", "-p", "epoch", "3", "-o", "out.ipynb", cwd=tmp_path)
    assert done.returncode == 1 and "Did you mean 'epochs'" in done.stderr and not (tmp_path / "out.ipynb").exists()


def test_doctor_says_what_is_missing_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = shell("doctor", cwd=tmp_path)
    lines = {line.split(maxsplit=3)[2 if " extra " not in line else 3].split()[0]: line for line in done.stdout.splitlines()}
    assert done.returncode == 0, done.stderr
    assert lines["elpv"].startswith("ok") and lines["schemathesis"].startswith("ok")
    assert lines["cifar10"].startswith("--") and "download=True" in lines["cifar10"]


@pytest.mark.parametrize("words, told", [(("data", "nowhere"), "Unknown data set 'nowhere'"), (("backbone", "nothing"), "'nothing'")])
def test_a_page_that_stops_is_one_sentence_and_its_copy_stays(words, told, tmp_path):
    done = shell("run", ROOT / "nbs/seven_steps.ipynb", "-p", *words, "-o", "out.ipynb", cwd=tmp_path)
    assert done.returncode == 1 and told in done.stderr and "out.ipynb" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert "AdaptkitError" in (tmp_path / "out.ipynb").read_text() and not (tmp_path / "runs").exists()


def test_a_value_out_of_range_stops_a_page_before_it_starts(tmp_path):
    done = shell("run", ROOT / "nbs/seven_steps.ipynb", "-p", "epochs", "-1", "-o", "out.ipynb", cwd=tmp_path)
    assert done.returncode == 1 and "wants a whole number from 1 to 1000" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


SETTINGS = {"backbone": "small_cnn", "epochs": "6", "views": "1", "size": "32", "batch_size": "8", "out": "result", "depth": "3"}


def check_seven_steps(where: Path) -> None:
    "What the main notebook has to leave behind."
    nb = json.loads((where / "out.ipynb").read_text())
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    records = {o["data"]["application/vnd.adaptkit.record+json"]["name"] for o in outputs if "application/vnd.adaptkit.record+json" in o.get("data", {})}
    assert {"test_accuracy", "valid_accuracy", "seconds", "peak_memory"} <= records
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 3
    assert {"run.json", "events.jsonl", "ledger.json", "model.safetensors", "report.html"} <= {p.name for p in (where / "result").iterdir()}


def test_seven_steps_on_a_folder_with_our_command(folder, tmp_path):
    words = [w for k, v in {**SETTINGS, "data": folder}.items() for w in ("-p", k, v)]
    done = shell("run", ROOT / "nbs/seven_steps.ipynb", *words, "-o", "out.ipynb", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "The model is right on" in done.stdout and "notebook  out.ipynb" in done.stdout
    check_seven_steps(tmp_path)


def test_seven_steps_on_a_folder_with_plain_papermill(folder, tmp_path):
    words = [str(w) for k, v in {**SETTINGS, "data": folder}.items() for w in ("-p", k, v)]
    command = [sys.executable, "-m", "papermill", str(ROOT / "nbs/seven_steps.ipynb"), "out.ipynb", *words, "--no-progress-bar"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_seven_steps(tmp_path)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Praise and complaint in a CSV with columns that nobody can guess."
    path = tmp_path_factory.mktemp("texts") / "letters.csv"
    rng = np.random.default_rng(0)
    words = ["fine great lovely superb nice".split(), "awful poor broken ugly late".split()]
    rows = [f"{i},{' '.join(rng.choice(words[i % 2], 4))} parcel number {i},{('good', 'bad')[i % 2]}" for i in range(200)]
    path.write_text("\n".join(["id,what,how", *rows]) + "\n", encoding="utf-8")
    return path


def test_adapt_a_table_of_texts(table, tmp_path):
    words = ("--text", "what", "--label", "how", "--backbone", "bag_of_embeddings", "--depth", "1", "--out", "out")
    done = shell("adapt", table, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "texts to learn from" in done.stdout and "test texts" in done.stdout
    run = open_run(tmp_path / "out")
    assert run.model.classes == ("bad", "good") and run.history[-1]["valid_accuracy"] > 0.9
    unknown = shell("adapt", table, cwd=tmp_path)
    assert unknown.returncode == 1 and "'id', 'what', 'how'" in unknown.stderr and "Traceback" not in unknown.stderr


@pytest.mark.slow
def test_the_main_job_on_a_table_of_texts(table, tmp_path):
    given = {"data": table, "text": "what", "label": "how", "backbone": "bag_of_embeddings", "depth": 1, "out": "run"}
    pairs = [word for name, value in given.items() for word in ("-p", name, value)]
    done = shell("run", ROOT / "nbs/seven_steps.ipynb", "-o", "out.ipynb", *pairs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "test texts" in done.stdout
    executed = json.loads((tmp_path / "out.ipynb").read_text())
    shown = json.dumps([c["outputs"] for c in executed["cells"] if c["cell_type"] == "code"])
    assert "tokens unknown" in shown and "class balance" in shown
