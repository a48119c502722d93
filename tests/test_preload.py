"""Kernels forked from a process that has imported everything: the same results, nothing shared, deaths told apart, nothing left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from queue import Empty
from typing import Any
from unittest.mock import AsyncMock, Mock, patch

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from traitlets.config import Config

from adaptkit.notebooks.client import Request
from adaptkit.notebooks.engine import kernel_source
from adaptkit.notebooks.jobs import Budget, Job, run_jobs
from adaptkit.notebooks.preload import Forked
from adaptkit.notebooks.ready import ReadyClient, ReadyManager
from adaptkit.notebooks.records import Record
from adaptkit.notebooks.runner import PageError, run_page

pytestmark = pytest.mark.alone

SPEC = {"name": "python3", "display_name": "python3", "language": "python"}
RECORD = "from adaptkit.notebooks.records import record\n"


def write_page(folder: Path, *sources: str, kernel: str = "python3") -> Path:
    "A page of code cells; the first takes the parameters."
    cells = [new_code_cell(s) for s in ("n = 0", *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    path = folder / "page.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {**SPEC, "name": kernel}}), path)
    return path


def both(page: Path) -> list[Any]:
    "The executed copies of one page: afresh, and forked."
    made = []
    for modules in ((), ("numpy", "matplotlib.pyplot")):
        out = page.parent / f"{len(modules)}.ipynb"
        run_page(page, out, preload=modules, progress=False)
        made.append(nbformat.read(out, as_version=4))
    return made


def test_outputs_are_those_of_a_fresh_kernel(tmp_path: Path) -> None:
    figure = "import matplotlib.pyplot as plt\nplt.plot([1, 3, 2])\nplt.show()"
    widget = "import ipywidgets\nipywidgets.IntSlider(3)"
    rest = "import os, sys, subprocess\n(__name__, os.getcwd(), sys.path, sys.stdin.__class__.__name__, subprocess.run(['true']).returncode)"
    pool = "from concurrent.futures import ProcessPoolExecutor\nwith ProcessPoolExecutor(1) as p:\n    print(p.submit(abs, -3).result())"
    fresh, forked = both(write_page(tmp_path, figure, widget, rest, pool, "print('a')\n!echo b", "import asyncio\nawait asyncio.sleep(0)\n1"))
    for a, b in zip(fresh.cells, forked.cells, strict=True):
        assert [o.output_type for o in a.outputs] == [o.output_type for o in b.outputs], a.source
        for x, y in zip(a.outputs, b.outputs, strict=True):
            assert sorted(x.get("data", {})) == sorted(y.get("data", {})) and x.get("text") == y.get("text")
            assert x.get("data", {}).get("image/png") == y.get("data", {}).get("image/png")
            if "widget" not in str(sorted(x.get("data", {}))):
                assert x.get("data", {}).get("text/plain") == y.get("data", {}).get("text/plain")
    assert "image/png" in forked.cells[1].outputs[-1].data


def test_kernels_of_one_process_share_nothing(tmp_path: Path) -> None:
    page = write_page(
        tmp_path,
        "import os, random, sys\nimport numpy",
        RECORD + "record('left', float(hasattr(numpy, 'left')))\nnumpy.left = 1\nrecord('draw', random.random() + numpy.random.rand())\nrecord('before', float('numpy' in BEFORE))\nrecord('threads', float(os.environ['OMP_NUM_THREADS']))",
    )
    jobs = [Job(page, tmp_path / f"{n}.ipynb", {"n": n}, before="import sys\nBEFORE = set(sys.modules)", preload=["numpy"]) for n in range(3)]
    found = list(run_jobs(jobs, budget=Budget(cores=1)))
    assert [o.error for o in found] == [""] * 3
    assert {o.records["left"].value for o in found} == {0.0} and {o.records["before"].value for o in found} == {1.0}
    assert len({o.records["draw"].value for o in found}) == 3 and {o.records["threads"].value for o in found} == {1.0}


@pytest.mark.parametrize(("last", "words"), [("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"), ("import os\nos._exit(3)", "3"), ("1 / 0", "ZeroDivisionError")])
def test_deaths_are_told_apart(tmp_path: Path, last: str, words: str) -> None:
    with pytest.raises(PageError, match=words):
        run_page(write_page(tmp_path, last), tmp_path / "out.ipynb", preload=["numpy"], progress=False)


def test_a_module_that_is_not_there_is_the_pages_business(tmp_path: Path) -> None:
    found = run_page(write_page(tmp_path, RECORD + "record('one', 1)"), tmp_path / "out.ipynb", preload=["no_such_module"], progress=False)
    assert found == {"one": Record("one", 1.0)}


@pytest.mark.slow
def test_nothing_outlives_a_program_that_was_killed(tmp_path: Path) -> None:
    page = write_page(tmp_path, f"import os, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}} {{os.getppid()}} .')\ntime.sleep(120)")
    code = f"from adaptkit.notebooks.jobs import Job, run_jobs\nlist(run_jobs([Job({str(page)!r}, {str(tmp_path / 'out.ipynb')!r}, preload=['numpy'])]))"
    runner = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith(".")) and time.monotonic() < until:
        time.sleep(0.1)
    pids = [int(n) for n in (tmp_path / "pid").read_text().split()[:2]]
    assert all(psutil.pid_exists(p) for p in pids)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    while any(psutil.pid_exists(p) for p in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(p) for p in pids)


def test_a_forked_process_looks_like_popen() -> None:
    from multiprocessing import get_context

    child = Forked(get_context("spawn").Process(target=time.sleep, args=(60,)))
    assert child.poll() is None and psutil.pid_exists(child.pid)
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == -signal.SIGTERM == child.poll()
    child.send_signal(signal.SIGTERM)  # nobody is there: nothing happens
    child.kill()


def test_unshare_sets_threads_and_the_place_of_figures() -> None:
    code = """
