"""Is one step enough? Fast adversarial training (Wong 2020) against PGD training with seven steps (Madry 2018).

The same small CNN, the same images, the same number of epochs, the same seeds; only the attack of the training differs. For each seed all trainings run one after the other in this process, who goes first alternates, and the
ratio of times is taken seed by seed. The clock counts the CPU seconds of this process during `fit`, validation and records included, with one thread: that is what stays comparable while others use the machine. `guarded` is one-step training with the guard against catastrophic overfitting
(PGD with ten steps on 64 held-out images, once an epoch). All are judged by the same PGD with 20 steps and 2 restarts on the same test images, from the same starts; the difference is taken image by image, and the interval is that of a mean of paired differences.

    python benchmarks/adversarial_training.py [--data digits fashion_mnist] [--root folder with Fashion-MNIST] [--seeds 5]
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

from adaptkit.data.datasets import Data
from adaptkit.data.images import Augment
from adaptkit.data.sources import load_data
from adaptkit.data.splits import split_rows
from adaptkit.heads.heads import build_model
from adaptkit.robustness.adversarial_training import AdversarialTraining, fast_training
from adaptkit.robustness.attacks import PGD, Robustness, robust_accuracy
from adaptkit.robustness.guard import Guarded
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.methods import Method
from adaptkit.training.runs import surroundings
from adaptkit.training.session import Plan

RESULTS = Path(__file__).parent / "results" / "adversarial_training.json"
SETTINGS = {
    "digits": {"eps": 0.1, "train": 1168, "test": 449, "size": 18, "epochs": 8, "rate": 5e-3, "batch": 32, "hflip": False},
    "fashion_mnist": {"eps": 8 / 255, "train": 2000, "test": 500, "size": 28, "epochs": 6, "rate": 3e-3, "batch": 50, "hflip": True},
}


def some(data: Data, *, train: int, test: int) -> Data:
    "About so many training and test images, every class with its share."

    def part(samples, n):
        share = min(1.0, n / len(samples))
        return samples if share == 1 else samples.take(split_rows(samples.labels, shares=(share, 1 - share, 0), seed=0)[0])

    return dataclasses.replace(data, train=part(data.train, train), valid=part(data.valid, 200), test=part(data.test, test))


def methods(data: Data, s: dict) -> dict[str, Method]:
    "What is compared."
    usual = FineTune(depth=3, rate=s["rate"])
    fast = fast_training(s["eps"], usual)
    guard = Guarded(fast, data.valid, probe=PGD(s["eps"], steps=10), every=s["train"] // s["batch"], images=64)
    return {"standard": usual, "pgd": AdversarialTraining(PGD(s["eps"], steps=7), usual), "fast": fast, "guarded": guard}


def one_seed(data: Data, s: dict, seed: int) -> dict[str, tuple[float, Robustness]]:
    "CPU seconds and robust accuracy of each method; every other seed goes backwards."
    plan = Plan(epochs=s["epochs"], batch_size=s["batch"], views=2 if s["hflip"] else 1, augment=Augment(hflip=s["hflip"]), seed=seed, accelerator="cpu")
    model, found = build_model("small_cnn", data, size=s["size"], seed=seed), {}
    todo = list(methods(data, s).items())
    for name, method in todo if seed % 2 else todo[::-1]:
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            run = fit(model, data, method, plan=plan, observers=[], out=Path(folder) / "run", cache=Path(folder) / "cache")
            seconds = time.process_time() - began
            trained = run.model
        judged = robust_accuracy(trained, data, PGD(s["eps"], steps=20, restarts=2), seed=0)
        found[name] = (seconds, judged)
        print(f"  seed {seed} {name:9s} {seconds:7.1f} CPU s   {judged}", flush=True)
    return found


def paired(a: list[Robustness], b: list[Robustness]) -> list[float]:
    "Mean difference of a and b in points, with its 95 % interval, over images of all seeds."
    gaps = np.concatenate([(~x.fallen).astype(float) - (~y.fallen).astype(float) for x, y in zip(a, b, strict=True)])
    half = 1.96 * gaps.std(ddof=1) / len(gaps) ** 0.5
    return [round(100 * float(v), 2) for v in (gaps.mean(), gaps.mean() - half, gaps.mean() + half)]


def compare(name: str, root: str | None, seeds: int) -> dict:
    "All seeds of one data set."
    s = SETTINGS[name]
    data = some(load_data(name, **({"root": root} if root and name != "digits" else {})), train=s["train"], test=s["test"])
    s = {**s, "train": len(data.train), "test": len(data.test)}
    print(name, s, flush=True)
    runs = [one_seed(data, s, seed) for seed in range(seeds)]
    out: dict = {"settings": s, "seeds": seeds}
    for method in runs[0]:
        out[method] = {
            "cpu_seconds": [round(r[method][0], 2) for r in runs],
            "robust": [round(r[method][1].accuracy, 4) for r in runs],
            "clean": [round(r[method][1].clean, 4) for r in runs],
        }
    for method in ("fast", "guarded"):
        ratios = [r[method][0] / r["pgd"][0] for r in runs]
        out[f"{method} against pgd"] = {
            "points": paired([r[method][1] for r in runs], [r["pgd"][1] for r in runs]),
            "cpu_time": round(statistics.median(ratios), 3),
            "cpu_times": [round(v, 3) for v in ratios],
        }
        print(name, method, out[f"{method} against pgd"], flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--root", help="folder with the files of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in asked.data:
        results[name] = {**compare(name, asked.root, asked.seeds), "where": surroundings()}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
