"""Sweeps: what is run, what is kept, and what is shown."""

from __future__ import annotations

import csv
import json
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from adaptkit.core.registry import AdaptkitError
from adaptkit.notebooks import sweep as module
from adaptkit.notebooks.curves import along, draw, logarithmic
from adaptkit.notebooks.jobs import Budget, Job, Outcome
from adaptkit.notebooks.records import Record
from adaptkit.notebooks.sweep import Row, combinations, grid_from_text, parted, sweep, telling

SPEC = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    "A page that fails at depth 3."
    sources = ["rate = 0.1\ndepth = 1\nname = 'a'\nseed = 0\nshares = (0.5, 0.5)", "from adaptkit.notebooks.records import record", "assert depth != 3", "record('score', 10 * depth + seed, 'points')"]
    cells = [new_code_cell(s) for s in sources]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=cells, metadata=SPEC), tmp_path / "page.ipynb")
    return tmp_path / "page.ipynb"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    "Pages are only pretended to run; the list tells with which parameters."
    given: list[dict[str, Any]] = []

    def pretend(jobs: Iterable[Job], **_: object) -> Generator[Outcome, None, None]:
        for job in jobs:
            given.append(dict(job.parameters))
            if job.parameters.get("depth") == 99:
                raise KeyboardInterrupt
            if job.parameters.get("depth") == 3:
                yield Outcome(job, error="it broke")
                continue
            Path(job.out).parent.mkdir(exist_ok=True)
            Path(job.out).write_text("{}")
            yield Outcome(job, {"score": Record("score", 10.0 * job.parameters.get("depth", 1) + job.parameters.get("seed", 0))}, 1.5)

    monkeypatch.setattr(module, "run_jobs", pretend)
    return given


def test_values_of_every_declared_kind_travel_to_the_page(tmp_path: Path) -> None:
    sources = ["from enum import Enum\nfrom pathlib import Path\nclass Mode(Enum):\n    FAST = 1\n    SLOW = 2", "mode: Mode = Mode.FAST\ndata: Path = Path('a')\nshares: tuple[float, ...] = (0.5,)"]
    sources += ["from adaptkit.notebooks.records import record\nassert type(mode) is Mode and isinstance(data, Path) and type(shares) is tuple\nrecord('score', mode.value + len(shares))"]
    cells = [new_code_cell(s) for s in sources]
    cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=cells, metadata=SPEC), tmp_path / "page.ipynb")
    grid = grid_from_text(["mode=SLOW", "shares=(0.5,0.5),(1.0,)", "data=b"], tmp_path / "page.ipynb")
    found = sweep(tmp_path / "page.ipynb", tmp_path / "out", grid, budget=Budget(cores=2, memory_mib=4096, gpus=0))
    assert [row.error for row in found.rows] == ["", ""] and [row.records["score"].value for row in found.rows] == [4, 3]


