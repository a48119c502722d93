"Looks, copies, doubtful labels, findings, reports."

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.alike import agreement, balanced, best_shift, closest, near_images, neighbours, shifted, texture
from adaptkit.data.checks import DataReport, apart, check_data
from adaptkit.data.datasets import Data, Samples, Source
from adaptkit.data.duplicates import Cluster, equal_pairs, find_duplicates, together, united
from adaptkit.data.findings import CHECKS, Finding, Options, deviation
from adaptkit.data.labels import confident_joint, doubtful_labels, out_of_fold, pieces, pixels, suspicious
from adaptkit.data.looks import look, look_at, sharpness, signature
from adaptkit.data.shingles import banded, minhash, near_texts, overlap, plain, shingled
from adaptkit.data.sources import load_data
from adaptkit.data.texts import Texts

SOURCE = Source("Test", "CC0", "Nobody, 2026.")
rng = np.random.default_rng(0)


def scene(seed: int, side: int = 160) -> np.ndarray:
    "A made-up photograph: smooth shapes, edges, a little noise."
    r = np.random.default_rng(seed)
    base = Image.fromarray(r.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    x = np.asarray(base).astype(np.float32)
    for _ in range(6):
        y0, x0 = r.integers(0, side - 20, 2)
        h, w = r.integers(side // 10, side // 2, 2)
        x[y0 : y0 + h, x0 : x0 + w] += r.normal(0, 60, 3)
    x = 30 + 180 * (x - x.min()) / np.ptp(x)
    return np.clip(x + r.normal(0, 1.5, x.shape), 0, 255).astype(np.uint8)


def saved(image: np.ndarray, quality: int = 75) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def resized(image: np.ndarray, share: float) -> np.ndarray:
    side = round(len(image) * share)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def brighter(image: np.ndarray) -> np.ndarray:
    return np.clip(image * 1.1 + 8, 0, 255).astype(np.uint8)


def cropped(image: np.ndarray, share: float = 0.02) -> np.ndarray:
    k = round(share * len(image))
    return image[k : len(image) - k, k : len(image) - k]


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "jpeg": saved,
    "half": lambda a: resized(a, 0.5),
    "double": lambda a: resized(a, 1.7),
    "brighter": brighter,
    "cropped": cropped,
    "all": lambda a: saved(brighter(cropped(resized(a, 0.8), 0.01)), 85),
}
SCENES = [scene(i) for i in range(60)]


def files(folder: Path, images: list[np.ndarray], labels: list[int], start: int = 0) -> Samples:
    folder.mkdir(exist_ok=True, parents=True)
    paths = [folder / f"{start + i:04}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return Samples(paths, np.array(labels, np.int64), [f"{folder.name}/{p.name}" for p in paths])


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Data:
    "Sixty different scenes in two classes."
    folder, labels = tmp_path_factory.mktemp("clean"), [i % 2 for i in range(60)]
    cut = {"train": (0, 36), "valid": (36, 46), "test": (46, 60)}
    parts = {s: files(folder / s, SCENES[a:b], labels[a:b], a) for s, (a, b) in cut.items()}
    return Data("clean", ("even", "odd"), **parts, source=SOURCE, seed=0)


def words(train: list[str], valid: list[str], test: list[str], groups: bool = False) -> Data:
    def part(texts: list[str]) -> Texts:
        return Texts(texts, np.arange(len(texts)) % 2, (), [t[:1] for t in texts] if groups else ())

    return Data("words", ("a", "b"), part(train), part(valid), part(test), SOURCE, 0)


# Looks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["jpeg", "half", "double", "brighter"])
def test_signature_hardly_moves_under_harmless_changes(change: str) -> None:
    for image in SCENES[:10]:
        a, b = signature(image)[0], signature(CHANGES[change](image))[0]
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), gain=st.floats(0.3, 1.0), offset=st.integers(0, 60))
def test_signature_direction_ignores_contrast_and_brightness(seed: int, gain: float, offset: int) -> None:
    image = (scene(seed, 64) * 0.7).astype(np.uint8)
    changed = np.clip(image * gain + offset, 0, 255).astype(np.uint8)
    a, b = signature(image)[0], signature(changed)[0]
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98


def test_blur_lowers_sharpness_step_by_step() -> None:
    for image in SCENES[:5]:
        steps = [sharpness(np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(r)))) for r in (0, 1, 2)]
        assert steps == sorted(steps, reverse=True)


