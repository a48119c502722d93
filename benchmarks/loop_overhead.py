"""What does the visible loop cost over a bare PyTorch loop that does the same work?

Both train the last stages of EfficientNet-Lite0 and a head on the same stored features, with the same optimiser and rates. The clock of `fit` counts everything between the first and the last
batch of an epoch: reading features, obeying the control, events, the check that the loss is finite. They run in turn, A B A B ..., and the ratio is taken pair by pair.

    python benchmarks/loop_overhead.py [--pairs 15]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from adaptkit.data.images import Augment, Preprocess
from adaptkit.data.sources import load_data
from adaptkit.heads.heads import build_model
from adaptkit.training.cache import Trunk, TrunkCache, Views
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.methods import one_cycle, set_learning
from adaptkit.training.runs import surroundings
from adaptkit.training.session import Plan, epoch_order, make_optimizer

RESULTS = Path(__file__).parent / "results" / "loop_overhead.json"


def bare(model, data, plan: Plan, path: Path) -> float:
    "Seconds of one epoch, written by hand."
    model.to(memory_format=torch.channels_last)
    groups = list(FineTune().groups(model))
    optimizer = make_optimizer(groups, plan)
    set_learning(model, groups, 0)
    labels = torch.from_numpy(data.train.labels)
    order = epoch_order(len(data.train), plan.batch_size, plan.seed, 0)
    started = time.perf_counter()
    steps = len(order) // plan.batch_size
    for step, rows in enumerate(np.split(order, steps)):
        x = torch.from_numpy(np.load(path, mmap_mode="r")[rows]).float().contiguous(memory_format=torch.channels_last)
        for entry, group in zip(optimizer.param_groups, groups, strict=True):
            entry["lr"] = group.rate * one_cycle(step / steps, plan.warmup)
        loss = torch.nn.functional.cross_entropy(model(x, start=6), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return time.perf_counter() - started


def ours(model, data, plan: Plan, folder: Path) -> float:
    "Seconds of one epoch of fit: from its first batch to its last."
    run = fit(
        model, data, FineTune(), plan=plan, observers=[], out=folder / "run", exists="replace", cache=folder / "cache"
    )
    return run.history[0]["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    whole = load_data("elpv")
    data = dataclasses.replace(whole, train=whole.train.take(range(1280)), valid=whole.valid.take(range(32)))
    plan = Plan(epochs=1, views=1, augment=Augment(hflip=False))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_model("efficientnet_lite0", data, seed=0)
        path = TrunkCache(folder / "cache").entry(
            data.train, Views(Preprocess(224), plan.augment, 1), 0, Trunk(model.backbone, 6)
        )
        pairs = []
        for turn in range(args.pairs + 1):  # the first pair warms up; who goes first alternates
            fresh = build_model("efficientnet_lite0", data, seed=0)
            if turn % 2:
                by_hand = bare(fresh, data, plan, path)
                pairs.append((ours(model, data, plan, folder), by_hand))
            else:
                pairs.append((ours(model, data, plan, folder), bare(fresh, data, plan, path)))
            print(
                f"fit {pairs[-1][0]:.3f} s   bare {pairs[-1][1]:.3f} s   ratio {pairs[-1][0] / pairs[-1][1]:.4f}",
                flush=True,
            )
    ratios = [a / b for a, b in pairs[1:]]
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    result = {
        "pairs": pairs[1:],
        "ratio": statistics.median(ratios),
        "median_low": float(low),
        "median_high": float(high),
        "low": min(ratios),
        "high": max(ratios),
        "steps": 40,
        "where": surroundings(),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result) + "\n")
    print(f"median ratio {result['ratio']:.4f} (95 % interval {low:.4f} to {high:.4f})")


if __name__ == "__main__":
    main()
