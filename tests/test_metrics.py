"Metrics, intervals and comparisons against scikit-learn and scipy."

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn import metrics as sk

from adaptkit.core.registry import AdaptkitError
from adaptkit.evaluation.compare import compare, crosstab, mcnemar
from adaptkit.evaluation.intervals import bootstrap, resampled, score, scores, wilson
from adaptkit.evaluation.metrics import METRICS, Predictions, auroc, balanced_accuracy, f1, remarks
from adaptkit.evaluation.pictures import confused_pairs, confusion, draw_errors, highest_losses

ABSENT = {"labels": lambda y, k: np.where(y == k - 1, 0, y), "none": lambda y, k: y}


def make(n: int, k: int, seed: int, *, absent: str = "none", ties: bool = False) -> Predictions:
    rng = np.random.default_rng(seed)
    y = ABSENT[absent](np.concatenate([np.arange(k), rng.integers(0, k, n - k)]), k)
    z = rng.normal(size=(n, k)) + 1.2 * np.eye(k)[y]
    return Predictions(np.round(z) if ties else z, y, tuple(f"class {i}" for i in range(k)))


CASES = [(37, 2, 0), (101, 3, 1), (257, 7, 2), (500, 40, 3)]


@pytest.mark.parametrize(("n", "k", "seed"), CASES)
@pytest.mark.parametrize("ties", [False, True])
def test_metrics_equal_scikit_learn(n: int, k: int, seed: int, ties: bool) -> None:
    p = make(n, k, seed, ties=ties)
    s = p.probabilities[:, 1] if k == 2 else p.probabilities
    expected = {
        "accuracy": sk.accuracy_score(p.labels, p.predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(p.labels, p.predicted),
        "f1": sk.f1_score(p.labels, p.predicted, average="macro"),
        "auroc": sk.roc_auc_score(p.labels, s, multi_class="ovr", average="macro"),
    }
    for name, value in expected.items():
        assert float(METRICS[name](p)) == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize(("n", "k", "seed"), CASES)
def test_weighted_metrics_equal_scikit_learn(n: int, k: int, seed: int) -> None:
    p, rng = make(n, k, seed, ties=True), np.random.default_rng(seed)
    weights = rng.random((4, n)) + 0.1
    s = p.probabilities[:, 1] if k == 2 else p.probabilities
    found = {name: METRICS[name](p, weights) for name in METRICS}
    for i, w in enumerate(weights):
        assert found["accuracy"][i] == pytest.approx(sk.accuracy_score(p.labels, p.predicted, sample_weight=w), abs=1e-6)
        assert found["balanced_accuracy"][i] == pytest.approx(sk.balanced_accuracy_score(p.labels, p.predicted, sample_weight=w), abs=1e-6)
        assert found["f1"][i] == pytest.approx(sk.f1_score(p.labels, p.predicted, average="macro", sample_weight=w), abs=1e-6)
        if k == 2:  # scikit-learn weighs the classes of several differently
            assert found["auroc"][i] == pytest.approx(sk.roc_auc_score(p.labels, s, sample_weight=w), abs=1e-6)


def test_a_class_absent_from_the_labels_is_left_out_and_said() -> None:
    p = make(60, 4, 5, absent="labels")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert float(balanced_accuracy(p)) == pytest.approx(sk.balanced_accuracy_score(p.labels, p.predicted), abs=1e-6)
        assert float(f1(p)) == pytest.approx(sk.f1_score(p.labels, p.predicted, average="macro"), abs=1e-6)
    each = [sk.roc_auc_score(p.labels == k, p.probabilities[:, k]) for k in range(3)]
    assert float(auroc(p)) == pytest.approx(np.mean(each), abs=1e-6)
    assert any("Nothing is labelled 'class 3'" in r for r in remarks(p))
    assert all(0 <= s.low <= s.value <= s.high <= 1 for s in scores(p, count=200).values())


def test_a_class_never_predicted_counts_as_zero_and_is_said() -> None:
    p = Predictions(np.eye(3)[[0, 0, 1, 1]], np.array([0, 2, 1, 2]), ("a", "b", "c"))
    assert float(balanced_accuracy(p)) == pytest.approx(sk.balanced_accuracy_score(p.labels, p.predicted), abs=1e-6)
    assert float(f1(p)) == pytest.approx(sk.f1_score(p.labels, p.predicted, average="macro", zero_division=0), abs=1e-6)
    assert any("'c' is never predicted" in r for r in remarks(p))


Z = np.eye(2)
BAD = [
    (np.zeros((0, 2)), np.zeros(0, int), ("a", "b"), "no predictions"),
    (np.array([[1.0, np.nan], [0, 1]]), np.array([0, 1]), ("a", "b"), "1 of 2 images are not finite (first: image 0)"),
    (np.array([[1.0, 0], [0, np.inf]]), np.array([0, 1]), ("a", "b"), "first: image 1"),
    (Z, np.array([0, 2]), ("a", "b"), "Label 2 of image 1 is out of range: 2 classes allow 0 to 1"),
    (Z, np.array([-1, 0]), ("a", "b"), "Label -1 of image 0"),
    (Z, np.array([0.0, 1.0]), ("a", "b"), "must be integers from 0 to 1, found float64"),
    (np.eye(3), np.array([0, 1, 1]), ("a", "b"), "shape (3, 3); 3 labels and 2 classes need (3, 2)"),
    (np.ones((2, 1)), np.array([0, 0]), ("a",), "at least two classes"),
]


@pytest.mark.parametrize(("logits", "labels", "classes", "words"), BAD)
def test_unusable_predictions_get_one_sentence(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], words: str) -> None:
    with pytest.raises(AdaptkitError) as e:
        Predictions(logits, labels, classes)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_one_class_has_no_auroc_but_an_accuracy() -> None:
    p = Predictions(np.eye(2), np.zeros(2, int), ("a", "b"))
    with pytest.raises(AdaptkitError, match="all 2 images are 'a'"):
        auroc(p)
    assert "auroc" not in scores(p, count=100) and any("AUROC does not exist" in r for r in remarks(p))


