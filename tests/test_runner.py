"""The runner: what comes out beside papermill's own engine, partial copies, limits, deaths, costs, bad input."""

from __future__ import annotations

import io
import json
import os
import pickle
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from nbclient.exceptions import CellTimeoutError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from adaptkit.core.registry import AdaptkitError
from adaptkit.notebooks.client import left_out
from adaptkit.notebooks.meter import GPU_PEAK, Meter, cpu_seconds, hardware, high_water
from adaptkit.notebooks.post_mortem import counters, oom_kills, why_dead, why_raised
from adaptkit.notebooks.records import RECORD, Record, records
from adaptkit.notebooks.runner import PageError, Progress, run_page

pytestmark = pytest.mark.alone

SPEC = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
SAY = "from adaptkit.notebooks.records import record"


def page(folder: Path, *sources: str, name: str = "page.ipynb", tags: dict[int, str] | None = None) -> Path:
    "A page of code cells (Markdown where they begin with #), some with a tag."
    made = [new_markdown_cell(s) if s.startswith("# ") or s.startswith("## ") else new_code_cell(s) for s in sources]
    for index, tag in (tags or {}).items():
        made[index].metadata["tags"] = [tag]
    nbformat.write(new_notebook(cells=made, metadata=SPEC), folder / name)
    return folder / name


def read(path: Path) -> Any:
    "A notebook that must be valid."
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    return nb


def code(nb: Any) -> list[Any]:
    return [c for c in nb.cells if c.cell_type == "code"]


def statuses(path: Path) -> list[str]:
    return [c.metadata.papermill.status for c in code(read(path))]


def stopped(made: Path, **options: Any) -> tuple[PageError, Any]:
    "The error of a page that must fail, and its copy."
    out = made.with_name("out.ipynb")
    with pytest.raises(PageError) as caught:
        run_page(made, out, progress=False, **options)
    return caught.value, read(out)


# ---- beside papermill's default engine: the cases that papermill's documentation describes

SHOW = "from IPython.display import display, clear_output, update_display, HTML, JSON, Latex, Markdown"
OUT_ERR = "import sys\nfor i in range(3):\n    print('out', i, flush=True)\n    print('err', i, file=sys.stderr, flush=True)"
WIDGETS = "import ipywidgets as w\nout = w.Output()\nwith out:\n    print('inside')\ndisplay(w.IntSlider(3), out)"
CASES: dict[str, tuple[list[str], dict[int, str], dict[str, Any]]] = {
    "raises": (["print('before')", "def f():\n    raise ValueError('no')\nf()", "print('after')"], {}, {}),
    "keyboard interrupt": (["print('a')", "raise KeyboardInterrupt", "1"], {}, {}),
    "exit": (["1", "import sys\nsys.exit()", "2"], {}, {}),
    "exit 0": (["1", "raise SystemExit(0)", "2"], {}, {}),
    "exit 1": (["1", "import sys\nsys.exit(1)", "2"], {}, {}),
    "text": (["# Überschrift", "ä = 'Ωmega ☃ 🎈'\nä", "print('日本語')", "", "  ", "None", "3;", "!echo hello", "%%capture caught\nprint('hidden')", "caught.stdout", "import warnings\nwarnings.warn('careful')"], {}, {}),
    "outputs": ([SHOW, "print('x')\ndisplay(HTML('<b>1</b>'))\nprint('y')\ndisplay(JSON({'a': [1]}), Latex('$x$'))\n{'last': 1}", OUT_ERR, "print('x' * 200_000)", "list(range(3000))", "for i in range(2000):\n    print(i)"], {}, {}),
    "parameters": (["# Title", "a = 1\nb = 'x'", "(a, b)"], {1: "parameters"}, {"a": 5}),
    "injected anew": (["a = 1", "a = 2", "a"], {0: "parameters", 1: "injected-parameters"}, {"a": 7}),
    "updates": ([SHOW, "h = display(Markdown('old'), display_id='here')", "update_display(Markdown('new'), display_id='here')\nprint('a')\nclear_output()\nprint('b')\nclear_output(wait=True)\nprint('c')"], {}, {}),
    "widgets": ([SHOW, WIDGETS, "out.clear_output()"], {}, {}),
    "allowed error": (["1", "1 / 0", "2"], {1: "raises-exception"}, {}),
    "skipped": (["1", "raise SystemExit", "2"], {1: "skip-execution"}, {}),
    "stdin": (["1", "input('name? ')", "2"], {}, {}),
    "slip": (["1", "def f(:", "2"], {}, {}),
}


