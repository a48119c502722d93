"""A part of the pages is compared like the whole: the same names, the same baselines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from adaptkit.core.registry import AdaptkitError
from adaptkit.notebooks.tree import part_of

MEASURE = "from random import Random\nfrom adaptkit.notebooks.records import record\nrecord('skill', 0.9 + 0.01 * Random(seed).random(), trivial={'coin': 0.5})"

KERNEL = {"name": "python3", "display_name": "python3", "language": "python"}


def write(path: Path) -> Path:
    "A page that records one number."
    seed = new_code_cell("seed: int = 0  # of the draw", metadata={"tags": ["parameters"]})
    nb = new_notebook(cells=[new_markdown_cell("# A page\n\n> of a few lines"), seed, new_code_cell(MEASURE)], metadata={"kernelspec": KERNEL})
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)
    return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "Three pages in two folders."
    for name in ("nbs/a/one.ipynb", "nbs/a/two.ipynb", "nbs/b/three.ipynb"):
        write(tmp_path / name)
    (tmp_path / "nbs/empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "place, top, meant",
    [
        ("nbs", "nbs", ()),
        ("./nbs", "nbs", ()),
        ("nbs/a", "nbs", ("a/one.ipynb", "a/two.ipynb")),
        ("nbs/b/three.ipynb", "nbs", ("b/three.ipynb",)),
        (".", ".", ()),
    ],
)
def test_a_part_belongs_to_the_folder_that_was_named_first(project: Path, place: str, top: str, meant: tuple[str, ...]) -> None:
    assert part_of(Path(place)) == (Path(top), meant)


def test_the_whole_way_names_its_own_tree(project: Path) -> None:
    assert part_of(project / "nbs/a") == (project / "nbs/a", ())
    assert part_of(project / "nbs/a/one.ipynb") == (project / "nbs/a", ("one.ipynb",))


@pytest.mark.parametrize("place, words", [("nbs/c", "There is no nbs/c"), ("nbs/empty", "There is no notebook in nbs/empty"), ("nbs/a/none.ipynb", "There is no nbs/a/none.ipynb")])
def test_where_nothing_is_it_says_so(project: Path, place: str, words: str) -> None:
    with pytest.raises(AdaptkitError, match=words):
        part_of(Path(place))


@pytest.mark.slow
def test_a_folder_of_the_tree_is_checked_against_the_baselines_of_the_tree(project: Path) -> None:
    def say(*command: str) -> str:
        begin = [sys.executable, "-c", "from adaptkit.cli import main; main()"]
        done = subprocess.run([*begin, *command], capture_output=True, text=True, env=os.environ, timeout=300)
        return done.stdout + done.stderr

    assert "baseline" in say("record", "nbs/a", "--seeds", "3")
    assert sorted(p.name for p in (project / "tests/baselines").rglob("*.json")) == ["one.json", "two.json"]
    assert "2 passed" in say("check", "nbs/a") and "1 passed" in say("check", "nbs/a/one.ipynb")
    whole = say("check", "nbs")
    assert "2 passed" in whole and "1 ungated" in whole
    assert "There is no notebook in nbs/empty" in say("check", "nbs/empty")
    found = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--notebooks", "nbs/a"], capture_output=True, text=True, env=os.environ, timeout=300)
    assert "2 passed" in found.stdout, found.stdout[-2000:]
