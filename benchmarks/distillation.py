"""What a teacher costs: an epoch of distillation beside one without a teacher, when the teacher's answers are kept, and when it is asked for every batch.

The same student, the same images, the same seed. A first run per seed fills the cache and is reported by itself. Then the two or three trainings of a seed run one after the other, who goes first alternates, and the
ratio of times is taken epoch by epoch of a seed. The clock counts the CPU seconds of this process from one epoch's end to the next, validation and records included, with one thread: that is what stays comparable while others use the machine.

    python benchmarks/distillation.py [--images 400] [--epochs 6] [--seeds 5]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from adaptkit.data.datasets import Data
from adaptkit.data.images import Augment
from adaptkit.data.sources import load_data
from adaptkit.distillation.distillation import Distillation
from adaptkit.heads.heads import Model, build_model
from adaptkit.training.control import When
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.methods import Method
from adaptkit.training.runs import surroundings
from adaptkit.training.session import Plan

RESULTS = Path(__file__).parent / "results" / "distillation.json"


class Clock:
    "The CPU seconds of each epoch, as an observer sees them."

    on = (When.START, When.EPOCH)

    def __init__(self) -> None:
        self.last, self.epochs = 0.0, []

    def __call__(self, event) -> None:
        now = time.process_time()
        self.epochs += [now - self.last] if event.when is When.EPOCH else []
        self.last = now


def seconds(student: Model, data: Data, method: Method, plan: Plan, *, out: Path, cache: Path) -> list[float]:
    "The CPU seconds of each epoch of a run."
    clock = Clock()
    fit(student, data, method, plan=plan, out=out, cache=cache, observers=[clock])
    return clock.epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    whole = load_data("digits", seed=0)
    data = dataclasses.replace(whole, train=whole.train.take(range(asked.images)), valid=whole.valid.take(range(60)))
    teacher = build_model("efficientnet_lite0", data, size=48, seed=0)
    usual, rows = FineTune(depth=3, rate=1e-2), []
    for seed in range(asked.seeds):
        student = build_model("small_cnn", data, size=32, seed=seed)
        plan = Plan(epochs=asked.epochs, batch_size=20, views=2, augment=Augment(hflip=True), seed=seed, accelerator="cpu")
        ways = {"alone": (usual, plan), "kept": (Distillation(teacher, base=usual), plan), "asked": (Distillation(teacher, base=usual), dataclasses.replace(plan, cache=False))}
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            first = seconds(student, data, *ways["kept"], out=place / "first", cache=place / "cache")
            order = list(ways) if seed % 2 else list(ways)[::-1]
            spent = {name: seconds(student, data, *ways[name], out=place / name, cache=place / "cache") for name in order}
        ratios = {name: statistics.median(a / b for a, b in zip(spent[name], spent["alone"], strict=True)) for name in ("kept", "asked")}
        rows.append({"seed": seed, "seconds": spent, "first_time": first, "ratio": ratios})
        print(seed, {k: round(v, 3) for k, v in ratios.items()}, flush=True)
    summary = {name: {"median": statistics.median(r["ratio"][name] for r in rows), "all": [r["ratio"][name] for r in rows]} for name in ("kept", "asked")}
    told = {"settings": vars(asked), "teacher": repr(teacher), "student": repr(student), "epoch_over_epoch_alone": summary, "runs": rows, **surroundings()}
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
