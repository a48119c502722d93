"""Pages on Ray: what travels, and each result exactly once, also when a node dies."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from adaptkit.core.registry import AdaptkitError
from adaptkit.notebooks.cluster import RETRIES, luggage, reach, unpack_and_perform, within
from adaptkit.notebooks.jobs import Budget, Job, Need, run_jobs
from adaptkit.notebooks.records import Record

pytestmark = pytest.mark.alone

SPEC = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
SMALL = Need(memory_mib=50)
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")  # read when Ray is imported


def write_page(folder: Path, *sources: str) -> Path:
    "A page of code cells; the first takes the parameters."
    cells = [new_code_cell(s) for s in ("n = 0", *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=cells, metadata=SPEC), folder / "page.ipynb")
    return folder / "page.ipynb"


def working(folder: Path, *, wait: bool = False) -> Path:
    "A page that notes each start, perhaps waits until it may go on, reads a file that travelled with it, and records."
    (folder / "data").mkdir()
    (folder / "data/offset.txt").write_text("100")
    (folder / "starts").mkdir()
    return write_page(
        folder,
        f"import os, secrets, time\nopen({str(folder / 'starts')!r} + f'/{{n}}-{{os.getppid()}}-{{secrets.token_hex(4)}}', 'w').write(os.getcwd())\nwhile {wait} and not os.path.exists({str(folder / 'go')!r}):\n    time.sleep(0.1)",
        "from adaptkit.notebooks.records import record\nrecord('result', n + int(open('data/offset.txt').read()))",
    )


def starts(folder: Path) -> Counter[int]:
    "How often each page was started."
    return Counter(int(p.name.split("-")[0]) for p in (folder / "starts").iterdir())


def owners(folder: Path) -> set[int]:
    "The living processes that started a page."
    return {pid for p in (folder / "starts").iterdir() if psutil.pid_exists(pid := int(p.name.split("-")[1]))}


def jobs_for(page: Path, count: int) -> list[Job]:
    "Jobs of a working page."
    return [Job(page, page.parent / f"out/{n}.ipynb", {"n": n}, SMALL, cwd=page.parent, files=["data/offset.txt"]) for n in range(count)]


def test_what_travels_is_read_before_anything_starts(tmp_path: Path) -> None:
    page = working(tmp_path)
    (job,) = jobs_for(page, 1)
    assert luggage(job) == {"": page.read_bytes(), "data/offset.txt": b"100"}
    for files, words in (["../x"], "lies outside"), (["data/none.txt"], "no such file"), (["data"], "no such file"):
        with pytest.raises(AdaptkitError, match=words):
            run_jobs([Job(page, tmp_path / "o.ipynb", cwd=tmp_path, files=files)], on="ray")
    with pytest.raises(AdaptkitError, match="No such file"):
        run_jobs([Job(tmp_path / "none.ipynb", tmp_path / "o.ipynb")], on="ray")


def test_a_page_unpacked_elsewhere_speaks_of_the_paths_here(tmp_path: Path) -> None:
    page = working(tmp_path)
    (job,) = jobs_for(page, 1)
    answer, copy = unpack_and_perform(job, luggage(job))
    nb = nbformat.reads(copy.decode(), as_version=4)
    assert answer["error"] == "" and Record(**answer["records"][0]).value == 100
    assert (nb.metadata.papermill.input_path, nb.metadata.papermill.output_path) == (str(page), str(job.out))
    (place,) = (p.read_text() for p in (tmp_path / "starts").iterdir())
    assert not Path(place).exists() and not (tmp_path / "out").exists()
    answer, copy = unpack_and_perform(job, {"": page.read_bytes()})
    assert answer["error"].startswith(f"{page} stopped") and "FileNotFoundError" in answer["error"] and str(job.out) in answer["error"] and copy
    answer, copy = unpack_and_perform(Job(page, job.out, {"m": 1}), {"": page.read_bytes()})
    assert "Unknown parameter 'm'" in answer["error"] and not copy


def test_within() -> None:
    assert within([Need(cores=0.1)] * 10, Budget(cores=1, memory_mib=10240, gpus=0)) and within([Need()] * 99, None)
    assert not within([Need(memory_mib=600)] * 2, Budget(cores=9, memory_mib=1000, gpus=0))


class Answers:
    "Stands for Ray where it loses the process that it starts for a client, a given number of times."

    def __init__(self, losses: int, error: type[ConnectionError] = ConnectionAbortedError) -> None:
        self.losses, self.error, self.asked = losses, error, 0

    def init(self, on: str, **how: Any) -> None:
        "Come to an end, or lose the process."
        self.asked += 1
        if self.asked <= self.losses:
            raise self.error("Starting Ray client server failed.")


def test_a_lost_client_process_is_asked_for_again() -> None:
    for losses in (0, 1, RETRIES):
        ray = Answers(losses)
        reach(ray, "ray://head:10001", {})
        assert ray.asked == losses + 1
    with pytest.raises(AdaptkitError, match="could not start its side.*ray_client_server"):
        reach(Answers(RETRIES + 1), "ray://head:10001", {})
    nobody = Answers(1, ConnectionError)
    with pytest.raises(AdaptkitError, match="No Ray answers at ray://head:10001"):
        reach(nobody, "ray://head:10001", {})
    assert nobody.asked == 1


def free_port() -> int:
    "A port that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


NODE = {"num_cpus": 1, "memory": 2**30, "include_dashboard": False}


@pytest.fixture(scope="module")
def port() -> int:
    "Of the cluster's client server."
    return free_port()


@pytest.fixture(scope="module")
def cluster(port: int) -> Iterator[Any]:
    "A Ray cluster on this machine: a head with one CPU and a client server."
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**NODE, "ray_client_server_port": port})
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture
def connection(cluster: Any) -> Iterator[Any]:
    "This process as a driver of the cluster."
    import ray

    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_a_node_is_killed_and_every_result_is_there_once(cluster: Any, connection: Any, tmp_path: Path) -> None:
    second = cluster.add_node(**NODE)
    page = working(tmp_path, wait=True)
    jobs = jobs_for(page, 5)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(list, run_jobs(jobs, on="ray"))
        until = time.monotonic() + 180
        while len(starts(tmp_path)) < 2 and time.monotonic() < until:  # no page ends yet, so each node has one under way
            time.sleep(0.05)
        assert len(starts(tmp_path)) == 2
        cluster.remove_node(second, allow_graceful=False)
        while len(owners(tmp_path)) > 1 and time.monotonic() < until:  # a worker outlives its node for a moment
            time.sleep(0.05)
        assert len(owners(tmp_path)) == 1
        (tmp_path / "go").touch()
        outcomes = coming.result(timeout=300)
    assert [o.error for o in outcomes] == [""] * 5
    assert sorted(o.job.parameters["n"] for o in outcomes) == [0, 1, 2, 3, 4], "each job once"
    assert {o.job.parameters["n"]: o.records["result"].value for o in outcomes} == {n: 100 + n for n in range(5)}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{n}.ipynb" for n in range(5)]
    for job in jobs:
        nb = nbformat.read(job.out, as_version=4)
        assert nb.metadata.papermill.parameters.n == job.parameters["n"] and nb.metadata.papermill.exception is None
    again = starts(tmp_path)
    assert set(again) == {0, 1, 2, 3, 4} and sum(again.values()) > 5, "the lost page was started twice"


@pytest.mark.slow
def test_a_job_no_node_can_hold_is_told_and_others_run(connection: Any, tmp_path: Path) -> None:
    page = working(tmp_path)
    jobs = [*jobs_for(page, 1), Job(page, tmp_path / "large.ipynb", need=Need(cores=64)), Job(page, tmp_path / "gpu.ipynb", need=Need(gpus=1))]
    found = {Path(o.job.out).stem: o.error for o in run_jobs(jobs, on="ray")}
    assert len(found) == 3 and found["0"] == ""
    assert "needs 64 cores" in found["large"] and "1 GPUs; no living machine" in found["gpu"]
    (refused,) = run_jobs([Job(page, tmp_path / "x.ipynb", need=Need(cores=2))], on="ray", budget=Budget(cores=1, memory_mib=1024, gpus=0))
    assert "needs 2 cores of 1" in refused.error
    with pytest.raises(AdaptkitError, match="connected to a Ray already"):
        list(run_jobs(jobs[:1], on="ray://127.0.0.1:1"))


@pytest.mark.slow
def test_closing_ends_the_pages(connection: Any, tmp_path: Path) -> None:
    page = write_page(tmp_path, f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)")
    quick = working(tmp_path / "quick") if (tmp_path / "quick").mkdir() is None else page
    running = run_jobs([*jobs_for(quick, 1), Job(page, tmp_path / "o.ipynb", need=SMALL)], on="ray")
    assert next(running).error == ""
    until = time.monotonic() + 180
    while not (tmp_path / "pid").exists() and time.monotonic() < until:
        time.sleep(0.05)
    running.close()
    number = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 60
    while Path(f"/proc/{number}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{number}").exists() and not (tmp_path / "o.ipynb").exists()


@pytest.mark.slow
def test_a_client_of_the_cluster(cluster: Any, port: int, tmp_path: Path) -> None:
    page = working(tmp_path)
    program = f"""
from adaptkit.notebooks.jobs import Job, Need, run_jobs
jobs = [Job({str(page)!r}, {str(tmp_path)!r} + f"/out/{{n}}.ipynb", {{"n": n}}, Need(memory_mib=50), cwd={str(tmp_path)!r}, files=["data/offset.txt"]) for n in range(2)]
print(sorted((o.error, o.records["result"].value) for o in run_jobs(jobs, on="ray://127.0.0.1:{port}")))"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip().split("\n")[-1] == "[('', 100.0), ('', 101.0)]", done.stdout + done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.ipynb", "1.ipynb"]
