"""Our maps beside those of captum and grad-cam, and our measures of maps beside those of captum and quantus, in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import compare_explanations
import compare_faithfulness
import oracles
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
SCRIPTS = {"explanations": 25, "occlusion": 16, "texts": 5, "faithfulness": 14}  # how many numbers each compares


@pytest.mark.parametrize("name", list(SCRIPTS))
def test_numbers_are_those_of_the_others(name: str) -> None:
    try:
        python = oracles.interpreter((compare_faithfulness if name == "faithfulness" else compare_explanations).PINS)
    except RuntimeError as e:
        pytest.skip(f"NOT COMPARED: {e}")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(python), str(ROOT / f"tests/compare_{name}.py")], capture_output=True, text=True, env=env)
    assert done.stdout, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == SCRIPTS[name] and all(row["apart"] <= 1e-4 for row in rows), done.stdout + done.stderr[-2000:]
