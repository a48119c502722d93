"""Every page runs to its end, in time, and leaves nothing behind in its folder."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path

import pytest
from conftest import ROOT, running

from adaptkit.notebooks.tree import pages

PAGES = [p.as_posix() for p in pages(ROOT / "nbs")]
LIMIT = 400  # seconds a page may take with one thread on a busy machine; alone, each takes about a minute


@pytest.mark.pages
@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str, answers: dict[str, Future[tuple[float, str]]], capsys: pytest.CaptureFixture[str]) -> None:
    seconds, wrong = answers[page].result()
    with capsys.disabled():
        print(f" {seconds:.1f} s", end="", flush=True)
    assert not wrong, wrong
    assert seconds < LIMIT, f"{page} took {seconds:.0f} s"


@pytest.mark.pages
def test_pages_leave_nothing_but_runs(answers: dict[str, Future[tuple[float, str]]], work: Path) -> None:
    for answer in answers.values():
        answer.result()
    there = {p.relative_to(work / "nbs").as_posix() for p in (work / "nbs").rglob("*") if p.is_file() and "runs" not in p.parts}
    stored = {p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*") if p.is_file()}
    assert sorted(there - stored) == []


def test_a_page_that_breaks_is_noticed(tmp_path: Path) -> None:
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": "assert 1 + 1 == 3"}
    nb = {"cells": [cell], "metadata": {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}, "nbformat": 4, "nbformat_minor": 4}
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/wrong.ipynb").write_text(json.dumps(nb))
    with running(tmp_path / "nbs", tmp_path / "out") as found:
        assert "AssertionError" in found["wrong.ipynb"].result()[1]