def test_softmax_and_losses_survive_huge_logits() -> None:
    z = np.array([[3e38, 0.0, -3e38], [100.0, 101.0, 99.0]], np.float32)
    p = Predictions(z, np.array([0, 1]), ("a", "b", "c"))
    assert np.isfinite(p.probabilities).all() and np.allclose(p.probabilities.sum(axis=1), 1)
    expected = torch.nn.functional.cross_entropy(torch.tensor(z[1:]).double(), torch.tensor([1]))
    assert p.losses[1] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 10, 100, 656, 12_345])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
def test_wilson_equals_scipy(n: int, level: float) -> None:
    for right in {0, 1, n // 3, n - 1, n}:
        expected = binomtest(right, n).proportion_ci(level, method="wilson")
        assert wilson(right, n, level=level) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 1), (0, 6), (3, 12), (7, 7), (40, 47), (500, 560), (9_000, 9_300)])
def test_mcnemar_equals_scipy(a: int, b: int) -> None:
    expected = binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, abs=1e-6, rel=1e-6)
    assert mcnemar(a, b) == mcnemar(b, a)


def test_resamples_keep_the_classes() -> None:
    labels = np.array([2, 0, 0, 2, 2, 5, 0, 2])
    w = np.concatenate(list(resampled(labels, count=301, seed=1)))
    assert w.shape == (301, 8) and (w[:, labels == 5] == 1).all() and (w[:, labels == 0].sum(axis=1) == 3).all()
    assert np.abs(w.mean(axis=0) - 1).max() < 0.25
    big = np.arange(40_000) % 3
    assert sum(len(b) for b in resampled(big, count=100)) == 100


def test_bootstrap_equals_copying() -> None:
    p = make(90, 4, 8, ties=True)
    w = next(resampled(p.labels, count=30, seed=2))
    for name in METRICS:
        copies = [METRICS[name](Predictions(*(np.repeat(a, r.astype(int), axis=0) for a in (p.logits, p.labels)), p.classes)) for r in w]
        assert np.allclose(METRICS[name](p, w), copies, atol=1e-12), name


def test_wilson_covers() -> None:
    "Exactly: the binomial probabilities of the outcomes whose interval contains the truth."
    from scipy.stats import binom

    for n in (100, 656):
        intervals = np.array([wilson(k, n) for k in range(n + 1)])
        covered = [binom.pmf(np.arange(n + 1), n, p)[(intervals[:, 0] <= p) & (p <= intervals[:, 1])].sum() for p in np.linspace(0.5, 0.98, 97)]
        assert abs(np.mean(covered) - 0.95) < 0.005 and min(covered) > 0.92