def plain(outputs: list[Any]) -> Any:
    "Outputs without what differs from run to run: identities, timings, how a stream was cut up."
    merged: list[Any] = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output.output_type == "stream" == last.get("output_type") and output.name == last["name"]:
            merged[-1] = {**last, "text": last["text"] + output.text}
        else:
            merged.append(dict(output))
    text = json.dumps(merged, sort_keys=True)
    return re.sub(r"[0-9a-f]{32}|0x[0-9a-f]+|ipykernel_\d+/\d+", "·", text)


def through(engine: str | None, made: Path, values: dict[str, Any]) -> tuple[Any, ...]:
    "What comes out of an engine: the error, and of each cell what a reader sees."
    out, quiet = made.with_name(f"{engine}.ipynb"), {"progress_bar": False, "extra_arguments": ["--log-level=ERROR"]}
    quiet |= {} if engine else {"execution_timeout": 60}
    name = ""
    try:
        papermill.execute_notebook(made, out, values, engine_name=engine, **quiet)
    except papermill.PapermillExecutionError as e:
        name = f"{e.ename}: {e.evalue}"
    nb = read(out)
    seen = [(c.source, plain(c.get("outputs", [])), c.get("execution_count")) for c in nb.cells]
    marks = [(c.metadata.get("papermill", {}).get("status"), c.metadata.get("papermill", {}).get("exception")) for c in nb.cells]
    state = [m["model_name"] for m in nb.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {}).values()]
    return name, seen, marks, sorted(state), nb.metadata.papermill.exception


def papermills_own(made: Path, values: dict[str, Any]) -> tuple[Any, ...]:
    "What comes out of papermill's own engine: it has been seen to wait for ever for a kernel that had answered, so it is asked again."
    for left in (2, 1, 0):
        try:
            return through(None, made, values)
        except CellTimeoutError:
            if not left:
                raise
    raise AssertionError


@pytest.mark.parametrize("case", CASES)
def test_the_engine_gives_what_papermills_own_gives(case: str, tmp_path: Path) -> None:
    sources, tags, values = CASES[case]
    made = page(tmp_path, *sources, tags=tags)
    theirs, ours = papermills_own(made, values), through("adaptkit", made, values)
    assert ours == theirs


