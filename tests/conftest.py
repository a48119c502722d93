"""Every page is executed once for all tests that look at executed pages: in two processes, each page in its one-minute form."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest

from adaptkit.notebooks.site import one_thread, run_one
from adaptkit.notebooks.tree import pages

ROOT = Path(__file__).parents[1]
Answers = dict[str, Future[tuple[float, str]]]


@contextmanager
def running(nbs: Path, out: Path) -> Iterator[Answers]:
    "Execute the pages of a folder side by side; what hasn't begun when the block ends is dropped."
    pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=one_thread)
    try:
        yield {p.as_posix(): pool.submit(run_one, str(nbs / p), str(out / p)) for p in pages(nbs)}
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A copy of what a page may look at, so that running pages leaves nothing in the repository."
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".*", "runs"))
    for name in ("_quarto.yml", "settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "adaptkit", folder / "adaptkit", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="session")
def answers(work: Path) -> Iterator[Answers]:
    "By page, in the order of the course: seconds and what went wrong, as soon as they are there."
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    with running(work / "nbs", work / "runs/docs") as found:
        yield found