def draw(n: int, rng: np.random.Generator) -> Predictions:
    y = (np.arange(n) % 10 >= 7).astype(int)
    m = rng.normal(1.0 * (2 * y - 1), 1.0)
    return Predictions(np.stack([-m, m], axis=1), y, ("common", "rare"))


@pytest.mark.parametrize("name", ["balanced_accuracy", "f1", "auroc"])
def test_bootstrap_covers(name: str) -> None:
    "The count of intervals that contain the truth is a binomial one; 93 to 97 % has to be credible."
    rng = np.random.default_rng(11)
    truth = float(METRICS[name](draw(400_000, rng)))
    trials = 400
    hits = 0
    for i in range(trials):
        low, high = bootstrap(METRICS[name], draw(300, rng), count=400, seed=i)
        hits += low <= truth <= high
    low, high = wilson(hits, trials, level=0.999)
    assert low < 0.97 and high > 0.93, hits


def test_no_errors_still_leaves_an_interval() -> None:
    p = Predictions(np.eye(2)[[0] * 30 + [1] * 5], np.array([0] * 30 + [1] * 5), ("a", "b"))
    for s in scores(p, count=200).values():
        assert s.value == s.high == 1 and s.low < 0.95, s
    assert score("f1", p).low == wilson(5, 5)[0]


@pytest.mark.parametrize("options", [{"count": 10}, {"level": 1.0}])
def test_bad_options_of_an_interval(options: dict[str, float]) -> None:
    with pytest.raises(AdaptkitError):
        bootstrap(f1, make(30, 3, 0), **options)
    with pytest.raises(AdaptkitError):
        wilson(5, 4)


def test_compare_is_antisymmetric_and_calm_about_equality() -> None:
    a, b = make(200, 3, 1), make(200, 3, 1)
    b = Predictions(b.logits + np.random.default_rng(0).normal(size=b.logits.shape), b.labels, b.classes)
    for metric in METRICS:
        one, two = compare(a, b, metric=metric, count=300), compare(b, a, metric=metric, count=300)
        assert one.difference == pytest.approx(-two.difference) and one.low == pytest.approx(-two.high)
        assert one.p_value == two.p_value and (one.only_a, one.only_b) == (two.only_b, two.only_a)
        assert one.both + one.only_a + one.only_b + one.neither == one.n == 200
    same = compare(a, a)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1) and "no image tells them apart" in str(same)


def test_compare_false_alarms() -> None:
    rng, alarms = np.random.default_rng(4), 0
    y = np.zeros(300, int)
    y[::2] = 1
    for _ in range(500):
        a, b = (Predictions(np.eye(2)[np.where(rng.random(300) < 0.85, y, 1 - y)], y, ("a", "b")) for _ in range(2))
        alarms += mcnemar(*crosstab(a, b)[1:3]) < 0.05
    assert wilson(alarms, 500, level=0.999)[0] < 0.05


def test_only_the_same_images_can_be_paired() -> None:
    a = make(30, 3, 0)
    with pytest.raises(AdaptkitError, match="same images"):
        compare(a, make(31, 3, 0))
    with pytest.raises(AdaptkitError, match="different classes"):
        compare(a, Predictions(a.logits, a.labels, ("x", "y", "z")))
    with pytest.raises(AdaptkitError, match="Did you mean 'auroc'"):
        compare(a, a, metric="aurocc")


def test_confusion_equals_scikit_learn() -> None:
    p = make(120, 6, 3, absent="labels")
    assert (confusion(p) == sk.confusion_matrix(p.labels, p.predicted, labels=range(6))).all()
    off = confusion(p) - np.diag(np.diag(confusion(p)))
    assert confused_pairs(p)[0][2] == off.max()
    assert p.losses[highest_losses(p)[0]] == p.losses.max()


@pytest.mark.parametrize("k", [2, 6, 20, 60])
def test_pictures_take_any_names(k: int) -> None:
    p = make(130, k, 0)
    odd = Predictions(p.logits, p.labels, tuple(("$\\frac{", "<b>", "名前", "x" * 80, "")[i % 5] + str(i) for i in range(k)))
    fig = draw_errors(odd, image=lambda i: np.zeros((9, 7, 3), np.uint8), top=5)
    fig.savefig("/dev/null", format="png", dpi=20)