def test_papermills_command_line_finds_the_engine(tmp_path: Path) -> None:
    made = page(tmp_path, "epochs = 2", "epochs * 11", tags={0: "parameters"})
    command = [sys.executable, "-m", "papermill", "--engine", "adaptkit", "--no-progress-bar", "page.ipynb", "out.ipynb", "-p", "epochs", "7", "--cwd", "/"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "without encryption" not in done.stderr, done.stderr
    assert code(read(tmp_path / "out.ipynb"))[-1].outputs[0].data["text/plain"] == "77"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ipynb", made.name]


def test_loading_the_engine_is_cheap() -> None:
    program = "import sys, adaptkit.notebooks.runner; print(*{n.split('.')[0] for n in sys.modules})"
    loaded = {*subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()}
    assert not loaded & {"torch", "numpy", "papermill", "nbclient", "nbformat", "pydantic", "psutil", "safetensors"}


@pytest.mark.parametrize(
    ("source", "skipped"),
    [
        ("#| eval: false\n1", True),
        ("#|eval:false\n1", True),
        ("from nbdev import nbdev_export\nnbdev_export()", True),
        ("#| eval: true\n1", False),
        ("1", False),
        ("import nbdev\nnbdev.nbdev_export()", True),
        ("#| Eval: False\n1", True),
        ("'#| eval: false'", False),
        ("page = 'nbdev_export()'", False),
    ],
)
def test_cells_that_must_not_run(source: str, skipped: bool) -> None:
    assert left_out(new_code_cell(source)) is skipped
    assert not left_out(new_markdown_cell(source))


def test_what_is_left_out_says_so_and_keeps_its_tags(tmp_path: Path) -> None:
    made = page(tmp_path, "#| eval: false\n1 / 0", "2")
    run_page(made, tmp_path / "out.ipynb", progress=False)
    assert statuses(tmp_path / "out.ipynb") == ["skipped", "completed"]
    assert code(read(tmp_path / "out.ipynb"))[0].metadata.tags == []


# ---- run_page


def test_records_come_back_in_order_and_parameters_arrive(tmp_path: Path) -> None:
    made = page(tmp_path, "epochs = 2", SAY, "record('b', epochs, 's', higher_is_better=False)\nrecord('a', 0.5)", tags={0: "parameters"})
    out = tmp_path / "deep/{curly}/out.ipynb"
    found = run_page(made, out, {"epochs": 5}, progress=False)
    assert list(found.values()) == [Record("b", 5.0, "s", False), Record("a", 0.5)]
    nb = read(out)
    assert nb.metadata.papermill.output_path == str(out) and nb.metadata.papermill.input_path == str(made)
    assert nb.metadata.papermill.parameters.epochs == 5 and [p.name for p in out.parent.iterdir()] == ["out.ipynb"]
    shown = code(nb)[-1].outputs[0].data
    assert shown["text/plain"] == "b = 5 s" and shown[RECORD]["unit"] == "s"


def test_values_arrive_with_their_types(tmp_path: Path) -> None:
    declared = "from pathlib import Path", "shares: tuple[float, ...] = (0.5, 0.5)\ndata: Path = Path('here')\nmost: float = 1.0", "(shares, data, most)"
    made = page(tmp_path, *declared, tags={1: "parameters"})
    run_page(made, tmp_path / "out.ipynb", {"shares": (0.25, 0.75), "data": Path("there"), "most": float("inf")}, progress=False)
    shown = code(read(tmp_path / "out.ipynb"))[-1].outputs[0].data["text/plain"]
    assert shown == "((0.25, 0.75), PosixPath('there'), inf)"
    with pytest.raises(AdaptkitError, match="most"):
        run_page(made, tmp_path / "never.ipynb", {"most": "much"}, progress=False)
    assert not (tmp_path / "never.ipynb").exists()


def test_a_name_is_recorded_once() -> None:
    twice = [{"data": {RECORD: {"name": "a", "value": 1.0}}}] * 2
    with pytest.raises(AdaptkitError, match="recorded twice"):
        records(nbformat.from_dict({"cells": [{"outputs": twice}]}))


def test_a_page_that_raises_is_kept_and_located(tmp_path: Path) -> None:
    made = page(tmp_path, "# Title", SAY + "\nrecord('loss', 0.25)", "## Second part", "#| echo: true\n1 / 0", "print('after')")
    error, nb = stopped(made)
    assert "in the section 'Second part', cell 2 (1 / 0): ZeroDivisionError: division by zero. Recorded until then: loss = 0.25." in str(error)
    assert error.why == "ZeroDivisionError: division by zero" and error.out == str(tmp_path / "out.ipynb")
    told = nb.metadata.adaptkit.stopped
    assert (told.kind, told.cell, told.section, told.line, told.records) == ("exception", 2, "Second part", "1 / 0", {"loss": 0.25})
    assert "Traceback" in json.dumps(nb) and sorted(p.name for p in tmp_path.iterdir()) == ["out.ipynb", "page.ipynb"]
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error) and str(pickle.loads(pickle.dumps(error))) == str(error)


def test_errors_that_a_cell_may_raise_do_not_fail_the_page(tmp_path: Path) -> None:
    made = page(tmp_path, "1 / 0", "'reached'", tags={0: "raises-exception"})
    assert run_page(made, tmp_path / "out.ipynb", progress=False) == {}
    nb = read(tmp_path / "out.ipynb")
    assert [c.source for c in nb.cells] == ["1 / 0", "'reached'"] and nb.cells[0].outputs[0].ename == "ZeroDivisionError"
    assert nb.metadata.adaptkit.stopped is None


def test_the_first_cell_can_be_planted(tmp_path: Path) -> None:
    made = page(tmp_path, "x + 1", "1 / 0")
    error, nb = stopped(made, before="x = 41")
    planted, first = code(nb)[:2]
    assert planted.metadata.tags == ["injected-before"] and first.outputs[0].data["text/plain"] == "42"
    assert "cell 2 (1 / 0)" in str(error), "cells are counted as the author sees them"


