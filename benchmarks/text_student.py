"""What a student of two layers keeps of MiniLM, which has six: accuracy on support questions, and time for one question.

The goal: at least 95 % of the accuracy at no more than 40 % of the time. For each division of the data the teacher learns first (its last layer and the head, with the settings of benchmarks/texts.py). Its two lowest layers begin as a student and learn on, from labels alone or with the teacher, in the two ways of GRID. Which of these two is reported is decided by the validation texts of the same division: accuracy, then loss. The test texts are read once, at the end. The divisions overlap, so the interval of the pooled texts is a little too narrow.

Time is CPU time of one thread for one test text, six layers and two in turns, the best of three passes; that is what stays comparable while others use the machine.

    python benchmarks/text_student.py [--seeds 5] [--epochs 8] [--texts 60]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaptkit.data.datasets import Data, Samples, make_batch
from adaptkit.data.sources import load_data
from adaptkit.distillation.cutting import cut_layers
from adaptkit.distillation.distillation import Distillation
from adaptkit.evaluation.evaluate import predict
from adaptkit.heads.heads import Model, build_model
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.methods import Method
from adaptkit.training.runs import surroundings
from adaptkit.training.session import Plan

RESULTS = Path(__file__).parent / "results" / "text_student.json"
RATES = {"depth": 2, "rate": 3e-4, "head_rate": 1e-3}
GRID: dict[str, dict[str, Any]] = {"mostly the teacher": {"weight": 0.9, "temperature": 2.0}, "half the teacher": {"weight": 0.5, "temperature": 2.0}}


def judged(model: Model, samples: Samples) -> tuple[list[bool], float]:
    "Which samples a model knows, and its mean loss on them."
    said = predict(model, samples)
    loss = torch.nn.functional.cross_entropy(torch.as_tensor(said.logits), torch.as_tensor(samples.labels))
    return (said.predicted == samples.labels).tolist(), float(loss)


def milliseconds(models: dict[str, Model], samples: Samples, texts: int) -> dict[str, list[float]]:
    "CPU time of each model for each of the first texts."
    found: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for i in range(texts):
            passes: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(3):
                for name, model in models.items():
                    x = make_batch(samples, np.array([i]), spec=model.reader).x
                    began = time.process_time()
                    model(x)
                    passes[name].append(1000 * (time.process_time() - began))
            for name, took in passes.items():
                found[name].append(min(took))
    return found


def one(seed: int, epochs: int, texts: int) -> dict[str, Any]:
    "One division of the data."
    data: Data = load_data("support_topics", seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)

        def learnt(model: Model, method: Method, name: str, plan: Plan) -> Model:
            return fit(model, data, method, plan=plan, out=place / name, cache=place / "cache", observers=[]).model

        slow, quick = Plan(epochs=15, seed=seed, accelerator="cpu"), Plan(epochs=epochs, batch_size=16, views=1, seed=seed, accelerator="cpu")
        teacher = learnt(build_model("minilm", data, seed=seed), FineTune(depth=1, smoothing=0.1), "teacher", slow)
        ways: dict[str, Method] = {"labels only": FineTune(smoothing=0.1, **RATES)} | {name: Distillation(teacher, base=FineTune(**RATES), **how) for name, how in GRID.items()}
        students = {name: learnt(cut_layers(teacher, 2, seed=seed), way, name, quick) for name, way in ways.items()}
    watched = {name: judged(model, data.valid) for name, model in {"teacher": teacher, **students}.items()}
    best = max(GRID, key=lambda name: (sum(watched[name][0]), -watched[name][1]))
    models = {"six layers": teacher.eval(), "two layers": students[best].eval()}
    reported = {**models, "two layers, labels only": students["labels only"]}
    right = {name: judged(model, data.test)[0] for name, model in reported.items()}
    valid = {name: {"accuracy": statistics.mean(hits), "loss": loss} for name, (hits, loss) in watched.items()}
    return {"seed": seed, "valid": valid, "chosen": best, "right": right, "milliseconds": milliseconds(models, data.test, texts)}


def interval(a: list[bool], b: list[bool]) -> list[float]:
    "95 % of the ratios of two accuracies, over texts drawn anew."
    x, y = np.array(a, float), np.array(b, float)
    rows = np.random.default_rng(0).integers(len(x), size=(4000, len(x)))
    return [float(v) for v in np.quantile(x[rows].mean(1) / y[rows].mean(1), [0.025, 0.975])]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    "What the divisions say together."
    right = {name: sum((r["right"][name] for r in rows), []) for name in rows[0]["right"]}
    took = {name: sum((r["milliseconds"][name] for r in rows), []) for name in rows[0]["milliseconds"]}
    told: dict[str, Any] = {"n": len(right["six layers"]), "accuracy": {name: statistics.mean(hits) for name, hits in right.items()}}
    for name in ("two layers", "two layers, labels only"):
        kept = [statistics.mean(r["right"][name]) / statistics.mean(r["right"]["six layers"]) for r in rows]
        told[f"kept by {name}"] = {"all": statistics.mean(right[name]) / statistics.mean(right["six layers"]), "interval": interval(right[name], right["six layers"]), "by division": kept}
    told["milliseconds"] = {name: statistics.median(v) for name, v in took.items()}
    ratios = [statistics.median(a / b for a, b in zip(r["milliseconds"]["two layers"], r["milliseconds"]["six layers"], strict=True)) for r in rows]
    told["time"] = {"median": statistics.median(ratios), "by division": ratios}
    told["goal reached"] = told["kept by two layers"]["all"] >= 0.95 and told["time"]["median"] <= 0.4
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--texts", type=int, default=60)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in range(asked.seeds):
        rows.append(one(seed, asked.epochs, asked.texts))
        print(seed, rows[-1]["chosen"], {name: round(statistics.mean(v), 3) for name, v in rows[-1]["right"].items()}, flush=True)
        settings = {**vars(asked), "seeds": len(rows), "grid": GRID, "rates": RATES}
        told = {"settings": settings, "summary": summary(rows), "runs": rows, **surroundings()}
        RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told["summary"], indent=1))


if __name__ == "__main__":
    main()
