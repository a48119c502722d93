"""Our maps beside those of captum and grad-cam, in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import oracles
import pytest
from compare_explanations import PINS

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def rows_of(script: str) -> list[dict[str, object]]:
    "What a script prints, one row for each pair."
    try:
        python = oracles.interpreter(PINS)
    except RuntimeError as e:
        pytest.skip(f"NOT COMPARED: {e}")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(python), str(ROOT / "tests" / script)], capture_output=True, text=True, env=env)
    assert done.stdout, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_maps_are_those_of_the_others() -> None:
    rows = rows_of("compare_explanations.py")
    assert len(rows) == 25 and all(row["apart"] <= 1e-4 for row in rows), rows


def test_values_of_words_are_captums() -> None:
    rows = rows_of("compare_texts.py")
    assert len(rows) == 5 and all(row["apart"] <= 1e-4 for row in rows), rows
