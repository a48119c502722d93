"""The server: what may be sent and what not, answers that are those of the model, models that follow one another, numbers, logs, and the files for an engine."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from service import Direct, bomb, form, image_folder, picture, text_folder

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.datasets import Samples
from adaptkit.data.sources import load_data
from adaptkit.deployment.app import Service, make_service
from adaptkit.deployment.batching import Batcher, together
from adaptkit.deployment.folder import open_folder
from adaptkit.deployment.gate import Rates, check_token, may_enter
from adaptkit.deployment.metrics import Log, Meters
from adaptkit.deployment.requests import Asked, Limits, Refusal, depth_of, read_body
from adaptkit.deployment.served import Setup, side_by_side, takes
from adaptkit.deployment.several import make_several
from adaptkit.deployment.watching import add_reference, monitor_of

ROOT = Path(__file__).parents[1]
LOG = io.StringIO()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    "A service of images without a network."
    made = make_service(image_folder().folder, log=Log(LOG))
    yield made
    made.slot.close()


@pytest.fixture(scope="module")
def texts() -> Iterator[Service]:
    "A service of texts without a network."
    made = make_service(text_folder().folder, log=Log(LOG))
    yield made
    made.slot.close()


# What may be sent


def encoded(image: bytes) -> str:
    return base64.b64encode(image).decode()


def test_all_ways_to_send_an_image_give_the_same_answer(service: Service) -> None:
    ask, image = Direct(service), picture(1)
    ways = [
        (image, "image/png"),
        (image, "application/octet-stream"),
        (json.dumps({"image": encoded(image)}).encode(), "application/json"),
        (json.dumps({"image": "data:image/png;base64," + encoded(image)}).encode(), "application/json; charset=utf-8"),
        (json.dumps({"images": [encoded(image)]}).encode(), "application/json"),
        form(("image", image)),
    ]
    answers = [ask("/predict", body, kind) for body, kind in ways]
    assert {status for status, _ in answers} == {200}
    assert all(told == answers[0][1] for _, told in answers)


def test_many_are_answered_in_their_order(service: Service) -> None:
    ask, images = Direct(service), [picture(i) for i in range(5)]
    alone = [ask("/predict", image, "image/png")[1]["answers"][0] for image in images]
    for body, kind in (form(*(("image", i) for i in images)), (json.dumps({"images": [encoded(i) for i in images]}).encode(), "application/json")):
        status, told = ask("/predict", body, kind)
        assert status == 200 and [a["class"] for a in told["answers"]] == [a["class"] for a in alone]
        gaps = [abs(a["probability"] - b["probability"]) for a, b in zip(told["answers"], alone, strict=True)]
        assert max(gaps) < 1e-5


def test_answers_are_those_of_the_network_calibrated(service: Service) -> None:
    folder, image = image_folder(), picture(3)
    told = Direct(service)("/predict?top=3", image, "image/png")[1]
    logits = folder.model()(__import__("torch").from_numpy(folder.read([image])["images"])).detach().numpy()[0]
    e = np.exp((logits - logits.max()) / folder.temperature)
    wanted = dict(zip(folder.classes, e / e.sum(), strict=True))
    assert told["model"] == {"name": "first", "revision": folder.revision, "calibrated": True}
    assert all(abs(c["probability"] - wanted[c["class"]]) < 1e-5 for c in told["answers"][0]["classes"])


BAD: dict[str, tuple[int, bytes, str]] = {
    "no content type": (415, b"x", ""),
    "wrong content type": (415, picture(), "application/pdf"),
    "nonsense as content type": (415, picture(), ";;=/\x00"),
    "a text for an image model": (415, b"hello", "text/plain"),
    "truncated": (422, picture()[:-200], "image/png"),
    "an icon that would be unpacked": (422, picture(kind="ICO"), "image/x-icon"),
    "a long content type": (400, picture(), "multipart/form-data; boundary=" + ";" * 5000),
    "a part with long headers": (400, b'--x\r\nContent-Disposition: form-data; name="image"; a="' + b";" * 30_000 + b"\r\n\r\nx\r\n--x--", "multipart/form-data; boundary=x"),
    "truncated JPEG header": (422, picture(kind="JPEG")[:20], "image/jpeg"),
    "no image": (422, b"#!/bin/sh", "image/png"),
    "PostScript": (422, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image/eps"),
    "empty": (400, b"", "image/png"),
    "a bomb": (413, bomb(9000, 9000), "image/png"),
    "a huge bomb": (422, bomb(60_000, 60_000), "image/png"),
    "a dot": (422, picture(size=(1, 1)), "image/png"),
    "10 MB of JSON": (413, b'{"image": "' + b"A" * 10 * 2**20 + b'"}', "application/json"),
    "much base64 that is no image": (422, b'{"image": "' + b"A" * 4 * 2**20 + b'"}', "application/json"),
    "deep": (400, b"[" * 100_000 + b"]" * 100_000, "application/json"),
    "deep objects": (400, b'{"image":' * 5000 + b"1" + b"}" * 5000, "application/json"),
    "NaN": (400, b'{"image": NaN}', "application/json"),
    "Infinity": (400, b'{"images": [-Infinity]}', "application/json"),
    "a number of 5000 digits": (400, b'{"image": ' + b"9" * 5000 + b"}", "application/json"),
    "wrong field": (400, b'{"imgae": "eA=="}', "application/json"),
    "two fields": (400, b'{"image": "eA==", "images": []}', "application/json"),
    "no field": (400, b"{}", "application/json"),
    "an empty list": (400, b'{"images": []}', "application/json"),
    "null": (400, b"null", "application/json"),
    "no base64": (400, b'{"image": "../../etc/passwd"}', "application/json"),
    "no UTF-8": (400, b'{"image": "\xff"}', "application/json"),
    "too many": (413, json.dumps({"images": ["eA=="] * 40}).encode(), "application/json"),
    "a form without parts": (400, b"", "multipart/form-data; boundary=x"),
    "a form without a boundary": (400, form(("image", picture()))[0], "multipart/form-data"),
    "a form without an end": (400, form(("image", picture()))[0][:-5], "multipart/form-data; boundary=x"),
    "a form with a path as name": (400, *form(("../../etc/passwd", picture()))),
    "a form of both": (400, *form(("image", picture()), ("text", b"x"))),
    "a form of 100 parts": (413, *form(*[("image", b"x")] * 100)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence(service: Service, name: str) -> None:
    status, body, kind = BAD[name]
    ask = Direct(service)
    found, told = ask("/predict", body, kind)
    assert found == status and [*told] == ["error"]
    sentence = told["error"]
    assert 20 < len(sentence) < 300 and sentence[-1] in ".)" and "\n" not in sentence and "Traceback" not in sentence and str(ROOT) not in sentence


def test_a_path_as_the_name_of_a_file_is_never_looked_at(service: Service) -> None:
    ask = Direct(service)
    assert ask("/predict", *form(("image", picture()), file="../../../etc/passwd"))[0] == 200
    assert ask("/predict", *form(("image", picture()), file='x"; name="text'))[0] in (200, 400)


TEXTS: dict[str, tuple[int, bytes, str]] = {
    "a word": (200, b"parcel", "text/plain"),
    "many": (200, json.dumps({"texts": ["one", "two"]}).encode(), "application/json"),
    "a form": (200, *form(("text", "für zwölf".encode()))),
    "only unknown words": (200, "\u4f60\u597d \U0001f600".encode(), "text/plain"),
    "empty": (400, b"", "text/plain"),
    "blank": (400, b" \n\t ", "text/plain"),
    "NUL": (400, b"a\x00b", "text/plain"),
    "half a pair": (400, b'{"text": "\\ud800"}', "application/json"),
    "no UTF-8": (400, b"\xff\xfe", "text/plain"),
    "too long": (413, b"a " * 20_000, "text/plain"),
    "an image": (415, picture(), "image/png"),
    "a number": (400, b'{"text": 3}', "application/json"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts(texts: Service, name: str) -> None:
    status, body, kind = TEXTS[name]
    found, told = Direct(texts)("/predict", body, kind)
    assert found == status, told


@settings(max_examples=150, deadline=None)
@given(body=st.binary(max_size=400), kind=st.sampled_from(["application/json", "multipart/form-data; boundary=x", "multipart/form-data; boundary=\u00e9", "image/png", "text/plain"]) | st.text(max_size=40))
def test_whatever_is_sent_is_read_or_refused(body: bytes, kind: str) -> None:
    try:
        assert read_body(body, kind, Limits()).items
    except Refusal as e:
        assert 400 <= e.status < 500 and str(e)


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30))
def test_depth_is_that_of_the_value(value: object) -> None:
    def deep(v: object) -> int:
        inner = v.values() if isinstance(v, dict) else v if isinstance(v, list) else None
        return 0 if inner is None else 1 + max(map(deep, inner), default=0)

    assert depth_of(json.dumps(value).encode()) == deep(value)


# Addresses


def test_parameters_and_addresses(service: Service) -> None:
    ask, image = Direct(service), (picture(), "image/png")
    assert [ask(f"/predict?top={t}", *image)[0] for t in ("0", "-1", "x", "1e3", "\u0663", "9" * 30, "")] == [422] * 7
    assert ask("/predict?" + "&".join(f"a{i}=1" for i in range(30)), *image)[0] == 400
    assert ask("/predict?tpo=1", *image)[1]["error"].startswith("Unknown parameter 'tpo'. Did you mean 'top'?")
    assert [ask(p)[0] for p in ("/nothing", "//etc/passwd", "/../../etc/passwd", "/predict/")] == [404] * 4
    assert ask("/predict")[0] == 405 and ask.headers["allow"] == "POST"
    assert [ask(p)[0] for p in ("/", "/health", "/ready", "/metrics", "/openapi.json")] == [200] * 5
    assert len(ask("/predict?top=2", *image)[1]["answers"][0]["classes"]) == 2


def test_the_page_shows_names_of_classes_as_text(service: Service) -> None:
    html = Direct(service)("/")[1].decode()
    assert "&lt;b&gt;bird" in html and "<b>bird" not in html and "http://" not in html and "https://" not in html


def test_explanations(service: Service, texts: Service) -> None:
    ask, image = Direct(service), (picture(2), "image/png")
    status, told = ask("/explain?target=dog", *image)
    assert status == 200 and told["class"] == "dog" and np.shape(told["map"]) == (20, 20) and np.isfinite(told["map"]).all()
    status, png = ask("/explain", *image, accept="image/png")
    assert status == 200 and min(Image.open(io.BytesIO(png)).size) >= 320
    assert ask("/explain?target=cow", *image)[0] == 422 and ask("/explain", *form(("image", picture()), ("image", picture())))[0] == 400
    status, told = Direct(texts)("/explain", b"where is my parcel", "text/plain")
    assert status == 200 and [w["word"] for w in told["words"]] == ["where", "is", "my", "parcel"]


def test_without_weights_nothing_is_explained_and_all_else_works(tmp_path: Path) -> None:
    folder = SimpleNamespace(**{n: getattr(image_folder(), n) for n in ("manifest", "classes", "kind", "revision", "temperature", "read", "session")}, folder=tmp_path)
    made = make_service(tmp_path, opener=lambda path: folder, log=Log(LOG))
    ask = Direct(made)
    assert ask("/explain", picture(), "image/png")[0] == 409 and ask("/predict", picture(), "image/png")[0] == 200
    assert "/explain" not in ask("/openapi.json")[1]["paths"] and b"Why?" not in ask("/")[1]
    made.slot.close()


# Tokens and rates


def test_tokens() -> None:
    token = "a" * 20
    made = make_service(image_folder().folder, token=token, log=Log(LOG))
    ask, mine = Direct(made), {"authorization": f"Bearer {token}"}
    assert [ask(p)[0] for p in ("/", "/health", "/ready", "/openapi.json", "/metrics")] == [200] * 4 + [401]
    assert ask.headers["www-authenticate"] == "Bearer"
    assert ask("/predict", picture(), "image/png")[0] == 401 and ask("/predict", picture(), "image/png", **mine)[0] == 200
    assert ask("/reload", b'{"folder": "x"}', "application/json")[0] == 401
    assert [ask("/predict", picture(), "image/png", authorization=w)[0] for w in (token, f"Basic {token}", f"Bearer {token}a", "Bearer \xe9", "")] == [401] * 5
    assert ask("/openapi.json")[1]["paths"]["/predict"]["post"]["security"] == [{"token": []}]
    made.slot.close()


@given(st.text(alphabet=st.characters(codec="latin-1"), max_size=40))
def test_no_other_header_lets_in(header: str) -> None:
    assert not may_enter(header, "0123456789abcdef0123")


@pytest.mark.parametrize(("token", "host"), [(None, "0.0.0.0"), (None, "192.0.2.1"), ("short", "127.0.0.1"), ("with blanks in between", "127.0.0.1"), ("\u00e9" * 20, "127.0.0.1"), (None, "::")])
def test_doors_that_nobody_meant_to_open(token: str | None, host: str) -> None:
    with pytest.raises(AdaptkitError):
        check_token(token, host)


def test_commands_are_off_without_a_token(service: Service) -> None:
    ask = Direct(service)
    assert ask("/reload", b'{"folder": "x"}', "application/json")[0] == ask("/rollback", b"", "application/json")[0] == 409


def test_rates_by_address() -> None:
    made = make_service(image_folder().folder, setup=Setup(limits=Limits(rate=0.001, burst=3)), log=Log(LOG))
    ask = Direct(made)
    assert [ask("/predict", picture(), "image/png")[0] for _ in range(5)] == [200, 200, 200, 429, 429]
    assert ask.headers["retry-after"] == "1" and ask("/health")[0] == 200
    made.slot.close()


@given(st.lists(st.tuples(st.floats(0, 3), st.sampled_from("ab")), max_size=60))
def test_nobody_gets_more_than_burst_and_rate(steps: list[tuple[float, str]]) -> None:
    now, taken = [0.0], {"a": 0, "b": 0}
    rates = Rates(2.0, 5, clock=lambda: now[0])
    for wait, who in steps:
        now[0] += wait
        taken[who] += rates.wait(who) == 0
    assert max(taken.values()) <= 5 + 2.0 * now[0] + 1e-6


# Batches


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=20), most=st.integers(1, 6), workers=st.integers(1, 3))
def test_everybody_gets_their_own_rows(sizes: list[int], most: int, workers: int) -> None:
    calls: list[int] = []

    def session(inputs):
        calls.append(len(inputs["x"]))
        return SimpleNamespace(logits=inputs["x"] * 2, features=inputs["x"])

    async def all_of_them() -> list:
        batcher = Batcher(session, most=most, workers=workers)
        found = await asyncio.gather(*(batcher.ask({"x": np.full((n, 1, 1), i)}) for i, n in enumerate(sizes)))
        await asyncio.to_thread(batcher.close)
        return found

    for i, (n, rows) in enumerate(zip(sizes, asyncio.run(all_of_them()), strict=True)):
        assert rows.logits.shape == (n, 1, 1) and (rows.logits == 2 * i).all() and (rows.features == i).all()
    assert sum(calls) == sum(sizes) and all(c <= max(most, max(sizes)) for c in calls)


def test_a_lonely_request_gets_the_wide_session_and_a_crowd_the_narrow_one() -> None:
    calls: list[tuple[str, int]] = []
    go = threading.Event()

    def session(name: str):
        def say(inputs):
            calls.append((name, len(inputs["x"])))
            assert go.wait(10)
            return SimpleNamespace(logits=inputs["x"], features=inputs["x"])

        return say

    async def all_of_them() -> None:
        batcher = Batcher(session("wide"), most=8, workers=2, beside=session("narrow"))
        first = asyncio.ensure_future(batcher.ask({"x": np.zeros((1, 1, 1))}))
        while not calls:
            await asyncio.sleep(0.001)
        rest = [asyncio.ensure_future(batcher.ask({"x": np.zeros((1, 1, 1))})) for _ in range(6)]
        while len(calls) < 2:
            await asyncio.sleep(0.001)
        go.set()
        await asyncio.gather(first, *rest)
        await asyncio.to_thread(batcher.close)
        assert not batcher.jobs and batcher.rows == 0

    asyncio.run(all_of_them())
    assert calls[0] == ("wide", 1) and calls[1][0] == "narrow" and sum(n for _, n in calls) == 7


@pytest.mark.parametrize(
    ("cores", "setup", "export", "wanted"),
    [(1, Setup(), "onnx", (1, 1, 1)), (2, Setup(), "onnx", (2, 1, 2)), (32, Setup(), "onnx", (32, 4, 8)), (8, Setup(threads=3), "onnx", (3, 3, 1)), (8, Setup(workers=2), "onnx", (8, 4, 2)), (8, Setup(threads=2, workers=3), "onnx", (2, 2, 3)), (8, Setup(), "torch", (0, 0, 1))],
)
def test_how_cores_are_shared(cores: int, setup: Setup, export: str, wanted: tuple[int, int, int]) -> None:
    folder = SimpleNamespace(manifest={"default": export}, session=lambda name="", threads=0: threads)
    wide, beside, workers = side_by_side(folder, setup, cores)
    assert (wide, wide if beside is None else beside, workers) == wanted


def test_a_session_that_loses_rows_is_noticed() -> None:
    async def one() -> None:
        batcher = Batcher(lambda inputs: SimpleNamespace(logits=inputs["x"][:-1], features=inputs["x"]))
        try:
            await batcher.ask({"x": np.zeros((3, 2, 2))})
        finally:
            await asyncio.to_thread(batcher.close)

    with pytest.raises(AdaptkitError, match="2 of 3"):
        asyncio.run(one())


def test_a_text_says_the_same_beside_a_longer_one() -> None:
    folder = text_folder()
    session, parts = folder.session(), [folder.read([t]) for t in ("hello", "where is my parcel, it should have come a week ago, and nobody answers")]
    alone, both = session(parts[0]).logits[0], session(together(parts)).logits[0]
    assert np.abs(alone - both).max() < 1e-5 * np.abs(alone).max()


def test_a_fault_of_the_server_is_not_blamed_on_whoever_asked(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Direct(service)
    monkeypatch.setattr(service.slot.current.batcher, "session", lambda inputs: SimpleNamespace(logits=np.zeros((0, 3)), features=np.zeros((0, 1))))
    monkeypatch.setattr(service.slot.current.batcher, "beside", service.slot.current.batcher.session)
    status, told = ask("/predict", picture(), "image/png")
    assert status == 500 and "not with your request" in told["error"]
    monkeypatch.setattr(service.slot.current.batcher, "closed", True)
    assert ask("/predict", picture(), "image/png")[0] == 503


# Several models


def test_several_models_share_a_gate_and_nothing_else() -> None:
    made = make_several({"pets": image_folder().folder, "topics": text_folder().folder}, token="c" * 20, setup=Setup(limits=Limits(rate=0.001, burst=3)), log=Log(LOG))
    ask, known = Direct(made), {"authorization": "Bearer " + "c" * 20}
    assert ask("/models")[1]["models"]["topics"]["kind"] == "text" and ask("/models/pets/health")[1]["status"] == "ready"
    assert ask("/models/pets/predict", picture(), "image/png")[0] == 401 and ask("/models/pets/predict", b"hello", "text/plain", **known)[0] == 415
    assert ask("/models/topics/predict", b"hello", "text/plain", **known)[1]["model"]["name"] == text_folder().manifest["name"]
    assert ask("/models/pets/predict", picture(), "image/png", **known)[0] == 200
    assert [ask(f"/models/{name}/predict", b"x", "text/plain", **known)[0] for name in ("pets", "topics")] == [429, 429], "one bucket for all"
    for _ in range(100):  # answers are counted when they are on their way
        status, text = ask("/metrics", **known)
        if text.count(b"adaptkit_answers_total{") == 2:
            break
        time.sleep(0.05)
    families = {f.name: f for f in text_string_to_metric_families(text.decode())}
    assert status == 200 and len(families) == text.decode().count("# TYPE"), "each family once"
    assert {s.labels["model"] for s in families["adaptkit_answers"].samples} == {"pets", "topics"}
    made.keeping.draining = True
    assert ask("/ready")[0] == ask("/models/pets/ready")[0] == 503
    made.close()


def test_if_one_of_several_models_is_wrong_none_is_left_behind(tmp_path: Path) -> None:
    before = {*threading.enumerate()}
    with pytest.raises(AdaptkitError, match=str(tmp_path)):
        make_several({"good": image_folder().folder, "bad": tmp_path}, log=Log(LOG))
    assert {*threading.enumerate()} <= before
    for names in ({}, {"a b": tmp_path}, {"..": tmp_path}):
        with pytest.raises(AdaptkitError, match="Name one model or more|can't be called"):
            make_several(names)


# Models that follow one another


def test_a_bad_folder_is_refused_and_the_old_one_stays(tmp_path: Path) -> None:
    token = "b" * 20
    for name in ("first", "second", "flipped", "missing", "newer"):
        copytree(image_folder().folder, tmp_path / name)
    weights = tmp_path / "flipped/model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(bytes(raw))
    (tmp_path / "missing/model.onnx").unlink()
    manifest = json.loads((tmp_path / "newer/model.json").read_text())
    (tmp_path / "newer/model.json").write_text(json.dumps({**manifest, "version": 99}))
    made = make_service(tmp_path / "first", token=token, log=Log(LOG))
    ask, mine = Direct(made), {"authorization": f"Bearer {token}"}

    def load(name: object) -> tuple[int, dict]:
        return ask("/reload", json.dumps({"folder": name}).encode(), "application/json", **mine)

    first = made.slot.current
    refused = [load(n) for n in ("flipped", "missing", "newer", "nowhere", "../first", "/etc", "", ".", "..", 3, None, "a\x00b", "x" * 5000)]
    assert all(400 <= status < 500 and told["error"] for status, told in refused) and made.slot.current is first
    assert ask("/rollback", b"", **mine)[0] == 409
    assert load("second")[0] == 200 and made.slot.current is not first
    assert ask("/predict", picture(), "image/png", **mine)[0] == 200
    assert ask("/rollback", b"", **mine)[0] == 200 and made.slot.current is first
    counted = ask("/metrics", **mine)[1].decode()
    assert 'adaptkit_reloads_total{outcome="changed"} 1.0' in counted and 'adaptkit_reloads_total{outcome="back"} 1.0' in counted
    made.slot.close()


def test_a_model_that_answers_with_nonsense_doesnt_go_to_work(tmp_path: Path) -> None:
    whole = image_folder()

    class Broken:
        def __getattr__(self, name):
            return getattr(whole, name)

        def session(self, export="", *, threads=0):
            return lambda inputs: SimpleNamespace(logits=np.full((len(inputs["images"]), 3), np.nan, np.float32), features=np.zeros((1, 1)))

    with pytest.raises(AdaptkitError, match="not finite"):
        make_service(tmp_path, opener=lambda path: Broken(), log=Log(LOG))


# Monitor, numbers, logs


class Watching:
    "A monitor that fails now and then."

    def __init__(self, fails: bool = False) -> None:
        self.seen, self.fails = 0, fails

    def observe(self, features, logits):
        if self.fails:
            raise OSError(28, "No space left on device")
        assert features.ndim == 2 and logits.shape == (len(features), 3)
        self.seen += len(logits)

    def state(self):
        return {"seen": self.seen, "features": {"ks": np.float32(0.5), "p": float("nan")}}


def wait_for(what) -> None:
    import time

    end = time.monotonic() + 30
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    assert what()


def test_a_monitor_is_told_everything_and_its_numbers_are_shown() -> None:
    watcher = Watching()
    made = make_service(image_folder().folder, monitor=lambda folder: watcher, log=Log(LOG))
    ask = Direct(made)
    for _ in range(3):
        ask("/predict", *form(("image", picture()), ("image", picture(1))))
    wait_for(lambda: watcher.seen == 6)
    text = ask("/metrics")[1].decode()
    assert 'adaptkit_drift{statistic="features.ks"} 0.5' in text and 'statistic="seen"} 6.0' in text and "features.p" not in text
    made.slot.close()


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_real_monitor_sees_requests_and_its_state_is_shown(kind: str, tmp_path: Path) -> None:
    whole = image_folder() if kind == "image" else text_folder()
    copytree(whole.folder, tmp_path / "model")
    if kind == "image":
        files = np.random.default_rng(0).integers(0, 255, (60, 20, 20, 3), np.uint8)
        samples = Samples(files, np.arange(60) % 3)
    else:
        samples = load_data("support_topics", seed=0).valid.take(range(60))
    add_reference(tmp_path / "model", samples)
    monitor = monitor_of(tmp_path / "model", window=20, permutations=99)
    made = make_service(tmp_path / "model", monitor=lambda folder: monitor, log=Log(LOG))
    assert takes(monitor) == {"quality", "unreadable"}
    ask = Direct(made)
    good, bad = ((picture(), "image/png"), (picture()[:-200], "image/png")) if kind == "image" else ((b"where is my parcel", "text/plain"), (b"", "text/plain"))
    for _ in range(25):
        assert ask("/predict", *good)[0] == 200
    status = ask("/predict", *bad)[0]

    def shown() -> dict[str, float]:
        lines = re.findall(r'^adaptkit_drift\{statistic="(\S+)"\} (\S+)$', ask("/metrics")[1].decode(), re.MULTILINE)
        return {name: float(value) for name, value in lines}

    wait_for(lambda: shown().get("monitor_requests_total") == 25 and shown()["monitor_windows_total"] == 1)
    wait_for(lambda: "drift_p" in shown())
    assert shown()["monitor_unreadable_total"] == (status == 422) == (kind == "image") and shown()["monitor_broken_total"] == 0
    (window,) = monitor.recent
    assert window.rows == 20 and {*window.outside} == ({"brightness", "contrast", "detail"} if kind == "image" else {"characters", "words", "letters"})
    assert "adaptkit_monitor_failures_total 0.0" in ask("/metrics")[1].decode()
    made.slot.close()
    monitor.close()


def test_a_full_disk_under_the_monitor_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    made = make_service(image_folder().folder, monitor=lambda folder: Watching(fails=True), log=Log(LOG))
    ask = Direct(made)
    assert [ask("/predict", picture(), "image/png")[0] for _ in range(3)] == [200] * 3
    wait_for(lambda: "adaptkit_monitor_failures_total 3.0" in ask("/metrics")[1].decode())
    made.slot.close()
    assert '"error": "OSError"' in capsys.readouterr().err


def test_logs_hold_nothing_that_was_sent(texts: Service) -> None:
    LOG.truncate(0)
    LOG.seek(0)
    ask, secret = Direct(texts), "Zanzibar"
    ask("/predict?" + secret, secret.encode(), "text/plain", user_agent=secret, cookie=secret)
    ask("/predict", *form(("text", secret.encode()), file=secret))
    ask("/predict", json.dumps({secret: secret}).encode(), "application/json")
    ask(f"/{secret}")
    lines = [json.loads(line) for line in LOG.getvalue().splitlines()]
    assert len(lines) == 4 and secret not in LOG.getvalue() and "192.0.2.7" not in LOG.getvalue()
    assert {"time", "event", "id", "route", "method", "status", "ms", "bytes"} == {*lines[0]}
    assert secret not in ask("/metrics")[1].decode()


# For an engine


def test_each_number_on_the_dashboard_is_one_that_the_server_gives(service: Service) -> None:
    Direct(service)("/predict", picture(), "image/png")
    given = {*re.findall(r"^# TYPE (\S+) ", Meters().text().decode(), re.MULTILINE)}
    ends = ("", "_bucket", "_sum", "_count")
    known = {name + end for name in given for end in ends}
    board = json.loads((ROOT / "docker/grafana/dashboards/adaptkit.json").read_text())
    asked = {name for panel in board["panels"] for t in panel["targets"] for name in re.findall(r"\b(?:adaptkit|process)_\w+", t["expr"])}
    assert len(asked) >= 10 and asked <= known, asked - known


def test_files_for_an_engine_can_be_read_and_belong_together() -> None:
    files = {p.relative_to(ROOT).as_posix(): yaml.safe_load(p.read_text()) for p in (ROOT / "docker").rglob("*.y*ml")}
    compose = files["docker/compose.yaml"]
    assert {*compose["services"]} == {"model", "prometheus", "grafana"}
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./docker") or source == "./docker/token" or (ROOT / source).exists(), source
    (scrape,) = files["docker/prometheus.yml"]["scrape_configs"]
    host, port = scrape["static_configs"][0]["targets"][0].split(":")
    assert host in compose["services"] and f"127.0.0.1:{port}:{port}" in compose["services"][host]["ports"]
    source = files["docker/grafana/provisioning/datasources/prometheus.yml"]["datasources"][0]
    board = json.loads((ROOT / "docker/grafana/dashboards/adaptkit.json").read_text())
    assert {t["datasource"]["uid"] for p in board["panels"] for t in p["targets"]} == {source["uid"]}
    lines = (ROOT / "docker/Dockerfile").read_text().splitlines()
    words = json.loads(next(line for line in lines if line.startswith("CMD"))[4:])
    from adaptkit.deployment.commands import serve_command

    told = serve_command.make_context("serve", words[2:]).params
    assert words[:2] == ["adaptkit", "serve"] and (*map(str, told["folders"]), told["host"]) == ("/models/current", "0.0.0.0")
    assert told["monitor"] and any(v.split(":")[1] in told["store"] for v in compose["services"]["model"]["volumes"])


@pytest.mark.parametrize("wrong", [{"body": 0}, {"rate": -1}, {"patience": 0}, {"items": 0}, {"patience": float("nan")}, {"depth": "3"}])
def test_limits_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(AdaptkitError, match=next(iter(wrong))):
        Limits(**wrong)


def test_served_folders_are_verified_by_default() -> None:
    assert make_service.__kwdefaults__["opener"] is open_folder and Asked("text", ("a",), False).kind == "text"
