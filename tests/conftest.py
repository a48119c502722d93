"""Every page is executed and judged once for all tests that look at executed pages: two at a time, each in its one-minute form."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from adaptkit.data.datasets import Data
from adaptkit.heads.heads import Model
from adaptkit.notebooks.check import Suite, preloads
from adaptkit.notebooks.meter import hardware
from adaptkit.notebooks.plugin import Runs
from adaptkit.testing import toy_data, toy_model

ROOT = Path(__file__).parents[1]
BASELINES = ROOT / "tests/baselines"


settings.register_profile("same", derandomize=True)  # to look further: pytest --hypothesis-profile=default
settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Files with a slow test begin first, or one core waits for another at the end (`--no-loadscope-reorder` keeps this order)."
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def same_chance() -> None:
    "Random numbers that nobody seeded are the same each time: a test fails always, or never."
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def data() -> Data:
    "Forty-eight small images."
    return toy_data(48)


@pytest.fixture
def model(data: Data) -> Model:
    "A small network for them."
    return toy_model(data)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A cache of its own for each test that asks for it."
    monkeypatch.setenv("ADAPTKIT_CACHE", str(tmp_path / "cache"))


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
def executed(work: Path) -> Iterator[Runs]:
    "The smoke profile of all pages: what came of each, as soon as it is there."
    suite = Suite(work / "nbs", baselines=BASELINES, out=work / "runs/check", root=work, hardware=hardware(), preload=preloads(ROOT))
    runs = Runs(suite, every=True)
    yield runs
    runs.close()
