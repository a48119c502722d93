"Samples, batches, fingerprints, divisions."

import gc
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adaptkit.core.files import read_json, write_json
from adaptkit.core.registry import AdaptkitError
from adaptkit.data.ahead import ahead_of, in_threads
from adaptkit.data.datasets import Batch, Data, Samples, Source, batches, picture, squares
from adaptkit.data.images import Preprocess
from adaptkit.data.splits import divided, load_split, pattern, save_split, split_rows

SPEC = Preprocess(size=16)
SOURCE = Source("Test", "CC0", "Nobody, 2026.")


def files(folder: Path, n: int, *, side: tuple[int, int] = (12, 20)) -> Samples:
    "Image files whose grey level is their row number."
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i:04}.png" for i in range(n)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full(side, i % 256, np.uint8)).save(path)
    return Samples(paths, np.arange(n) % 3, [p.name for p in paths])


def arrays(n: int = 30, k: int = 3) -> Samples:
    pixels = np.random.default_rng(0).integers(0, 256, (n, 9, 11), dtype=np.uint8)
    return Samples(pixels, np.arange(n) % k)


def data(n: int = 60, k: int = 3, seed: int = 0) -> Data:
    return divided(arrays(n, k), name="test", classes=[f"c{i}" for i in range(k)], source=SOURCE, seed=seed)


def test_samples_from_files_and_from_arrays(tmp_path: Path) -> None:
    from_files = files(tmp_path, 7)
    x = from_files.load([5, 0, 3], SPEC)
    assert x.dtype == torch.uint8 and x.shape == (3, 3, 16, 16)
    assert x[:, 0, 0, 0].tolist() == [5, 0, 3]
    assert from_files.load([], SPEC).shape == (0, 3, 16, 16)
    assert arrays().image(2).shape == (9, 11, 3) and from_files.image(1).shape == (12, 20, 3)
    colour = Samples(np.zeros((2, 9, 11, 3), np.uint8), np.array([0, 1]))
    assert colour.image(0).shape == (9, 11, 3)
    with pytest.raises(AdaptkitError, match="7 images but 2 labels and 0 names"):
        Samples(from_files.items, np.zeros(2, np.int64))


def test_take_keeps_names_labels_and_pictures() -> None:
    samples = arrays()
    part = samples.take([4, 2]).take([1])
    assert part.name(0) == "2" and part.labels.tolist() == [2]
    assert (part.image(0) == samples.image(2)).all()


def test_a_damaged_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    samples, before = files(tmp_path, 4), set(threading.enumerate())
    samples.items[2].write_bytes(b"")
    with pytest.raises(AdaptkitError, match="0002.png: the file is empty"):
        list(batches(samples, range(4), batch_size=2, spec=SPEC))
    assert set(threading.enumerate()) <= before


def test_batches_are_what_was_asked_for_in_order(tmp_path: Path) -> None:
    samples, order = files(tmp_path, 11), [10, 3, 3, 7, 0, 1, 2]
    got = list(batches(samples, order, batch_size=3, spec=SPEC))
    assert [len(b) for b in got] == [3, 3, 1]
    assert torch.cat([b.index for b in got]).tolist() == order
    assert torch.cat([b.y for b in got]).tolist() == [i % 3 for i in order]
    assert torch.equal(torch.cat([b.x for b in got])[:, 0, 0, 0] * 255, torch.tensor(order, dtype=torch.float32))
    assert got[0].x.dtype == torch.float32 and got[0].y.dtype == got[0].index.dtype == torch.int64
    rest = list(batches(samples, order, batch_size=3, spec=SPEC, start=1))
    assert [b.index.tolist() for b in rest] == [b.index.tolist() for b in got[1:]]
    assert isinstance(got[0].to("cpu"), Batch)
    assert list(batches(samples, order, batch_size=3, spec=SPEC, start=9)) == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(batch_size=0), "batch_size is 0"),
        (dict(start=-1), "start is -1"),
        (dict(order=[0, 30]), "from 0 to 29"),
        (dict(order=[-1]), "from 0 to 29"),
    ],
)
def test_batches_refuse_at_once(wrong: dict, says: str) -> None:
    with pytest.raises(AdaptkitError, match=says):
        batches(arrays(), **{"order": [0], "batch_size": 2, "spec": SPEC, **wrong})


def test_closing_early_ends_the_thread() -> None:
    before = set(threading.enumerate())
    stream = batches(arrays(), list(range(30)) * 20, batch_size=2, spec=SPEC)
    next(stream)
    stream.close()
    assert set(threading.enumerate()) <= before
    done = []
    jobs = ahead_of((lambda i=i: done.append(i)) for i in range(100))
    next(jobs)
    del jobs
    gc.collect()
    assert len(done) <= 4 and set(threading.enumerate()) <= before