def test_what_a_page_has_cost_is_in_its_copy(tmp_path: Path) -> None:
    made = page(tmp_path, "# Costs", "x = bytearray(200 * 2**20)[::4096]\nx = None", "1", "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass")
    run_page(made, tmp_path / "out.ipynb", progress=False)
    nb = read(tmp_path / "out.ipynb")
    hungry, small, busy = (c.metadata.adaptkit for c in code(nb))
    assert {*hungry} == {"seconds", "cpu_seconds", "peak_mib", "gpu_mib"} and "adaptkit" not in nb.cells[0].metadata
    assert busy.cpu_seconds >= 0.45 and busy.seconds >= 0.45 and small.cpu_seconds < 0.3
    whole = nb.metadata.adaptkit
    assert {*whole} == {*hungry, "hardware", "stopped"} and whole.hardware == hardware() and whole.stopped is None
    assert whole.seconds >= busy.seconds and whole.cpu_seconds >= busy.cpu_seconds
    if hungry.peak_mib is not None:
        assert hungry.peak_mib - small.peak_mib > 150 and whole.peak_mib >= hungry.peak_mib


STATIC = """
import ipywidgets
class Shown(ipywidgets.IntSlider):
    def _repr_mimebundle_(self, **options):
        return {**super()._repr_mimebundle_(**options), 'text/html': '<b>static picture</b>'}
Shown(3)
"""


@pytest.mark.parametrize("after", ["1", "1 / 0", "import os; os.kill(os.getpid(), 9)"])
def test_widgets_leave_their_static_picture_and_their_state(after: str, tmp_path: Path) -> None:
    made = page(tmp_path, STATIC, after)
    try:
        run_page(made, tmp_path / "out.ipynb", progress=False)
    except PageError:
        assert after != "1"
    nb = read(tmp_path / "out.ipynb")
    shown = next(o for c in code(nb) for o in c.outputs if o.output_type == "execute_result").data
    view = shown["application/vnd.jupyter.widget-view+json"]
    state = nb.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    assert shown["text/html"] == "<b>static picture</b>" and state[view["model_id"]]["state"]["value"] == 3


# ---- limits and deaths


@pytest.mark.parametrize("tag", ["none", "raises-exception"])
def test_the_limit_of_a_cell_interrupts_it_keeps_its_outputs_and_says_so(tag: str, tmp_path: Path) -> None:
    made = page(tmp_path, "1", SAY + "\nrecord('a', 1)\nimport time\nprint('begun')\ntime.sleep(100)", "3", tags={1: tag})
    error, nb = stopped(made, timeout=1.5, limit=90)
    assert error.why == "a cell took longer than its time limit of 1.5 s"
    assert statuses(tmp_path / "out.ipynb") == ["completed", "failed", "pending"]
    outputs = code(nb)[1].outputs
    assert outputs[1].text == "begun\n" and outputs[-1].ename == "KeyboardInterrupt"
    assert nb.metadata.adaptkit.stopped.kind == "time" and nb.metadata.adaptkit.stopped.records == {"a": 1.0}


def test_the_limit_of_the_page_ends_the_cell_that_is_running(tmp_path: Path) -> None:
    start = time.monotonic()
    error, nb = stopped(page(tmp_path, "print('begun', flush=True)\nimport time\ntime.sleep(100)", "2"), timeout=60, limit=12)
    assert error.why == "the page took longer than its time limit of 12 s" and time.monotonic() - start < 40
    assert code(nb)[0].outputs[0].text == "begun\n" and statuses(tmp_path / "out.ipynb") == ["failed", "pending"]


def test_cells_that_swallow_the_interrupt_are_given_up(tmp_path: Path) -> None:
    stubborn = "import time\nprint('begun', flush=True)\nwhile True:\n    try:\n        time.sleep(100)\n    except KeyboardInterrupt:\n        pass"
    error, nb = stopped(page(tmp_path, stubborn, "2"), timeout=1)
    assert error.why == "a cell took longer than its time limit of 1 s" and code(nb)[0].outputs[0].text == "begun\n"