def test_content_is_that_of_the_pixels_not_of_the_file(tmp_path: Path) -> None:
    Image.fromarray(SCENES[0]).save(tmp_path / "a.png")
    Image.fromarray(SCENES[0]).save(tmp_path / "b.bmp")
    assert look(tmp_path / "a.png").content == look(tmp_path / "b.bmp").content == look(SCENES[0]).content
    assert look(SCENES[0]).content != look(SCENES[1]).content


def test_a_broken_file_is_told_and_the_others_are_seen(tmp_path: Path) -> None:
    samples = files(tmp_path, SCENES[:3], [0, 1, 0])
    Path(samples.items[1]).write_bytes(b"")
    looks = look_at(samples)
    assert [bool(p) for p in looks.problems] == [False, True, False] and "empty" in looks.problems[1]
    assert repr(looks) == "Looks(3 images, 1 unreadable)" and not looks.shapes[1].any()


# Copies among images -------------------------------------------------------------------------------------------------


def shapes_of(images: list[np.ndarray]) -> np.ndarray:
    return np.stack([look(image).shape for image in images])


@pytest.mark.parametrize("change", list(CHANGES))
def test_planted_copies_are_found_and_nothing_else(change: str) -> None:
    images = SCENES + [CHANGES[change](image) for image in SCENES[:30]]
    pairs, likeness = near_images(shapes_of(images), lambda i: images[i])
    got, truth = set(map(tuple, pairs.tolist())), {(i, 60 + i) for i in range(30)}
    assert len(got & truth) >= 27 and not got - truth
    assert (likeness >= 0.98).all() and (pairs[:, 0] < pairs[:, 1]).all()


def test_different_scenes_are_no_copies_however_many() -> None:
    pairs, _ = near_images(shapes_of(SCENES), lambda i: SCENES[i])
    assert len(pairs) == 0


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_images(n: int) -> None:
    shapes = shapes_of(SCENES[:2])[:n]
    pairs, likeness = near_images(shapes, lambda i: SCENES[i])
    assert pairs.shape == (0, 2) and likeness.shape == (0,)


def test_two_copies_alone_are_found() -> None:
    images = [SCENES[0], saved(SCENES[0], 85)]
    assert near_images(shapes_of(images), lambda i: images[i])[0].tolist() == [[0, 1]]


@pytest.mark.parametrize("orders", [2, 8])
def test_equal_descriptions_cost_no_more_than_the_window(orders: int) -> None:
    n = 5000
    vectors = np.tile(balanced(shapes_of(SCENES[:2]))[:1], (n, 1, 1))
    pairs = neighbours(vectors, orders=orders, window=5)
    assert len(pairs) <= orders * 5 * (n + 2 * 2 * n) and len(closest(pairs, vectors)) <= 3 * n


def test_pairs_are_found_whatever_the_order_of_the_rows() -> None:
    images = SCENES[:20] + [saved(image) for image in SCENES[:20]]
    order = np.random.default_rng(3).permutation(40)
    one = near_images(shapes_of(images), lambda i: images[i])[0]
    mixed = [images[i] for i in order]
    two = near_images(shapes_of(mixed), lambda i: mixed[i])[0]
    assert set(map(tuple, one.tolist())) == {tuple(sorted((int(order[a]), int(order[b])))) for a, b in two}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(-4, 4), gain=st.floats(0.4, 2), offset=st.floats(-50, 50))
def test_alignment_undoes_small_shifts_gain_and_offset(seed: int, shift: int, gain: float, offset: float) -> None:
    x = np.random.default_rng(seed).normal(size=(1, 96, 96)).cumsum(1).cumsum(2).astype(np.float32)
    x = 40 * (x - x.mean()) / x.std()
    moved = shifted(x, np.array([[0, shift]]))
    _, by = best_shift(moved * np.float32(gain) + np.float32(offset), x)
    assert abs(by[0, 1] - shift) < 0.3 and agreement(moved, shifted(x, by))[0] > 0.98


def test_texture_ignores_brightness_and_flat_images_stay_flat() -> None:
    small = np.stack([np.asarray(Image.fromarray(s).convert("L").resize((64, 64))) for s in SCENES[:4]])
    assert np.allclose(texture(small), texture(small.astype(np.float32) + 9), atol=0.01)
    assert not texture(np.full((2, 40, 40), 7, np.uint8)).any()


# Copies among texts --------------------------------------------------------------------------------------------------

