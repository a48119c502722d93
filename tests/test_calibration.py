"Calibration: a temperature that is known, and answers that can't be calibrated."

from __future__ import annotations

import numpy as np
import pytest

from adaptkit.core.registry import AdaptkitError
from adaptkit.evaluation.calibration import fit_temperature, reliability, tempered
from adaptkit.evaluation.metrics import Predictions

CLASSES = tuple("abcde")


def drawn(n: int = 3000, seed: int = 0) -> Predictions:
    "Answers that are calibrated to the point: classes drawn by their softmax."
    dice = np.random.default_rng(seed)
    z = 2 * dice.standard_normal((n, 5))
    shares = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return Predictions(z, (shares.cumsum(1) > dice.random((n, 1))).argmax(1), CLASSES)


@pytest.mark.parametrize("factor", [0.25, 1, 6])
def test_the_temperature_that_was_put_in_comes_out(factor: float) -> None:
    p = drawn()
    found = fit_temperature(tempered(p, 1 / factor))
    assert found == pytest.approx(factor * fit_temperature(p), rel=1e-3) and found == pytest.approx(factor, rel=0.06)


def test_it_is_the_bottom_of_the_valley_and_no_answer_changes() -> None:
    p = tempered(drawn(500), 0.2)
    best = fit_temperature(p)
    loss = [float(tempered(p, t).losses.mean()) for t in (best * 0.98, best, best * 1.02)]
    assert loss[1] < min(loss[0], loss[2]) and (tempered(p, best).predicted == p.predicted).all()


def test_shares_add_up() -> None:
    sure, right, share = reliability(drawn(100), bins=7)
    assert share.sum() == pytest.approx(1) and len(sure) == len(right) == len(share) <= 7


@pytest.mark.parametrize("right", [True, False])
def test_answers_that_are_all_right_or_all_wrong_are_refused(right: bool) -> None:
    z = np.eye(5)[np.arange(20) % 5]
    with pytest.raises(AdaptkitError, match="hasn't learnt from"):
        fit_temperature(Predictions(z, (np.arange(20) + (not right)) % 5, CLASSES))
    with pytest.raises(AdaptkitError, match="above 0"):
        tempered(Predictions(z, np.arange(20) % 5, CLASSES), 0.0)
