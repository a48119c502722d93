"""The doctor: containers, accelerators, caches and programs, each present and absent."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from adaptkit import doctor
from adaptkit.doctor import (
    NETWORKS,
    accelerators,
    cores,
    hub_cache,
    limits,
    machine,
    memory,
    tool,
    tools,
    torch_cache,
    torch_file,
)

GIB = 2**30


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, (math.inf, math.inf)),
        ({"cpu.max": "max 100000", "memory.max": "max"}, (math.inf, math.inf)),
        ({"cpu.max": "50000 100000", "memory.max": str(GIB)}, (0.5, GIB)),
        ({"cpu.max": "400000 100000"}, (4, math.inf)),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": "9223372036854771712"}, (math.inf, math.inf)),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": str(3 * GIB)}, (3, 3 * GIB)),
    ],
)
def test_the_limits_of_a_container(files: dict[str, str], wanted: tuple[float, float], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert limits(tmp_path) == wanted


def test_a_limit_is_shown_beside_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "limits", lambda: (0.5, GIB / 2))
    assert cores().startswith("0.5 of ") and memory().startswith("0.5 of ")
    monkeypatch.setattr(doctor, "limits", lambda: (math.inf, math.inf))
    assert " of " not in memory()


def test_the_cache_of_frozen_stages_is_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTKIT_CACHE", str(tmp_path))
    for i in range(3):
        (tmp_path / f"{i}.npy").write_bytes(bytes(10_000_000))
    found = {f.name: f.found for f in machine()}
    assert found["outputs of frozen stages"].startswith("0.03 GB in 3 files") and str(tmp_path) in found["free disk for caches"]


def pretend(monkeypatch: pytest.MonkeyPatch, *, cards: int, apple: bool, driver: bool) -> None:
    "Another machine."
    card = SimpleNamespace(name="Big Card", total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "nvidia-smi" if driver else None)


def test_each_card_is_named_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cards=2, apple=False, driver=True)
    assert [(f.name, f.found) for f in accelerators()] == [("cuda:0", "Big Card, 80 GiB"), ("cuda:1", "Big Card, 80 GiB")]
    pretend(monkeypatch, cards=0, apple=True, driver=False)
    assert [f.name for f in accelerators()] == ["mps"]


def test_a_card_that_pytorch_cannot_use_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cards=0, apple=False, driver=False)
    (none,) = accelerators()
    pretend(monkeypatch, cards=0, apple=False, driver=True)
    (unused,) = accelerators()
    assert none.found.startswith("none") and not unused.found and "can't use it" in unused.mend


def test_the_cache_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    before = {f.name: f for f in torch_cache()}
    assert [*before] == [f"torchvision/{name}" for name in NETWORKS] and not any(f.found for f in before.values())
    assert all(f"load_backbone('{name}')" in f.mend for name, f in before.items())
    torch_file("vgg16").parent.mkdir(parents=True)
    torch_file("vgg16").write_bytes(bytes(2_000_000))
    after = {f.name: f.found for f in torch_cache()}
    assert after["torchvision/vgg16"] == f"{torch_file('vgg16').name}, 2 MB" and not after["torchvision/resnet18"]


def test_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (empty,) = hub_cache()
    assert not empty.found and "load_backbone('timm/" in empty.mend
    whole, begun = (tmp_path / "hub" / f"models--timm--{name}" / "snapshots/abc" for name in ("whole", "begun"))
    for folder in (whole, begun):
        folder.mkdir(parents=True)
    (whole / "model.safetensors").write_bytes(bytes(3_000_000))
    (begun / "model.safetensors").symlink_to(tmp_path / "nowhere")
    assert {f.name: f.found[:4] for f in hub_cache()} == {"timm/whole": "3 MB", "timm/begun": ""}


def test_a_tool_counts_when_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho version 1\nexit 3\n")
    broken.chmod(0o755)
    assert tool("Python", [broken, sys.executable], mend="").found.startswith("Python 3")
    assert tool("Python", ["no-such-program", broken], mend="Get one.").mend == "Get one."
    monkeypatch.setenv("CXX", str(broken))
    (compiler, browser) = tools()
    assert not compiler.found and "g++" in compiler.mend and browser.name == "browser"
