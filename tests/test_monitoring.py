"""What the monitor promises: exact levels, statistics that agree with other packages, and never being in the way of an answer."""

from __future__ import annotations

import json
import logging
import re
import threading
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, chi2_contingency, ks_2samp
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from adaptkit.core.registry import AdaptkitError
from adaptkit.deployment.drift import check_drift_test, dealt, drift_tests, judge, planted_pool, together
from adaptkit.deployment.monitor import Keeper, Monitor
from adaptkit.deployment.monitor_page import stored_windows, write_monitor
from adaptkit.deployment.quality import image_quality, outside, quality_ranges, text_quality
from adaptkit.deployment.readapt import adopt, adopted, rollback
from adaptkit.deployment.reference import Reference, make_reference, read_reference, softmax, write_reference
from adaptkit.deployment.store import Kept, StoreError, Window
from adaptkit.deployment.two_samples import (
    DRIFT_TESTS,
    KS,
    MMD,
    Pool,
    Settings,
    alikeness,
    class_gap,
    ks_gaps,
    left_out,
    mmd,
    told_apart,
)
from adaptkit.deployment.unlabelled import atc, atc_limit, doc, estimated

ROOT = Path(__file__).parents[1]
CLASSES = ("crack", "dust", "good")
MIXING = np.random.default_rng(1).standard_normal((6, 32))
WEIGHTS = np.random.default_rng(2).standard_normal((32, 3)) / 4


def drawn(rng: np.random.Generator, n: int, shift: float = 0.0) -> dict:
    "Features, logits and brightness of n requests."
    x = (rng.standard_normal((n, 6)) + shift) @ MIXING + 0.3 * rng.standard_normal((n, 32))
    return {"features": x, "logits": x @ WEIGHTS, "quality": {"brightness": rng.normal(0.5, 0.05, n)}}


def referenced(rng: np.random.Generator, n: int = 400, **how: object) -> Reference:
    "What is normal for them."
    valid = drawn(rng, n)
    labels = (valid["logits"] + rng.gumbel(size=(n, 3))).argmax(1)
    return make_reference(**valid, labels=labels, classes=CLASSES, **how)


class Memory:
    "A store in memory, which may be full."

    def __init__(self, full: bool = False) -> None:
        self.full, self.windows, self.kept = full, [], []

    def write(self, windows: Sequence[Window], kept: Sequence[Kept] = ()) -> None:
        if self.full:
            raise StoreError("No space left on device.")
        self.windows += windows
        self.kept += kept

    def read(self, model: str = "", *, last: int = 200) -> list[Window]:
        return self.windows[-last:]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def reference(rng: np.random.Generator) -> Reference:
    return referenced(rng)


# statistics, beside other packages


@pytest.mark.parametrize("ties", [False, True])
def test_ks_is_scipys(rng: np.random.Generator, ties: bool) -> None:
    x = rng.standard_normal((53, 4))
    x = x.round(1) if ties else x
    members = dealt(40, 13, permutations=5, rng=rng)
    theirs = [[ks_2samp(c[z], c[~z]).statistic for c in x.T] for z in members]
    assert np.allclose(ks_gaps(x, members), theirs, atol=1e-6)


def test_mmd_is_the_formula(rng: np.random.Generator) -> None:
    x, members, width = rng.standard_normal((31, 3)), dealt(20, 11, permutations=4, rng=rng), 1.7

    def k(i: int, j: int) -> float:
        return float(np.exp(-((x[i] - x[j]) ** 2).sum() / (2 * width**2)))

    def slowly(z: np.ndarray) -> float:
        a, b = np.flatnonzero(z), np.flatnonzero(~z)
        same = [np.mean([k(i, j) for i in g for j in g if i != j]) for g in (a, b)]
        return float(sum(same) - 2 * np.mean([k(i, j) for i in a for j in b]))

    assert np.allclose(mmd(alikeness(x, width), members), [slowly(z) for z in members], atol=1e-5)


def test_the_classifier_is_sklearns(rng: np.random.Generator) -> None:
    x, members = rng.standard_normal((37, 5)), dealt(25, 12, permutations=3, rng=rng)
    y = members.astype(float)
    theirs = np.array([cross_val_predict(Ridge(alpha=2.0), x, row, cv=LeaveOneOut()) for row in y])
    assert np.allclose(left_out(x, y, strength=2.0), theirs, atol=1e-8)
    said = theirs > (y.sum(1, keepdims=True) - y) / 36
    balanced = [(s[z].mean() + (~s)[~z].mean()) / 2 for s, z in zip(said, members, strict=True)]
    assert np.allclose(told_apart(x, members, strength=2.0), balanced)


