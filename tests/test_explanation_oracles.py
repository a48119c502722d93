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


@pytest.mark.parametrize(("script", "pairs"), [("compare_explanations", 25), ("compare_occlusion", 16), ("compare_texts", 5)])
def test_values_are_those_of_the_others(script: str, pairs: int) -> None:
    try:
        python = oracles.interpreter(PINS)
    except RuntimeError as e:
        pytest.skip(f"NOT COMPARED: {e}")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(python), str(ROOT / f"tests/{script}.py")], capture_output=True, text=True, env=env)
    assert done.stdout, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == pairs and all(row["apart"] <= 1e-4 for row in rows), done.stdout
