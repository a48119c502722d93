"""What does the visible loop cost over a bare PyTorch loop that does the same work?

Both train the last stages of EfficientNet-Lite0 and a head on the same stored features, with the same optimiser and rates. The clock of `fit` counts everything between the first and the last
batch of an epoch: reading features, obeying the control, events, the check that the loss is finite. They run in turn, A B B A ..., and the ratio is taken pair by pair.

On a noisy machine such a ratio wavers by more than the loop costs. So the same is done once more with almost no work, the head alone: there the difference of a step, in milliseconds, is plain to see, and can be set against the
step of the real work.

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


def bare(model, data, plan: Plan, path: Path, depth: int) -> float:
    "Seconds of one epoch, written by hand."
    model.to(memory_format=torch.channels_last)
    groups = list(FineTune(depth=depth).groups(model))
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
        loss = torch.nn.functional.cross_entropy(model(x, start=9 - depth), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return time.perf_counter() - started


def ours(model, data, plan: Plan, folder: Path, depth: int) -> float:
    "Seconds of one epoch of fit: from its first batch to its last."
    run = fit(
        model,
        data,
        FineTune(depth=depth),
        plan=plan,
        observers=[],
        out=folder / "run",
        exists="replace",
        cache=folder / "cache",
    )
    return run.history[0]["seconds"]


def in_turn(data, plan: Plan, folder: Path, *, depth: int, pairs: int) -> list[tuple[float, float]]:
    "Seconds of an epoch of fit and of the bare loop, pair by pair; the first pair warms up, who goes first alternates."
    model = build_model("efficientnet_lite0", data, seed=0)
    views, trunk = Views(Preprocess(224), plan.augment, 1), Trunk(model.backbone, 9 - depth)
    path = TrunkCache(folder / "cache").entry(data.train, views, 0, trunk)
    found = []
    for turn in range(pairs + 1):
        fresh = build_model("efficientnet_lite0", data, seed=0)
        by_hand = bare(fresh, data, plan, path, depth) if turn % 2 else None
        fitted = ours(model, data, plan, folder, depth)
        by_hand = bare(fresh, data, plan, path, depth) if by_hand is None else by_hand
        found.append((fitted, by_hand))
        print(f"depth {depth}: fit {fitted:.3f} s   bare {by_hand:.3f} s   ratio {fitted / by_hand:.4f}", flush=True)
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11)
    args = parser.parse_args()
    whole = load_data("elpv")
    data = dataclasses.replace(whole, train=whole.train.take(range(1280)), valid=whole.valid.take(range(32)))
    plan, steps = Plan(epochs=1, views=1, augment=Augment(hflip=False), accelerator="cpu"), 40
    with tempfile.TemporaryDirectory() as name:
        light = in_turn(data, plan, Path(name), depth=0, pairs=2 * args.pairs)
        heavy = in_turn(data, plan, Path(name), depth=3, pairs=args.pairs)
    ratios = [a / b for a, b in heavy]
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    extra = statistics.median(1000 * (a - b) / steps for a, b in light)  # milliseconds a step
    step = statistics.median(1000 * b / steps for _, b in heavy)
    result = {
        "light": light,
        "pairs": heavy,
        "ratio": statistics.median(ratios),
        "median_low": float(low),
        "median_high": float(high),
        "extra_ms": extra,
        "step_ms": step,
        "share": extra / step,
        "steps": steps,
        "where": surroundings(),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result) + "\n")
    print(f"{extra:.2f} ms a step of {step:.0f} ms: {extra / step:.2%}; ratio {result['ratio']:.4f} ({low:.4f} to {high:.4f})")


if __name__ == "__main__":
    main()