def test_a_page_without_time_begins_no_cell(tmp_path: Path) -> None:
    error, nb = stopped(page(tmp_path, "open('ran', 'w')"), limit=0.01, cwd=tmp_path)
    assert "time limit of 0.01 s" in error.why and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("death", "kind", "why"),
    [
        ("os.kill(os.getpid(), 9)", "signal", "its kernel died of SIGKILL"),
        ("os.kill(os.getpid(), 11)", "signal", "its kernel died of SIGSEGV"),
        ("os._exit(3)", "exit", "its kernel ended itself with exit code 3"),
    ],
)
def test_a_dead_kernel_leaves_a_true_copy_and_a_reason(death: str, kind: str, why: str, tmp_path: Path) -> None:
    made = page(tmp_path, "print('kept')", f"import os\nprint('so far', flush=True)\nimport time\ntime.sleep(1)\n{death}", "3")
    error, nb = stopped(made)
    assert statuses(tmp_path / "out.ipynb") == ["completed", "failed", "pending"] and error.why == why
    assert [c.outputs[0].text for c in code(nb)[:2]] == ["kept\n", "so far\n"]
    assert nb.metadata.adaptkit.stopped.kind == kind and nb.metadata.adaptkit.stopped.cell == 2
    assert nb.metadata.papermill.exception is True