def test_class_gap_is_scipys(rng: np.random.Generator) -> None:
    said, members = rng.integers(0, 4, 60), dealt(40, 20, permutations=3, rng=rng)
    theirs = [chi2_contingency([np.bincount(said[part], minlength=4) for part in (z, ~z)], correction=False).statistic for z in members]
    assert np.allclose(class_gap(said, members), theirs)


# levels


def test_the_level_holds_over_200_clean_windows(rng: np.random.Generator) -> None:
    tests, level, alarms = drift_tests([]), 0.05, 0
    for i in range(200):
        made, window = referenced(rng, 120, dims=8), drawn(rng, 20)
        out = outside(window["quality"], made.ranges, rows=20)["brightness"].astype(float)
        pool = made.pool(made.project(window["features"]), softmax(window["logits"]), out)
        alarms += judge(pool, 20, tests=tests, level=level, permutations=99, seed=i).alarm
    low, high = binom.interval(0.95, 200, level)
    assert low <= alarms <= high


def test_p_values_of_the_true_deal_are_as_uniform_as_they_can_be() -> None:
    statistics = np.random.default_rng(3).standard_normal((100, 4))
    found = sorted(together(np.roll(statistics, -i, axis=0))[0] for i in range(100))
    assert np.allclose(found, np.arange(1, 101) / 100)  # each deal has a rank of its own


def test_ties_are_never_in_favour_of_an_alarm() -> None:
    assert together(np.zeros((20, 3)))[0] == 1.0


@pytest.mark.parametrize(("level", "permutations"), [(0.01, 50), (0, 99), (1, 99)])
def test_levels_that_cannot_be_kept_are_refused(level: float, permutations: int) -> None:
    with pytest.raises(AdaptkitError, match="level"):
        judge(planted_pool(shift=0, seed=0), 40, tests=[KS()], level=level, permutations=permutations)


# the contract


def test_ours_are_entry_points_and_keep_the_contract() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["adaptkit.drift_test"]
    assert {*points} == {*DRIFT_TESTS}
    for name in DRIFT_TESTS:
        check_drift_test(DRIFT_TESTS[name])


@dataclass(frozen=True)
class Blind(Settings):
    "Sees nothing."

    name = "blind"

    def statistic(self, pool: Pool, members: np.ndarray) -> np.ndarray:
        return np.zeros(len(members))


class Short(Blind):
    def statistic(self, pool: Pool, members: np.ndarray) -> np.ndarray:
        return np.zeros(1)


class Meddler(Blind):
    def statistic(self, pool: Pool, members: np.ndarray) -> np.ndarray:
        pool.features[0] += 1
        return np.ones(len(members))


class ByOrder(Blind):
    def statistic(self, pool: Pool, members: np.ndarray) -> np.ndarray:
        return members @ np.arange(members.shape[1], dtype=float)


@pytest.mark.parametrize(("bad", "why"), [(Blind, "it noticed"), (Short, "shape"), (Meddler, "changed"), (ByOrder, "order of the rows")])
def test_the_contract_bites(bad: type, why: str) -> None:
    with pytest.raises(AdaptkitError, match=why):
        check_drift_test(bad)


def test_a_test_named_twice_and_an_unknown_one_are_refused() -> None:
    with pytest.raises(AdaptkitError, match="twice"):
        drift_tests(["ks", KS()])
    with pytest.raises(AdaptkitError, match="mmd"):
        drift_tests(["mdm"])
    with pytest.raises(AdaptkitError, match="width"):
        MMD(width=0)


# references


def test_a_reference_survives_its_files(reference: Reference, tmp_path: Path) -> None:
    write_reference(reference, tmp_path)
    again = read_reference(tmp_path)
    for name in ("centre", "directions", "features", "probabilities", "confidence", "right"):
        assert np.allclose(getattr(again, name), getattr(reference, name), atol=1e-5), name
    assert (again.classes, again.ranges, again.temperature, again.error) == (CLASSES, reference.ranges, 1.0, None)