SENTENCE = "屏幕很清楚，电池也耐用，就是键盘有点软，打字的时候会晃，不过这个价钱已经很值了。"


@pytest.mark.parametrize(
    "other",
    [
        SENTENCE.replace("，", ", ").replace("。", "!!"),
        " " + SENTENCE.replace("屏幕", "屏 幕"),
        SENTENCE + "推荐",
        SENTENCE.replace("软", "硬"),
    ],
)
def test_a_changed_sentence_is_a_copy(other: str) -> None:
    pairs, likeness = near_texts([SENTENCE, "完全不同的一句话，讲的是酒店的早餐和房间。", other])
    assert pairs.tolist() == [[0, 2]] and likeness[0] >= 0.7


def test_unlike_texts_are_none() -> None:
    texts = [" ".join(rng.choice(list("abcdefghijklmnop"), 40)) for _ in range(300)]
    assert len(near_texts(texts)[0]) == 0


@given(st.text(max_size=60))
def test_plain_form_is_stable_and_ignores_punctuation(text: str) -> None:
    once = plain(text)
    assert plain(f" {once}… !") == plain(once)
    assert not any(c.isspace() for c in once)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abc", max_size=12), min_size=1, max_size=8), st.integers(1, 4))
def test_overlap_is_that_of_the_sets(texts: list[str], size: int) -> None:
    def pieces_of(text: str) -> set[str]:
        text = text.ljust(size, "\0")
        return {text[i : i + size] for i in range(len(text) - size + 1)}

    sets, pairs = shingled(texts, size=size), np.array([[0, i] for i in range(len(texts))])
    want = [len(pieces_of(texts[0]) & pieces_of(t)) / len(pieces_of(texts[0]) | pieces_of(t)) for t in texts]
    assert np.allclose(overlap(sets, pairs), want)
    assert np.diff(sets.starts).tolist() == [len(pieces_of(t)) for t in texts]


def test_sketches_estimate_the_overlap() -> None:
    letters = rng.choice(list("abcdefghij"), 400)
    texts = ["".join(letters)] + ["".join([*letters[:k], *rng.choice(list("klmnopqrst"), 400 - k)]) for k in (350, 200, 80)]
    sets = shingled(texts)
    true = overlap(sets, np.array([[0, i] for i in range(4)]))
    sketch = minhash(sets, count=512)
    assert abs((sketch == sketch[0]).mean(axis=1) - true).max() < 0.1


def test_ten_thousand_equal_texts_dont_explode() -> None:
    sketch = np.ones((10_000, 64), np.uint64)
    assert len(banded(sketch)) <= 8 * 10_000
    pairs, _ = near_texts([SENTENCE] * 2000 + ["short"])
    assert len(pairs) <= 8 * 2000 and set(united(2001, pairs)) == {0, 2000}


# Clusters ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60))
def test_union_finds_the_connected_components(n: int, raw: list[tuple[int, int]]) -> None:
    pairs = [(a % n, b % n) for a, b in raw]
    reach = np.eye(n, dtype=bool)
    for a, b in pairs:
        reach[a, b] = reach[b, a] = True
    for _ in range(n):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    assert united(n, pairs).tolist() == reach.argmax(axis=1).tolist()


def test_equal_rows_are_chained_to_the_first() -> None:
    assert equal_pairs(["a", "", "b", "a", "", "a"]).tolist() == [[0, 3], [0, 5]]


def test_clusters_know_kind_splits_and_similarity(clean: Data, tmp_path: Path) -> None:
    images = [SCENES[0], saved(SCENES[1]), SCENES[50]]
    data = replace(clean, test=files(tmp_path, images, [0, 1, 0]))
    found = {c.rows: c for c in find_duplicates(data)}
    exact, near = found[("train", 0), ("test", 0)], found[("train", 1), ("test", 1)]
    assert (exact.kind, exact.similarity, exact.across) == ("exact", 1.0, True)
    assert near.kind == "near" and 0.98 <= near.similarity < 1 and len(found) == 2


def test_clusters_of_texts() -> None:
    data = words([SENTENCE, "eins zwei drei vier"], ["fünf sechs sieben"], [SENTENCE, SENTENCE + "!", "acht neun zehn"])
    (cluster,) = find_duplicates(data)
    assert cluster == Cluster("near", (("train", 0), ("test", 0), ("test", 1)), 1.0)
    with pytest.raises(AdaptkitError, match="alike is 2"):
        find_duplicates(data, alike=2)


