"""The Studio as people meet it: served, in a real browser, from choosing data to a notebook that gives the same accuracy."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import papermill
import psutil
import pytest
from browser import ROOT, SHOTS, WIDTHS, Notebook, browser, chromium, free_port, lab_server, served
from nbformat.v4 import new_code_cell, new_notebook, writes
from PIL import Image
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from adaptkit.data.sources import load_data
from adaptkit.notebooks.records import records
from adaptkit.training.runs import Run
from adaptkit.training.session import fingerprint
from adaptkit.widgets.notes import find_notes
from adaptkit.widgets.recipe import reproduce
from adaptkit.widgets.reproduction import KERNEL
from adaptkit.widgets.still import STATE

pytestmark = [pytest.mark.slow, pytest.mark.alone]

TOKEN = "correct-horse-battery-staple"
COMMAND = "from adaptkit.cli import main; main()"


def digit_folder(root: Path, classes: int, images: int = 90) -> Path:
    "Some digits in folders."
    digits = load_data("digits")
    for i in range(images):
        place = root / f"number {digits.train.labels[i] % classes}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.train.image(i)).save(place)
    return root


def zipped(folder: Path, more: dict[str, bytes] | None = None) -> bytes:
    "A folder as a zip, and perhaps something else in it."
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder.parent))
        for name, content in (more or {}).items():
            archive.writestr(name, content)
    return file.getvalue()


def words_of(process: psutil.Process) -> list[str]:
    "What a process was started with; nothing if it has ended."
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@dataclass
class Site:
    "A Studio that is served."

    port: int
    folder: Path  # of the test
    data: Path  # below which visitors may choose

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def kernels(self) -> list[int]:
        "Processes of kernels."
        mine = [c for c in psutil.Process().children() if str(self.port) in words_of(c)]
        return [c.pid for p in mine for c in p.children(recursive=True) if "ipykernel_launcher" in words_of(c)]

    def ask(self, path: str, method: str = "GET", *, headers: dict[str, str] | None = None, body: bytes | None = None) -> tuple[int, bytes, str]:
        "Status, content, and where one is sent to; nothing is followed."
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.getheader("Location", "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    chromium()
    folder, port = tmp_path_factory.mktemp("studio"), free_port()
    digit_folder(folder / "data/tens", 10, 100)
    (folder / "data/secret.txt").write_text("not for everybody")
    options = ["studio", "--port", str(port), "--token", TOKEN, "--data", str(folder / "data"), "--most", "30"]
    with served([sys.executable, "-c", COMMAND, *options], f"http://127.0.0.1:{port}/voila/static/none", work=folder):
        yield Site(port, folder, folder / "data")


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    with browser() as started:
        yield started


@dataclass
class Visitor:
    "Somebody with a browser."

    page: Any  # Playwright's
    site: Site

    def come(self) -> Visitor:
        "Open the Studio; its first step is open."
        self.page.goto(f"{self.site.url}/?token={TOKEN}", wait_until="domcontentloaded", timeout=90_000)
        self.turn(1)
        return self

    def turn(self, number: int) -> None:
        "Wait until it is the turn of a step."
        self.page.locator(".adaptkit-step h2", has_text=re.compile(rf"{number}\. .*your turn")).wait_for(timeout=90_000)

    def step(self, number: int) -> Any:
        return self.page.locator(".adaptkit-step").nth(number - 1)

    def press(self, words: str, then: int = 0) -> None:
        "Press a button, and wait for a step's turn."
        self.page.locator("button.jupyter-button", has_text=re.compile(rf"^\s*{re.escape(words)}\s*$")).first.click()
        if then:
            self.turn(then)

    def train(self) -> None:
        "Steps 2 to 4 with the small network."
        self.page.get_by_label("Network").select_option("small_cnn")
        self.press("Use this network", 3)
        self.press("Use this layer", 4)
        self.page.get_by_label("Images may be mirrored").uncheck()
        self.step(4).locator(".noUi-handle").nth(1).focus()
        self.page.keyboard.press("Home")  # one epoch
        self.press("What will it take?")
        self.step(4).locator("text=It will take about").wait_for(timeout=60_000)
        self.press("Start", 5)

    def begin(self, first: int) -> None:
        "Press Start, and wait until the training is in the middle of that epoch or a later one; the first leaves no checkpoint."
        self.step(4).get_by_role("button", name="Start").click()
        middle = "|".join(str(36 * epoch + i) for epoch in range(first - 1, 5) for i in range(4, 33))
        self.step(4).locator(".widget-html-content", has_text=re.compile(f"running.*batch ({middle}) of 216")).wait_for(timeout=90_000)

    def welcome(self) -> str:
        "Wait for the question that is asked to those who come back."
        found = self.page.locator(".adaptkit-welcome", has_text="Go on where I was")
        found.wait_for(timeout=90_000)
        assert not self.step(1).is_visible()
        return str(found.inner_text())

    def fetch(self, name: str) -> Path:
        "Click a link, and keep what comes."
        with self.page.expect_download() as waiting:
            self.step(7).locator("a", has_text=name).click()
        path = self.site.folder / f"{time.monotonic_ns()}-{name}"
        waiting.value.save_as(path)
        return path

    def send(self, name: str, content: bytes) -> None:
        "Choose a file in the field of step 1."
        self.page.get_by_label("a file that I send").check()
        field = self.page.locator(".adaptkit-upload input[type=file]")
        field.wait_for(state="visible", timeout=60_000)
        field.set_input_files({"name": name, "mimeType": "application/zip", "buffer": content})

    def said(self, words: str) -> str:
        "Wait for a sentence in step 1."
        found = self.step(1).locator("[role=alert], .adaptkit-upload output", has_text=re.compile(words)).first
        found.wait_for(timeout=60_000)
        return str(found.inner_text())

    def shoot(self, name: str) -> None:
        "Pictures of the whole page, wide and narrow; nothing is wider than the screen."
        SHOTS.mkdir(parents=True, exist_ok=True)
        for width in WIDTHS:
            self.page.set_viewport_size({"width": width, "height": 1000})
            self.page.wait_for_timeout(400)
            tall = self.page.evaluate("Math.ceil(document.querySelector('.adaptkit-guide').getBoundingClientRect().height) + 60")
            self.page.set_viewport_size({"width": width, "height": min(6000, max(1000, tall))})
            self.page.wait_for_timeout(400)
            assert self.page.evaluate("document.querySelector('.adaptkit-guide').getBoundingClientRect().right") <= width
            self.page.screenshot(path=str(SHOTS / f"{name}-{width}.png"))
        self.page.set_viewport_size({"width": 1280, "height": 1000})


@pytest.fixture
def come(chrome: Any, site: Site) -> Iterator[Callable[[], Visitor]]:
    "Lets somebody come in; at the end everybody leaves, and their kernels end."
    contexts = []

    def comes() -> Visitor:
        contexts.append(chrome.new_context(viewport={"width": 1280, "height": 1000}))
        return Visitor(contexts[-1].new_page(), site).come()

    yield comes
    for page in (p for c in contexts for p in c.pages):
        page.goto("about:blank")  # its last message ends its kernel
    until(lambda: not site.kernels())
    for context in contexts:
        context.close()


def test_two_people_at_once_each_to_the_end_and_the_notebook_gives_the_same_accuracy(site: Site, come: Callable[[], Visitor], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ann, bob = come(), come()
    assert len(site.kernels()) == 2
    ann.shoot("studio-begin")
    assert ann.page.get_by_label("Data set").input_value() == "digits"
    ann.press("Look at these data", 2)
    bob.send("two.zip", zipped(digit_folder(tmp_path / "two", 2)))
    bob.turn(2)
    assert "number 1" in bob.step(1).inner_text() and "number 1" not in ann.step(1).inner_text() and "digits: " in ann.step(1).inner_text()
    ann.train()
    bob.train()
    for who in (ann, bob):
        who.press("Go on", 6)
        who.press("Test it now", 7)
        who.press("Pack everything")
        who.step(7).locator("a", has_text="model.zip").wait_for(timeout=60_000)
    ann.shoot("studio-end")
    for who, classes in ((ann, 10), (bob, 2)):
        shown = re.search(r"([\d.]+) % of the test samples right", who.step(6).inner_text())[1]
        files = {name: who.fetch(name) for name in ("model.zip", "report.html", "reproduce.ipynb")}
        place = tmp_path / f"home-{classes}"
        with zipfile.ZipFile(files["model.zip"]) as archive:
            archive.extractall(place)
        assert (place / "report.html").read_bytes() == files["report.html"].read_bytes()
        assert len(json.loads((place / "model/model.json").read_text())["classes"]) == classes
        assert (place / "data").is_dir() == (who is bob)
        assert json.loads((place / "model/run.json").read_text())["status"] == "done"
        assert f"{shown} % of the test samples" in (place / "README.txt").read_text()
    executed = papermill.execute_notebook(tmp_path / "home-10/reproduce.ipynb", tmp_path / "executed.ipynb", cwd=str(tmp_path / "home-10"), progress_bar=False)
    assert f"{100 * records(executed)['test_accuracy'].value:.1f}" == re.search(r"([\d.]+) % of the test samples right", ann.step(6).inner_text())[1]
    mine = ann.step(7).locator("a", has_text="model.zip").get_attribute("href")
    assert site.ask(mine)[0] in (302, 403) and mine.split("/")[2] not in bob.page.content()
    ann.page.goto("about:blank")
    until(lambda: len(site.kernels()) == 1)


def until(true: Callable[[], bool]) -> None:
    "Wait, on a busy machine a minute and a half at most."
    end = time.monotonic() + 90
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def key_of(who: Visitor) -> str:
    "The name of a visitor's folder, which stands in that visitor's page only."
    return re.search(r"/studio/([\w-]{20,})/", who.page.content())[1]


def place_of(who: Visitor) -> Path:
    "A visitor's folder."
    processes = [c for c in psutil.Process().children() if str(who.site.port) in words_of(c)]
    return Path(processes[0].cwd()).parent / "desk" / key_of(who)


def left(who: Visitor) -> list[str]:
    "What a visitor has on the disk, besides what the server itself keeps."
    place = place_of(who)
    return sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file() and p.name not in ("kernel", "visit.json", "choices.json"))


def test_bad_uploads_each_get_a_sentence_and_leave_nothing(site: Site, come: Callable[[], Visitor], tmp_path: Path) -> None:
    eve = come()
    good = digit_folder(tmp_path / "two", 2, 60)
    bad = {
        "zip bomb": ("bomb.zip", zipped(good, {"two/cat/zeros.png": bytes(60_000_000)})),
        "leads out of the folder": ("up.zip", zipped(good, {"../../1.png": b"x"})),
        "absolute path": ("abs.zip", zipped(good, {"/etc/1.png": b"x"})),
        "neither an image": ("code.zip", zipped(good, {"two/run.py": b"boom"})),
        "not a zip": ("not.zip", b"GIF89a" * 100),
        "is neither a zip nor a table": ("cat.exe", b"x"),
        "empty": ("empty.zip", b""),
        "cannot be used": ("noise.zip", zipped(good, {f"two/number 0/noise-{i}.png": bytes([i]) * 200 for i in range(40)})),
    }
    for words, (name, content) in bad.items():
        eve.send(name, content)
        assert "Traceback" not in eve.said(words)
        assert left(eve) == [], name
    eve.page.locator(".adaptkit-upload input[type=file]").evaluate(
        "(field) => { const f = new File(['x'], 'big.zip'); Object.defineProperty(f, 'size', {value: 2e9});"
        "Object.defineProperty(field, 'files', {value: [f]}); field.onchange(); }"
    )
    eve.said("too large: at most 30 MB")
    eve.shoot("studio-refused")
    eve.page.reload()
    eve.turn(1)
    eve.send("two.zip", zipped(good))
    eve.turn(2)
    eve.page.get_by_label("a folder of this server").check()
    assert eve.page.get_by_label("Folder", exact=True).locator("option").all_inner_texts() == ["tens"]
    eve.press("Look at these data")
    eve.step(1).locator("td", has_text="number 9").wait_for(timeout=60_000)
    assert left(eve) == []  # what was sent before is gone


def test_without_the_token_everything_is_closed(site: Site, come: Callable[[], Visitor]) -> None:
    someone = come()
    kernel = re.search(r'"kernelId": ?"([\w-]+)"', someone.page.content())[1]
    key = key_of(someone)
    paths = [("/", "GET"), (f"/api/kernels/{kernel}", "GET"), (f"/api/kernels/{kernel}", "DELETE"), (f"/api/kernels/{kernel}/channels", "GET")]
    paths += [(f"/studio/{key}/in?name=a.zip", "PUT"), (f"/studio/{key}/out/model.zip", "GET"), (f"/studio/{key}/pulse?kernel={kernel}", "GET"), (f"/voila/api/shutdown/{kernel}", "POST")]
    for path, method in paths:
        status, body, to = site.ask(path, method, body=b"x" if method == "PUT" else None)
        assert status == 403 or (status == 302 and "/login" in to), (path, status)
        assert b"adaptkit-guide" not in body
    wrong = site.ask("/?token=wrong")
    assert wrong[0] in (302, 403) and b"studio_page" not in wrong[1]
    assert len(site.kernels()) == 1  # nobody without a token has started one, and none was ended
    known = {"Authorization": f"token {TOKEN}"}
    assert site.ask(f"/api/kernels/{kernel}", headers=known)[0] == 200
    for path in ("/voila/files/Studio.ipynb", "/voila/files/..%2F..%2Fetc%2Fpasswd", f"/studio/{key}/out/..%2Fkernel", f"/studio/{key}/in/x", "/etc/passwd"):
        assert site.ask(path, headers=known)[0] in (302, 403, 404), path
    declared = {**known, "Content-Length": str(2 * 10**9)}
    status, said, _ = site.ask(f"/studio/{key}/in?name=big.zip", "PUT", headers=declared)
    assert status == 413 and said.decode() == "'big.zip' has 2.0 GB: at most 30 MB are allowed." and left(someone) == []

    def knock(headers: dict[str, str]) -> str:
        try:
            with connect(f"ws://127.0.0.1:{site.port}/api/kernels/{kernel}/channels", additional_headers=headers, open_timeout=10):
                return "open"
        except InvalidStatus as e:
            return str(e.response.status_code)

    assert [knock(h) for h in ({}, known)] == ["403", "open"]


def test_a_kernel_that_dies_is_told_of_and_what_it_did_is_found_again_by_its_visitor_only(site: Site, come: Callable[[], Visitor], tmp_path: Path) -> None:
    ann = come()
    (process,) = site.kernels()
    ann.press("Look at these data", 2)
    ann.page.get_by_label("Network").select_option("small_cnn")
    ann.press("Use this network", 3)
    ann.press("Use this layer", 4)
    ann.press("What will it take?")
    place = place_of(ann)
    ann.begin(2)
    os.kill(process, signal.SIGKILL)
    banner = ann.page.locator("#adaptkit-banner")
    banner.wait_for(timeout=30_000)
    assert "has ended" in banner.inner_text() and "The training that was going on can be resumed." in banner.inner_text()
    assert ann.page.evaluate("document.querySelector('.adaptkit-guide').inert")  # nothing can be pressed that nobody hears
    ann.shoot("studio-died")
    bob = come()  # somebody else, who has seen Ann's address
    bob.page.goto(f"{ann.page.url}&token={TOKEN}", wait_until="domcontentloaded", timeout=90_000)
    bob.turn(1)
    assert "tab=" in ann.page.url and key_of(bob) != key_of(ann) and "Welcome back" not in bob.page.locator(".adaptkit-guide").inner_text()
    banner.get_by_role("button").click()
    ann.welcome()
    assert place_of(ann) == place
    ann.shoot("studio-welcome")
    ann.press("Go on where I was", 4)
    resume = ann.step(4).get_by_role("button", name="Resume")
    ann.step(4).locator("text=/broke off on .*, in epoch \\d of 6/").wait_for(timeout=30_000)
    ann.step(2).locator("text=Three convolutions").wait_for(timeout=30_000)
    resume.click()
    ann.turn(5)
    again = Run(place / "work/run-1")
    whole = reproduce(find_notes(place / "work").recipe, tmp_path / "whole").run
    assert [e["loss"] for e in again.events] == [e["loss"] for e in whole.events] and fingerprint(again.model) == fingerprint(whole.model)
    ann.press("What will it take?", 4)
    ann.begin(1)
    ann.page.reload(wait_until="domcontentloaded", timeout=90_000)  # no kernel died: the old one has written where it was
    reached, kept = re.search(r"after batch ([\d,]+) of 216: its checkpoint holds ([\d,]+) batches", ann.welcome()).groups()
    assert reached == kept != "0"  # a checkpoint that is written only after an epoch would hold fewer
    ann.press("Begin anew", 1)
    until(lambda: left(ann) == [])


def test_dark_and_by_keyboard(chrome: Any, tmp_path: Path) -> None:
    port = free_port()
    options = ["studio", "--port", str(port), "--token", TOKEN, "--theme", "dark", "--visitors", "1"]
    with served([sys.executable, "-c", COMMAND, *options], f"http://127.0.0.1:{port}/voila/static/none", work=tmp_path):
        who = Visitor(chrome.new_context(viewport={"width": 1280, "height": 1000}).new_page(), Site(port, tmp_path, tmp_path)).come()
        other = chrome.new_context(viewport={"width": 390, "height": 800}).new_page()
        assert other.goto(f"{who.site.url}/?token={TOKEN}").status == 503
        assert "One person works here just now" in other.locator("body").inner_text() and other.locator("meta[http-equiv=refresh]").count() == 1
        other.screenshot(path=str(SHOTS / "studio-full-390.png"))
        assert len(who.site.kernels()) == 1
        for control in who.page.locator(".adaptkit-step select:visible, .adaptkit-step input:visible").all():
            assert control.evaluate("e => [...(e.labels || [])].some(l => l.innerText.trim()) || !!e.getAttribute('aria-label') || !!e.title"), control
        seen = set()
        for _ in range(40):
            who.page.keyboard.press("Tab")
            seen.add(who.page.evaluate("document.activeElement.innerText || document.activeElement.tagName"))
            if "Look at these data" in seen:
                break
        assert "Look at these data" in seen and "INPUT" in seen and any(words.startswith("digits") for words in seen)
        who.page.keyboard.press("Enter")
        who.turn(2)
        who.shoot("studio-dark")
        pixels = np.asarray(Image.open(SHOTS / "studio-dark-1280.png").convert("L"))
        assert np.median(pixels) < 60
        who.page.goto("about:blank")
        until(lambda: not who.site.kernels())
        Visitor(other, who.site).come()  # there is room again
        other.goto("about:blank")
        until(lambda: not who.site.kernels())
        for page in (who.page, other):
            page.context.close()


def test_in_jupyterlab_it_is_the_value_of_a_cell(chrome: Any, tmp_path: Path) -> None:
    root = tmp_path / "lab"
    digit_folder(root / "photos", 2, 60)
    source = "from adaptkit.widgets.guide import studio_page\nstudio_page()"
    (root / "studio.ipynb").write_text(writes(new_notebook(cells=[new_code_cell(source)], metadata={"kernelspec": KERNEL})))
    (tmp_path / "jupyter").mkdir()
    with lab_server(root, tmp_path / "jupyter") as url:
        page = Notebook(chrome.new_page(viewport={"width": 1280, "height": 1000}), url, "studio.ipynb").open()
        page.run()
        page.panel.get_by_label("a folder of this computer").check()
        page.panel.get_by_label("Folder or table").fill("photos")
        page.button("Look at these data").click()
        page.panel.locator("h2", has_text="2. Choose a pretrained network (your turn)").wait_for(timeout=60_000)
        page.shoot("studio-lab", page.panel.locator(".adaptkit-guide"))
        page.save()
        page.stop()
    stored = [output["data"] for output in json.loads((root / "studio.ipynb").read_text())["cells"][0]["outputs"] if "data" in output]
    assert stored[-1][STATE]["state"]["done"] == 1 and "adaptkit-still" in "".join(stored[-1]["text/html"])