def test_what_is_equal_stays_equal_in_a_file(rng: np.random.Generator, tmp_path: Path) -> None:
    some = drawn(rng, 300)
    some["logits"] = 40 * some["logits"]  # so sure that many probabilities are 1, but for rounding
    some["features"][::3] = some["features"][0]  # a third of the requests are one and the same
    some["logits"][::3] = some["logits"][0]
    made = make_reference(**some, labels=some["logits"].argmax(1), classes=CLASSES)
    write_reference(made, tmp_path)
    again, window = read_reference(tmp_path), {name: some[name][150:190] for name in ("features", "logits")}
    rows, p = again.project(window["features"]), softmax(window["logits"])
    pools = [r.pool(r.project(window["features"]), p, np.zeros(40)) for r in (made, again)]
    for name in ("features", "probabilities"):
        assert np.array_equal(getattr(pools[0], name), getattr(pools[1], name)), name
    same = (again.pool(rows, p, np.zeros(40)).features[:, None] == again.pool(rows, p, np.zeros(40)).features[-40:]).all(2)
    assert same[: len(made.features)].any(0).mean() > 0.3  # what is the same in both is found to be the same
    told = [judge(pool, 40, tests=drift_tests(["ks", "confidence"]), level=0.05, permutations=99).p for pool in pools]
    assert told[0] == told[1] > 0.05


def test_altered_mixed_and_newer_references_are_refused(rng: np.random.Generator, tmp_path: Path) -> None:
    for name in "ab":
        write_reference(referenced(rng), tmp_path / name)
    (tmp_path / "a/reference.safetensors").write_bytes((tmp_path / "b/reference.safetensors").read_bytes())
    with pytest.raises(AdaptkitError, match="isn't the one"):
        read_reference(tmp_path / "a")
    told = json.loads((tmp_path / "b/reference.json").read_text())
    (tmp_path / "b/reference.json").write_text(json.dumps(told | {"version": 2}))
    with pytest.raises(AdaptkitError, match="version 2"):
        read_reference(tmp_path / "b")
    (tmp_path / "b/reference.json").write_text("[]")
    with pytest.raises(AdaptkitError, match="version None"):
        read_reference(tmp_path / "b")


def test_bad_validation_data_are_refused(rng: np.random.Generator) -> None:
    valid, labels = drawn(rng, 100), np.arange(100) % 3
    with pytest.raises(AdaptkitError, match="NaN"):
        make_reference(np.full((100, 4), np.nan), valid["logits"], labels, classes=CLASSES)
    with pytest.raises(AdaptkitError, match="at least 60"):
        make_reference(valid["features"][:50], valid["logits"][:50], labels[:50], classes=CLASSES)
    with pytest.raises(AdaptkitError, match="same for every sample"):
        make_reference(np.ones((100, 4)), valid["logits"], labels, classes=CLASSES)
    with pytest.raises(AdaptkitError, match="brightness"):
        make_reference(valid["features"], valid["logits"], labels, classes=CLASSES, quality={"brightness": np.ones(3)})


# quality and estimates


def test_quality_finds_nan_black_and_empty() -> None:
    x = np.random.default_rng(0).random((40, 3, 20, 24), np.float32)
    ranges = quality_ranges(image_quality(x))
    x[3, 1, 4, 4], x[5] = np.nan, 0
    found = outside(image_quality(x), ranges, rows=40)
    assert {i for flags in found.values() for i in np.flatnonzero(flags)} == {3, 5}
    texts = text_quality(["some words here"] * 10)
    assert outside(text_quality(["", "some words here"]), quality_ranges(texts), rows=2)["words"].tolist() == [True, False]
    with pytest.raises(AdaptkitError, match="batch, channels"):
        image_quality(x[0])
    with pytest.raises(AdaptkitError, match="one each"):
        outside({"words": [1.0]}, {"words": (0, 1)}, rows=2)


def test_estimates_are_the_known_accuracy_on_what_they_know(reference: Reference) -> None:
    limit = atc_limit(reference.confidence, reference.right)
    assert atc(reference.confidence, limit) == pytest.approx(reference.accuracy, abs=1 / 400)
    assert doc(reference.confidence, reference) == pytest.approx(reference.accuracy)
    told = estimated(reference, np.full(10, 1.0))
    assert told.atc == 1 and told.low < 1
    wider = estimated(Reference(**{**vars(reference), "error": {"atc": 0.1, "doc": 0.1}}), np.full(10, 1.0))
    assert wider.low == pytest.approx(told.low - 0.1)


def test_a_model_that_is_never_wrong_has_a_limit() -> None:
    assert atc_limit(np.array([0.4, 0.9]), np.ones(2)) == 0.4 and atc_limit(np.array([0.4, 0.9]), np.zeros(2)) == np.inf


# the monitor


def watching(reference: Reference, store: object, **how: object) -> Monitor:
    return Monitor(reference, store, **{"window": 20, "level": 0.05, "permutations": 99, **how})