def test_a_folder_of_equal_and_of_flat_images_is_quick_and_whole() -> None:
    same = np.tile(SCENES[0][None], (300, 1, 1, 1))
    flat = np.stack([np.full((40, 30, 3), i % 250, np.uint8) for i in range(300)])
    data = Data("odd", ("a",), Samples(same, np.zeros(300, int)), Samples(flat, np.zeros(300, int)), Samples(flat[:0], np.zeros(0, int)), SOURCE, 0)
    clusters = find_duplicates(data)
    assert len(clusters[0].rows) == 300 and clusters[0].kind == "exact"
    assert all(c.kind == "exact" and len(c.rows) == 2 for c in clusters[1:])  # flat ones are equal or nothing


def test_together_moves_towards_train_and_loses_nothing(clean: Data) -> None:
    sets = [(("test", 0), ("train", 3)), (("test", 1), ("valid", 2)), (("valid", 2), ("valid", 4)), (("test", 5), ("test", 6))]
    data = together(clean, sets)
    assert [len(s) for s in data.splits.values()] == [37, 11 - 1 + 1 - 1 + 1, 12]
    assert clean.test.name(0) in data.train.names and clean.test.name(1) in data.valid.names
    before, after = ({s.name(i) for s in d.splits.values() for i in range(len(s))} for d in (clean, data))
    assert before == after
    with pytest.raises(AdaptkitError, match="Nothing would be left in valid"):
        together(clean, [[("train", 0), *(("valid", i) for i in range(10))]])


# Labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_confident_learning_is_cleanlabs(seed: int) -> None:
    from cleanlab.count import compute_confident_joint
    from cleanlab.filter import find_label_issues

    r = np.random.default_rng(seed)
    k, n = int(r.integers(2, 7)), 400
    labels = np.concatenate([np.arange(k), r.integers(0, k, n - k)])
    p = r.dirichlet(np.ones(k) * 0.4, n) + 0.8 * np.eye(k)[np.where(r.random(n) < 0.8, labels, r.integers(0, k, n))]
    p /= p.sum(axis=1, keepdims=True)
    theirs = compute_confident_joint(labels, p, calibrate=False)
    ours = confident_joint(labels, p)
    assert (ours - np.diag(np.diag(ours)) == theirs - np.diag(np.diag(theirs))).all()
    for ranking, name in (("self_confidence", "self_confidence"), ("margin", "normalized_margin")):
        issues = find_label_issues(labels, p, filter_by="confident_learning", return_indices_ranked_by=name, n_jobs=1)
        assert suspicious(labels, p, ranking=ranking).tolist() == issues.tolist() and len(issues) > 5


def test_planted_labels_are_found() -> None:
    digits = load_data("digits").train
    r = np.random.default_rng(1)
    wrong = r.permutation(len(digits))[:50]
    labels = digits.labels.copy()
    labels[wrong] = (labels[wrong] + 1 + r.integers(0, 9, 50)) % 10
    found = suspicious(labels, out_of_fold(pixels(digits), labels, classes=10))
    hit = np.isin(found, wrong)
    assert hit.sum() >= 30 and hit.mean() > 0.7 and hit[:20].mean() > 0.9


def test_probabilities_come_from_models_that_did_not_see_the_row() -> None:
    "Features that only say which row it is help nobody who has not seen the row."
    labels = rng.integers(0, 2, 60)
    p = out_of_fold(np.eye(60), labels, classes=2)
    assert (p.argmax(axis=1) == labels).mean() < 0.75


def test_rare_single_and_missing_classes() -> None:
    x = rng.normal(size=(30, 4))
    assert out_of_fold(x, np.zeros(30, int), classes=3)[:, 0].tolist() == [1] * 30
    rare = np.array([1] + [0] * 29)
    p = out_of_fold(x, rare, classes=2)
    assert p[0, 1] == 0 and np.allclose(p.sum(axis=1), 1)
    with pytest.raises(AdaptkitError, match="3 rows cannot be divided into 5 folds"):
        out_of_fold(x[:3], rare[:3], classes=2)
    with pytest.raises(AdaptkitError, match="Did you mean 'margin'"):
        suspicious(rare, p, ranking="margins")


def test_features_of_texts_and_wrong_shapes(clean: Data) -> None:
    data = words(["gut schön toll"] * 20, ["schlecht übel"] * 4, ["toll schlecht"] * 6)
    assert pieces(data.train).shape == (20, 2**18)
    assert doubtful_labels(data)[1] <= 1
    with pytest.raises(AdaptkitError, match=r"shape \(3, 2\) for 60 rows"):
        doubtful_labels(clean, features=lambda samples: np.zeros((3, 2)))


