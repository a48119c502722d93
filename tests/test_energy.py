"Energy: counters as Linux lays them out, overflow, and where it appears once it can be read."

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adaptkit.core.registry import AdaptkitError
from adaptkit.distillation import costs as module
from adaptkit.distillation.costs import Choice, costs
from adaptkit.distillation.energy import Counter, counters, energies
from adaptkit.distillation.lineage import lineage_page, read_lineage
from adaptkit.heads.heads import Named, build_model

def lay(place: Path, name: str, kind: str, value: int = 0, most: int = 2**32) -> Path:
    (place / name).mkdir()
    for file, text in (("name", kind), ("energy_uj", value), ("max_energy_range_uj", most)):
        (place / name / file).write_text(f"{text}\n")
    return place / name / "energy_uj"


class Hungry(nn.Linear):
    "Draws a millijoule for each question."

    def __init__(self, file: Path) -> None:
        super().__init__(2, 2)
        self.file = file

    def example(self, n: int) -> Tensor:
        return torch.zeros(n, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) == 1 and torch.is_inference_mode_enabled()
        self.file.write_text(str((int(self.file.read_text()) + 1000) % (2**32 + 1)))
        return super().forward(x)


def test_only_whole_processors_are_counted(tmp_path: Path) -> None:
    whole = [lay(tmp_path, "intel-rapl:0", "package-0"), lay(tmp_path, "intel-rapl:1", "package-1")]
    lay(tmp_path, "intel-rapl:0:0", "core")
    lay(tmp_path, "intel-rapl:2", "psys")
    lay(tmp_path, "intel-rapl-mmio:0", "package-0")
    assert [c.file for c in counters(tmp_path)] == whole
    whole[0].unlink()
    whole[0].mkdir()  # is there, and can't be read
    assert [c.file for c in counters(tmp_path)] == whole[1:]


@pytest.mark.parametrize("before, now, counted", [(5, 5, 0), (5, 9, 4), (98, 3, 6), (100, 0, 1)])
def test_a_counter_that_begins_anew_loses_nothing(before: int, now: int, counted: int, tmp_path: Path) -> None:
    file = tmp_path / "energy_uj"
    file.write_text(f"{now}\n")
    assert Counter(file, 100).since(before) == counted


@pytest.mark.parametrize("start", [0, 2**32 - 2500])
def test_what_was_drawn_is_divided_by_the_answers(start: int, tmp_path: Path) -> None:
    network = Hungry(lay(tmp_path, "intel-rapl:0", "package-0", start))
    assert energies({"a": network, "b": network}, rounds=2, seconds=0.01, place=tmp_path) == {"a": 1.0, "b": 1.0}


def test_without_counters_there_is_no_number(tmp_path: Path) -> None:
    assert energies({"a": nn.Linear(1, 1)}, place=tmp_path) is None and counters(tmp_path / "nowhere") == ()
    for wrong in ({"rounds": 0}, {"seconds": 0.0}):
        with pytest.raises(AdaptkitError, match="above 0"):
            energies({}, place=tmp_path, **wrong)


def test_costs_and_the_lineage_report_show_it_once_it_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {who: build_model("small_cnn", Named(("a", "b")), size=18, seed=0) for who in ("teacher", "alone", "distilled")}
    for used in (None, {"teacher": 7.125, "alone": 2.0, "distilled": 1.5}):
        monkeypatch.setattr(module, "energies", lambda *_, used=used, **__: used)
        found = costs(models, rounds=6)
        assert [c.millijoules for c in found] == (list(used.values()) if used else [None] * 3)
        assert ("mJ" in Choice(tuple(found)).table()) == bool(used)
        score = {who: {"name": "accuracy", "value": 0.5, "low": 0.4, "high": 0.6, "n": 9} for who in models}
        gain = {"value": 0.0, "low": -0.1, "high": 0.1, "seeds": [0.0]}
        told = {c.name: c.to_json() for c in found}
        report = read_lineage({"data": "few", "n": 9, "lines": {"accuracy": score}, "gains": {"accuracy": gain}, "costs": told, "remarks": []})
        rows = {r["in %"]: r for r in report.rows()}
        assert rows["mJ"]["teacher"] == "7.125" if used else "mJ" not in rows
        assert ("whole processor drew" if used else "no counter of the processor") in lineage_page(report)
        assert [dataclasses.asdict(c) for c in report.costs.values()] == list(told.values())