def test_in_threads_keeps_order_and_bounds_what_is_under_way() -> None:
    taken = []

    def numbers():
        for i in range(5000):
            taken.append(i)
            yield i

    stream = in_threads(lambda i: i * i, numbers(), threads=2)
    assert [next(stream) for _ in range(5)] == [0, 1, 4, 9, 16] and len(taken) <= 128
    assert list(stream)[-1] == 4999**2


def peak_mib(samples: Samples) -> float:
    "Highest resident memory while all samples are read once."
    Path("/proc/self/clear_refs").write_text("5")
    for _ in batches(samples, np.arange(len(samples)), batch_size=16, spec=Preprocess(size=128)):
        pass
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_flat_when_the_folder_grows_tenfold(tmp_path: Path) -> None:
    "Kept in memory, 600 float images of 128 x 128 would take 112 MiB, and 1,080 more MiB as files of 960 x 640."
    image = Image.effect_noise((960, 640), 50)
    image.save(tmp_path / "0.jpg")
    for i in range(1, 600):
        (tmp_path / f"{i}.jpg").hardlink_to(tmp_path / "0.jpg")
    paths = [tmp_path / f"{i}.jpg" for i in range(600)]
    small, large = Samples(paths[:60], np.zeros(60, np.int64)), Samples(paths, np.zeros(600, np.int64))
    peak_mib(small)  # warm up: allocators and thread stacks
    first = peak_mib(small)
    assert peak_mib(large) < first + 25


# Fingerprints --------------------------------------------------------------------------------------------------------


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    a, b = files(tmp_path / "a", 5), files(tmp_path / "b", 5)
    assert a.fingerprint == b.fingerprint
    assert Samples(a.items, a.labels[::-1].copy()).fingerprint != a.fingerprint
    Image.fromarray(np.full((12, 20), 99, np.uint8)).save(b.items[3])
    assert Samples(b.items, b.labels).fingerprint != a.fingerprint
    assert a.take([1, 0]).fingerprint != a.take([0, 1]).fingerprint


def test_fingerprint_of_data_follows_division_and_classes() -> None:
    one = data()
    assert one.fingerprint == data().fingerprint
    assert one.fingerprint != data(seed=1).fingerprint
    renamed = Data("other", ("x", "y", "z"), one.train, one.valid, one.test, SOURCE, 0)
    assert renamed.fingerprint != one.fingerprint
    assert Data("other", one.classes, one.train, one.valid, one.test, SOURCE, 5).fingerprint == one.fingerprint


# What one sees -------------------------------------------------------------------------------------------------------


def test_repr_table_and_figure() -> None:
    d = data()
    assert repr(d) == "Data('test': 3 classes, train 39, valid 6, test 15)"
    assert repr(d.train) == "Samples(39 images, 3 classes)"
    table = d.describe()
    assert list(table.columns) == ["train", "valid", "test"] and list(table.index) == ["c0", "c1", "c2", "total"]
    assert table.loc["total"].tolist() == [39, 6, 15] and (table.iloc[:-1].sum() == table.loc["total"]).all()
    figure = d.show(n=4)
    assert len(figure.axes) == 12 and "CC0" in figure.get_supxlabel()
    assert len(d.show(n=2, split="valid", rows=2).axes) == 4
    with pytest.raises(AdaptkitError, match="Did you mean 'valid'"):
        d.show(split="vald")


def test_data_is_frozen() -> None:
    with pytest.raises(AttributeError):
        data().name = "other"  # type: ignore[misc]