# Checks --------------------------------------------------------------------------------------------------------------


def plant(clean: Data, tmp_path: Path, check: str) -> tuple[Data, dict]:
    "The clean data with one defect."
    labels = clean.test.labels.copy()
    extra = {
        "constant images": [np.full((160, 160, 3), 90, np.uint8)],
        "blurred images": [np.asarray(Image.fromarray(SCENES[46]).resize((7, 7)).resize((160, 160), Image.Resampling.BICUBIC))],
        "sizes": [scene(200, 30)],
        "copies across splits": [saved(SCENES[0])],
        "copies within a split": [saved(SCENES[47])],
        "copies with other labels": [saved(SCENES[1])],
    }
    if check in extra:
        n = len(extra[check])
        more = files(tmp_path / "more", extra[check], [0] * n)
        return replace(clean, test=Samples.join([clean.test, more])), {}
    if check == "unreadable":
        broken = files(tmp_path / "broken", SCENES[46:60], labels.tolist())
        Path(broken.items[2]).write_bytes(b"broken")
        return replace(clean, test=broken), {}
    if check == "class coverage":
        return replace(clean, test=clean.test.take(np.flatnonzero(labels == 0))), {}
    if check == "class balance":
        few = np.concatenate([np.flatnonzero(clean.train.labels == 0), np.flatnonzero(clean.train.labels == 1)[:1]])
        return replace(clean, train=clean.train.take(few), valid=clean.valid.take([0, 2, 4, 1]), test=clean.test.take([0, 2, 4, 6, 8])), {}
    if check == "groups across splits":
        return clean, {"groups": {n: ["same" if i == 0 else f"{n}{i}" for i in range(len(s))] for n, s in clean.splits.items()}}
    assert check == "doubtful labels"
    told = {s.name(i): int(s.labels[i]) for s in clean.splits.values() for i in range(len(s))}

    def features(samples: Samples) -> np.ndarray:
        return np.array([[told[samples.name(i)]] for i in range(len(samples))])

    wrong = clean.train.labels.copy()
    wrong[5] = 1 - wrong[5]
    return replace(clean, train=replace(clean.train, labels=wrong)), {"features": features}


IMAGE_CHECKS = sorted(set(CHECKS) - {"short texts"})


@pytest.fixture(scope="module")
def clean_report(clean: Data) -> DataReport:
    told = {s.name(i): int(s.labels[i]) for s in clean.splits.values() for i in range(len(s))}
    groups = {n: [f"{n}{i}" for i in range(len(s))] for n, s in clean.splits.items()}
    return check_data(clean, groups=groups, features=lambda s: np.array([[told[s.name(i)]] for i in range(len(s))]))


def test_clean_data_are_called_clean(clean_report: DataReport) -> None:
    assert set(clean_report.severities) == set(IMAGE_CHECKS)
    assert set(clean_report.severities.values()) == {"ok"}, clean_report.table().to_string()
    assert "Nothing that was checked" in clean_report.verdict


@pytest.mark.parametrize("check", IMAGE_CHECKS)
def test_every_check_trips_on_its_defect(check: str, clean: Data, tmp_path: Path) -> None:
    data, options = plant(clean, tmp_path, check)
    report = check_data(data, checks=[check], **options)
    assert list(report.severities) == [check] and report.severities[check] != "ok"
    if check == "doubtful labels":
        assert report.findings[0].rows == (("train", 5),)


def test_checks_of_texts() -> None:
    good = [f"{a} {b} {c}" for a in ("sehr", "gar nicht", "ziemlich") for b in ("gut", "schlecht") for c in ("gemacht", "gekocht", "gespielt")]
    data = words(good[:12], good[12:15], good[15:], groups=False)
    report = check_data(replace(data, valid=data.valid.take([0, 1])), labels=False)
    assert report.severities["short texts"] == "ok" and not {"blurred images", "constant images"} & set(report.by_check)
    bad = words([*good, "!?", "x" * 5000], ["?", SENTENCE], [SENTENCE, "gut"], groups=True)
    said = check_data(bad).severities
    assert said["short texts"] == "warning" and said["sizes"] == "note" and said["copies across splits"] == "stop"
    assert said["groups across splits"] == "stop"
    assert "屏幕" in check_data(bad, labels=False).show()._repr_html_()