import matplotlib, numpy, random, threadpoolctl, torch
from adaptkit.notebooks.preload import INLINE, unshare
random.seed(0), numpy.random.seed(0)
first = random.random(), numpy.random.rand()
random.seed(0), numpy.random.seed(0)
unshare({"OMP_NUM_THREADS": "1"})
assert matplotlib.rcParams["backend"] == INLINE and torch.get_num_threads() == 1
assert (random.random(), numpy.random.rand()) != first
unshare({"MPLBACKEND": "agg"})
assert matplotlib.rcParams["backend"] == "agg"
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})


def test_a_project_names_what_to_preload(tmp_path: Path) -> None:
    from adaptkit.core.registry import AdaptkitError
    from adaptkit.notebooks.check import preloads

    assert preloads(tmp_path) == ()
    for text, words in (("[tool.adaptkit]\npreload = 'torch'", "give a list"), ("[tool.adaptkit]\npreload = ['torch', 'torch.optimal']", "names \\['torch.optimal'\\], which isn't installed"), ("[tool.adaptkit]\npreload = [1]", "give a list"), ("[tool", "cannot be read")):
        (tmp_path / "pyproject.toml").write_text(text)
        with pytest.raises(AdaptkitError, match=words):
            preloads(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool.adaptkit]\npreload = ['torch', 'pandas']")
    assert preloads(tmp_path) == ("torch", "pandas")
    assert set(preloads(Path(__file__).parents[1])) >= {"torch", "pandas"}


def test_a_kernel_that_is_ready_has_said_all_about_our_question(tmp_path: Path) -> None:
    async def spare() -> tuple[int, bool]:
        manager = ReadyManager()
        await manager.start_kernel(cwd=str(tmp_path))
        client = manager.client()
        assert isinstance(client, ReadyClient)
        client.start_channels()
        await client.wait_for_ready(timeout=60)
        left = 0
        while await client.iopub_channel.msg_ready():
            left += (await client.get_iopub_msg())["msg_type"] == "status"
        client.stop_channels()
        await manager.shutdown_kernel()
        return left, await manager.is_alive()

    assert asyncio.run(spare()) == (0, False)


@pytest.mark.parametrize("modules", [(), ("torch",)])
def test_pages_begin_and_end_without_a_pause(modules: tuple[str, ...]) -> None:
    assert issubclass(kernel_source(Request(preload=modules), Config())["kernel_manager_class"], ReadyManager)


@pytest.mark.parametrize("idle, rounds", [(3, 3), (99, 6)])
def test_a_kernel_is_asked_until_it_says_that_this_was_all(idle: int, rounds: int) -> None:
    asked: list[str] = []

    class Said:
        def __init__(self, state: Any) -> None:
            self.state = state

        async def get_msg(self, timeout: float) -> dict[str, Any]:
            if (state := self.state(len(asked))) is None:
                raise Empty
            return {"parent_header": {"msg_id": asked[-1] if state != "starting" else ""}, "content": {"execution_state": state}}

    outputs = iter(range(99))  # by turns a word about something else, and silence
    iopub = Said(lambda n: "idle" if n >= idle else "starting" if next(outputs) % 2 == 0 else None)
    ask = Mock(side_effect=lambda: asked.append(f"{len(asked)}") or asked[-1])
    fakes = {"shell_channel": Said(lambda n: ""), "iopub_channel": iopub, "kernel_info": ask, "is_alive": AsyncMock(return_value=True)}
    with patch.multiple(ReadyClient, **fakes, _handle_kernel_info_reply=Mock()):
        asyncio.run(ReadyClient().wait_for_ready(timeout=60))
    assert len(asked) == rounds


def test_a_kernel_that_dies_before_it_is_ready_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "ipykernel_launcher.py").write_text("raise SystemExit(3)")
    began = time.monotonic()
    with pytest.raises(PageError, match="died before replying"):
        run_page(write_page(tmp_path, "1"), tmp_path / "out.ipynb", progress=False)
    assert time.monotonic() - began < 30


def test_a_kernel_without_a_word_is_given_up_in_time() -> None:
    class Mute:
        async def get_msg(self, timeout: float) -> None:
            await asyncio.sleep(timeout)
            raise Empty

    client = ReadyClient()
    with patch.multiple(ReadyClient, shell_channel=Mute(), iopub_channel=Mute(), kernel_info=lambda self: "1", is_alive=AsyncMock(return_value=True)):
        with pytest.raises(RuntimeError, match="didn't respond in 1 seconds"):
            asyncio.run(client.wait_for_ready(timeout=1))


def test_freed_memory_is_kept_for_the_next_tensor(tmp_path: Path) -> None:
    step = "x = [torch.ones(2**k) for k in (14, 16, 18, 19, 20)]\n    y = [2 * a for a in x]"
    counted = f"import resource, torch\ndef faults(n):\n  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n  for _ in range(n):\n    {step}\n  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\nfaults(50)\nfaults(200)"
    pages = [tmp_path / f"{n}.ipynb" for n in (0, 1)]
    for out, modules in zip(pages, ((), ("torch",)), strict=True):
        run_page(write_page(tmp_path, counted), out, preload=modules, progress=False)
    fresh, forked = (int(nbformat.read(out, 4).cells[-1].outputs[-1].data["text/plain"]) for out in pages)
    assert forked < 0.3 * fresh
