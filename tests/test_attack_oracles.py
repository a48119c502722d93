"""Our attacks beside those of torchattacks, foolbox, ART, adv-lib and the published ensemble, in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import oracles
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python() -> Path:
    "The Python with the other packages; without a registry there is nothing to compare with."
    try:
        return oracles.interpreter()
    except RuntimeError as e:
        pytest.skip(f"NOT COMPARED: {e}")


def compared(python: Path, *arguments: str) -> list[dict[str, Any]]:
    "The lines of tests/compare_attacks.py."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(python), str(ROOT / "tests/compare_attacks.py"), *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_single_run_is_the_same_to_the_last_pixel(python: Path) -> None:
    rows = compared(python, "--only", "single")
    assert len(rows) == 4
    for row in rows:
        assert row["apart"] <= 1e-5 < row["moved"], row


def test_robust_accuracy_is_that_of_the_others(python: Path) -> None:
    rows = compared(python, "--images", "100", "--steps", "30", "--targets", "3", "--queries", "100", "--only", "FGSM", "PGD-20", "APGD-CE", "APGD-T", "FAB-T", "ensemble")
    assert len(rows) == 24
    for row in rows:
        others = [v["accuracy"] for k, v in row.items() if isinstance(v, dict) and k != "ours"]
        allowed = 0.011 if row["attack"] in ("ensemble", "FGSM") else 0.021  # one image of a hundred, or two where the starts are random
        assert row["ours"]["accuracy"] <= min(others) + allowed, row  # lower is stronger


def test_square_finds_what_the_published_one_finds(python: Path) -> None:
    rows = compared(python, "--images", "100", "--queries", "400", "--only", "Square")
    assert len(rows) == 4
    for row in rows:
        assert abs(row["ours"]["accuracy"] - row["published"]["accuracy"]) <= 0.08, row  # two random searches


def test_the_ensemble_asks_no_more_than_the_budget_allows(python: Path) -> None:
    (row,) = compared(python, "--only", "network", "--models", "1", "--norms", "linf", "--images", "20", "--steps", "10", "--targets", "2", "--queries", "50")
    climbs, walks = 3 * 11, 2 * 10  # each image: one run of APGD, two towards targets, two walks
    assert 20 <= row["gradients"] <= 20 * (climbs + walks) + 10, row
    assert 20 * 50 / 4 <= row["looks"] <= 20 * (50 + walks + 20), row
    assert 0 < row["network_seconds"] < row["processor_seconds"], row


def test_smallest_changes_are_as_small_as_those_of_the_others(python: Path) -> None:
    rows = compared(python, "--images", "50", "--norms", "l2", "--only", "DeepFool", "C&W")
    assert len(rows) == 4
    for row in rows:
        ours, others = row["ours"], [v for k, v in row.items() if isinstance(v, dict) and k != "ours"]
        assert 0 < ours["median_length"] <= 1.02 * min(o["median_length"] for o in others), row
        assert ours["accuracy"] <= min(o["accuracy"] for o in others) + 0.021, row  # of the images within the radius of the other attacks
