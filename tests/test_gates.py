"""Gates: the promised rate of false alarms, refusals when recording, baselines on disk, verdicts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from adaptkit.core.registry import AdaptkitError
from adaptkit.notebooks import gates
from adaptkit.notebooks.baselines import (
    Baseline,
    Measured,
    baseline_path,
    interval,
    learn,
    read_baseline,
    resolution,
    write_baseline,
)
from adaptkit.notebooks.gates import Verdict, judge
from adaptkit.notebooks.records import Record

PAGE = "4_training/page.ipynb"
VALUES = (0.951, 0.945, 0.957, 0.949, 0.953)


def runs(values: tuple[float, ...] = VALUES, *, trivial: dict[str, float] | None = None, **extra: Any) -> dict[int, dict[str, Record]]:
    "Runs of a page with one number that scatters, a count, and a time."
    useless = {"majority class": 0.6} if trivial is None else trivial
    return {
        seed: {
            "accuracy": Record("accuracy", v, trivial=useless, **extra),
            "rows": Record("rows", 449),
            "duration": Record("duration", 2.0 + seed, "s", higher_is_better=False),
        }
        for seed, v in enumerate(values)
    }


@pytest.fixture
def baseline() -> Baseline:
    return learn(runs(), page=PAGE, parameters={"epochs": 3}, seconds=(1.0,) * 5)


@pytest.mark.parametrize("n", [3, 5, 20])
@pytest.mark.parametrize("rate", [0.001, 0.01, 0.2])
def test_the_interval_is_that_of_the_textbook(n: int, rate: float) -> None:
    x = np.random.default_rng(n).normal(3, 2, n)
    wanted = stats.t.interval(1 - rate, n - 1, x.mean(), x.std(ddof=1) * math.sqrt(1 + 1 / n))
    assert interval(x.tolist(), rate) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(("n", "rate"), [(3, 0.05), (5, 0.01), (10, 0.002)])
def test_the_stated_rate_of_false_alarms_is_kept(n: int, rate: float) -> None:
    rng, pages = np.random.default_rng(n), 20_000
    x = rng.normal(0.9, 0.02, (pages, n + 1))
    alarms = 0
    for row in x.tolist():
        low, high = interval(row[:-1], rate)
        alarms += not low <= row[-1] <= high
    low, high = stats.binom.interval(0.999, pages, rate)
    assert low <= alarms <= high


@pytest.mark.parametrize("shared", [0.0, 0.9], ids=["independent", "moving together"])
def test_a_page_with_many_gates_keeps_its_rate(shared: float) -> None:
    rng, pages, gated = np.random.default_rng(1), 3000, 6
    common = rng.normal(size=(pages, 6, 1)) * math.sqrt(shared)
    x = 1 + 0.01 * (common + rng.normal(size=(pages, 6, gated)) * math.sqrt(1 - shared))
    alarms = 0
    for page in x:
        made = Baseline("p.ipynb", "cpu", tuple(range(5)), {str(g): Measured(tuple(page[:5, g].tolist())) for g in range(gated)}, rate=0.05)
        new = {str(g): Record(str(g), float(page[5, g])) for g in range(gated)}
        alarms += not all(v.passed for v in judge(new, made))
    assert alarms <= stats.binom.interval(0.999, pages, 0.05)[1]
    assert alarms > 0


def test_twenty_fresh_seeds_of_a_real_page() -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.naive_bayes import GaussianNB

    x, y = load_digits(return_X_y=True)

    def page(seed: int) -> dict[str, Record]:
        a, b, c, d = train_test_split(x, y, train_size=400, random_state=seed)
        model = GaussianNB().fit(a, c)
        loss = float(-np.log(model.predict_proba(b)[np.arange(len(d)), d] + 1e-6).mean())
        return {"accuracy": Record("accuracy", float(model.score(b, d))), "loss": Record("loss", loss, "nats", higher_is_better=False)}

    learnt = learn({s: page(s) for s in range(5)}, page="p.ipynb")
    alarms = sum(not all(v.passed for v in judge(page(s), learnt)) for s in range(100, 120))
    assert alarms <= stats.binom.interval(0.999, 20, 0.01)[1]


def test_numbers_without_spread() -> None:
    assert interval([449.0] * 5) == (449, 449) and interval([0.0] * 3) == (0, 0)
    low, high = interval([0.7123] * 5)
    assert 0.7123 - low == pytest.approx(resolution(0.7123)) and high - low < 1e-3 * 0.7123
    tiny = [0.7123 + i * 1e-12 for i in range(5)]
    assert interval(tiny)[1] - interval(tiny)[0] == pytest.approx(2 * resolution(0.7123))


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_in_any_order_stay_within_the_resolution(sign: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = (sign * rng.exponential(size=100_000)).astype(np.float32)
        sums = [float(np.cumsum(x[rng.permutation(len(x))], dtype=np.float32)[-1]) / len(x) for _ in range(5)]
        assert 0 < max(sums) - min(sums) <= resolution(sums[0])


def test_numbers_without_spread_take_no_share_of_the_rate(baseline: Baseline) -> None:
    assert baseline.limits()["accuracy"] == interval(VALUES, 0.01)
    assert "duration" not in baseline.limits() and baseline.limits()["rows"] == (449, 449)
    assert gates.interval is interval


@pytest.mark.parametrize("bad", [(1.0,), ()])
def test_too_little_for_an_interval(bad: tuple[float, ...]) -> None:
    with pytest.raises(AdaptkitError, match="at least two"):
        interval(bad)
    with pytest.raises(AdaptkitError, match="rate"):
        interval([1.0, 2.0], 1.5)


LOSSES = (0.21, 0.22, 0.2, 0.215, 0.205)
USELESS: list[tuple[tuple[float, ...], float, dict[str, Any]]] = [
    (VALUES, 0.95, {}),  # inside
    (VALUES, 0.99, {}),  # above
    (VALUES, interval(VALUES, 0.01)[0], {}),  # at the lower end
    (LOSSES, 0.1, {"higher_is_better": False}),  # a better loss
    (LOSSES, interval(LOSSES, 0.01)[1], {"higher_is_better": False}),  # at the upper end
]


@pytest.mark.parametrize(("values", "useless", "extra"), USELESS)
@pytest.mark.parametrize("model", ["majority class", "untrained head", "permuted labels"])
def test_a_gate_that_a_useless_model_would_pass_is_refused(values: tuple[float, ...], useless: float, extra: dict[str, Any], model: str) -> None:
    with pytest.raises(AdaptkitError, match=f"{PAGE}: a gate on 'accuracy' .* would let '{model}' pass"):
        learn(runs(values, trivial={model: useless}, **extra), page=PAGE)


@pytest.mark.parametrize("lucky", range(5))
def test_one_lucky_seed_of_a_useless_model_is_enough(lucky: int) -> None:
    found = runs()
    found[lucky]["accuracy"] = replace(found[lucky]["accuracy"], trivial={"majority class": 0.95})
    with pytest.raises(AdaptkitError, match="would let"):
        learn(found, page=PAGE)


def test_a_useless_model_on_the_worse_side_is_fine() -> None:
    low, high = interval(LOSSES, 0.01)
    learn(runs(LOSSES, trivial={"untrained head": high + 1e-6}, higher_is_better=False), page=PAGE)
    learn(runs(trivial={"untrained head": interval(VALUES, 0.01)[0] - 1e-6}), page=PAGE)


def test_what_cannot_be_learnt() -> None:
    with pytest.raises(AdaptkitError, match="at least 3 different seeds"):
        learn({s: r for s, r in runs().items() if s < 2}, page=PAGE)
    with pytest.raises(AdaptkitError, match="at least 3 different seeds"):
        learn({}, page=PAGE)
    some = runs()
    del some[3]["rows"]
    with pytest.raises(AdaptkitError, match="rows with some seeds only .seed 3."):
        learn(some, page=PAGE)
    other = runs()
    other[2]["rows"] = Record("rows", 449, "nats")
    with pytest.raises(AdaptkitError, match="'rows' has another unit"):
        learn(other, page=PAGE)
    with pytest.raises(AdaptkitError, match="nothing that a gate could guard"):
        learn({s: {"duration": r["duration"]} for s, r in runs().items()}, page=PAGE)


def test_round_trip_and_several_profiles(tmp_path: Path, baseline: Baseline) -> None:
    path = write_baseline(baseline, tmp_path)
    gpu = replace(baseline, profile="gpu", seeds=(5, 6, 7, 8, 9))
    assert write_baseline(gpu, tmp_path) == path == tmp_path / "cpu/4_training/page.json"
    assert read_baseline(tmp_path, "cpu", PAGE) == baseline
    assert read_baseline(tmp_path, "cpu", PAGE, profile="gpu") == gpu
    write_baseline(replace(baseline, rate=0.02), tmp_path)
    assert read_baseline(tmp_path, "cpu", PAGE).rate == 0.02 and read_baseline(tmp_path, "cpu", PAGE, profile="gpu") == gpu
    assert baseline.versions["torch"] and baseline.date and "2 gates from 5 seeds" in repr(baseline)


@pytest.mark.parametrize("there", [None, "NVIDIA-H100-80GB-HBM3"])
def test_no_baseline_for_this_hardware(tmp_path: Path, baseline: Baseline, there: str | None) -> None:
    if there:
        write_baseline(replace(baseline, hardware=there), tmp_path)
    with pytest.raises(AdaptkitError, match="no baseline for this hardware .cpu, profile smoke.*: record one") as e:
        read_baseline(tmp_path, "cpu", PAGE)
    assert (f"only for {there}" in str(e.value)) == bool(there)


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    "A change of the stored entry."

    def edit(text: str) -> str:
        value = json.loads(text)
        change(value["smoke"])
        return json.dumps(value)

    return edit


DAMAGE: dict[str, Callable[[str], str]] = {
    "cut off": lambda text: text[:-30],
    "empty": lambda text: "",
    "a list": lambda text: "[1, 2]",
    "no entries": lambda text: '{"smoke": 3}',
    "no seeds": edited(lambda e: e.pop("seeds")),
    "no records": edited(lambda e: e.update(records=None)),
    "unknown key": edited(lambda e: e.update(surprise=1)),
    "a value missing": edited(lambda e: e["records"]["accuracy"]["values"].pop()),
    "a value of text": edited(lambda e: e["records"]["accuracy"].update(values=["a", "b", "c", "d", "e"])),
    "not finite": edited(lambda e: e["records"]["accuracy"].update(values=[1, 2, 3, 4, float("nan")])),
    "a trivial value edited": edited(lambda e: e["records"]["accuracy"]["trivial"].update({"majority class": [0.95] * 5})),
    "a rate of two": edited(lambda e: e.update(rate=2)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_corrupt_baseline_is_an_error(tmp_path: Path, baseline: Baseline, damage: str) -> None:
    path = write_baseline(baseline, tmp_path)
    path.write_text(DAMAGE[damage](path.read_text()))
    with pytest.raises(AdaptkitError):
        read_baseline(tmp_path, "cpu", PAGE)


def test_a_write_that_fails_leaves_the_old_baseline(tmp_path: Path, baseline: Baseline, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_baseline(baseline, tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AdaptkitError, match="No space left"):
        write_baseline(replace(baseline, rate=0.5), tmp_path)
    assert read_baseline(tmp_path, "cpu", PAGE) == baseline and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("page", ["../../out.ipynb", "/etc/passwd.ipynb", "page.py", "page"])
def test_baselines_stay_in_their_folder(tmp_path: Path, page: str) -> None:
    with pytest.raises(AdaptkitError):
        baseline_path(tmp_path, "cpu", page)
    with pytest.raises(AdaptkitError):
        baseline_path(tmp_path, "..", "page.ipynb")


def test_verdicts(baseline: Baseline) -> None:
    fine = runs((0.95,))[0]
    assert [v.passed for v in judge(fine, baseline)] == [True] * 3
    low, high = baseline.limits()["accuracy"]

    def said(**changed: Record | None) -> tuple[bool, str]:
        found = {n: r for n, r in {**fine, **changed}.items() if r}
        (name,) = changed
        verdict = next(v for v in judge(found, baseline) if v.name == name)
        assert all(v.passed for v in judge(found, baseline) if v.name != name)
        return verdict.passed, verdict.why

    assert said(accuracy=Record("accuracy", low)) == (True, "") and said(accuracy=Record("accuracy", high)) == (True, "")
    assert said(accuracy=Record("accuracy", low - 1e-9))[1].startswith("worse than")
    assert "too good for chance" in said(accuracy=Record("accuracy", high + 1e-9))[1]
    assert said(accuracy=Record("accuracy", 0.95, trivial={"majority class": 0.95})) == (False, "no better than majority class, which gets 0.95")
    assert said(accuracy=Record("accuracy", 0.95, higher_is_better=False))[1].startswith("its unit or direction")
    assert said(accuracy=None) == (False, "it is not recorded any more") == said(duration=None)
    assert said(rows=Record("rows", 448)) == (False, "worse than exactly 449")
    assert said(duration=Record("duration", 1e6, "s", higher_is_better=False))[0]
    assert said(surprise=Record("surprise", 1)) == (False, "the baseline doesn't know it: record the page again")
    assert said(peak=Record("peak", 1, "MiB", higher_is_better=False))[0]


def test_directions_and_places() -> None:
    learnt = learn({s: {"loss": Record("loss", v, "nats", higher_is_better=False)} for s, v in enumerate(LOSSES)}, page=PAGE)
    (good,), (bad,) = (judge({"loss": Record("loss", v, "nats", higher_is_better=False)}, learnt) for v in (0.1, 0.3))
    assert "too good" in good.why and bad.why.startswith("worse") and good.place < -1 < 1 < bad.place
    assert Verdict("a", 2.0, 1.0, 1.0).place == math.inf and Verdict("a", 0.5, 1.0, 1.0).place == -math.inf and Verdict("a", 1.0, 1.0, 1.0).place == 0
    assert Verdict("a", None, 0.0, 1.0).place == 0 == Verdict("t", 3.0).place


def test_what_people_see(baseline: Baseline) -> None:
    verdicts = judge({**runs((0.4,))[0], "rows": Record("rows", 450)}, baseline)
    shown = gates.table(verdicts)
    assert list(shown.verdict) == ["FAILED", "FAILED", "passed"] and gates.draw(verdicts)._repr_png_().startswith(b"\x89PNG")
    assert str(verdicts[0]).startswith("FAILED  accuracy = 0.4: worse than")
