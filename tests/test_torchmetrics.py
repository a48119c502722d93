"Metrics and calibration against torchmetrics, which lives in an environment of its own: here, each new process would import it."

from __future__ import annotations

import json
import subprocess
from importlib.util import find_spec
from typing import Any

import compare_metrics
import numpy as np
import oracles
import pytest
from test_calibration import drawn
from test_lineage import some
from test_metrics import CASES, make

from adaptkit.distillation.measures import calibration
from adaptkit.evaluation.calibration import calibration_error, tempered
from adaptkit.evaluation.metrics import METRICS, Predictions

METRIC_CALLS = {
    "accuracy": ("accuracy", {"average": "micro"}),
    "balanced_accuracy": ("accuracy", {"average": "macro"}),
    "f1": ("f1_score", {"average": "macro"}),
    "auroc": ("auroc", {"average": "macro"}),
}


def theirs(calls: list[tuple[str, Predictions, dict[str, Any]]]) -> list[float]:
    "What torchmetrics says."
    asked = [(name, p.probabilities.tolist(), p.labels.tolist(), options) for name, p, options in calls]
    try:
        python = oracles.interpreter(compare_metrics.PINS)
    except RuntimeError as e:
        pytest.skip(f"NOT COMPARED: {e}")
    command = [str(python), compare_metrics.__file__]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_metrics_are_those_of_torchmetrics() -> None:
    cases = [make(*case) for case in CASES]
    found = theirs([(name, p, options) for p in cases for name, options in METRIC_CALLS.values()])
    ours = [float(METRICS[name](p)) for p in cases for name in METRIC_CALLS]
    assert ours == pytest.approx(found, abs=1e-6)


def test_calibration_is_that_of_torchmetrics() -> None:
    cases = [(tempered(drawn(400), 1 / factor), bins) for factor in (0.3, 1, 4) for bins in (15, 4, 1)]
    more = [(some(0), bins) for bins in (15, 4)]
    found = theirs([("calibration_error", p, {"n_bins": bins}) for p, bins in cases + more])
    ours = [calibration_error(p, bins=bins) for p, bins in cases]
    shares = [float(calibration(p, bins=bins)(np.ones(len(p)))) for p, bins in more]
    assert ours + shares == pytest.approx(found, abs=1e-6)


def test_no_process_of_ours_imports_torchmetrics() -> None:
    if find_spec("lightning"):
        pytest.skip("Lightning, which needs it, has been installed for the benchmarks")
    assert find_spec("torchmetrics") is None, "lightning_fabric would import it in each new process"
