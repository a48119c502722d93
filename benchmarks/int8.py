"""What eight bits cost and bring: EfficientNet-Lite0 on solar cells (ELPV), MiniLM on support questions; the usual recipe, each repair beside it, and what `onnx-int8` writes.

The network: EfficientNet-Lite0 at 224 pixels, its backbone as it comes, a linear head on its features (logistic regression; how strongly it is held back is chosen on the validation images). Copies across splits are kept in one split. Each recipe is calibrated with the same validation images. What `onnx-int8` spares is decided on validation images as well. Test images are read once for
each file; accuracy is compared with floating point image by image. Of texts, the head and the last layer of MiniLM learn; weights are stored in eight bits (dynamic).

Time: one input, and sixteen, two threads, all files in turns in one process, many rounds; the ratio of each round is taken, and their median is what counts, so that what else the machine does meets all files alike.

Processors without VNNI add neighbouring products in 16 bits and cut sums off. Which kind measured this is in the record. With an emulator of such a processor the same files are asked there as well (accuracy only): --emulator "qemu-x86_64 -cpu Haswell".

    python benchmarks/int8.py [--size 224] [--test 0] [--rounds 60] [--parts images texts] [--emulator "..."] [--emulated 96]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from adaptkit.data.checks import apart, check_data
from adaptkit.data.datasets import Data, Samples
from adaptkit.data.sources import load_data
from adaptkit.deployment.eight_bits import OnnxInt8
from adaptkit.deployment.equalise import bias_corrected, equalised
from adaptkit.deployment.exporters import graph_of, write_graph
from adaptkit.deployment.graphs import open_session, parting, read_graph, run
from adaptkit.deployment.grids import decibels
from adaptkit.deployment.int8 import NAIVE, Recipe, flowing, prepared, quantise_weights, write_int8
from adaptkit.deployment.mixed import sensitivity
from adaptkit.deployment.ranges import observe
from adaptkit.deployment.sessions import Feeds, feeds
from adaptkit.evaluation.compare import compare
from adaptkit.evaluation.metrics import Predictions
from adaptkit.heads.heads import Model, build_model
from adaptkit.training.finetune import FineTune
from adaptkit.training.loop import fit
from adaptkit.training.plan import Plan
from adaptkit.training.runs import surroundings

RESULTS = Path(__file__).parent / "results" / "int8.json"
CHANNEL = Recipe(limit=127, last=True)
RECIPES = {
    "usual": NAIVE,
    "usual, head spared": dataclasses.replace(NAIVE, last=False),
    "usual, least error": dataclasses.replace(NAIVE, calibration="least error"),
    "usual, biases corrected": dataclasses.replace(NAIVE, correct=True),
    "usual, equalised": dataclasses.replace(NAIVE, equalise="flow"),
    "scales by channel": CHANNEL,
    "by channel, head spared": Recipe(limit=127),
    "by channel, head spared, corrected": Recipe(limit=127, correct=True),
    "by channel, head spared, equalised, corrected": Recipe(limit=127, equalise="flow", correct=True),
    "up to 64, by channel": dataclasses.replace(CHANNEL, limit=64),
    "up to 64, by channel, head spared": Recipe(),
    "up to 64, by channel, head spared, corrected": Recipe(correct=True),
    "up to 64, by channel, head spared, equalised, corrected": Recipe(equalise="flow", correct=True),
}
ASKING = "import sys, numpy as np, onnxruntime as o; x = np.load(sys.argv[2]); s = o.InferenceSession(sys.argv[1]); np.save(sys.argv[3], np.concatenate([s.run(['logits'], {'images': x[i : i + 1].astype('f4') / 255})[0] for i in range(len(x))]))"


def logits(file: Any, inputs: list[Feeds]) -> Any:
    "What a file says, [N, K]."
    session = open_session(file, threads=2)
    return np.concatenate([run(session, f)["logits"] for f in inputs])


def processor() -> dict[str, Any]:
    "What it is, and which instructions for eight bits it has."
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    flags = {f for line in info.splitlines() if line.startswith("flags") for f in line.split()}
    name = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "unknown")
    return {"name": name, "has": sorted(flags & {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8"})}


def probe(model: Model, data: Data, inputs: dict[str, list[Feeds]]) -> dict[str, float]:
    "Fit the head to features, in place; validation accuracy by strength."
    session = open_session(graph_of(model, opset=20), threads=2)
    features = {split: np.concatenate([run(session, f)["features"] for f in inputs[split]]) for split in ("train", "valid")}
    mean, std = features["train"].mean(0), features["train"].std(0) + 1e-3
    fitted = {c: LogisticRegression(C=c, max_iter=500).fit((features["train"] - mean) / std, data.train.labels) for c in (1e-3, 1e-2, 1e-1)}
    found = {c: float(m.score((features["valid"] - mean) / std, data.valid.labels)) for c, m in fitted.items()}
    best = fitted[max(found, key=lambda c: found[c])]
    weight, head = best.coef_[0] / std, model.head[-1]  # type: ignore[index]
    bias = float(best.intercept_[0] - weight @ mean)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(np.stack([-weight, weight]) / 2))
        head.bias.copy_(torch.tensor([-bias, bias]) / 2)
    return {str(c): v for c, v in found.items()}


def times(files: dict[str, Any], batch: Feeds, rounds: int, base: str) -> dict[str, Any]:
    "Milliseconds of each file in turns, and how many times as fast as the base it is."
    sessions = {name: open_session(f, threads=2) for name, f in files.items()}
    for s in sessions.values():
        run(s, batch)
    took: dict[str, list[float]] = {n: [] for n in sessions}
    for _ in range(rounds):
        for name, s in sessions.items():
            began = time.perf_counter()
            run(s, batch)
            took[name].append(1000 * (time.perf_counter() - began))
    ratios = {n: [b / t for b, t in zip(took[base], v, strict=True)] for n, v in took.items()}
    told = {n: {"median ms": statistics.median(v), "least ms": min(v), "times as fast": statistics.median(ratios[n]), "of the least": min(took[base]) / min(v)} for n, v in took.items()}
    return {n: {k: round(x, 3) for k, x in t.items()} for n, t in told.items()}


def emulated(file: Path, images: Any, emulator: str, place: Path) -> Any:
    "What a file says on another processor, [N, K]."
    np.save(place / "images.npy", images)
    subprocess.run([*shlex.split(emulator), sys.executable, "-c", ASKING, str(file), str(place / "images.npy"), str(place / "said.npy")], check=True, stderr=subprocess.DEVNULL)
    return np.load(place / "said.npy")


def judged(said: Any, truth: Any, samples: Samples, classes: tuple[str, ...]) -> dict[str, Any]:
    "Accuracy beside floating point, and what is left of the logits."
    pair = compare(Predictions(truth, samples.labels, classes), Predictions(said, samples.labels, classes))
    centred = [z - z.mean(1, keepdims=True) for z in (truth, said)]
    return {"accuracy": pair.b, "difference": pair.difference, "interval": [pair.low, pair.high], "n": pair.n, "p": pair.p_value, "other answers": float((said.argmax(1) != truth.argmax(1)).mean()), "decibels": round(decibels(*centred), 1)}


def written(graph: Any, watched: list[Feeds], place: Path) -> dict[str, Path]:
    "A file for each recipe; networks that several share are made once."
    plain = observe(graph, flowing(graph), inputs=watched)
    even = equalised(graph, plain)
    bases = {"no": (graph, plain), "flow": (even, observe(even, flowing(even), inputs=watched))}
    files = {}
    for name, recipe in RECIPES.items():
        model, seen = bases[recipe.equalise]
        model = bias_corrected(model, seen, axis=0 if recipe.by_channel else None, limit=recipe.limit) if recipe.correct else model
        files[name] = write_int8(model, seen, place / f"{len(files)}.onnx", recipe=recipe)
    return files


def layers(graph: Any, files: dict[str, Path], watched: list[Feeds], batch: list[Feeds]) -> dict[str, Any]:
    "Where it is lost: reach of channels' weights, what is left layer by layer, and what each can bear alone."
    seen = observe(graph, flowing(graph), inputs=watched[:4])
    alone = sensitivity(graph, seen, inputs=batch, recipe=NAIVE)
    left = {name: {k: round(v, 1) for k, v in parting(graph, read_graph(files[name]), inputs=batch).items()} for name in ("usual", "scales by channel")}
    return {"rounded alone, usual": [[round(d, 1), n] for d, n in alone.worst()[:12]], "left by layer": left}


def images(size: int, most: int, rounds: int, emulator: str, few: int, keep: Callable[[dict[str, Any]], None]) -> None:
    "EfficientNet-Lite0 on solar cells."
    data = load_data("elpv")
    data = apart(data, check_data(data, labels=False))
    model = build_model("efficientnet_lite0", data, size=size, seed=0).eval()
    test = data.test.take(np.arange(min(most or len(data.test), len(data.test))))
    splits = {"train": data.train, "valid": data.valid, "test": test}
    inputs = {k: list(feeds(s, model, batch_size=16)) for k, s in splits.items()}
    tried = probe(model, data, inputs)
    del inputs["train"]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        raw = graph_of(model, opset=20)
        write_graph(raw, place / "model.onnx")
        rows = np.sort(np.random.default_rng(0).permutation(len(data.valid))[:64]).tolist()
        watched = list(feeds(data.valid, model, batch_size=4, rows=rows))
        graph = prepared(raw)
        files = written(graph, watched, place)
        began = time.process_time()
        told = OnnxInt8().write(model, place / "model-int8.onnx", samples=data.valid)
        told["cpu seconds of the export"] = round(time.process_time() - began, 1)
        files["onnx-int8"] = place / "model-int8.onnx"
        truth = {k: logits(raw, v) for k, v in inputs.items()}
        found: dict[str, Any] = {}
        for title, file in files.items():
            said = {k: logits(file, v) for k, v in inputs.items()}
            found[title] = {k: judged(said[k], truth[k], splits[k], data.classes) for k in said} | {"bytes": file.stat().st_size}
            print(f"{title}: valid {found[title]['valid']['accuracy']:.3f}, test {found[title]['test']['accuracy']:.3f}, {found[title]['valid']['decibels']} dB", flush=True)
        result: dict[str, Any] = {"head": tried, "float": {k: float((truth[k].argmax(1) == splits[k].labels).mean()) for k in truth} | {"bytes": (place / "model.onnx").stat().st_size}, "files": found, "onnx-int8": told}
        result["layers"] = layers(graph, files, watched, inputs["valid"][:1])
        timed = {"float": place / "model.onnx", **{k: files[k] for k in ("usual", "scales by channel", "onnx-int8")}}
        result["times"] = {f"batch {b}": times(timed, {"images": inputs["test"][0]["images"][:b]}, rounds if b == 1 else max(3, rounds // 4), "float") for b in (1, 16)}
        keep(result)
        if emulator:
            keep(result | {"emulated": elsewhere(timed, inputs["test"], test, emulator, few, place)})


def elsewhere(files: dict[str, Path], inputs: list[Feeds], test: Samples, emulator: str, few: int, place: Path) -> dict[str, Any]:
    "The same files and images on a processor that has AVX2 and not VNNI."
    x = np.concatenate([f["images"] for f in inputs])
    rows = np.sort(np.random.default_rng(0).permutation(len(x))[:few])
    pixels, labels, found = np.round(255 * x[rows]).astype(np.uint8), test.labels[rows], {}
    for name, file in files.items():
        here = logits(file, [{"images": p[None].astype(np.float32) / 255} for p in pixels])
        there = emulated(file, pixels, emulator, place)
        found[name] = {"here": float((here.argmax(1) == labels).mean()), "there": float((there.argmax(1) == labels).mean()), "other answers": float((here.argmax(1) != there.argmax(1)).mean()), "decibels": round(min(decibels(here, there), 199.0), 1)}
        print(f"emulated, {name}: {found[name]}", flush=True)
    return {"emulator": Path(shlex.split(emulator)[0]).name + " " + " ".join(shlex.split(emulator)[1:]), "n": len(rows), "files": found}


def texts(rounds: int, keep: Callable[[dict[str, Any]], None]) -> None:
    "MiniLM on support questions: weights in eight bits."
    data = load_data("support_topics", seed=0)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        model = fit(build_model("minilm", data, seed=0), data, FineTune(depth=1, smoothing=0.1), plan=Plan(epochs=8, seed=0, accelerator="cpu"), out=place / "run", cache=place / "cache", observers=[]).model.eval()
        graph = graph_of(model, opset=20)
        write_graph(graph, place / "model.onnx")
        files = {"float": place / "model.onnx", "up to 127": quantise_weights(graph, place / "a.onnx", limit=127), "up to 64": quantise_weights(graph, place / "b.onnx"), "up to 64, embeddings spared": quantise_weights(graph, place / "c.onnx", embeddings=False)}
        told = OnnxInt8().write(model, place / "model-int8.onnx", samples=data.valid)
        files["onnx-int8"] = place / "model-int8.onnx"
        splits = {"valid": data.valid, "test": data.test}
        inputs = {k: list(feeds(s, model, batch_size=1)) for k, s in splits.items()}
        said = {n: {k: logits(f, v) for k, v in inputs.items()} for n, f in files.items()}
        found = {n: {k: judged(z[k], said["float"][k], splits[k], data.classes) for k in z} | {"bytes": files[n].stat().st_size} for n, z in said.items()}
        lengths = sorted(inputs["test"], key=lambda f: f["ids"].shape[1])
        middle = lengths[len(lengths) // 2]
        many = next(iter(feeds(data.test, model, batch_size=16)))
        keep({"files": found, "onnx-int8": told, "tokens": int(middle["ids"].shape[1]), "times": {"one text": times(files, middle, rounds, "float"), "16 texts": times(files, many, max(3, rounds // 4), "float")}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--test", type=int, default=0, help="test images; 0: all")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--parts", nargs="+", choices=["images", "texts"], default=["images", "texts"])
    parser.add_argument("--emulator", default="", help="command that runs a program on a processor without VNNI")
    parser.add_argument("--emulated", type=int, default=96, help="test images that are asked there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(2)
    results: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.exists() else {}

    def keep(part: str, found: dict[str, Any]) -> None:
        one = found["times"]["batch 1" if part == "images" else "one text"]["onnx-int8"]
        lost = -found["files"]["onnx-int8"]["test"]["difference"]
        goals = {"1.15 times as fast": one["times as fast"] >= 1.15, "at most 1 point lost": lost <= 0.01}
        results[part] = {"settings": {"size": asked.size, "rounds": asked.rounds}, "goals": goals, **found, "processor": processor(), **surroundings()}
        asked.out.write_text(json.dumps(results, indent=1) + "\n")
        print(part, goals, json.dumps(found["times"], indent=1), flush=True)

    for part in asked.parts:
        if part == "images":
            images(asked.size, asked.test, asked.rounds, asked.emulator, asked.emulated, partial(keep, part))
        else:
            texts(asked.rounds, partial(keep, part))


if __name__ == "__main__":
    main()