# Divisions -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(3, 60), min_size=2, max_size=6),
    seed=st.integers(0, 10**6),
    shares=st.sampled_from([(0.65, 0.10, 0.25), (0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.34, 0.33, 0.33)]),
    strata=st.booleans(),
)
def test_divisions_are_disjoint_complete_repeatable_and_proportional(
    sizes: list[int], seed: int, shares: tuple[float, ...], strata: bool
) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    extra = np.arange(len(labels)) % 2 if strata else None
    parts = split_rows(labels, shares=shares, strata=extra, seed=seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    again = split_rows(labels, shares=shares, strata=extra, seed=seed)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    for part, share in zip(parts, shares, strict=True):
        got = np.bincount(labels[part], minlength=len(sizes))
        assert (got >= 1).all() and (np.abs(got - share * np.array(sizes)) <= 2.5).all()


def test_strata_are_kept_in_proportion() -> None:
    rng = np.random.default_rng(0)
    labels, cells = rng.integers(0, 2, 4000), rng.integers(0, 3, 4000)
    train, valid, test = split_rows(labels, strata=cells)
    assert (len(train), len(valid), len(test)) == (2600, 400, 1000)
    for part, share in ((train, 0.65), (valid, 0.10), (test, 0.25)):
        got = np.bincount(labels[part] * 3 + cells[part])
        assert np.abs(got - share * np.bincount(labels * 3 + cells)).max() <= 2


def test_seeds_differ_and_order_of_the_pattern_carries_no_meaning() -> None:
    labels = np.arange(300) % 3
    assert (split_rows(labels, seed=1)[2] != split_rows(labels, seed=2)[2]).any()
    seen = np.mean([np.isin(np.arange(300), split_rows(labels, seed=s)[2]) for s in range(200)], axis=0)
    assert 0.1 < seen.min() and seen.max() < 0.4  # every image gets its turn in test


def test_pattern_counts() -> None:
    assert np.bincount(pattern(2624, (0.65, 0.10, 0.25))).tolist() == [1706, 262, 656]
    assert pattern(0, (1.0, 0.0, 0.0)).tolist() == [] and set(pattern(9, (1.0, 0.0, 0.0))) == {0}


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.5, 0.6, -0.1), (0.5, 0.1, 0.1)])
def test_wrong_shares(shares: tuple[float, ...]) -> None:
    with pytest.raises(AdaptkitError, match="add up to 1"):
        split_rows(np.arange(30) % 3, shares=shares)


def test_too_small_a_class_is_named_with_its_count() -> None:
    labels = np.array([0] * 20 + [1])
    with pytest.raises(AdaptkitError, match=r"Class 'rare' has too few usable examples \(1\): train, valid, test need"):
        split_rows(labels, classes=["common", "rare"])


def test_given_splits_stay_as_they_are() -> None:
    samples = arrays(60)
    given_ = ["train"] * 40 + ["test"] * 20
    d = divided(samples, name="t", classes="abc", source=SOURCE, seed=0, given=given_)
    assert d.test.names == [str(i) for i in range(40, 60)] and len(d.train) + len(d.valid) == 40
    assert 4 <= len(d.valid) <= 7
    with pytest.raises(AdaptkitError, match=r"No usable example of \['c'\] in 't' for test"):
        divided(samples.take([*range(40), 42, 43]), name="t", classes="abc", source=SOURCE, seed=0,
                given=["train"] * 40 + ["test"] * 2)  # fmt: skip


def test_stored_division_round_trip(tmp_path: Path) -> None:
    first = data(seed=3)
    path = save_split(first, tmp_path / "split.json")
    again = load_split(data(seed=8), path)
    assert again.fingerprint == first.fingerprint and again.seed == 3
    assert set(read_json(path)["splits"]) == {"train", "valid", "test"}


def test_stored_division_of_other_images_is_refused(tmp_path: Path) -> None:
    path = save_split(data(60), tmp_path / "split.json")
    with pytest.raises(AdaptkitError, match="1 don't match, e.g. .'60'"):
        load_split(data(61), path)
    stored = read_json(path)
    stored["splits"]["test"].append(stored["splits"]["train"][0])
    with pytest.raises(AdaptkitError, match="don't match"):
        load_split(data(60), write_json(path, stored))
    with pytest.raises(AdaptkitError, match="not a stored split"):
        load_split(data(60), write_json(path, ["train"]))
    with pytest.raises(AdaptkitError, match="Cannot read"):
        load_split(data(60), tmp_path / "gone.json")


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
@pytest.mark.parametrize("side", [8, 24, 90])
def test_a_grey_image_is_shaped_once_and_comes_out_the_same(tmp_path: Path, fit: str, side: int) -> None:
    grey, spec = np.random.default_rng(side).integers(0, 256, (60, 41), np.uint8), Preprocess(side, fit)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).convert("RGB").save(tmp_path / "colour.png")
    found = squares([tmp_path / "grey.png", tmp_path / "colour.png", grey, np.repeat(grey[..., None], 3, axis=-1)], spec)
    assert found.shape == (4, 3, side, side) and (found == found[:1]).all()
    assert picture(tmp_path / "grey.png").shape == picture(grey).shape == (60, 41, 3)
    assert picture(tmp_path / "grey.png", channels=0).shape == picture(grey, channels=0).shape == (60, 41, 1)


@pytest.mark.parametrize("shape", [(9, 9, 4), (9, 9, 2), (9,), (2, 9, 9, 3)])
def test_an_array_that_is_no_image_is_refused_in_words(shape: tuple[int, ...]) -> None:
    with pytest.raises(AdaptkitError, match="is no image: give"):
        squares([np.zeros(shape, np.uint8)], Preprocess(8))