def test_a_real_sweep_keeps_every_copy_and_shows_failures(page: Path, tmp_path: Path) -> None:
    found = sweep(page, tmp_path / "out", {"depth": [1, 3], "seed": [0, 1]}, budget=Budget(cores=2, memory_mib=4096, gpus=0))
    assert [row.parameters for row in found.rows] == [{"depth": d, "seed": s} for d in (1, 3) for s in (0, 1)]
    assert [row.records["score"].value if row.records else None for row in found.rows] == [10, 11, None, None]
    assert all("AssertionError" in row.error for row in found.rows[2:])
    names = [f"depth={d},seed={s}.ipynb" for d in (1, 3) for s in (0, 1)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([*names, "sweep.json", "sweep.png", "table.csv"])
    copy = nbformat.read(tmp_path / "out" / names[1], as_version=4)
    assert dict(copy.metadata.papermill.parameters) == {"depth": 1, "seed": 1}
    table = list(csv.DictReader((tmp_path / "out/table.csv").open()))
    assert [row["score"] for row in table] == ["10.0", "11.0", "", ""] and "AssertionError" in table[3]["error"]
    assert (tmp_path / "out/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert repr(found) == "Sweep(page.ipynb: 4 combinations, 2 failed)"
    text = found._repr_html_()
    assert text.count("<tr>") == 5 and "<b>11</b>" in text and "AssertionError" in text


def test_only_what_is_missing_failed_or_changed_runs_again(page: Path, tmp_path: Path, ran: list[dict[str, Any]]) -> None:
    grid = {"depth": [1, 2, 3], "seed": [0, 1]}
    first = sweep(page, tmp_path / "out", grid)
    assert first.ran == len(ran) == 6
    second = sweep(page, tmp_path / "out", grid)
    assert ran[6:] == [{"depth": 3, "seed": 0}, {"depth": 3, "seed": 1}] and second.rows == first.rows and second.ran == 2
    (tmp_path / "out/depth=1,seed=1.ipynb").unlink()
    assert sweep(page, tmp_path / "out", {"depth": [1], "seed": [0, 1]}).ran == 1
    assert sweep(page, tmp_path / "out", {"depth": [1, 2], "seed": [0, 1, 2]}).ran == 2, "rows that were not asked for are remembered"
    assert sweep(page, tmp_path / "out", {"depth": [1, 2], "seed": [0]}, again=True).ran == 2
    assert sweep(page, tmp_path / "out", {"depth": [1, 2], "seed": [0]}, parameters={"rate": 0.5}).ran == 2
    assert ran[-1] == {"rate": 0.5, "depth": 2, "seed": 0}
    page.write_text(page.read_text().replace("10 * depth", "20 * depth"))
    assert sweep(page, tmp_path / "out", {"depth": [1, 2], "seed": [0]}, parameters={"rate": 0.5}).ran == 2


def test_a_sweep_that_is_broken_off_goes_on(page: Path, tmp_path: Path, ran: list[dict[str, Any]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        sweep(page, tmp_path / "out", {"depth": [1, 2, 99]})
    assert len(json.loads((tmp_path / "out/sweep.json").read_text())["rows"]) == 2
    assert sweep(page, tmp_path / "out", {"depth": [1, 2, 4]}).ran == 1


def test_values_get_the_declared_types(page: Path) -> None:
    grid = grid_from_text(["rate=1e-4,1e-3", "depth=-1..1,7", "name=a,0.5", "seed=0..4"], page)
    assert grid == {"rate": [1e-4, 1e-3], "depth": [-1, 0, 1, 7], "name": ["a", "0.5"], "seed": [0, 1, 2, 3, 4]}
    assert [list(v) for v in grid_from_text(["shares=(0.5,0.5),(0.7,0.3)"], page)["shares"]] == [[0.5, 0.5], [0.7, 0.3]]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["sed=1"], "Did you mean 'seed'"),
        (["seed"], "lacks its values"),
        (["seed="], "lacks its values"),
        (["seed=4..0"], "write the smaller number first"),
        (["seed=0.5"], "seed"),
        (["seed=1", "seed=2"], "has two grids"),
    ],
)
def test_wrong_grids_are_told(texts: list[str], words: str, page: Path) -> None:
    with pytest.raises(AdaptkitError, match=words):
        grid_from_text(texts, page)


@pytest.mark.parametrize(
    ("grid", "words"),
    [({}, "grid is empty"), ({"seed": []}, "at least one value"), ({"name": "abc"}, "give a list"), ({"seed": [1, 1]}, "same value twice"), ({"sed": [1]}, "Did you mean 'seed'"), ({"seed": ["x"]}, "seed")],
)
def test_a_sweep_refuses_before_it_runs(grid: dict[str, Any], words: str, page: Path, tmp_path: Path, ran: list[dict[str, Any]]) -> None:
    with pytest.raises(AdaptkitError, match=words):
        sweep(page, tmp_path / "out", grid)
    assert not ran and not (tmp_path / "out").exists()


def test_a_folder_belongs_to_one_page(page: Path, tmp_path: Path, ran: list[dict[str, Any]]) -> None:
    sweep(page, tmp_path / "out", {"seed": [0]})
    other = tmp_path / "other.ipynb"
    other.write_text(page.read_text())
    with pytest.raises(AdaptkitError, match="holds a sweep of page.ipynb"):
        sweep(other, tmp_path / "out", {"seed": [0]})
    with pytest.raises(AdaptkitError, match="seed: given as a fixed value and in the grid"):
        sweep(page, tmp_path / "out", {"seed": [0]}, parameters={"seed": 1})
    for damage in ("{", "[]", '{"page": "page.ipynb", "rows": [1], "earlier": []}'):
        (tmp_path / "out/sweep.json").write_text(damage)
        with pytest.raises(AdaptkitError, match="sweep.json"):
            sweep(page, tmp_path / "out", {"seed": [0]})


def test_names_tell_and_differ(page: Path) -> None:
    assert telling({"rate": 1e-4, "seed": 0, "name": None}) == "rate=0.0001,seed=0,name=None"
    odd = [telling({"name": v}) for v in ("a/b", "a b", "a\\b", "..", "ä" * 200, "ä" * 201, "x" * 500)]
    assert len(set(odd)) == len(odd) and not any(set("/\\ ") & set(name) for name in odd) and max(len(n.encode()) for n in odd) < 200
    assert [*combinations(page, {"depth": [1, 2], "seed": [0, 1]})][1] == "depth=1,seed=1"


def test_parted() -> None:
    assert parted("a,'b,c',[1,2]") == ["a", "'b,c'", "[1,2]"] and parted("0..2") == ["0", "1", "2"] and parted("1.5") == ["1.5"]


def rows(**grid: list[Any]) -> list[Row]:
    "Rows of a full grid; those with `mode` = 'bad' have failed."
    names, found = [*grid], [{}]
    for name in names:
        found = [{**one, name: value} for one in found for value in grid[name]]
    return [Row(one, "", "", {} if one.get("mode") == "bad" else {"r": Record("r", float(i), "s", False, {"none": 3.0})}, 0.0, None, None, "broke" * (one.get("mode") == "bad")) for i, one in enumerate(found)]


@pytest.mark.parametrize(
    ("grid", "x", "scale"),
    [
        ({"rate": [1e-4, 1e-3, 1e-2], "seed": [0, 1, 2, 3, 4]}, "rate", "log"),
        ({"depth": [1, 2, 3], "mode": ["a", "b", "c", "bad"]}, "depth", "linear"),
        ({"mode": ["a", "bad"], "seed": [0, 1]}, "mode", "linear"),
        ({"seed": [0, 1, 2]}, "seed", "linear"),
        ({"flag": [True, False], "other": [None, "x", 2]}, "other", "linear"),
        ({"mode": ["bad"]}, "mode", "linear"),
    ],
)
def test_every_grid_has_a_picture(grid: dict[str, list[Any]], x: str, scale: str) -> None:
    made = rows(**grid)
    (ax,) = draw(made, ["r"] if any(r.records for r in made) else []).axes
    assert ax.get_xlabel() == x == along(grid) and ax.get_xscale() == scale
    assert [t.get_text() for t in ax.get_xticklabels()] == [f"{v:g}" if x in ("rate", "depth", "seed") else str(v) for v in grid[x]]
    assert ("failed" in ax.get_legend_handles_labels()[1]) == ("bad" in grid.get("mode", []))


def test_means_and_spread_are_those_of_the_seeds() -> None:
    (ax,) = draw(rows(rate=[0.1, 0.5], seed=[0, 1, 2]), ["r"]).axes
    bars = ax.containers[0]
    assert list(bars[0].get_ydata()) == [1.0, 4.0]
    assert [list(ends[:, 1]) for ends in bars[2][0].get_segments()] == [[0.0, 2.0], [3.0, 5.0]]
    assert ax.get_title() == "r (s): lower is better"


def test_an_unknown_record_is_named(page: Path, tmp_path: Path, ran: list[dict[str, Any]]) -> None:
    found = sweep(page, tmp_path / "out", {"seed": [0, 1]})
    assert found.figure("score").axes[0].get_title().startswith("score")
    with pytest.raises(AdaptkitError, match="Did you mean 'score'"):
        found.figure("scor")
    assert not logarithmic([-1, 1, 100]) and not logarithmic([5])


def test_runs_of_a_page_that_writes_get_folders_of_their_own(tmp_path: Path, ran: list[dict[str, Any]]) -> None:
    cell = new_code_cell("rate = 0.1\nout = 'runs/page'")
    cell.metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=[cell], metadata=SPEC), tmp_path / "writes.ipynb")
    sweep(tmp_path / "writes.ipynb", tmp_path / "own", {"rate": [1.0, 2.0]})
    assert [given.pop("out") for given in ran] == [str(tmp_path / "own/rate=1.0"), str(tmp_path / "own/rate=2.0")]
    ran.clear()
    sweep(tmp_path / "writes.ipynb", tmp_path / "told", {"rate": [1.0, 2.0]}, parameters={"out": "here"})
    assert [given["out"] for given in ran] == ["here", "here"]


