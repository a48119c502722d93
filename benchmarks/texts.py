"""How fast, and how well, does adaptkit learn from texts, beside what you would use instead?

frozen: from a raw CSV to a tested model, MiniLM frozen and cached, beside logistic regression on its sentence embeddings (five divisions of the data, compared in pairs).
full:   all of MiniLM learns, beside the Trainer of the transformers library, with the same batch, epochs, peak rate and texts, one process after the other.

    python benchmarks/texts.py [--only frozen full] [--data support_topics] [--rows 1600] [--epochs 4] [--pairs 3]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "texts.json"
BATCH, RATE = 32, 1e-4


def frozen(seed: int, depth: int = 0, epochs: int = 40) -> dict[str, Any]:
    "One division of the support questions (epochs and smoothing by cross-validation on train and valid of the first): seconds from the CSV to the tested model, and both answers on the test texts."
    from sklearn.linear_model import LogisticRegressionCV

    from adaptkit.data.sources import load_data
    from adaptkit.evaluation.evaluate import evaluate
    from adaptkit.heads.heads import build_model
    from adaptkit.models.backbones import load_backbone
    from adaptkit.training.cache import Stream, Trunk, Views
    from adaptkit.training.finetune import FineTune
    from adaptkit.training.loop import fit
    from adaptkit.training.session import Plan

    whole = load_data("support_topics", seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "questions.csv"
        with table.open("w", encoding="utf-8", newline="") as f:
            write = csv.writer(f)
            write.writerow(["text", "label", "split"])
            for split, samples in whole.splits.items():
                write.writerows((samples.text(i), whole.classes[samples.labels[i]], split) for i in range(len(samples)))
        started = time.perf_counter()
        data = load_data(table)
        model = build_model("minilm", data)
        plan = Plan(epochs=epochs, seed=seed)
        run = fit(model, data, FineTune(depth=depth, smoothing=0.1), plan=plan, observers=[], out=Path(folder) / "run", cache=folder)
        result = evaluate(run.model, data, start=model)
        seconds = time.perf_counter() - started
    network = load_backbone("minilm").eval()
    stream = Stream(data.train, Views(network.reader()), Trunk(network, len(network.stages)))
    found = {}
    for name in ("train", "test"):
        stream.samples = data.splits[name]
        parts = [(b.x, b.y) for b in stream.batches(np.arange(len(stream.samples)), 64)]
        z = np.concatenate([x.numpy() for x, _ in parts])
        found[name] = z / np.linalg.norm(z, axis=1, keepdims=True), np.concatenate([y.numpy() for _, y in parts])
    other = LogisticRegressionCV(Cs=[1, 10, 100, 1000], cv=5, max_iter=2000).fit(*found["train"])
    x, y = found["test"]
    right = (result.predictions.predicted == result.predictions.labels).tolist()
    return {"seed": seed, "seconds": seconds, "n": len(y), "right": right, "other": (other.predict(x) == y).tolist()}


def chosen(name: str, rows: int, seed: int) -> Any:
    "Some rows of a data set, or all of them if there are fewer."
    from dataclasses import replace

    from adaptkit.data.sources import load_data

    data = load_data(name, seed=seed)
    rng = np.random.default_rng(seed)
    few = {n: s.take(rng.permutation(len(s))[:k]) for (n, s), k in zip(data.splits.items(), (rows, 400, 800), strict=True)}
    return replace(data, **few)


def ours(name: str, rows: int, epochs: int, seed: int) -> dict[str, Any]:
    "All of MiniLM learns, in adaptkit."
    from adaptkit.evaluation.evaluate import predict
    from adaptkit.heads.heads import build_model
    from adaptkit.training.finetune import FineTune
    from adaptkit.training.loop import fit
    from adaptkit.training.session import Plan

    data = chosen(name, rows, seed)
    rows = len(data.train)
    model = build_model("minilm", data, seed=seed)
    method = FineTune(depth=model.n_stages, rate=RATE, head_rate=RATE)
    plan = Plan(epochs=epochs, batch_size=BATCH, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        run = fit(model, data, method, plan=plan, observers=[], out=Path(folder) / "run", cache=folder)
        seconds, said = sum(row["seconds"] for row in run.history), predict(run.model, data.test)
    return {"seconds": seconds, "rows": rows // BATCH * BATCH * epochs, "right": (said.predicted == said.labels).tolist()}


def theirs(name: str, rows: int, epochs: int, seed: int, *, grouped: bool = False) -> dict[str, Any]:
    "The same with the Trainer of the transformers library; each batch is padded to its longest text."
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    from adaptkit.models.backbones import minilm_folder

    data, folder = chosen(name, rows, seed), str(minilm_folder())
    rows = len(data.train)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(data.classes), dtype=torch.float32)

    def prepared(samples: Any) -> list[dict[str, Any]]:
        texts = [samples.text(i) for i in range(len(samples))]
        encoded = tokenizer(texts, truncation=True, max_length=128)
        return [{"input_ids": i, "attention_mask": m, "labels": int(y)} for i, m, y in zip(encoded["input_ids"], encoded["attention_mask"], samples.labels, strict=True)]

    with tempfile.TemporaryDirectory() as out:
        asked: dict[str, Any] = {"train_sampling_strategy": "group_by_length"} if grouped else {}
        arguments = TrainingArguments(
            out, num_train_epochs=epochs, per_device_train_batch_size=BATCH, per_device_eval_batch_size=64, learning_rate=RATE, lr_scheduler_type="cosine", warmup_steps=rows // BATCH * epochs // 4,
            weight_decay=0.01, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_drop_last=True, seed=seed, use_cpu=True, **asked,
        )
        trainer = Trainer(model, arguments, train_dataset=prepared(data.train), data_collator=DataCollatorWithPadding(tokenizer), processing_class=tokenizer)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        arguments.dataloader_drop_last = False
        logits = trainer.predict(prepared(data.test)).predictions
    right = logits.argmax(1) == data.test.labels
    return {"seconds": seconds, "rows": rows // BATCH * BATCH * epochs, "right": right.tolist()}


def in_process(what: str) -> dict[str, Any]:
    "One measurement, e.g. `ours('support_topics', 1600, 4, 0)`, in a process of its own."
    code = f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import texts; print(json.dumps(texts.{what}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def paired(a: list[bool], b: list[bool]) -> dict[str, float]:
    "Accuracy of both and McNemar's exact test."
    from scipy.stats import binomtest

    x, y = np.array(a), np.array(b)
    only, other = int((x & ~y).sum()), int((~x & y).sum())
    p = binomtest(only, only + other).pvalue if only + other else 1.0
    return {"ours": float(x.mean()), "theirs": float(y.mean()), "only ours right": only, "only theirs right": other, "p": float(p)}


def main() -> None:
    from adaptkit.training.runs import surroundings

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("frozen", "full"), default=("frozen", "full"))
    parser.add_argument("--data", default="support_topics")
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    asked = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "frozen" in asked.only:
        for name, how in (("frozen", "0, 40"), ("last layer learns", "1, 15")):
            runs = [in_process(f"frozen({seed}, {how})") for seed in range(5)]
            both = [sum((r[k] for r in runs), []) for k in ("right", "other")]
            found[name] = {"seconds": [round(r["seconds"], 1) for r in runs], "n": len(both[0]), **paired(*both), "machine": surroundings()}
            print(name, json.dumps(found[name], indent=1), flush=True)
    if "full" in asked.only:
        pairs = []
        for seed in range(asked.pairs):
            sizes = f"{asked.data!r}, {asked.rows}, {asked.epochs}, {seed}"
            pairs.append({"ours": in_process(f"ours({sizes})"), "trainer": in_process(f"theirs({sizes})"), "trainer, grouped": in_process(f"theirs({sizes}, grouped=True)")})
            rate = {k: v["rows"] / v["seconds"] for k, v in pairs[-1].items()}
            print({k: round(v, 1) for k, v in rate.items()}, {k: float(np.mean(v["right"])) for k, v in pairs[-1].items()}, flush=True)
        rates = {k: [round(p[k]["rows"] / p[k]["seconds"], 2) for p in pairs] for k in pairs[0]}
        right = {k: sum((p[k]["right"] for p in pairs), []) for k in pairs[0]}
        ratio = [round(a / b, 3) for a, b in zip(rates["ours"], rates["trainer"], strict=True)]
        found["full"] = {"data": asked.data, "rows": pairs[0]["ours"]["rows"] // asked.epochs, "epochs": asked.epochs, "batch": BATCH, "texts a second": rates, "ratio to the Trainer": ratio, "accuracy": {k: float(np.mean(v)) for k, v in right.items()}}
        found["full"] |= {"against the Trainer": paired(right["ours"], right["trainer"]), "machine": surroundings()}
        print(json.dumps(found["full"], indent=1), flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
