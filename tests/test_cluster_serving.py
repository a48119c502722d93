"""One address, two nodes: what travels, what a replica answers, and what becomes of requests when a node dies under load."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
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
from service import image_folder, picture

from adaptkit.core.registry import AdaptkitError
from adaptkit.deployment import cluster as deployed
from adaptkit.deployment.cluster import Replica, Replicas, on_cluster, packed, unpack
from adaptkit.deployment.folder import open_folder
from adaptkit.deployment.served import Setup

pytestmark = [pytest.mark.alone, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")  # read when Ray is imported
TOKEN = "t" * 24


def test_all_files_travel_and_damage_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = image_folder()
    files = packed(folder.folder)
    assert open_folder(unpack(files, tmp_path / "there")).revision == folder.revision
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
        assert "x-request-id" in reply.headers
        return reply.status_code, json.loads(reply.body)

    image = picture(3)
    wanted = folder.probabilities(folder.session()(folder.read([image])).logits)[0]
    status, told = ask("/predict", image)
    assert status == 200 and told["answers"][0]["class"] == folder.classes[int(wanted.argmax())]
    assert abs(told["answers"][0]["probability"] - float(wanted.max())) < 1e-5
    assert ask("/predict", image, "wrong" * 5)[0] == 401 and ask("/predict", b"nonsense")[0] == 422
    assert {path: ask(path, b"{}")[0] for path in ("/reload", "/rollback", "/metrics")} == dict.fromkeys(("/reload", "/rollback", "/metrics"), 404)
    replica.check_health()
    replica.service.slot.current.batcher.session = lambda inputs: (_ for _ in ()).throw(RuntimeError("gone"))
    with pytest.raises(RuntimeError, match="gone"):
        replica.check_health()
    replica.service.close()


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


class Clients:
    "Threads that ask all the time; an error of the server is told, and asked again."

    def __init__(self, url: str, images: list[bytes], wanted: list[str]) -> None:
        self.url, self.images, self.wanted = url, images, wanted
        self.stop, self.answers, self.errors, self.wrong = threading.Event(), 0, Counter[str](), 0
        self.threads = [threading.Thread(target=self.work, args=(i,)) for i in range(6)]

    def work(self, i: int) -> None:
        "What each does."
        while not self.stop.is_set():
            i = (i + 1) % len(self.images)
            request = urllib.request.Request(self.url + "predict", self.images[i], {"Content-Type": "image/png", "Authorization": f"Bearer {TOKEN}"})
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    said = json.load(reply)["answers"][0]["class"]
            except urllib.error.HTTPError as e:
                self.errors[str(e.code)] += 1
                continue
            self.answers += 1
            self.wrong += said != self.wanted[i]

    def __enter__(self) -> Clients:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def until(self, n: int, seconds: float) -> None:
        "Wait for so many more answers."
        wanted, end = self.answers + n, time.monotonic() + seconds
        while self.answers < wanted:
            assert time.monotonic() < end, f"{wanted - self.answers} answers are missing; errors: {self.errors}"
            time.sleep(0.02)


@pytest.mark.slow
def test_a_node_dies_under_load_and_the_other_answers(cluster: Any) -> None:
    folder, images = image_folder(), [picture(i) for i in range(12)]
    logits = folder.session()(folder.read(images)).logits
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    wanted = [folder.classes[k] for k in np.asarray(logits).argmax(1)]
    with on_cluster(folder.folder, port=port, token=TOKEN) as url:
        (victim,) = replicas_of(cluster.second)
        with Clients(url, images, wanted) as clients:
            clients.until(100, 60)
            cluster.remove_node(cluster.second, allow_graceful=False)
            victim.send_signal(signal.SIGKILL) if victim.is_running() else None
            clients.until(50, 60)  # those under way may have been lost
            before = clients.errors.total()
            clients.until(150, 60)
        assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE
        assert before <= 6 * 4 and clients.errors.total() == before, clients.errors  # later on nobody notices
        assert clients.wrong == 0
        assert urllib.request.urlopen(url + "health").status == 200
