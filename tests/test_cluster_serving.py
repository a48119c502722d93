"""One address, two nodes: what travels, what a replica answers, and what becomes of requests when a node dies under load."""

from __future__ import annotations

import asyncio
import io
import json
import os
import secrets
import signal
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from service import image_folder, picture

from adaptkit.core.registry import AdaptkitError
from adaptkit.deployment import cluster as deployed
from adaptkit.deployment.cluster import Replica, Replicas, address_of, on_cluster, packed, unpack
from adaptkit.deployment.export import export
from adaptkit.deployment.folder import open_folder
from adaptkit.deployment.served import Setup
from adaptkit.heads.heads import Named, build_model

pytestmark = [pytest.mark.alone, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")  # read when Ray is imported
TOKEN = "t" * 24


def test_all_files_travel_and_damage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = image_folder()
    (folder.folder / ".env").write_text("a secret")
    files = packed(folder.folder)
    (folder.folder / ".env").unlink()
    assert ".env" not in files and open_folder(unpack(files, tmp_path / "there")).revision == folder.revision
    files["model.onnx"] = files["model.onnx"][:-1] + b"?"
    with pytest.raises(AdaptkitError, match="model.onnx"):
        Replica("there", files, Setup(), "", {})
    monkeypatch.setattr(deployed, "MOST", 1000)
    with pytest.raises(AdaptkitError, match="at most 0 MiB travel"):
        packed(folder.folder)


@pytest.mark.parametrize(("wrong", "words"), [({"count": 0}, "at least one replica"), ({"cores": 0.0}, "more than 0"), ({"queue": 0}, "at least 1")])
def test_replicas_that_cant_be(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(AdaptkitError, match=words):
        Replicas(**wrong)


def test_an_open_door_has_to_be_meant() -> None:
    with pytest.raises(AdaptkitError, match="can be reached from other machines"), on_cluster(image_folder().folder, host="0.0.0.0"):
        pass


def test_a_replica_is_the_same_application() -> None:
    from starlette.requests import Request

    folder = image_folder()
    replica = Replica("m", packed(folder.folder), Setup(threads=1), TOKEN, {})

    def ask(path: str, body: bytes, token: str = TOKEN) -> tuple[int, Any]:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        headers = [(b"content-type", b"image/png"), (b"authorization", f"Bearer {token}".encode())]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "client": None, "headers": headers}
        reply = asyncio.run(replica(Request(scope, receive)))
        assert "x-request-id" not in reply.headers, "Ray adds one"
        return reply.status_code, json.loads(reply.body)

    image = picture(3)
    wanted = folder.probabilities(folder.session()(folder.read([image])).logits)[0]
    status, told = ask("/predict", image)
    assert status == 200 and told["answers"][0]["class"] == folder.classes[int(wanted.argmax())]
    assert abs(told["answers"][0]["probability"] - float(wanted.max())) < 1e-5
    assert ask("/predict", image, "wrong" * 5)[0] == 401 and ask("/predict", b"nonsense")[0] == 422
    assert {path: ask(path, b"{}")[0] for path in ("/reload", "/rollback")} == dict.fromkeys(("/reload", "/rollback"), 404) and ask("/metrics", b"")[0] == 404
    replica.check_health()
    replica.service.slot.current.batcher.session = lambda inputs: (_ for _ in ()).throw(RuntimeError("gone"))
    with pytest.raises(RuntimeError, match="gone"):
        replica.check_health()
    place = replica.service.slot.path
    assert place.is_dir()
    replica.__del__()
    assert not place.exists()


def free_port() -> int:
    "A port that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize(("on", "host", "told"), [("ray", "127.0.0.1", "127.0.0.1"), ("ray", "0.0.0.0", "127.0.0.1"), ("ray://head:10001", "0.0.0.0", "head"), ("ray://head:10001", "::", "head"), ("ray", "::1", "[::1]")])
def test_where_somebody_finds_it(on: str, host: str, told: str) -> None:
    assert address_of(on, host, 80) == f"http://{told}:80/"


NODE = {"num_cpus": 1, "memory": 2**30, "include_dashboard": False}


@pytest.fixture
def cluster() -> Iterator[Any]:
    "Two nodes on this machine, and this process as a driver."
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        made.second = made.add_node(**NODE)
        ray.init(made.address, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def replicas_of(node: Any) -> list[psutil.Process]:
    "Processes of replicas on a node."
    raylet = next(p.process.pid for kind, ps in node.all_processes.items() if kind == "raylet" for p in ps)
    return [p for p in psutil.Process(raylet).children(recursive=True) if p.name().startswith("ray::ServeRepl")]


def plain(colour: tuple[int, int, int]) -> bytes:
    "An image of one colour."
    out = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(out, "PNG")
    return out.getvalue()


class Clients:
    "Threads that ask all the time; an error of the server is told, and asked again."

    def __init__(self, url: str, images: list[bytes], wanted: list[float]) -> None:
        self.url, self.images, self.wanted = url, images, wanted
        self.stop, self.answers, self.errors, self.wrong = threading.Event(), 0, Counter[str](), 0
        self.asked = [0] * 6  # requests that each has begun
        self.threads = [threading.Thread(target=self.work, args=(i,)) for i in range(6)]

    def work(self, me: int) -> None:
        "What each does."
        i = me
        while not self.stop.is_set():
            i, self.asked[me] = (i + 1) % len(self.images), self.asked[me] + 1
            request = urllib.request.Request(self.url + "predict", self.images[i], {"Content-Type": "image/png", "Authorization": f"Bearer {TOKEN}"})
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    said = json.load(reply)["answers"][0]["probability"]
            except urllib.error.HTTPError as e:
                self.errors[str(e.code)] += 1
                continue
            self.answers += 1
            self.wrong += abs(said - self.wanted[i]) > 1e-5

    def __enter__(self) -> Clients:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def each(self, n: int, seconds: float) -> None:
        "Wait until each has begun so many more requests."
        before, end = [*self.asked], time.monotonic() + seconds
        while any(now - then < n for now, then in zip(self.asked, before, strict=True)):
            assert time.monotonic() < end, f"{self.asked} after {before}; errors: {self.errors}"
            time.sleep(0.02)


@pytest.mark.slow
def test_a_node_dies_under_load_and_the_other_answers(cluster: Any, tmp_path: Path) -> None:
    folder = export(build_model("small_cnn", Named(("left", "right")), size=32, seed=0), "onnx", out=tmp_path / "sides")
    images = [plain((20 * i, 255 - 15 * i, 7 * i)) for i in range(12)]
    wanted = folder.probabilities(folder.session()(folder.read(images)).logits).max(1).tolist()
    gaps = np.diff(np.sort(wanted))
    assert gaps.min() > 3e-5, "an answer tells whose it is"
    before = {*Path(tempfile.gettempdir()).glob("adaptkit-*")}
    with on_cluster(folder.folder, port=free_port(), token=TOKEN) as url:
        (victim,) = replicas_of(cluster.second)
        with Clients(url, images, wanted) as clients:
            clients.each(10, 60)
            cluster.remove_node(cluster.second, allow_graceful=False)
            if victim.is_running():
                victim.send_signal(signal.SIGKILL)
            clients.each(3, 120)  # what was under way may have been lost; now it is over
            lost = clients.errors.total()
            clients.each(20, 120)
        assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE
        assert clients.errors.total() == lost, clients.errors  # later on nobody notices
        assert clients.wrong == 0 and clients.answers > 150
        assert urllib.request.urlopen(url + "health").status == 200
        with pytest.raises(AdaptkitError, match="runs on this cluster already"), on_cluster(folder.folder, port=free_port()):
            pass
    left = {*Path(tempfile.gettempdir()).glob("adaptkit-*")} - before
    assert len(left) <= 1, left  # that of the replica that was killed
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(AdaptkitError, match="is that port free"), on_cluster(folder.folder, port=s.getsockname()[1], replicas=Replicas(1, seconds=60)):
            pass
    with pytest.raises(AdaptkitError, match="the cores that they need"), on_cluster(folder.folder, port=free_port(), replicas=Replicas(2, seconds=5)):
        pass
