"""Uploads: hostile zips are refused in a sentence and leave nothing; honest ones arrive whole."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.sources import load_data
from adaptkit.widgets.uploads import Limits, check_entry, receive, safe_parts, unpack

def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16), grey % 256, np.uint8)).save(file, "png")
    return file.getvalue()


GOOD = {f"{kind}/{i}.png": png(40 * k + i) for k, kind in enumerate(("cat", "dog")) for i in range(20)}


def zipped(path: Path, files: dict[str | zipfile.ZipInfo, bytes], packing: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def entry(name: str, mode: int = 0o644, system: int = 3) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.create_system = mode << 16, system
    return info


def refused(tmp_path: Path, path: Path, words: str, **limits: int) -> None:
    before = {p.relative_to(tmp_path) for p in tmp_path.rglob("*")}
    with pytest.raises(AdaptkitError, match=words) as told:
        unpack(path, tmp_path / "new", limits=Limits(**limits))
    assert "\n" not in str(told.value) and len(str(told.value)) < 300
    assert {p.relative_to(tmp_path) for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../1.png", "out of the folder"),
        ("cat/../../1.png", "out of the folder"),
        ("..\\1.png", "out of the folder"),
        ("/etc/1.png", "absolute"),
        ("\\\\server\\1.png", "absolute"),
        ("C:\\1.png", "absolute"),
        ("cat//1.png", "not a usable name"),
        ("cat/\x1b[2J.png", "not a usable name"),
        ("cat/" + "x" * 300 + ".png", "not a usable name"),
        ("/".join("abcdefghijklmn") + "/1.png", "not a usable name"),
        ("cat/setup.py", "neither an image"),
        ("cat/photo", "neither an image"),
        ("inner.zip", "neither an image"),
        ("../", "out of the folder"),
    ],
)
def test_a_bad_name_anywhere_refuses_the_whole_zip(tmp_path: Path, name: str, words: str) -> None:
    refused(tmp_path, zipped(tmp_path / "it.zip", {**GOOD, name: b""}), words)
    assert not (tmp_path.parent / "1.png").exists()


def test_links_and_devices(tmp_path: Path) -> None:
    for kind in (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR):
        refused(tmp_path, zipped(tmp_path / "it.zip", {**GOOD, entry("cat/passwd.png", kind | 0o777): b"/etc/passwd"}), "link or a device")
    refused(tmp_path, zipped(tmp_path / "it.zip", {entry("cat", stat.S_IFLNK | 0o777): b"/etc", **GOOD}), "link or a device")


def test_twice_and_both_file_and_folder(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        zipped(tmp_path / "it.zip", {entry("cat/a.png"): b"1", entry("cat/a.png", 0o600): b"2"})
    refused(tmp_path, tmp_path / "it.zip", "there twice")
    refused(tmp_path, zipped(tmp_path / "it.zip", {"cat.png": b"1", "cat.png/a.png": b"2"}), "file and a folder")


def test_a_bomb_is_stopped_while_it_unpacks(tmp_path: Path) -> None:
    refused(tmp_path, zipped(tmp_path / "it.zip", {**GOOD, "cat/zeros.png": bytes(50_000_000)}), "zip bomb")
    refused(tmp_path, zipped(tmp_path / "it.zip", {"cat/noise.png": os.urandom(2_000_000)}), "larger than 1 MB", one=1_000_000)
    many = {f"cat/{i}.png": os.urandom(100_000) for i in range(20)}
    refused(tmp_path, zipped(tmp_path / "it.zip", many), "more than 1 MB", unpacked=1_000_000)


def test_a_zip_that_lies_about_its_sizes_unpacks_no_more_than_it_says(tmp_path: Path) -> None:
    path = zipped(tmp_path / "it.zip", {"cat/zeros.png": bytes(5_000_000)})
    raw = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = raw.find(mark) + place
        assert struct.unpack_from("<I", raw, at)[0] == 5_000_000
        struct.pack_into("<I", raw, at, 100)
    path.write_bytes(raw)
    refused(tmp_path, path, "damaged")


def test_overlapping_files(tmp_path: Path) -> None:
    path = zipped(tmp_path / "it.zip", {f"cat/{i}.png": bytes(9_000_000) for i in range(4)})
    raw = bytearray(path.read_bytes())
    at = -1
    while (at := raw.find(b"PK\x01\x02", at + 1)) >= 0:
        struct.pack_into("<I", raw, at + 42, 0)  # all point to the first
    path.write_bytes(raw)
    refused(tmp_path, path, "damaged|bomb")


def test_too_many(tmp_path: Path) -> None:
    path = zipped(tmp_path / "it.zip", GOOD)
    refused(tmp_path, path, "at most 10 are", files=10)
    refused(tmp_path, path, "too many files", files=1)
    refused(tmp_path, path, "at most 100 bytes", packed=100)


def test_what_is_no_zip(tmp_path: Path) -> None:
    path = tmp_path / "it.zip"
    path.write_bytes(b"")
    refused(tmp_path, path, "empty")
    path.write_bytes(os.urandom(1000))
    refused(tmp_path, path, "not a zip")
    whole = zipped(path, GOOD).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, path, "not a zip")
    path.write_bytes(whole[:100] + os.urandom(200) + whole[300:])
    refused(tmp_path, path, "damaged")
    refused(tmp_path, zipped(path, {".DS_Store": b"x", "__MACOSX/._a.png": b"x"}), "no image")
    locked = bytearray(zipped(path, {"cat/a.png": b"x"}).read_bytes())
    locked[locked.find(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(locked)
    refused(tmp_path, path, "password")


def test_a_target_that_is_there_is_untouched(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/mine").write_text("mine")
    refused(tmp_path, zipped(tmp_path / "it.zip", GOOD), "there already")
    assert (tmp_path / "new/mine").read_text() == "mine"


@pytest.mark.parametrize("wrap", ["", "photos/", "a/photos/"])
def test_an_honest_folder_arrives_however_it_was_packed(tmp_path: Path, wrap: str) -> None:
    path = zipped(tmp_path / "it.zip", {f"{wrap}{name}": content for name, content in GOOD.items()} | {f"{wrap}Thumbs.db": b"x"})
    data = load_data(receive(path, "my photos.ZIP", into=tmp_path / "new"))
    assert data.classes == ("cat", "dog") and sum(map(len, data.splits.values())) == 40


def test_tables(tmp_path: Path) -> None:
    rows = "text,label\n" + "".join(f"{word} number {i},{word}\n" for word in ("good", "bad") for i in range(30))
    (tmp_path / "sent").write_text(rows)
    found = receive(tmp_path / "sent", "C:\\fake path\\reviews.csv", into=tmp_path / "new")
    assert found.name == "reviews.csv" and load_data(found).kind == "text"
    inside = receive(zipped(tmp_path / "it.zip", {"reviews/reviews.csv": rows.encode()}), "reviews.zip", into=tmp_path / "newer")
    assert inside.read_text() == rows


def test_other_things_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(png(1))
    for name, words in (("cat.png", "neither a zip nor a table"), ("x.tar.gz", "neither"), ("", "neither"), ("../.csv", "usable")):
        with pytest.raises(AdaptkitError, match=words):
            receive(tmp_path / "sent", name, into=tmp_path / "new")
    (tmp_path / "sent").write_bytes(b"")
    with pytest.raises(AdaptkitError, match="empty"):
        receive(tmp_path / "sent", "a.csv", into=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.lists(st.sampled_from(["..", ".", "", "cat", "a.png", "\\", "C:", "~", "\0"]), min_size=1, max_size=5).map("/".join))
def test_no_name_leaves_the_folder(name: str) -> None:
    try:
        parts = safe_parts(name)
    except AdaptkitError:
        return
    base = Path("/base")
    assert parts == () or Path(os.path.normpath(base.joinpath(*parts))) == base.joinpath(*parts) != base


def test_a_file_without_a_name_is_refused() -> None:
    nameless = zipfile.ZipInfo("a.png")
    nameless.filename = ""
    with pytest.raises(AdaptkitError, match="without a name"):
        check_entry(nameless)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_ends_in_a_sentence_or_a_whole_folder(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damage")
    raw = bytearray(zipped(folder / "it.zip", dict(list(GOOD.items())[:3])).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / "it.zip").write_bytes(raw)
    try:
        unpack(folder / "it.zip", folder / "new")
    except AdaptkitError:
        assert [p.name for p in folder.iterdir()] == ["it.zip"]
    else:
        assert (folder / "new").is_dir() and not list(folder.glob(".*"))
