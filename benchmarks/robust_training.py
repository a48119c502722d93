"""What adversarial training gives on real pictures, and what it costs: solar cells (ELPV, at one grey level and at half of one) and clothes (Fashion-MNIST).

The same network, the same images, the same number of epochs and the same seed; trained on the images, or on what PGD makes of them (Madry 2018), or on what one step makes of them (Wong 2020). Each is audited with the same test images: untouched, under the attacks of `audit_robustness`, under 15 corruptions at level 3, and under the
ensemble (Croce 2020), whose budget stands in the results. Beside them what the commonest class gets, which no attack can change. Intervals: Wilson's, 95 %, over test images; differences to standard training are taken image by image. Besides the radii no setting was chosen by looking at test images.

    python benchmarks/robust_training.py [--data elpv "elpv, half" fashion_mnist] [--root folder with Fashion-MNIST] [--images 300] [--methods standard pgd fast]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch

from adaptkit.data.datasets import Data
from adaptkit.data.images import Augment
from adaptkit.data.sources import load_data
from adaptkit.data.splits import split_rows
from adaptkit.evaluation.evaluate import majority
from adaptkit.evaluation.metrics import accuracy
from adaptkit.heads.heads import Model, build_model
from adaptkit.models.backbones import load_backbone
from adaptkit.robustness.adversarial_training import AdversarialTraining, fast_training
from adaptkit.robustness.attacks import PGD, robust_accuracy
from adaptkit.robustness.audit import audit_robustness
from adaptkit.robustness.ensemble import AutoAttack
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.methods import Method
from adaptkit.training.runs import surroundings
from adaptkit.training.session import Plan

RESULTS = Path(__file__).parent / "results" / "robust_training.json"
SETTINGS = {
    "fashion_mnist": {"data": "fashion_mnist", "backbone": "small_cnn", "size": 28, "train": 6000, "epochs": 8, "batch": 50, "eps": 0.1, "steps": 7, "ensemble": {"steps": 100, "targets": 9, "queries": 5000}},
    "elpv": {"data": "elpv", "backbone": "efficientnet_lite0", "size": 96, "train": 1200, "epochs": 6, "batch": 20, "eps": 1 / 255, "steps": 7, "ensemble": {"steps": 50, "targets": 9, "queries": 300}},
    "elpv, half": {"data": "elpv", "backbone": "efficientnet_lite0", "size": 96, "train": 1200, "epochs": 6, "batch": 20, "eps": 0.5 / 255, "steps": 7, "ensemble": {"steps": 50, "targets": 9, "queries": 300}},
}


def some(samples, n: int):
    "About n of them, every class with its share."
    share = min(1.0, n / len(samples))
    return samples if share == 1 else samples.take(split_rows(samples.labels, shares=(share, 1 - share, 0), seed=0)[0])


def begun(data: Data, s: dict) -> tuple[Model, Method]:
    "The network before any training, and the way it is trained without an attack."
    if s["data"] == "elpv":
        net = build_model(load_backbone(s["backbone"], size=s["size"]), data, seed=0)
        return net, FineTune(depth=2, weights=(1.0, 2.0), statistics=False)
    return build_model(s["backbone"], data, size=s["size"], seed=0), FineTune(depth=3, rate=3e-3)


def trained(data: Data, net: Model, method: Method, s: dict) -> tuple[Model, float]:
    "The model after training, and the processor's seconds."
    plan = Plan(epochs=s["epochs"], batch_size=s["batch"], views=1, augment=Augment(hflip=False), seed=0, accelerator="cpu")
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        run = fit(net, data, method, plan=plan, observers=[], out=Path(folder) / "run", cache=Path(folder) / "cache")
        return run.model, time.process_time() - began


def judged(model: Model, data: Data, s: dict, images: int) -> dict:
    "The audit's lines, the ensemble's, and which images stand it."
    audit = audit_robustness(model, data, eps=s["eps"], n=images, seed=0)
    strong = robust_accuracy(model, data, AutoAttack(s["eps"], **s["ensemble"]), n=images, seed=0)
    lines = audit.to_json()["lines"]
    lines["white box"]["ensemble"] = {"name": "ensemble", "value": strong.accuracy, "low": strong.low, "high": strong.high, "n": strong.n}
    return {"lines": lines, "checks": {v.name: v.passed for v in audit.checks.verdicts}, "stands": [int(not f) for f in strong.fallen]}


def compare(name: str, data: Data, *, images: int, wanted: list[str]) -> dict:
    "Some trainings of one data set."
    s = SETTINGS[name]
    net, usual = begun(data, s)
    methods = {"standard": usual, "pgd": AdversarialTraining(PGD(s["eps"], steps=s["steps"]), usual), "fast": fast_training(s["eps"], usual)}
    share = float(accuracy(majority(data.train, data.test, classes=data.classes)))
    out: dict = {"settings": {**s, "train": len(data.train), "test": len(data.test)}, "commonest class": share}
    for key in wanted:
        model, seconds = trained(data, net, methods[key], s)
        out[key] = {"cpu_seconds": round(seconds, 1), **judged(model, data, s, images)}
        print(name, key, round(seconds), "s", {p: {k: round(v["value"], 3) for k, v in ls.items()} for p, ls in out[key]["lines"].items() if p != "corrupted"}, flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--root", help="folder with the files of Fashion-MNIST")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--methods", nargs="+", choices=["standard", "pgd", "fast"], default=["standard", "pgd", "fast"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.data:
        whole = load_data(SETTINGS[name]["data"], **({"root": asked.root} if asked.root and name == "fashion_mnist" else {}))
        data = dataclasses.replace(whole, train=some(whole.train, SETTINGS[name]["train"]), valid=some(whole.valid, 300), test=some(whole.test, max(asked.images, 500)))
        for key in asked.methods:
            found = compare(name, data, images=asked.images, wanted=[key])
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            results[name] = {**results.get(name, {}), **found, "where": surroundings()}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