def test_report_survives_json_and_refuses_damage(clean: Data, tmp_path: Path) -> None:
    data, _ = plant(clean, tmp_path, "copies across splits")
    report = check_data(data, labels=False)
    again = DataReport.from_json(json.loads(json.dumps(report.to_json())))
    assert again.findings == report.findings and again.fingerprint == data.fingerprint and again.data is None
    assert (again.table() == report.table()).all(axis=None) and again.verdict == report.verdict
    assert "copies across splits" in report._repr_html_() and repr(report).startswith("DataReport(Don't train")
    with pytest.raises(AdaptkitError, match="no pictures"):
        again.show()
    for damaged in ({}, {"findings": 3}, report.to_json() | {"findings": [{"check": "x"}]}):
        with pytest.raises(AdaptkitError, match="not a stored data report"):
            DataReport.from_json(damaged)


def test_pictures_show_what_was_found(clean: Data, tmp_path: Path) -> None:
    data, _ = plant(clean, tmp_path, "constant images")
    figure = check_data(data, labels=False).show()
    assert len(figure.axes) == 1 + 8 and figure._repr_png_()[:4] == b"\x89PNG"


def test_apart_closes_the_leaks(clean: Data, tmp_path: Path) -> None:
    copies = files(tmp_path / "copies", [saved(SCENES[i]) for i in (0, 3, 40)], [0, 1, 0])
    data = replace(clean, test=Samples.join([clean.test, copies]))
    groups = {"train": ["g", *range(35)], "valid": ["v", *range(100, 109)], "test": ["v", *range(200, 216)]}
    report = check_data(data, labels=False, groups=groups)
    closed = apart(data, report)
    assert [len(s) for s in closed.splits.values()] == [38, 12, 13]
    assert check_data(closed, checks=["copies across splits"]).severities == {"copies across splits": "ok"}
    with pytest.raises(AdaptkitError, match="about other data"):
        apart(clean, report)


def test_nothing_one_row_and_one_class(clean: Data) -> None:
    empty = replace(clean, **{name: s.take([]) for name, s in clean.splits.items()})
    assert check_data(empty).severities["class balance"] == "stop"
    one = replace(empty, train=clean.train.take([0]))
    assert check_data(one).severities["class coverage"] == "stop"
    single = replace(clean, classes=("even",), **{n: replace(s, labels=np.zeros(len(s), int)) for n, s in clean.splits.items()})
    assert check_data(single).severities["doubtful labels"] == "note"
    nothing = words([], [], [])
    assert check_data(nothing).severities["sizes"] == "ok"


def test_wrong_names_and_groups_are_refused(clean: Data) -> None:
    with pytest.raises(AdaptkitError, match="Did you mean 'sizes'"):
        check_data(clean, checks=["size"])
    with pytest.raises(AdaptkitError, match="2 groups for the 36 rows of train"):
        check_data(clean, checks=["groups across splits"], groups={"train": [1, 2], "valid": [], "test": []})
    with pytest.raises(AdaptkitError, match="severity"):
        Finding("x", "bad", "y")


def test_a_check_of_another_package_joins_in(clean: Data) -> None:
    @CHECKS.register("always")
    def always(data: Data, options: Options) -> list[Finding]:
        return [Finding("always", "warning", f"{data.name} has {len(data.train)} rows to learn from.")]

    try:
        assert check_data(clean, checks=["always"]).verdict == "Look at clean before you train: always."
    finally:
        del CHECKS.items["always"]


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=40), st.floats(-50, 50))
def test_deviation_moves_with_the_data(values: list[float], shift: float) -> None:
    x = np.array(values)
    assert np.allclose(deviation(x, floor=1), deviation(x + shift, floor=1), atol=1e-6)


@pytest.mark.slow
def test_solar_cells_hold_real_copies_and_few_others() -> None:
    "Cells photographed twice have neighbouring numbers, or lie one module (542 numbers) apart; far others would be mistakes."
    data = load_data("elpv")
    pairs = []
    for c in find_duplicates(data):
        number = sorted(int(data.splits[s].name(i)[-8:-4]) for s, i in c.rows)
        pairs += list(zip(number[:-1], number[1:], strict=True))
    far = [p for p in pairs if p[1] - p[0] > 80 and not 535 <= p[1] - p[0] <= 550]
    assert len(pairs) > 20 and len(far) <= 0.05 * len(pairs)