@pytest.mark.slow
def test_seeds_that_are_recorded_at_once_never_meet(tmp_path: Path) -> None:
    from adaptkit.notebooks.check import Suite, record_baseline

    work = "from pathlib import Path\nimport time\nplace = Path(out)\nplace.mkdir(parents=True)\n(place / 'seed').write_text(str(seed))\ntime.sleep(1)"
    sources = ["seed = 0\nout = 'runs/page'", work, "from adaptkit.notebooks.records import record\nrecord('read', int((place / 'seed').read_text()), trivial={'nothing': -50})"]
    cells = [new_code_cell(s) for s in sources]
    cells[0].metadata["tags"] = ["parameters"]
    (tmp_path / "pages").mkdir()
    nbformat.write(new_notebook(cells=cells, metadata=SPEC), tmp_path / "pages/page.ipynb")
    suite = Suite(tmp_path / "pages", baselines=tmp_path / "baselines", out=tmp_path / "out", root=tmp_path)
    learnt = record_baseline(suite, Path("page.ipynb"), seeds=3, budget=Budget(cores=2))
    assert learnt.records["read"].values == (0.0, 1.0, 2.0)
    assert not (tmp_path / "pages/runs").exists() and "out" not in learnt.parameters


def test_what_is_preloaded_changes_no_result(page: Path, tmp_path: Path, ran: list[dict[str, Any]]) -> None:
    sweep(page, tmp_path / "s", {"depth": [1, 2]})
    assert sweep(page, tmp_path / "s", {"depth": [1, 2]}, preload=["json"]).ran == 0 and len(ran) == 2