def test_no_request_is_lost_between_threads(reference: Reference) -> None:
    store = Memory()
    monitor = watching(reference, store, keep=True)
    some = drawn(np.random.default_rng(5), 7)

    def send() -> None:
        for _ in range(20):
            monitor.observe(**some)
            monitor.settle()

    threads = [threading.Thread(target=send) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    monitor.close()
    total = 6 * 20 * 7
    assert monitor.state()["monitor_requests_total"] == total
    assert sorted(w.number for w in store.windows) == list(range(total // 20)) and monitor.totals["dropped"] == 0
    assert all(w.rows == 20 and sum(w.counts) == 20 for w in store.windows)
    assert all(k.features.shape == (20, 32) and k.logits.shape == (20, 3) for k in store.kept)


def test_nothing_of_a_request_is_stored_unless_asked(reference: Reference) -> None:
    store = Memory()
    monitor = watching(reference, store)
    monitor.observe(**drawn(np.random.default_rng(5), 20))
    monitor.close()
    assert len(store.windows) == 1 and store.kept == []


def test_a_shift_is_noticed_and_somebody_is_told(reference: Reference) -> None:
    heard: list[Window] = []
    monitor = watching(reference, Memory(), on_alarm=heard.append)
    monitor.observe(**drawn(np.random.default_rng(5), 20, shift=3.0))
    monitor.settle()
    assert len(heard) == 1 and heard[0].alarm and heard[0].why and monitor.state()["drift_alarm"] == 1


def test_answers_that_are_no_numbers_are_counted_and_an_alarm(reference: Reference) -> None:
    monitor, some = watching(reference, Memory()), drawn(np.random.default_rng(6), 21)
    some["features"][4, 2] = np.nan
    monitor.observe(**some, unreadable=3)
    monitor.settle()
    w = monitor.recent[-1]
    assert (w.rows, w.broken, w.unreadable) == (20, 1, 3) and w.alarm


def test_a_model_that_says_no_numbers_any_more_is_an_alarm(reference: Reference) -> None:
    monitor, some = watching(reference, Memory()), drawn(np.random.default_rng(6), 1)
    for _ in range(50):
        monitor.observe(some["features"] * np.nan, some["logits"])
    monitor.settle()
    assert [(w.rows, w.broken, w.alarm) for w in monitor.recent] == [(0, 20, True)] * 2
    assert monitor.state()["drift_alarm"] == 1 and len(monitor._buffer.parts) == 1


def test_requests_that_cannot_be_read_make_a_quiet_window(reference: Reference) -> None:
    monitor, none = watching(reference, Memory()), {"features": np.zeros((0, 32)), "logits": np.zeros((0, 3))}
    for _ in range(45):
        monitor.observe(**none, unreadable=1)
    monitor.settle()
    assert [(w.rows, w.unreadable, w.alarm) for w in monitor.recent] == [(0, 20, False)] * 2


def test_what_fails_after_an_alarm_is_told_as_that(reference: Reference, caplog: pytest.LogCaptureFixture) -> None:
    def fail(window: Window) -> None:
        raise OSError("no mail today")

    monitor = watching(reference, store := Memory(), on_alarm=fail)
    with caplog.at_level(logging.ERROR, "adaptkit.monitor"):
        monitor.observe(**drawn(np.random.default_rng(5), 20, shift=3.0))
        monitor.settle()
    assert len(store.windows) == 1 and monitor.failed == 0 and "after the alarm" in caplog.text


@pytest.mark.parametrize("change", [{"features": np.ones((2, 31))}, {"logits": np.ones((2, 4))}, {"logits": np.ones((3, 3))}])
def test_arrays_of_another_model_are_refused(reference: Reference, change: dict) -> None:
    with pytest.raises(AdaptkitError, match="this model's reference"):
        watching(reference, Memory()).observe(**{**drawn(np.random.default_rng(5), 2), **change})


def test_a_faulty_test_does_not_end_the_watch(reference: Reference, caplog: pytest.LogCaptureFixture) -> None:
    class Bad(Blind):
        def statistic(self, pool: Pool, members: np.ndarray) -> np.ndarray:
            raise RuntimeError("a plugin's fault")

    monitor = watching(reference, Memory(), tests=[Bad()])
    for _ in range(2):
        monitor.observe(**drawn(np.random.default_rng(5), 20))
        monitor.settle()
    assert monitor.state()["monitor_failed_total"] == 2 and "a plugin's fault" in caplog.text


def test_a_full_disk_is_told_once_and_nothing_is_lost(reference: Reference, caplog: pytest.LogCaptureFixture) -> None:
    store, some = Memory(full=True), drawn(np.random.default_rng(5), 20)
    monitor = watching(reference, store)
    with caplog.at_level(logging.WARNING, "adaptkit.monitor"):
        for i in range(6):
            store.full = i < 4
            monitor.observe(**some)
            monitor.settle()
            assert monitor.state()["monitor_store_failing"] == (i < 4)
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 2 and "still answered" in told[0] and "works again" in told[1]
    assert [w.number for w in store.windows] == list(range(6))


def test_windows_that_wait_too_long_are_given_up_and_counted(reference: Reference) -> None:
    monitor = watching(reference, Memory(full=True))
    monitor.keeper = Keeper(monitor.keeper.store, most=2)
    for _ in range(4):
        monitor.observe(**drawn(np.random.default_rng(5), 20))
        monitor.settle()
    assert monitor.state()["monitor_windows_lost_total"] == 2 and len(monitor.keeper.waiting) == 2


def test_the_state_is_ready_for_prometheus(reference: Reference) -> None:
    monitor = watching(reference, Memory())
    before = monitor.state()
    monitor.observe(**drawn(np.random.default_rng(5), 20))
    monitor.settle()
    for state in (before, monitor.state()):
        assert all(re.fullmatch(r"[a-z_][a-z0-9_]*", k) and isinstance(v, float) and np.isfinite(v) for k, v in state.items())
    assert "accuracy_estimate" not in before and monitor.state().keys() > before.keys()


def test_windows_that_are_too_small_are_refused(reference: Reference) -> None:
    with pytest.raises(AdaptkitError, match="at least 10"):
        watching(reference, Memory(), window=5)


# the page


def test_the_page_is_one_file_and_escapes_names(rng: np.random.Generator, tmp_path: Path) -> None:
    valid = drawn(rng, 200)
    made = make_reference(**valid, labels=np.arange(200) % 3, classes=("<script>alert(1)</script>", "b", "c"))
    monitor = watching(made, Memory(), model="<b>model</b>")
    with pytest.raises(AdaptkitError, match="No window is over"):
        monitor.report(tmp_path)
    monitor.observe(**drawn(rng, 40))
    monitor.settle()
    text = monitor.report(tmp_path).read_text()
    assert "<b>model" not in text and "<script>" not in text and text.count("data:image/png") == 5
    assert len(json.loads((tmp_path / "monitor.json").read_text())["windows"]) == 2


def test_the_page_is_drawn_from_memory_where_the_store_is_away(reference: Reference, tmp_path: Path) -> None:
    class Away(Memory):
        def read(self, model: str = "", *, last: int = 200) -> list[Window]:
            raise StoreError("away")

    monitor = watching(reference, Away())
    monitor.observe(**drawn(np.random.default_rng(5), 20))
    monitor.settle()
    assert write_monitor(stored_windows(monitor), reference, tmp_path).is_file()


# adopting


def model_at(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(folder.name.encode())
    return folder


def test_adopting_is_seen_whole_and_can_be_undone(tmp_path: Path) -> None:
    one, two, link = model_at(tmp_path / "one"), model_at(tmp_path / "two"), tmp_path / "current"
    adopt(one, link)
    stop, seen, failed = threading.Event(), set(), []

    def read() -> None:
        while not stop.is_set():
            try:
                seen.add((link / "model.safetensors").read_bytes())
            except OSError as e:
                failed.append(e)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(100):
        adopt(two, link)
        assert rollback(link) == one
    stop.set()
    reader.join()
    assert failed == [] and seen <= {b"one", b"two"} and adopted(link) == [str(one)]
    with pytest.raises(AdaptkitError, match="no way back"):
        rollback(link)


def test_what_was_linked_by_hand_is_kept_too(tmp_path: Path) -> None:
    one, two, link = model_at(tmp_path / "one"), model_at(tmp_path / "two"), tmp_path / "current"
    link.symlink_to(one)
    adopt(two, link)
    adopt(two, link)
    assert rollback(link) == one and link.resolve() == one.resolve()


def test_adopting_refuses_what_is_no_model_or_no_link(tmp_path: Path) -> None:
    one = model_at(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdaptkitError, match=r"no model\.safetensors"):
        adopt(tmp_path / "empty", tmp_path / "current")
    with pytest.raises(AdaptkitError, match="not a link"):
        adopt(one, tmp_path / "empty")
    with pytest.raises(AdaptkitError, match="no link"):
        rollback(tmp_path / "empty")