def test_memory_is_blamed_when_a_counter_has_risen(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/box").mkdir(parents=True)
    (tmp_path / "proc/vmstat").write_text("nr_free 3\noom_kill 4\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/box\n")
    (tmp_path / "sys/fs/cgroup/box/memory.events").write_text("oom 9\noom_kill 2\noom_group_kill 7\n")
    assert [*oom_kills(tmp_path).values()] == [4, 2]
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,memory:/old\n")
    assert counters(tmp_path)[-1][0] == tmp_path / "sys/fs/cgroup/memory/old/memory.oom_control"
    assert why_dead(-9, hungry=True)[0] == "memory" and why_dead(-9, hungry=False)[0] == "signal"
    assert [why_raised(*e)[0] for e in (("OutOfMemoryError", "x"), ("RuntimeError", "CUDA out of memory."), ("MemoryError", ""))] == ["gpu memory", "gpu memory", "memory"]


def test_a_kernel_that_dies_of_hunger_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([{"here": 1}, {"here": 2}])
    monkeypatch.setattr("adaptkit.notebooks.client.oom_kills", lambda: next(counts))
    error, nb = stopped(page(tmp_path, "import os\nos.kill(os.getpid(), 9)"))
    assert "ran out of memory" in error.why and nb.metadata.adaptkit.stopped.kind == "memory"


@contextmanager
def in_the_background(made: Path, out: Path, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    "A run in a process of its own that can be killed."
    program = f"from adaptkit.notebooks.runner import run_page; run_page({str(made)!r}, {str(out)!r}, cwd={str(folder)!r})"
    runner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield runner
    finally:
        runner.kill()
        runner.wait()


def until(condition: Any, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(condition())


def test_a_killed_runner_leaves_the_old_copy_and_a_whole_partial_one(tmp_path: Path) -> None:
    out, partial = tmp_path / "out.ipynb", tmp_path / "out.partial.ipynb"
    out.write_text("the old copy")
    made = page(tmp_path, "print('first')", "import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(100)", "3")
    with in_the_background(made, out, tmp_path) as runner:
        assert until(lambda: partial.exists() and re.search(r"pid \d", partial.read_text())), "output of a running cell reaches the disk"
        runner.send_signal(signal.SIGKILL)
        runner.wait()
    nb = read(partial)
    assert out.read_text() == "the old copy" and statuses(partial) == ["completed", "running", "pending"]
    assert nb.metadata.adaptkit.stopped.kind == "unfinished" and code(nb)[0].outputs[0].text == "first\n"
    kernel = int(code(nb)[1].outputs[0].text.split()[1])
    assert until(lambda: not Path(f"/proc/{kernel}").exists() or "Z" in Path(f"/proc/{kernel}/stat").read_text().split()[2]), "no orphan goes on"
    run_page(page(tmp_path, "4"), out, progress=False)
    assert not partial.exists() and code(read(out))[0].source == "4"


def test_the_partial_copy_is_whole_whenever_one_looks(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial.ipynb"
    cells = [f"print('{i}' * 20_000)\nimport time\ntime.sleep(0.02)" for i in range(9)]
    made, looks = page(tmp_path, *cells), 0
    with in_the_background(made, tmp_path / "out.ipynb", tmp_path) as runner:
        while runner.poll() is None:
            try:
                text = partial.read_text()
            except FileNotFoundError:
                continue
            nbformat.validate(nbformat.reads(text, as_version=4))
            looks += 1
    assert runner.returncode == 0 and looks > 3


# ---- bad input


def test_what_is_no_notebook_is_named(tmp_path: Path) -> None:
    for text in ("", "no notebook", '{"cells": 1}', "[]"):
        (tmp_path / "x.ipynb").write_text(text)
        with pytest.raises(AdaptkitError, match="x.ipynb"):
            run_page(tmp_path / "x.ipynb", tmp_path / "out.ipynb", progress=False)
    with pytest.raises(AdaptkitError, match="y.ipynb: No such file"):
        run_page(tmp_path / "y.ipynb", tmp_path / "out.ipynb", progress=False)
    with pytest.raises(AdaptkitError, match="Is a directory"):
        run_page(tmp_path, tmp_path / "out.ipynb", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["x.ipynb"]


def test_old_notebooks_are_told_how_to_become_new(tmp_path: Path) -> None:
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {}, "worksheets": [{"cells": [{"cell_type": "code", "input": "1", "language": "python", "outputs": [], "metadata": {}}], "metadata": {}}]}
    (tmp_path / "old.ipynb").write_text(json.dumps(old))
    with pytest.raises(AdaptkitError, match="version 3 of the notebook format; version 4 is needed: open and save it in JupyterLab"):
        run_page(tmp_path / "old.ipynb", tmp_path / "out.ipynb")


@pytest.mark.parametrize("sources", [[], ["# Only words"], ["", " \n"]])
def test_pages_without_code_are_refused(sources: list[str], tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match="holds no code"):
        run_page(page(tmp_path, *sources), tmp_path / "out.ipynb")


@pytest.mark.parametrize(("name", "words"), [("fortran77", "Unknown kernel .*'fortran77'.*Known: .*python3"), ("pyton3", "Did you mean 'python3'"), (None, "which kernel it needs")])
def test_kernels_that_are_not_here(name: str | None, words: str, tmp_path: Path) -> None:
    nb = read(page(tmp_path, "1"))
    nb.metadata = {"kernelspec": {"name": name, "display_name": "x"}} if name else {}
    nbformat.write(nb, tmp_path / "page.ipynb")
    with pytest.raises(AdaptkitError, match=words):
        run_page(tmp_path / "page.ipynb", tmp_path / "out.ipynb", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["page.ipynb"]


def test_places_where_no_copy_can_lie(tmp_path: Path) -> None:
    made = page(tmp_path, "1")
    before = made.read_bytes()
    for out, words in ((tmp_path / "." / made.name, "own output"), (tmp_path, "is a folder"), (made / "out.ipynb", "Cannot write")):
        with pytest.raises(AdaptkitError, match=words):
            run_page(made, out, progress=False)
    (tmp_path / "link.ipynb").symlink_to(made)
    with pytest.raises(AdaptkitError, match="own output"):
        run_page(made, tmp_path / "link.ipynb", progress=False)
    assert made.read_bytes() == before


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    "An open folder with a folder in it where this process may not write; the page lies outside."
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(folder))
    (folder / "mine").mkdir(mode=0o555)
    root = os.geteuid() == 0
    run_page(page(folder, "1", name="warm.ipynb"), folder / "warm_out.ipynb", progress=False)  # everything is imported
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        (folder / "mine").chmod(0o755)
        shutil.rmtree(folder)


def test_no_permission_is_told_before_a_kernel_starts(forbidden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptkit.notebooks.client.Client.execute", lambda self: pytest.fail("a kernel was started"))
    for out in (forbidden / "mine/out.ipynb", forbidden / "mine/deeper/out.ipynb"):
        with pytest.raises(AdaptkitError, match="Cannot write .*out.*Permission denied"):
            run_page(forbidden / "warm.ipynb", out, progress=False)


def test_a_full_disk_stops_the_page_and_spoils_nothing(tmp_path: Path) -> None:
    made = page(tmp_path, "print('small')", "import time\ntime.sleep(1)\nprint('x' * 300_000)", "3")
    (tmp_path / "out.ipynb").write_text("the old copy")
    program = f"from adaptkit.notebooks.runner import run_page; run_page({str(made)!r}, {str(tmp_path / 'out.ipynb')!r})"
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731  # what a full disk looks like to a process
    done = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True, preexec_fn=small)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "AdaptkitError: Cannot write" in last and "File too large" in last and "Make room" in last
    assert (tmp_path / "out.ipynb").read_text() == "the old copy"
    assert code(read(tmp_path / "out.partial.ipynb"))[0].outputs[0].text == "small\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ipynb", "out.partial.ipynb", "page.ipynb"]


# ---- meter


def test_the_meter_says_nothing_about_what_it_cannot_see() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert high_water(gone.pid) is None and cpu_seconds(gone.pid) is None
    meter = Meter(gone.pid)
    meter.begin()
    assert meter.end() | {"seconds": 0} == {"seconds": 0, "cpu_seconds": None, "peak_mib": None, "gpu_mib": None}


def test_the_work_of_children_counts() -> None:
    before = cpu_seconds(os.getpid())
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    after = cpu_seconds(os.getpid())
    assert before is not None and after is not None and after - before >= 0.45


def test_gpu_memory_is_asked_of_pytorch_only_where_it_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        used = True
        is_initialized = staticmethod(lambda: Card.used)
        device_count = staticmethod(lambda: 2)
        max_memory_allocated = staticmethod(lambda d: (d + 1) * 2**20)

    monkeypatch.setitem(sys.modules, "torch", type("torch", (), {"cuda": Card}))
    assert eval(GPU_PEAK) == 2.0
    Card.used = False
    assert eval(GPU_PEAK) is None
    monkeypatch.delitem(sys.modules, "torch")
    assert eval(GPU_PEAK) is None


# ---- progress


def test_progress_prints_sections_that_did_something() -> None:
    stream = io.StringIO()
    with Progress(stream) as told:
        for heading, seconds in (("# One", 0.1), ("## Nothing", 0), ("## Two", 0.1)):
            told.cell(new_markdown_cell(heading))
            time.sleep(seconds)
    assert [line.split(" s  ")[1] for line in stream.getvalue().splitlines()] == ["One", "Two"]


def test_on_a_terminal_the_live_line_shows_what_the_page_prints(tmp_path: Path) -> None:
    made = page(tmp_path, "## Train", "import time\nprint('epoch 1 of 2', flush=True)\ntime.sleep(2)")
    program = f"from adaptkit.notebooks.runner import run_page; run_page({str(made)!r}, {str(tmp_path / 'out.ipynb')!r})"
    pid, screen = pty.fork()
    if pid == 0:
        os.environ["COLUMNS"] = "100"
        os.execv(sys.executable, [sys.executable, "-c", program])
    seen = b""
    try:
        while part := os.read(screen, 4096):
            seen += part
    except OSError:
        pass  # the terminal closes with the program
    assert os.waitpid(pid, 0)[1] == 0
    assert b"Train  epoch 1 of 2" in seen and b"\r\x1b[K" in seen


def test_papermill_says_nothing_about_what_only_its_own_reader_does_not_know(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources = ["from typing import Annotated\nfrom adaptkit.notebooks.parameters import Range", "epochs: Annotated[int, Range(1, 9)] = 2", "epochs"]
    run_page(page(tmp_path, *sources, tags={1: "parameters"}), tmp_path / "out.ipynb", {"epochs": 3}, progress=False)
    assert "unknown parameter" not in caplog.text


def test_children_of_every_thread_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import psutil

    from adaptkit.notebooks import meter

    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"  # a child of its own
    begin = lambda _: subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)  # noqa: E731
    with ThreadPoolExecutor(3) as pool:
        children = list(pool.map(begin, range(3)))
        try:
            ends = time.monotonic() + 20
            while len(found := meter.offspring(os.getpid())) < 6 and time.monotonic() < ends:
                time.sleep(0.05)
            asked = [p.pid for p in psutil.Process().children(recursive=True)]
            assert {c.pid for c in children} < set(found) and sorted(found) == sorted(asked) and len(found) >= 6
            real = meter.Path
            monkeypatch.setattr(meter, "Path", lambda p: real(str(p).replace("/task", "/nowhere")))
            assert sorted(meter.offspring(os.getpid())) == sorted(asked)  # looked up in the other way
        finally:
            for child in children:
                child.communicate(b"\n")
    assert meter.offspring(children[0].pid) == []
