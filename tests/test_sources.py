"Ready-made data, folders, tables, and everything that can be wrong with them."

import gzip
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.datasets import Data
from adaptkit.data.folders import ordered
from adaptkit.data.sources import DATASETS, load_data, read_idx
from adaptkit.data.splits import save_split

def draw(path: Path, grey: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((10, 14), grey % 256, np.uint8)).save(path)
    return path


def folder(root: Path, **sizes: int) -> Path:
    "Class folders with so many images each."
    for label, n in sizes.items():
        for i in range(n):
            draw(root / label / f"{i:03}.png", i)
    return root


def names(data: Data) -> list[str]:
    return sorted(s.name(i) for s in data.splits.values() for i in range(len(s)))


# Ready-made ----------------------------------------------------------------------------------------------------------


def test_elpv() -> None:
    data = load_data("elpv")
    assert data.classes == ("functional", "defective") and "CC BY-NC-SA" in data.source.licence
    assert data.describe().loc["total"].tolist() == [1706, 262, 656]
    assert data.describe().loc["defective"].sum() == 821
    assert data.train.image(0).shape == (300, 300, 3)
    assert set(load_data("elpv", seed=1).test.names) != set(data.test.names)


def test_digits() -> None:
    data = load_data("digits", shares=(0.5, 0.2, 0.3))
    assert data.describe().loc["total"].sum() == 1797 and len(data.classes) == 10
    assert data.train.image(0).shape == (8, 8, 3) and data.train.items.max() == 255
    assert data.fingerprint == load_data("digits", shares=(0.5, 0.2, 0.3)).fingerprint


def write_idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    body = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)


def tiny_fashion(root: Path, suffix: str = ".gz") -> Path:
    rng = np.random.default_rng(0)
    for part, n in (("train", 60), ("t10k", 20)):
        write_idx(root / f"{part}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (n, 28, 28)))
        write_idx(root / f"{part}-labels-idx1-ubyte{suffix}", np.arange(n) % 10)
    return root


@pytest.mark.parametrize(("below", "suffix"), [(".", ".gz"), ("FashionMNIST/raw", ""), ("FashionMNIST/raw", ".gz")])
def test_fashion_mnist_from_either_place(tmp_path: Path, below: str, suffix: str) -> None:
    tiny_fashion(tmp_path / below, suffix)
    data = load_data("fashion_mnist", root=tmp_path)
    assert len(data.test) == 20 and len(data.train) + len(data.valid) == 60 and data.classes[-1] == "Ankle boot"
    assert data.test.name(0) == "test/0" and data.test.image(0).shape == (28, 28, 3)
    assert load_data("fashion_mnist", root=tmp_path, seed=1).test.fingerprint == data.test.fingerprint


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    tiny_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-200], b"", b"junk", gzip.compress(b"\0\0\x08"), gzip.compress(b"\0\0\x08\x01\0\0\0\x09abc"),
                    gzip.compress(b"\0\0\x08\x04" + b"\xff" * 16), gzip.compress(b"\0\0\x0d\x01\0\0\0\0")):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(AdaptkitError, match=r"Cannot read .*train-images-idx3-ubyte.gz: .+ Fetch the file again"):
            read_idx(path)
    write_idx(path, np.zeros((50, 28, 28)))
    with pytest.raises(AdaptkitError, match="50 images but 60 labels"):
        load_data("fashion_mnist", root=tmp_path)


