"""The runner: parameters, progress, records, failures, and the engine beside papermill's own."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from adaptkit.core.registry import AdaptkitError
from adaptkit.notebooks.parameters import checked, declared, from_text
from adaptkit.notebooks.records import RECORD, Record, records
from adaptkit.notebooks.runner import PageError, Progress, left_out, run_page

SPEC = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}


def page(folder: Path, *sources: str, name: str = "page.ipynb", tag: str | None = None) -> Path:
    "A page of code cells (Markdown where they begin with #); the one that equals `tag` takes parameters."
    made = [new_markdown_cell(s) if s.startswith("# ") or s.startswith("## ") else new_code_cell(s) for s in sources]
    for cell in made:
        if cell.source == tag:
            cell.metadata["tags"] = ["parameters"]
    nbformat.write(new_notebook(cells=made, metadata=SPEC), folder / name)
    return folder / name


DEFAULTS = "data = 'elpv'\nepochs: int = 2\nrate = 1e-3\nfast = False\nshares = [0.5, 0.5]\nlimit = None"


@pytest.fixture
def typed(tmp_path: Path) -> Path:
    return page(tmp_path, DEFAULTS, "(data, epochs, rate, fast, shares, limit)", tag=DEFAULTS)


def test_declared_parameters_keep_order_and_type(typed: Path) -> None:
    assert declared(typed) == {"data": "elpv", "epochs": 2, "rate": 1e-3, "fast": False, "shares": [0.5, 0.5], "limit": None}
    assert [*declared(typed)][0] == "data"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("data", "007", "007"), ("epochs", "3", 3), ("rate", "1", 1), ("fast", "True", True), ("shares", "(1, 2)", [1, 2]), ("limit", "x", "x"), ("limit", "None", None)],
)
def test_text_becomes_what_the_page_declares(typed: Path, name: str, text: str, value: object) -> None:
    found = from_text(typed, [(name, text)])[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epoch": 1}, "Did you mean 'epochs'"),
        ({"epochs": 2.5}, "wants a whole number, such as 2"),
        ({"epochs": True}, "wants a whole number"),
        ({"epochs": "2"}, "wants a whole number"),
        ({"fast": 1}, "wants True or False"),
        ({"data": None}, "wants text"),
        ({"shares": "half"}, "wants a list"),
    ],
)
def test_wrong_parameters_stop_the_page_before_it_starts(typed: Path, given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match=words):
        run_page(typed, tmp_path / "out.ipynb", given, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["page.ipynb"]


def test_a_path_is_text(typed: Path) -> None:
    assert checked(typed, {"data": Path("a/b")}) == {"data": "a/b"}


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (["x = 1"], "no cell of it is tagged"),
        (["epochs = 2 * 3"], "line 1 does not: epochs = 2 \\* 3"),
        (["import os"], "line 1 does not: import os"),
        (["a, b = 1, 2"], "line 1 does not"),
    ],
)
def test_cells_that_declare_nothing_useful(sources: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(AdaptkitError, match=words):
        declared(page(tmp_path, *sources, tag=None if sources == ["x = 1"] else sources[0]))


def test_two_parameter_cells_are_refused(tmp_path: Path) -> None:
    made = page(tmp_path, "a = 1", "a = 1", tag="a = 1")
    with pytest.raises(AdaptkitError, match="2 cells tagged"):
        declared(made)


@pytest.mark.parametrize("text", ["", "no notebook", '{"cells": 1}', "[]"])
def test_what_is_no_notebook_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.ipynb").write_text(text)
    with pytest.raises(AdaptkitError, match="x.ipynb"):
        run_page(tmp_path / "x.ipynb", tmp_path / "out.ipynb", progress=False)
    with pytest.raises(AdaptkitError, match="No such file"):
        run_page(tmp_path / "y.ipynb", tmp_path / "out.ipynb", progress=False)


def test_parameters_arrive_and_paths_are_the_users(typed: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep/{curly}/out.ipynb"
    run_page(typed, out, {"epochs": 5, "shares": (0.25, 0.75)}, progress=False)
    nb = nbformat.read(out, as_version=4)
    assert nb.cells[-1].outputs[0].data["text/plain"] == "('elpv', 5, 0.001, False, [0.25, 0.75], None)"
    assert nb.metadata.papermill.output_path == str(out) and nb.metadata.papermill.parameters.epochs == 5
    assert [p.name for p in out.parent.iterdir()] == ["out.ipynb"]


def test_the_page_is_never_its_own_output(typed: Path) -> None:
    before = typed.read_bytes()
    with pytest.raises(AdaptkitError, match="own output"):
        run_page(typed, typed.parent / "." / typed.name)
    assert typed.read_bytes() == before


SAY = "from adaptkit.notebooks.records import record"


def test_records_come_back_in_order(tmp_path: Path) -> None:
    made = page(tmp_path, SAY, "record('b', 2, 's', higher_is_better=False)\nrecord('a', 0.5)")
    found = run_page(made, tmp_path / "out.ipynb", progress=False)
    assert list(found.values()) == [Record("b", 2.0, "s", False), Record("a", 0.5)]
    shown = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[1].outputs[0].data
    assert shown["text/plain"] == "b = 2 s" and shown[RECORD]["unit"] == "s"


def test_a_name_is_recorded_once() -> None:
    twice = [{"data": {RECORD: {"name": "a", "value": 1.0}}}] * 2
    with pytest.raises(AdaptkitError, match="recorded twice"):
        records(nbformat.from_dict({"cells": [{"outputs": twice}]}))


def test_a_page_that_raises_is_kept_and_located(tmp_path: Path) -> None:
    made = page(tmp_path, "# Title", "print('before')", "## Second part", "1 / 0", "print('after')")
    with pytest.raises(PageError, match="in the section 'Second part': ZeroDivisionError: division by zero"):
        run_page(made, tmp_path / "out.ipynb", progress=False)
    text = (tmp_path / "out.ipynb").read_text()
    assert "before\\n" in text and "Traceback" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.ipynb", "page.ipynb"]


@pytest.mark.parametrize(("source", "words"), [("import os; os.kill(os.getpid(), 9)", "its kernel died"), ("import time; time.sleep(60)", "time limit")])
def test_a_dead_or_slow_kernel_is_told_apart_from_success(source: str, words: str, tmp_path: Path) -> None:
    made = page(tmp_path, "1", source, "3")
    with pytest.raises(PageError, match=words):
        run_page(made, tmp_path / "out.ipynb", timeout=2, progress=False)
    status = [c.metadata.papermill.status for c in nbformat.read(tmp_path / "out.ipynb", as_version=4).cells if c.cell_type == "code"]
    assert status == ["completed", "failed", "pending"]


def test_unknown_kernels_are_named(tmp_path: Path) -> None:
    nb = nbformat.read(page(tmp_path, "1"), as_version=4)
    nb.metadata.kernelspec.name = "fortran77"
    nbformat.write(nb, tmp_path / "page.ipynb")
    with pytest.raises(PageError, match="fortran77"):
        run_page(tmp_path / "page.ipynb", tmp_path / "out.ipynb", progress=False)


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


def test_our_engine_gives_what_papermills_gives(tmp_path: Path) -> None:
    sources = ["import sys", "print('out')", "print('err', file=sys.stderr)", "{'a': 1}", "from IPython.display import HTML\nHTML('<b>x</b>')", "None"]
    made = page(tmp_path, *sources)
    quiet = {"progress_bar": False, "extra_arguments": ["--log-level=ERROR"]}
    both = [papermill.execute_notebook(made, tmp_path / f"{name}.ipynb", engine_name=name, **quiet) for name in (None, "adaptkit")]
    first, second = ([(c.get("outputs"), c.get("execution_count"), c.metadata.papermill.status) for c in nb.cells] for nb in both)
    assert first == second
    nbformat.validate(both[1])


def test_papermills_command_line_finds_the_engine(typed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "papermill", "--engine", "adaptkit", "--no-progress-bar", str(typed), str(tmp_path / "out.ipynb"), "-p", "epochs", "7"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "without encryption" not in done.stderr
    assert "'elpv', 7" in (tmp_path / "out.ipynb").read_text()


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


def test_a_killed_runner_leaves_the_old_copy(tmp_path: Path) -> None:
    out = tmp_path / "out.ipynb"
    out.write_text("the old copy")
    made = page(tmp_path, "import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(60)")
    program = f"from adaptkit.notebooks.runner import run_page; run_page({str(made)!r}, {str(out)!r}, cwd={str(tmp_path)!r})"
    runner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < end:
        time.sleep(0.1)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    assert (tmp_path / "started").exists() and out.read_text() == "the old copy"
    drafts = [p for p in tmp_path.iterdir() if p.name.endswith(".part.ipynb")]
    assert len(drafts) == 1 and json.loads(drafts[0].read_text())["cells"]
