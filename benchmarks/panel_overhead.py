"""What does the training panel cost, how promptly does it obey, and how large does it get in a notebook?

Overhead: the same run twice, once by `fit` in a thread with nobody watching and once by a panel whose widgets are brought up to date four times a second by the event loop of a notebook. They run in turn, A B B A ..., and the ratio of
their seconds (the clock of `fit`: from the first batch of an epoch to its last) is taken pair by pair. The first epoch, which fills the cache, does not count.

Where the clock of the machine wavers by more than the panel costs, that ratio says little. So what the panel does is timed directly, too: the seconds in which the training waits for it, and the processor seconds of the event loop, which
may be taken from the training where it uses all cores; together, as a share of the seconds of the run.

Latency: a pause is asked for at random moments; how long until the run holds, beside the longest step of the same run.

Size: a panel that has seen 100,000 batches, as it is stored in the notebook.

    python benchmarks/panel_overhead.py [--pairs 9] [--small]
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from adaptkit.data.images import Augment
from adaptkit.data.sources import load_data
from adaptkit.heads.heads import build_model
from adaptkit.training.control import Event, When
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.runs import Run, surroundings
from adaptkit.training.session import Plan
from adaptkit.widgets.still import bundle, show
from adaptkit.widgets.training import TrainingPanel
from adaptkit.widgets.worker import Watcher

RESULTS = Path(__file__).parent / "results" / "panel_overhead.json"


@contextmanager
def timed(spent: list[float]) -> Iterator[None]:
    "How long the training waits for the panel's watcher, between its first batch and its last, added to a list call by call."
    plain = Watcher.__call__

    def watch(self: Watcher, event: Event) -> None:
        began = time.perf_counter()
        plain(self, event)
        if event.when not in (When.START, When.END):
            spent.append(time.perf_counter() - began)

    Watcher.__call__ = watch  # type: ignore[method-assign]
    try:
        yield
    finally:
        Watcher.__call__ = plain  # type: ignore[method-assign]


class Steps:
    "How long each step took."

    on = (When.STEP,)

    def __init__(self) -> None:
        self.last, self.seconds = time.perf_counter(), []

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def seconds(run: Run) -> float:
    "Of all epochs but the first."
    return sum(e["seconds"] for e in run.history[1:])


async def looked_after(panel: TrainingPanel) -> tuple[Run, float]:
    "A run of a panel in an event loop, with live widgets; and the processor seconds of the loop while it trained."
    with redirect_stdout(io.StringIO()):  # what a notebook would show
        panel.desk.places.append(show(panel.desk, "lab"))
        panel.start()
        began = used = time.thread_time()
        while panel.training.is_alive():
            used = time.thread_time()
            await asyncio.sleep(0.05)
        await panel.follower
    return panel.run, used - began


def in_turn(work: tuple[Any, ...], plan: Plan, folder: Path, *, pairs: int) -> tuple[list[tuple[float, float]], list[float]]:
    "Seconds with a panel and without, pair by pair, and the panel's share; the first pair warms up, who goes first alternates."
    found, shares = [], []

    def alone() -> float:
        how = {"plan": plan, "observers": [], "out": folder / "alone", "exists": "replace", "cache": folder / "cache"}
        with ThreadPoolExecutor(1) as pool:
            return seconds(pool.submit(fit, *work, **how).result())

    def watched() -> float:
        panel = TrainingPanel(*work, plan=plan, out=folder / "watched", exists="replace", cache=folder / "cache")
        spent: list[float] = []
        with timed(spent):
            run, used = asyncio.run(looked_after(panel))
            shares.append((used + sum(spent)) / sum(e["seconds"] for e in run.history))
        return seconds(run)

    for turn in range(pairs + 1):
        first = alone() if turn % 2 else None
        ours = watched()
        theirs = alone() if first is None else first
        found.append((ours, theirs))
        print(f"panel {ours:.3f} s   alone {theirs:.3f} s   ratio {ours / theirs:.4f}   the panel's share {shares[-1]:.4f}", flush=True)
    return found[1:], shares[1:]


def latencies(work: tuple[Any, ...], plan: Plan, folder: Path, *, pauses: int) -> tuple[list[float], float]:
    "Seconds from asking for a pause to holding; and the longest step."
    steps, rng = Steps(), np.random.default_rng(0)
    panel = TrainingPanel(*work, plan=dataclasses.replace(plan, epochs=200), out=folder / "pauses", exists="replace", cache=folder / "cache", observers=[steps])
    panel.start()
    while len(steps.seconds) < 45:  # two epochs
        time.sleep(0.01)
    found = []
    for _ in range(pauses):
        time.sleep(rng.uniform(0.1, 0.5))
        asked = time.perf_counter()
        panel.pause()
        while panel.state != "paused":
            time.sleep(0.0005)
        found.append(time.perf_counter() - asked)
        panel.resume()
        steps.last = time.perf_counter()
    panel.stop()
    panel.training.join()
    return found, max(steps.seconds[1:])


def stored_bytes(work: tuple[Any, ...], folder: Path, steps: int = 100_000) -> int:
    "What a panel of so many batches takes in a notebook."
    panel = TrainingPanel(*work, plan=Plan(epochs=100), out=folder / "long")
    noise = np.random.default_rng(0).random(steps)
    for step in range(1, steps + 1):
        row = {"when": "step", "epoch": step // 1000, "step": step, "total": steps, "now": step / 10, "loss": noise[step - 1]}
        panel.history.add(row)
        if step % 1000 == 0:
            panel.history.add({**row, "when": "epoch", "valid_loss": noise[step - 1], "valid_accuracy": noise[step - 1]})
    return len(json.dumps(bundle(panel.desk))) + len(json.dumps(bundle(panel.desk, behind=True)))


def small_work() -> tuple[Any, ...]:
    "Digits."
    data = load_data("digits")
    return build_model("small_cnn", data, seed=0), data, FineTune(depth=3, rate=3e-3, head_rate=3e-3)


def demo_work() -> tuple[Any, ...]:
    "The solar cells of the demo."
    whole = load_data("elpv")
    data = dataclasses.replace(whole, train=whole.train.take(range(640)), valid=whole.valid.take(range(64)))
    return build_model("efficientnet_lite0", data, seed=0), data, FineTune(depth=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="digits instead of the demo, nothing is written")
    args = parser.parse_args()
    plan = Plan(epochs=8, views=1, augment=Augment(hflip=False), accelerator="cpu")
    work = small_work() if args.small else demo_work()
    with tempfile.TemporaryDirectory() as name:
        pairs, shares = in_turn(work, plan, Path(name), pairs=args.pairs)
        waits, longest = latencies(work, plan, Path(name), pauses=60)
        size = stored_bytes(work, Path(name))
    ratios = [a / b for a, b in pairs]
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    result = {
        "pairs": pairs, "ratio": statistics.median(ratios), "median_low": float(low), "median_high": float(high), "share": statistics.median(shares), "share_max": max(shares),
        "latency_max": max(waits), "latency_median": statistics.median(waits), "longest_step": longest,
        "bytes_100000_steps": size, "where": surroundings(),
    }  # fmt: skip
    print(f"ratio {result['ratio']:.4f} ({low:.4f} to {high:.4f}), share {result['share']:.4f} ({max(shares):.4f} at most); pause after {1000 * max(waits):.0f} ms at most, longest step {1000 * longest:.0f} ms; 100,000 batches {size / 1e6:.2f} MB")
    if not args.small:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