@pytest.mark.parametrize(("name", "says"), [("fashion_mnist", "dataset-fashion-mnist"), ("cifar10", "cifar-10-binary")])
def test_missing_files_say_what_to_do_and_leave_nothing(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(AdaptkitError, match=f"is not in .*{says}.*download=True"):
        load_data(name, root=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_cifar10_from_plain_bytes(tmp_path: Path) -> None:
    base = tmp_path / "cifar-10-batches-bin"
    base.mkdir()
    rng = np.random.default_rng(0)
    for i, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
        records = rng.integers(0, 256, (20, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(20) % 10
        records[0, 1:1025], records[0, 1025:] = 200 + i, 0  # the first one is red
        records.tofile(base / name)
    data = load_data("cifar10", root=tmp_path)
    assert len(data.test) == 20 and len(data.train) + len(data.valid) == 100
    assert data.test.image(0)[5, 7].tolist() == [205, 0, 0]
    (base / "test_batch.bin").write_bytes(bytes(5000))
    with pytest.raises(AdaptkitError, match="test_batch.bin is damaged"):
        load_data("cifar10", root=tmp_path)


def test_pickled_cifar10_with_a_wrong_checksum_is_never_opened(tmp_path: Path) -> None:
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    (base / "data_batch_1").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(AdaptkitError, match="damaged"):
        load_data("cifar10", root=tmp_path)


def test_download_without_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets as ready

    def offline(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(ready, "FashionMNIST", offline)
    with pytest.raises(AdaptkitError, match="Cannot download FashionMNIST .*Network is unreachable"):
        load_data("fashion_mnist", root=tmp_path, download=True)


# Names and options ---------------------------------------------------------------------------------------------------


def test_unknown_names_options_and_paths(tmp_path: Path) -> None:
    for name, says in (
        ("elvp", "Did you mean 'elpv'"),
        ("epvl", "Did you mean 'elpv'"),
        ("Fashion-MNIST", "fashion_mnist"),
    ):
        with pytest.raises(AdaptkitError, match=f"Unknown data set '{name}'.*{says}"):
            load_data(name)
    with pytest.raises(AdaptkitError, match="There is no folder .*nowhere"):
        load_data(tmp_path / "nowhere")
    with pytest.raises(AdaptkitError, match="There is no folder nowhere"):
        load_data("./nowhere")
    with pytest.raises(AdaptkitError, match="Unknown option of 'digits' 'share'. Did you mean 'shares'"):
        load_data("digits", share=(1, 0, 0))
    with pytest.raises(AdaptkitError, match="option of .* 'licens'. Did you mean 'licence'"):
        load_data(folder(tmp_path, a=4, b=4), licens="mine")
    with pytest.raises(AdaptkitError, match="Unknown option of 'elpv' 'labels_csv'"):
        load_data("elpv", labels_csv="x.csv")


def test_others_can_add_a_source(tmp_path: Path) -> None:
    DATASETS.register("twice")(lambda *, seed=0, **more: load_data("digits", seed=seed))
    try:
        assert len(load_data("twice", whatever=1).classes) == 10
    finally:
        del DATASETS.items["twice"]


# Folders -------------------------------------------------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    root = folder(tmp_path / "birds", wren=20, robin=30)
    draw(root / "robin" / "deeper" / "still.png")
    data = load_data(str(root), licence="mine")
    assert repr(data) == "Data('birds': 2 classes, train 33, valid 5, test 13)"
    assert data.classes == ("robin", "wren") and "robin/deeper/still.png" in names(data)
    assert data.source.licence == "mine" and data.unreadable == ()


@pytest.mark.parametrize(
    "given", [{"train", "test"}, {"train", "val"}, {"train", "validation", "testing"}, {"training"}]
)
def test_given_split_folders(tmp_path: Path, given: set[str]) -> None:
    for split in given:
        folder(tmp_path / split, a=20 if split.startswith("train") else 5, b=20 if split.startswith("train") else 6)
    data = load_data(tmp_path)
    assert min(len(s) for s in data.splits.values()) >= 2
    for split, alias in (("valid", {"val", "validation"}), ("test", {"test", "testing"})):
        if given & alias:
            assert len(data.splits[split]) == 11 and all(n.startswith(tuple(alias)) for n in data.splits[split].names)
        else:
            assert all(n.startswith("train") for n in data.splits[split].names)


def test_a_given_test_folder_must_know_every_class(tmp_path: Path) -> None:
    folder(tmp_path / "train", a=10, b=10)
    folder(tmp_path / "test", a=3)
    with pytest.raises(AdaptkitError, match=r"No usable example of \['b'\] in .* for test"):
        load_data(tmp_path)
    folder(tmp_path / "test", b=3, z=3)
    with pytest.raises(AdaptkitError, match=r"No usable example of \['z'\] in .* for train"):
        load_data(tmp_path)


def table(path: Path, rows: list[str], head: str = "file,label") -> Path:
    path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return path


def test_table_beside_a_folder_of_images(tmp_path: Path) -> None:
    for i in range(20):
        draw(tmp_path / "images" / f"{i}.png")
    table(tmp_path / "labels.csv", [f"{i}.png,{i % 2}" for i in range(20)])
    data = load_data(tmp_path)
    assert data.classes == ("0", "1") and "images/7.png" in names(data)


def test_table_anywhere_with_semicolons_splits_and_a_byte_order_mark(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    for i in range(24):
        draw(root / "sub" / f"{i}.png")
    split = ["train", "train", "valid", "test"]
    rows = [
        f'sub\\{i}.png;"weiß; grau";{split[i // 2 % 4]}' if i % 2 else f"sub/{i}.png;blau;{split[i // 2 % 4]}"
        for i in range(24)
    ]
    path = table(tmp_path / "my.csv", rows, "\ufeffFile;Label;Split")
    data = load_data(root, labels_csv=path)
    assert data.classes == ("blau", "weiß; grau") and [len(s) for s in data.splits.values()] == [12, 6, 6]


@pytest.mark.parametrize(
    ("rows", "head", "says"),
    [
        (["0.png,a"], "file,class", "has no column label: it needs file and label; found: file, class"),
        (["0.png,a"], "picture,class", "no column file and no column label"),
        (["../../secret.png,a"], "file,label", r"line 2: .*secret.png' leaves the folder"),
        (["0.png,a", "/etc/hostname,b"], "file,label", "line 3: .*leaves the folder"),
        (["0.png,a", "1.png,"], "file,label", "line 3: every row needs a file and a label"),
        (["0.png,a", "1.png"], "file,label", "line 3: every row needs a file and a label"),
        (["0.png,a", "images/0.png,b"], "file,label", "line 3: 'images/0.png' is listed twice"),
        (["0.png,a,traim"], "file,label,split", "line 2: the split is 'traim'"),
        ([], "file,label", "holds no images"),
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, rows: list[str], head: str, says: str) -> None:
    folder(tmp_path, images=4)
    for i in range(4):
        (tmp_path / "images" / f"{i:03}.png").rename(tmp_path / "images" / f"{i}.png")
    table(tmp_path / "labels.csv", rows, head)
    with pytest.raises(AdaptkitError, match=says):
        load_data(tmp_path)


def test_a_table_naming_missing_files(tmp_path: Path) -> None:
    for i in range(40):
        draw(tmp_path / f"{i}.png")
    rows = [f"{i}.png,{'ab'[i % 2]}" for i in range(40)]
    data = load_data(tmp_path, labels_csv=table(tmp_path / "t.csv", [*rows, "gone.png,a", "x" * 300 + ".png,b"]))
    assert len(names(data)) == 40 and [why for _, why in data.unreadable] == ["the file is missing"] * 2
    rows = [f"no{i}.png,{'ab'[i % 2]}" for i in range(40)]
    with pytest.raises(
        AdaptkitError, match="40 of 40 files in .* cannot be used, more than 5%.*no0.png: the file is missing"
    ):
        load_data(tmp_path, labels_csv=table(tmp_path / "t.csv", rows))


def test_a_table_that_is_no_text_or_missing(tmp_path: Path) -> None:
    folder(tmp_path, a=4, b=4)
    (tmp_path / "t.csv").write_bytes(b"file,label\n\xff\xfe\x00,a\n")
    with pytest.raises(AdaptkitError, match="Cannot read .*t.csv as a table in UTF-8"):
        load_data(tmp_path, labels_csv=tmp_path / "t.csv")
    with pytest.raises(AdaptkitError, match="There is no table .*u.csv"):
        load_data(tmp_path, labels_csv=tmp_path / "u.csv")


# Folders that are wrong ----------------------------------------------------------------------------------------------


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match="holds no images"):
        load_data(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "notes.txt").write_text("soon")
    with pytest.raises(AdaptkitError, match="holds no images"):
        load_data(tmp_path)


def test_images_without_class_folders(tmp_path: Path) -> None:
    for i in range(30):
        draw(tmp_path / f"{i}.png")
    with pytest.raises(AdaptkitError, match="has images but no class folders"):
        load_data(tmp_path)


def test_one_class(tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match="one class only, 'a'"):
        load_data(folder(tmp_path, a=9))


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    (folder(tmp_path, a=9, b=9) / "c").mkdir()
    with pytest.raises(AdaptkitError, match="The class folder .*c holds no image"):
        load_data(tmp_path)


@pytest.mark.parametrize("n", [1, 2])
def test_class_with_too_few_images(tmp_path: Path, n: int) -> None:
    with pytest.raises(AdaptkitError, match=rf"Class 'b' has too few usable examples \({n}\): train"):
        load_data(folder(tmp_path, a=9, b=n))


def test_the_path_of_a_table_is_enough(tmp_path: Path) -> None:
    folder(tmp_path, a=9, b=9)
    rows = [f"{p.relative_to(tmp_path).as_posix()},{p.parent.name}" for p in sorted(tmp_path.rglob("*.png"))]
    path = table(tmp_path / "mine.csv", rows)
    assert load_data(path).fingerprint == load_data(tmp_path, labels_csv=path).fingerprint
    with pytest.raises(AdaptkitError, match="There is no table .*yours.csv"):
        load_data(tmp_path / "yours.csv")


@pytest.mark.parametrize("tops", [("Train", "Test"), ("TRAINING", "val", "Testing")])
def test_split_folders_in_any_case(tmp_path: Path, tops: tuple[str, ...]) -> None:
    for top in tops:
        folder(tmp_path / top, a=9, b=9)
    data = load_data(tmp_path)
    assert data.classes == ("a", "b") and len(data.test) == 18


def test_split_folders_without_train(tmp_path: Path) -> None:
    for top in ("val", "test"):
        folder(tmp_path / top, a=9, b=9)
    with pytest.raises(AdaptkitError, match="folders for test and val, but none called train"):
        load_data(tmp_path)


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match="There is no folder"):
        load_data(f"{tmp_path}/{'x' * 300}")
    with pytest.raises(AdaptkitError, match="no folder"):
        load_data("~nobody-of-that-name/pictures")


def test_a_loop_of_links_in_a_table(tmp_path: Path) -> None:
    folder(tmp_path / "a", a=9, b=9)
    (tmp_path / "a" / "loop.png").symlink_to(tmp_path / "a" / "pool.png")
    (tmp_path / "a" / "pool.png").symlink_to(tmp_path / "a" / "loop.png")
    with pytest.raises(AdaptkitError, match="loop.png"):
        load_data(tmp_path / "a", labels_csv=table(tmp_path / "t.csv", ["a/000.png,a", "loop.png,b"]), max_unreadable=0.0)


@pytest.mark.parametrize("shares", [(0.5, 0.1, 0.1), (0.5, 0.5), (0.75, 0, 0.25), (0, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_shares_that_are_none(shares: tuple[float, ...]) -> None:
    with pytest.raises(AdaptkitError, match="shares are"):
        load_data("digits", shares=shares)


@pytest.mark.parametrize(("change", "says"), [({"seed": None}, "needs 'seed'"), ({"splits": {"train": ["0"], "valid": [], "test": []}}, "nothing into valid and test")])
def test_a_stored_division_that_is_damaged(tmp_path: Path, change: dict, says: str) -> None:
    path = save_split(load_data("digits"), tmp_path / "split.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdaptkitError, match=says):
        load_data("digits", split=path)


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match="is a file"):
        load_data(draw(tmp_path / "a.png"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_files_are_listed_and_set_aside(tmp_path: Path) -> None:
    folder(tmp_path, a=100, b=100)
    (tmp_path / "a" / "zero.png").touch()
    Image.effect_noise((40, 30), 50).save(tmp_path / "a" / "half.png")
    (tmp_path / "a" / "half.png").write_bytes((tmp_path / "a" / "half.png").read_bytes()[:600])
    (tmp_path / "b" / "letter.jpg").write_text("Dear reader")
    Image.new("1", (10_100, 10_000)).save(tmp_path / "b" / "bomb.png")
    Image.new("L", (1, 1)).save(tmp_path / "b" / "dot.png")
    draw(tmp_path / "stray.png")
    data = load_data(tmp_path)
    assert len(names(data)) == 200
    assert dict(data.unreadable).keys() == {
        "a/half.png",
        "a/zero.png",
        "b/bomb.png",
        "b/dot.png",
        "b/letter.jpg",
        "stray.png",
    }
    assert "6 set aside" in repr(data)
    with pytest.raises(AdaptkitError, match=r"6 of 206 files in .* cannot be used, more than 1%"):
        load_data(tmp_path, max_unreadable=0.01)


@pytest.mark.parametrize(("bad", "fatal"), [(5, False), (6, True)])
def test_fatal_only_above_5_percent(tmp_path: Path, bad: int, fatal: bool) -> None:
    folder(tmp_path, a=50, b=50 - bad)
    for i in range(bad):
        (tmp_path / "b" / f"z{i}.png").touch()
    if fatal:
        with pytest.raises(AdaptkitError, match="6 of 100 files in .* more than 5%.*b/z0.png: the file is empty"):
            load_data(tmp_path)
    else:
        assert len(load_data(tmp_path).unreadable) == 5
    assert len(load_data(tmp_path, verify=False).unreadable) == 0


def test_companions_and_hidden_files_are_no_images(tmp_path: Path) -> None:
    folder(tmp_path, a=5, b=5)
    for name in ("README.md", ".DS_Store", "Thumbs.db", "a/._000.png", "__MACOSX/x.png", ".git/c.png", "a/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert load_data(tmp_path).unreadable == ()


def test_links_out_of_the_folder_are_set_aside_and_inside_links_work(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", a=40, b=40)
    draw(tmp_path / "elsewhere" / "secret.png")
    (root / "a" / "out.png").symlink_to(tmp_path / "elsewhere" / "secret.png")
    (root / "a" / "all").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "nothing.png").symlink_to(root / "gone.png")
    draw(root / "b" / "loop" / "x.png")
    (root / "b" / "loop" / "up").symlink_to(root)
    data = load_data(root)
    assert dict(data.unreadable) == {
        "a/all": "it is a link that leaves the folder",
        "a/out.png": "it is a link that leaves the folder",
        "b/nothing.png": "it is a link to a folder, or to nothing",
        "b/loop/up": "it is a link to a folder, or to nothing",
    }
    rows = [f"{x}/{i:03}.png,{x}" for x in "ab" for i in range(40)]
    with pytest.raises(AdaptkitError, match="'a/out.png' leaves the folder"):
        load_data(root, labels_csv=table(tmp_path / "t.csv", [*rows, "a/out.png,a"]))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX names")
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_of_all_kinds(tmp_path: Path) -> None:
    root = folder(tmp_path / "Größe 尺寸", **{"étoile ☆": 30, "с пробелом $_{": 30})
    long = draw(root / "étoile ☆" / ("x" * 240 + ".png"))
    draw(root / "étoile ☆" / "new\nline, \"quoted\" 'name'.png")
    with open(os.fsencode(root / "étoile ☆") + b"/\xff\xfe.png", "wb") as f:
        f.write(long.read_bytes())
    data = load_data(root)
    assert len(names(data)) == 62 and data.unreadable[0][1] == "its name is not valid UTF-8: rename it"
    again = load_data(root, seed=5, split=save_split(data, tmp_path / "split.json"))
    assert again.fingerprint == data.fingerprint
    data.show(n=2).savefig(tmp_path / "shown.png")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    (folder(tmp_path, a=5, b=5) / "b").chmod(0)
    with pytest.raises(AdaptkitError, match="Cannot list"):
        load_data(tmp_path)


def test_a_new_place_and_another_order_change_nothing(tmp_path: Path) -> None:
    one = load_data(folder(tmp_path / "one", a=20, b=20))
    for i in reversed(range(20)):
        draw(tmp_path / "two" / "b" / f"{i:03}.png", i)
        draw(tmp_path / "two" / "a" / f"{i:03}.png", i)
    two = load_data(tmp_path / "two")
    assert two.fingerprint == one.fingerprint and two.train.names == one.train.names


def test_ordered() -> None:
    assert ordered(["10", "9", "1"]) == ("1", "9", "10") and ordered(["b", "10", "9", "b"]) == ("10", "9", "b")
    assert ordered(["01", "1"]) == ("01", "1")
