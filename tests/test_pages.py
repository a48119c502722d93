"""Every page runs to its end, its numbers are where they should be, and it leaves nothing behind in its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from conftest import BASELINES, ROOT
from nbformat.v4 import new_code_cell, new_notebook

from adaptkit.notebooks.baselines import baseline_path, write_baseline
from adaptkit.notebooks.check import Suite, check_pages, record_baseline
from adaptkit.notebooks.meter import hardware
from adaptkit.notebooks.plugin import Runs
from adaptkit.notebooks.tree import pages

pytestmark = pytest.mark.alone

PAGES = [p.as_posix() for p in pages(ROOT / "nbs")]
WITHOUT = (ROOT / "tests/without_baseline.txt").read_text().split()  # pages that run, but whose numbers nobody compares yet


@pytest.mark.pages
@pytest.mark.parametrize("page", PAGES)
def test_page_passes(page: str, executed: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    row = executed.row(page)
    with capsys.disabled():
        print(f" {row.seconds or 0:.1f} s, {len(row.verdicts)} numbers", end="", flush=True)
    if hardware() == "cpu" and page in WITHOUT:
        assert row.status == "ungated", f"{row}: take it out of tests/without_baseline.txt if it has a baseline now"
    else:
        assert row.status == "passed", str(row)


def test_the_list_of_pages_without_baseline_is_true() -> None:
    there = {p for p in PAGES if baseline_path(BASELINES, "cpu", p).is_file()}
    assert sorted(WITHOUT) == sorted(set(PAGES) - there)


def test_no_baseline_is_left_over() -> None:
    kept = {p.relative_to(BASELINES / "cpu").with_suffix(".ipynb").as_posix() for p in (BASELINES / "cpu").rglob("*.json")}
    assert kept <= set(PAGES)


@pytest.mark.pages
def test_pages_leave_nothing_but_runs(executed: Runs, work: Path) -> None:
    for page in PAGES:
        executed.row(page)
    there = {p.relative_to(work / "nbs").as_posix() for p in (work / "nbs").rglob("*") if p.is_file() and "runs" not in p.parts}
    stored = {p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*") if p.is_file()}
    assert sorted(there - stored) == []


def test_a_page_that_breaks_is_noticed(tmp_path: Path) -> None:
    cells = [new_code_cell("seed = 0", metadata={"tags": ["parameters"]}), new_code_cell("assert 1 + 1 == 3")]
    (tmp_path / "nbs").mkdir()
    spec = {"name": "python3", "display_name": "", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), tmp_path / "nbs/wrong.ipynb")
    report = check_pages(Suite(tmp_path / "nbs", baselines=tmp_path, out=tmp_path / "out", root=tmp_path))
    assert report.rows[0].status == "stopped" and "AssertionError" in report.rows[0].why


def test_half_precision_is_another_class_of_hardware(tmp_path: Path) -> None:
    sources = {
        "parameters": 'seed: int = 0\nprecision: str = "32-true"',
        "profile-cpu": '#| eval: false\nprecision = "bf16-mixed"',
        "work": "from adaptkit.notebooks.records import record\nrecord('digits', 24.0 if precision == '32-true' else 8.0)",
    }
    cells = [new_code_cell(source, metadata={"tags": [tag]}) for tag, source in sources.items()]
    (tmp_path / "nbs").mkdir()
    spec = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), tmp_path / "nbs/halves.ipynb")
    smoke = Suite(tmp_path / "nbs", baselines=tmp_path / "kept", out=tmp_path / "out", root=tmp_path)
    mixed = replace(smoke, profile="cpu")
    page = Path("halves.ipynb")
    write_baseline(record_baseline(smoke, page, seeds=3), smoke.baselines)
    (row,) = check_pages(mixed).rows
    assert row.status == "ungated" and "no baseline for this hardware (cpu-bf16-mixed, profile cpu) (only for cpu)" in row.why
    write_baseline(record_baseline(mixed, page, seeds=3), smoke.baselines)
    assert {p.relative_to(smoke.baselines).as_posix() for p in smoke.baselines.rglob("*.json")} == {"cpu/halves.json", "cpu-bf16-mixed/halves.json"}
    assert [check_pages(suite).rows[0].status for suite in (smoke, mixed)] == ["passed", "passed"]
