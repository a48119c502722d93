"""Stages: a page goes on where it was killed, with the same numbers; what has changed runs again; what is kept is what was there."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook
from test_runner import SAY, code, in_the_background, page, read, stopped, until

from adaptkit.core.registry import AdaptkitError
from adaptkit.notebooks.runner import PageError, run_page
from adaptkit.notebooks.shelf import Shelf, decode, encode, restore, store
from adaptkit.notebooks.stages import Stage, stage_keys, stage_of

LOG = "def log(what):\n    with open('log', 'a') as f:\n        f.write(what + ' ')"
SETUP = "import os, random, pathlib, time\nimport numpy as np\nrandom.seed(seed)\nnp.random.seed(seed)"
ONE = "#| stage: one -> x, shares\nlog('one')\nx = np.random.rand(4)\nshares = (0.5, pathlib.Path('a'))\nprint('drawn', x.sum())"
TWO = "#| stage: two -> y\nlog('two')\ny = {'sum': float(x.sum()) + random.random(), 'x': x}\nrecord('two', y['sum'])"
DEATH = "if not os.path.exists('live'):\n    os.kill(os.getpid(), 9)"
THREE = "#| stage: three -> z\nlog('three')\n{}\nz = y['sum'] + np.random.rand() + random.random()\nrecord('three', z)"
CHECK = "assert type(shares) is tuple and isinstance(shares[1], pathlib.PurePath) and (y['x'] == x).all()"


def three(folder: Path, death: str = DEATH, two: str = TWO) -> Path:
    "A page of three stages that dies in the third."
    return page(folder, "seed = 0", LOG, SAY, SETUP, ONE, two, "log('between')", THREE.format(death), CHECK, tags={0: "parameters"})


def log(folder: Path) -> str:
    "Which cells have run since the last look."
    told = (folder / "log").read_text().strip() if (folder / "log").exists() else ""
    (folder / "log").unlink(missing_ok=True)
    return told


def go(folder: Path, made: Path, **options: Any) -> tuple[dict[str, float], Any]:
    "The records of a run in its folder, and its copy."
    found = run_page(made, folder / "out.ipynb", options.pop("parameters", {"seed": 3}), cwd=folder, progress=False, **options)
    return {name: r.value for name, r in found.items()}, read(folder / "out.ipynb")


def marks(nb: Any) -> list[bool]:
    return [bool(c.metadata.get("adaptkit", {}).get("restored")) for c in code(nb) if "#| stage" in c.source]


@pytest.fixture(scope="module")
def grave(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder in which a page of three stages has died in the third."
    folder = tmp_path_factory.mktemp("grave")
    error, nb = stopped(three(folder), parameters={"seed": 3}, cwd=folder)
    assert error.why == "its kernel died of SIGKILL" and nb.metadata.adaptkit.stopped.records.keys() == {"two"}
    assert log(folder) == "one two between three"
    (folder / "live").touch()
    return folder


@pytest.fixture
def died(grave: Path, tmp_path: Path) -> Path:
    "A copy of it."
    return Path(shutil.copytree(grave, tmp_path / "run"))


def test_a_page_killed_in_its_third_stage_goes_on_there_with_the_same_numbers(died: Path, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/live").touch()
    whole, unbroken = go(tmp_path / "whole", three(tmp_path / "whole"))
    resumed, nb = go(died, died / "page.ipynb", resume=True)
    assert resumed == whole and log(died) == "between three" and marks(nb) == [True, True, False]
    assert [c.outputs for c in code(nb)] == [c.outputs for c in code(unbroken)], "also the outputs of cells that did not run"
    files = sorted(p.name for p in (died / "out.stages").rglob("*") if p.is_file())
    assert {*files} == {"arrays.safetensors", "values.json"} and not [*died.glob("*.partial.ipynb")]
    again, nb = go(died, died / "page.ipynb", resume=True)
    assert again == whole and log(died) == "between" and marks(nb) == [True, True, True]


def test_what_has_changed_runs_again(died: Path) -> None:
    go(died, three(died, two=TWO + "\n"), resume=True)
    assert log(died) == "two between three"
    go(died, three(died, two=TWO + "\n"), resume=True, parameters={"seed": 4})
    assert log(died) == "one two between three"
    _, nb = go(died, three(died, two=TWO + "\n"), parameters={"seed": 4})
    assert log(died) == "one two between three" and marks(nb) == [False] * 3, "nothing is restored unasked"
    assert len([*(died / "out.stages").iterdir()]) == 3, "earlier versions of a stage go away"


def test_a_killed_runner_leaves_stages_to_go_on_from(tmp_path: Path) -> None:
    made = three(tmp_path, "if not os.path.exists('live'):\n    open('waiting', 'w')\n    time.sleep(100)")
    with in_the_background(made, tmp_path / "out.ipynb", tmp_path) as runner:
        assert until(lambda: (tmp_path / "waiting").exists())
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    assert not (tmp_path / "out.ipynb").exists() and (tmp_path / "out.partial.ipynb").exists()
    log(tmp_path)
    (tmp_path / "live").touch()
    found, nb = go(tmp_path, made, resume=True, parameters=None)
    assert log(tmp_path) == "between three" and marks(nb) == [True, True, False] and [*found] == ["two", "three"]


def test_without_its_outputs_a_stage_runs_again(died: Path) -> None:
    (died / "out.ipynb").unlink()
    go(died, died / "page.ipynb", resume=True)
    assert log(died) == "one two between three"


def test_a_damaged_stage_is_named(died: Path) -> None:
    place = next((died / "out.stages").glob("one-*"))
    (place / "arrays.safetensors").write_bytes(b"half")
    with pytest.raises(PageError, match="out.stages/one-.* is damaged .*delete that folder"):
        go(died, died / "page.ipynb", resume=True)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("model = object()", "The stage 'fit' cannot keep 'model': it is or holds a object"),
        ("model = {'a': [1, {2}]}", "cannot keep 'model': it is or holds a set"),
        ("other = 1", "The stage 'fit' promises 'model', but its cell sets no such variable"),
    ],
)
def test_what_cannot_be_kept_stops_the_page(source: str, words: str, tmp_path: Path) -> None:
    error, nb = stopped(page(tmp_path, f"#| stage: fit -> model\n{source}", "2"))
    assert words in str(error) and [c.metadata.papermill.status for c in code(nb)] == ["failed", "pending"]
    assert words in json.dumps(nb.cells) and not [*tmp_path.glob("out.stages/*")]


@pytest.mark.parametrize("directive", ["stage: one", "stage: one ->", "stage: one -> 2x", "stage: two words -> x", "Stage : one - x", "stage: ../one -> x"])
def test_directives_that_make_no_sense_are_refused_before_anything_runs(directive: str, tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match="names no stage"):
        run_page(page(tmp_path, f"#| {directive}\nx = 1"), tmp_path / "out.ipynb", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["page.ipynb"]


def keys(*sources: str) -> list[str]:
    return [key for _, key in stage_keys(new_notebook(cells=[new_code_cell(s) for s in sources])).values()]


def test_a_planted_first_cell_changes_every_key() -> None:
    cell = "#| stage: a -> x\nx = 1"
    assert keys("faulty = True", cell) != keys(cell) == keys(cell, "print(x)")


def test_directives_are_read_from_the_top() -> None:
    assert stage_of("\n#|stage:one->x ,y\n#| files: a.csv, b.csv\n# words\nx = y = 1") == Stage("one", ("x", "y"), ("a.csv", "b.csv"))
    assert stage_of("x = 1\n#| stage: one -> x") is None and stage_of("# stage: one -> x") is None
    with pytest.raises(AdaptkitError, match="Two stages have the same name"):
        keys("#| stage: a -> x\nx = 1", "#| stage: a -> y\ny = 1")


def test_files_count_by_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = "#| stage: a -> x\n#| files: data.csv\nx = open('data.csv').read()"
    with pytest.raises(AdaptkitError, match="reads data.csv, which is no file"):
        keys(source)
    Path("data.csv").write_text("1")
    first = keys(source)
    Path("data.csv").touch()
    assert keys(source) == first
    Path("data.csv").write_text("2")
    assert keys(source) != first


def test_modules_behind_the_imports_count(monkeypatch: pytest.MonkeyPatch) -> None:
    source, other = "#| stage: a -> x\nfrom adaptkit.notebooks.records import Record\nx = 1", "#| stage: a -> x\nimport math\nx = 1"
    before = keys(source), keys(other)
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: real(self) + (b"#" if self.name == "registry.py" else b""))
    assert keys(source) != before[0] and keys(other) == before[1]


# ---- the shelf

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.builds(Path, st.from_regex(r"[a-z/]{1,9}", fullmatch=True)),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), inner),
    max_leaves=12,
)


def back(value: Any) -> Any:
    shelf = Shelf({}, {})
    return decode(json.loads(json.dumps(encode(value, shelf))), shelf)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b) or (a != a and b != b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return [*a] == [*b] and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


@given(VALUES)
def test_plain_values_come_back_equal_and_of_the_same_type(value: Any) -> None:
    assert same(back(value), value)


TENSORS = [
    torch.zeros(()),
    torch.zeros(0, 3),
    torch.arange(6).reshape(2, 3).T,
    torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.rand(3).bfloat16(),
    torch.tensor([True, False]),
    torch.tensor([1.0, float("nan"), -0.0]),
    torch.rand(3, requires_grad=True),
    torch.rand(1).expand(4),
    torch.rand(6)[::2],
]
ARRAYS = [np.zeros(()), np.zeros((0, 3)), np.asfortranarray(np.random.rand(2, 3)), np.arange(6)[::2], np.array([True]), np.float16([1.5]), np.float32(0.1), np.int64(2**60), np.bool_(True)]


@pytest.mark.parametrize("value", [*TENSORS, *ARRAYS], ids=lambda v: f"{type(v).__name__}{tuple(v.shape)}{v.dtype}")
def test_tensors_and_arrays_come_back_bit_by_bit(value: Any, tmp_path: Path) -> None:
    store({"x": [value]}, tmp_path / f"a-{'0' * 16}", stage="a", names=("x",))
    namespace: dict[str, Any] = {}
    restore(namespace, tmp_path / f"a-{'0' * 16}")
    found = namespace["x"][0]
    assert type(found) is type(value) and found.dtype == value.dtype and found.shape == value.shape
    if isinstance(value, torch.Tensor):
        assert found.stride() == value.detach().clone().stride() and found.requires_grad == value.requires_grad
        assert torch.equal(found.detach().contiguous().view(torch.uint8), value.detach().contiguous().view(torch.uint8)) if value.ndim else found == value
    else:
        assert found.tobytes() == value.tobytes() and np.asarray(found).flags.f_contiguous == np.asarray(value.copy(order="K")).flags.f_contiguous


@pytest.mark.parametrize(
    "value",
    [np.array(["a"]), np.array([None]), np.array([1], dtype=">i4"), np.ma.array([1]), torch.rand(2, requires_grad=True) * 2, torch.eye(2).to_sparse(), torch.nn.Parameter(torch.ones(1)), np.random.default_rng(0), b"bytes", 1j, {1}, len],
    ids=lambda v: type(v).__name__,
)
def test_everything_else_is_refused_by_name_and_type(value: Any, tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match="The stage 'a' cannot keep 'x': it is or holds a"):
        store({"x": (value,)}, tmp_path / "a-0", stage="a", names=("x",))
    assert not [*tmp_path.iterdir()]


def test_chance_goes_on_where_it_was(tmp_path: Path) -> None:
    store({}, tmp_path / "a-0", stage="a", names=())
    drawn = random.random(), np.random.rand(), torch.rand(2).tolist()
    restore({}, tmp_path / "a-0")
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == drawn


def test_copies_without_stages_and_old_copies_do_no_harm(tmp_path: Path) -> None:
    made = page(tmp_path, "1")
    nbformat.write(new_notebook(cells=[new_code_cell("0")]), tmp_path / "out.ipynb")
    assert run_page(made, tmp_path / "out.ipynb", resume=True, progress=False) == {}
