"""A real server, a real browser: under load, at its end, while models change, with clients that are slow or mean; fuzzed from its own description."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import psutil
import pytest
from browser import SHOTS, WIDTHS, browser
from service import form, image_folder, picture, text_folder

from adaptkit.core.registry import AdaptkitError
from adaptkit.data.sources import load_data
from adaptkit.deployment.requests import Limits
from adaptkit.deployment.served import Setup
from adaptkit.deployment.serving import Running, model_folder, running, shadow

pytestmark = pytest.mark.alone
TOKEN = "only-for-these-tests-0123456789"


@pytest.fixture(scope="module")
def images() -> Iterator[Running]:
    "A server for images that isn't patient."
    with running(image_folder().folder, setup=Setup(limits=Limits(patience=2.0))) as up:
        yield up


@pytest.fixture(scope="module")
def texts() -> Iterator[Running]:
    "A server for texts."
    with running(text_folder().folder) as up:
        yield up


def raw(port: int, *pieces: bytes, wait: float = 0.0) -> tuple[int, bytes]:
    "Status and body of whatever is sent, in pieces; 0: nothing came back."
    with socket.create_connection(("127.0.0.1", port), 10) as s:
        s.settimeout(10)
        for piece in pieces:
            try:
                s.sendall(piece)
            except OSError:  # it has hung up, after an answer
                break
            time.sleep(wait)
        told = b""
        try:
            while chunk := s.recv(65536):
                told += chunk
        except OSError:
            pass
    head, _, body = told.partition(b"\r\n\r\n")
    return (int(head.split(b" ")[1]) if head else 0), body


def test_served_answers_are_those_of_the_network(images: Running, texts: Running) -> None:
    data = load_data("support_topics", seed=0)
    told = shadow(texts, text_folder().model(), samples=data.test.take(range(20)))
    assert told.passed and told.n == 20
    digits = load_data("digits", seed=0)
    model = image_folder().model()
    assert shadow(images, model, samples=digits.test.take(range(20)), temperature=image_folder().temperature).passed
    assert not shadow(images, model, samples=digits.test.take(range(5)), temperature=9.0).passed


def test_what_isnt_a_request(images: Running) -> None:
    line = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\n"
    image = picture()
    cases = {
        "half a line": (408, [b"POST /pre"]),
        "nothing": (408, [b""]),
        "half a body": (408, [line + b"Content-Length: 5000\r\n\r\n" + image[:100]]),
        "many headers": (431, [line + b"X-A: b\r\n" * 5000 + b"\r\n"]),
        "one long header": (431, [line + b"X-A: " + b"b" * 100_000 + b"\r\n\r\n"]),
        "a long address": (431, [b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"]),
        "no HTTP": (400, [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"]),
        "a wrong length": (400, [line + b"Content-Length: -5\r\n\r\n"]),
        "two lengths": (400, [line + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!"]),
        "a length that lies": (413, [line + b"Content-Length: 99999999999\r\n\r\n" + image]),
        "chunks without end": (408, [line + b"Transfer-Encoding: chunked\r\n\r\n" + b"5\r\nhello\r\n"]),
        "another method": (405, [b"BREW /predict HTTP/1.1\r\nHost: a\r\n\r\n", b""]),
    }
    for name, (status, pieces) in cases.items():
        found, body = raw(images.port, *pieces)
        assert found == status or (name == "another method" and found == 400), (name, found, body)
        assert json.loads(body)["error"], name
    began = time.monotonic()
    assert raw(images.port, *[bytes([c]) for c in line[:60]], wait=0.1)[0] == 408 and time.monotonic() - began < 8
    assert images.ask("/predict", image, kind="image/png")[0] == 200


def test_too_large_bodies_are_told_so_and_not_kept(images: Running) -> None:
    before = psutil.Process(images.process.pid).memory_info().rss
    status, body = images.ask("/predict", b"\x00" * 14 * 2**20, kind="application/octet-stream")
    assert status == 413 and b"10 MiB" in body
    assert psutil.Process(images.process.pid).memory_info().rss - before < 30 * 2**20


def spoilt(dice: random.Random) -> tuple[bytes, str]:
    "A request with something wrong."
    image = picture(dice.randrange(9))
    return dice.choice([
        (image[: dice.randrange(len(image) - 200)], "image/png"), (dice.randbytes(900), "image/png"), (b"[" * 3000, "application/json"), (b'{"image": NaN}', "application/json"),
        (b'{"imgae": "x"}', "application/json"), (b"hello", "text/plain"), (image, "application/pdf"), form(("../x", image)), (form(("image", image))[0][:-9], "multipart/form-data; boundary=x"),
    ])  # fmt: skip


def test_a_storm_with_a_fifth_malformed(images: Running) -> None:
    pictures = [picture(i) for i in range(9)]
    right = [json.loads(images.ask("/predict", p, kind="image/png")[1])["answers"][0]["class"] for p in pictures]
    statuses: Counter[int] = Counter()
    memory: list[int] = []

    def client(seed: int) -> None:
        dice = random.Random(seed)
        for i in range(50):
            k = dice.randrange(9)
            bad = dice.random() < 0.2
            body, kind = spoilt(dice) if bad else (pictures[k], "image/png")
            status, told = images.ask("/predict", body, kind=kind)
            statuses[status] += 1
            assert 400 <= status < 500 if bad else json.loads(told)["answers"][0]["class"] == right[k]
            if i % 5 == 0:
                memory.append(psutil.Process(images.process.pid).memory_info().rss)

    failures: list[BaseException] = []

    def guarded(seed: int) -> None:
        try:
            client(seed)
        except BaseException as e:
            failures.append(e)

    for _ in range(2):
        threads = [threading.Thread(target=guarded, args=(seed,)) for seed in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(120)
    assert not failures, failures[0]
    assert sum(statuses.values()) == 400 and max(statuses) < 500 and 40 < sum(statuses.values()) - statuses[200] < 130
    half = len(memory) // 2
    assert max(memory[half:]) < 1.1 * max(memory[:half])


class Askers:
    "Clients that ask all the time, half of them on connections that they keep."

    def __init__(self, port: int, n: int = 8) -> None:
        self.heard: Counter[str] = Counter()
        self.port, self.stop = port, threading.Event()
        self.threads = [threading.Thread(target=self.client, args=(i % 2 == 0,)) for i in range(n)]
        for t in self.threads:
            t.start()

    def client(self, keep: bool) -> None:
        body, told = picture(), {"Content-Type": "image/png", "Authorization": f"Bearer {TOKEN}"}
        connection = None
        while not self.stop.is_set():
            try:
                if connection is None:
                    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
                    connection.connect()
            except OSError:
                self.heard["refused"] += 1
                return
            try:
                connection.request("POST", "/predict", body, told)
                reply = connection.getresponse()
                reply.read()
                word, over = str(reply.status), reply.will_close
            except (OSError, http.client.HTTPException) as e:
                word, over = f"lost: {type(e).__name__}", True
            self.heard[word] += 1
            if over or not keep:
                connection.close()
                connection = None

    def end(self) -> Counter[str]:
        self.stop.set()
        for t in self.threads:
            t.join(40)
        return self.heard


def test_told_to_end_under_load_nobody_is_lost() -> None:
    with running(image_folder().folder) as up:
        askers = Askers(up.port, 12)
        time.sleep(1.0)
        up.process.terminate()
        assert up.process.wait(30) == 0
        heard = askers.end()
        events = [line["event"] for line in up.lines()]
    assert {*heard} == {"200", "refused"} and heard["200"] > 12 and heard["refused"] == 12, heard
    assert events[0] == "started" and events[-1] == "ended"


def test_while_it_ends_it_isnt_ready_and_still_answers() -> None:
    with running(image_folder().folder, drain=6.0) as up:
        up.process.terminate()
        time.sleep(0.5)
        assert up.ask("/ready")[0] == 503 and up.ask("/predict", picture(), kind="image/png")[0] == 200


def test_models_change_under_load_and_nobody_is_lost(tmp_path: Path) -> None:
    for name in ("first", "second", "broken"):
        copytree(image_folder().folder, tmp_path / name)
    weights = tmp_path / "broken/model.onnx"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with running(tmp_path / "first", token=TOKEN) as up:
        askers = Askers(up.port)
        outcomes = []
        for _ in range(2):
            outcomes.append([up.ask("/reload", json.dumps({"folder": n}).encode())[0] for n in ("second", "broken")] + [up.ask("/rollback", b"")[0]])
        os.kill(up.process.pid, 1)  # SIGHUP
        end = time.monotonic() + 20
        while sum(line.get("outcome") == "changed" for line in up.lines()) < 3 and time.monotonic() < end:
            time.sleep(0.1)
        heard = askers.end()
        changed = sum(line.get("outcome") == "changed" for line in up.lines())
    assert outcomes == [[200, 422, 200]] * 2 and changed == 3
    assert {*heard} == {"200"} and heard["200"] > 20, heard


@pytest.mark.parametrize("which", ["images", "texts"])
def test_it_keeps_the_word_of_its_description(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    up: Running = request.getfixturevalue(which)
    tool = Path(sys.executable).with_name("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance,unsupported_method,ignored_auth"
    options = ["--max-examples", "6", "--seed", "1", "--phases", "examples,coverage,fuzzing", "--checks", checks, "--suppress-health-check", "all", "--request-timeout", "30"]
    done = subprocess.run([str(tool), "run", f"{up.url}openapi.json", *options], capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d+ generated", done.stdout) and not [s for s in re.findall(r'"status": (\d+)', up.log.read_text()) if int(s) >= 500]


def test_what_cannot_start_says_why(tmp_path: Path, images: Running) -> None:
    with pytest.raises(AdaptkitError, match="run.json|model.json"), running(tmp_path, seconds=60):
        pass
    with pytest.raises(AdaptkitError, match="another port"), running(image_folder().folder, port=images.port):
        pass
    assert model_folder(image_folder().folder) == image_folder().folder


# The page, in a browser


def watched(tab: Any) -> list[str]:
    "What goes wrong on a page, as it goes wrong."
    wrong: list[str] = []
    tab.on("pageerror", lambda e: wrong.append(str(e)))
    tab.on("console", lambda m: wrong.append(m.text) if m.type == "error" and "status of 4" not in m.text else None)
    tab.on("request", lambda r: wrong.append(r.url) if "127.0.0.1" not in r.url and not r.url.startswith(("data:", "blob:")) else None)
    return wrong


def shots(tab: Any, name: str) -> None:
    "Pictures of a page, wide and narrow, light and dark; nothing may stick out."
    SHOTS.mkdir(parents=True, exist_ok=True)
    for theme in ("light", "dark"):
        tab.emulate_media(color_scheme=theme)
        for width in WIDTHS:
            tab.set_viewport_size({"width": width, "height": 900})
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            tab.screenshot(path=str(SHOTS / f"{name}-{width}-{theme}.png"), full_page=True)


def test_the_page_for_images(tmp_path: Path) -> None:
    file = tmp_path / "some.png"
    file.write_bytes(picture(size=(400, 300)))
    with running(image_folder().folder, token=TOKEN) as up, browser() as chrome:
        tab = chrome.new_page(viewport={"width": WIDTHS[1], "height": 844}, has_touch=True)
        wrong = watched(tab)
        tab.goto(up.url)
        tab.set_input_files("#file", file)
        tab.locator("#error", has_text="needs the token").wait_for(timeout=20_000)
        tab.locator("summary").click()
        tab.fill("#token", TOKEN)
        tab.set_input_files("#file", file)
        tab.locator("#answer").wait_for(timeout=20_000)
        wanted = json.loads(up.ask("/predict", file.read_bytes(), kind="image/png")[1])["answers"][0]
        assert tab.locator("#said").inner_text() == wanted["class"] and tab.locator("#classes li").count() == 3
        assert f"{100 * wanted['probability']:.1f}" in tab.locator("#sure").inner_text()
        tab.locator("#why").click()
        tab.locator("#map img").wait_for(timeout=60_000)
        tab.wait_for_function("document.querySelector('#map img').naturalWidth >= 320")
        shots(tab, "demo-image")
        (tmp_path / "bad.png").write_bytes(b"hello")
        tab.set_input_files("#file", tmp_path / "bad.png")
        tab.locator("#error", has_text="not an image").wait_for(timeout=20_000)
        assert tab.locator("#answer").is_hidden() and not wrong, wrong


def test_a_file_that_is_dropped(images: Running) -> None:
    with browser() as chrome:
        tab = chrome.new_page()
        wrong = watched(tab)
        tab.goto(images.url)
        data = tab.evaluate_handle(
            "bytes => { const t = new DataTransfer(); t.items.add(new File([new Uint8Array(bytes)], 'a.png', {type: 'image/png'})); return t }", list(picture(size=(60, 60)))
        )
        tab.dispatch_event("#drop", "drop", {"dataTransfer": data})
        tab.locator("#answer").wait_for(timeout=20_000)
        assert not wrong, wrong


def test_the_page_for_texts_with_keys_alone(texts: Running) -> None:
    with browser() as chrome:
        tab = chrome.new_page(viewport={"width": WIDTHS[0], "height": 900})
        wrong = watched(tab)
        tab.goto(texts.url)
        keys = tab.keyboard
        keys.press("Tab")
        keys.type("Who wrote <b>Hamlet</b>?")
        keys.press("Control+Enter")
        tab.locator("#answer").wait_for(timeout=20_000)
        for _ in range(8):
            keys.press("Tab")
            if tab.evaluate("document.activeElement.id") == "why":
                break
        keys.press("Enter")
        tab.locator("#map mark").first.wait_for(timeout=60_000)
        assert "Hamlet" in tab.locator("#map").inner_text() and tab.locator("#map b").count() == 0
        shots(tab, "demo-text")
        assert not wrong, wrong


def test_several_models_at_one_address() -> None:
    with running({"pets": image_folder().folder, "topics": text_folder().folder}) as up:
        assert up.ask("/")[1].count(b"<h2>") == 2
        status, told = up.ask("/models/topics/predict", b"where is my parcel", kind="text/plain")
        assert status == 200 and json.loads(told)["answers"][0]["class"] in text_folder().classes
        up.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 30
        while sum(line["event"] == "reload" for line in up.lines()) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        assert [line["outcome"] for line in up.lines() if line["event"] == "reload"] == ["changed"] * 2
    assert up.process.returncode == 0
