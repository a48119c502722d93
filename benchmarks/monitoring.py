"""What does a monitor cost, how often is it wrong, and what does it notice?

Three measurements, with seeds, on the machine at hand. False alarms: 200 clean windows, of an endless clean stream with one reference and with a new one for each window, and of the ELPV solar cells. Overhead: `observe` beside the
same loop without it, request by request in pairs, 1,280 features, full windows judged in the thread meanwhile. Power: camera corruptions of ELPV images seen by EfficientNet-Lite0 with a linear probe.

    python benchmarks/monitoring.py [--windows 200] [--requests 3000] [--images 200] [--repeats 20] [--size 96]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom

from adaptkit.deployment.asking import Asked, spoilt
from adaptkit.deployment.drift import drift_tests, judge
from adaptkit.deployment.monitor import Monitor
from adaptkit.deployment.power import power_curve, window_of, with_errors
from adaptkit.deployment.quality import image_quality
from adaptkit.deployment.reference import Reference, make_reference

RESULTS = Path(__file__).parent / "results/monitoring.json"
CAMERA = ("camera_focus", "camera_belt", "camera_rotation", "camera_lighting", "camera_dust", "camera_exposure")
LEVELS = (0.01, 0.05)


class Stream:
    "Clean requests without end: 64 features of 12 causes, four classes."

    def __init__(self, seed: int) -> None:
        self.rng, fixed = np.random.default_rng(seed), np.random.default_rng(7)
        self.mixing, self.weights = fixed.standard_normal((12, 64)), fixed.standard_normal((64, 4)) / 6

    def draw(self, n: int) -> Asked:
        "n requests."
        x = self.rng.standard_normal((n, 12)) @ self.mixing + 0.3 * self.rng.standard_normal((n, 64))
        logits = x @ self.weights
        labels = (logits + self.rng.gumbel(size=logits.shape)).argmax(1)
        return Asked(x.astype(np.float32), logits.astype(np.float32), labels, {"brightness": self.rng.normal(0.5, 0.1, n)})


def referenced(asked: Asked, seed: int, **how: Any) -> Reference:
    "What is normal for them."
    classes = tuple(str(k) for k in range(asked.logits.shape[1]))
    return make_reference(asked.features, asked.logits, asked.labels, classes=classes, quality=asked.quality, seed=seed, **how)


def p_of(reference: Reference, window: Asked, seed: list[int], tests: Any) -> float:
    "How surprising a window is."
    return judge(reference.pool(*window_of(window, reference)), len(window), tests=tests, level=0.01, permutations=499, seed=seed).p


def counted(p: list[float]) -> dict[str, Any]:
    "False alarms at several levels, beside what a coin with that level allows."
    told = {}
    for level in LEVELS:
        low, high = (int(v) for v in binom.interval(0.95, len(p), level))
        told[str(level)] = {"alarms": int((np.array(p) <= level).sum()), "allowed": [low, high]}
    return {"windows": len(p), **told}


def false_alarms(windows: int, cells: Asked, size: int) -> dict[str, Any]:
    "Clean windows, three times."
    tests, stream = drift_tests([]), Stream(0)
    one = referenced(stream.draw(1600), 0)
    same = [p_of(one, stream.draw(size), [1, i], tests) for i in range(windows)]
    new = [p_of(referenced(stream.draw(500), i), stream.draw(size), [2, i], tests) for i in range(windows)]
    rng, dealt = np.random.default_rng(3), []
    for i in range(windows):
        order = rng.permutation(len(cells))
        dealt.append(p_of(referenced(cells.take(order[size:]), i, keep=500), cells.take(order[:size]), [3, i], tests))
    shape = {"window": size, "reference rows": {"one reference": len(one.features), "a new reference each": 350}}
    return {**shape, "one reference": counted(same), "a new reference each": counted(new), "ELPV, dealt anew": counted(dealt)}


def overhead(requests: int) -> dict[str, float]:
    "Milliseconds a request: without, with, and the median and the 99th percentile of the paired differences."
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((600, 1280)).astype(np.float32), rng.standard_normal((600, 2)).astype(np.float32)
    images = rng.random((8, 3, 224, 224), np.float32)
    reference = make_reference(x, z, rng.integers(0, 2, 600), classes=("broken", "working"), quality=image_quality(rng.random((600, 3, 32, 32))))
    found = []
    with tempfile.TemporaryDirectory() as place:
        monitor = Monitor(reference, Path(place) / "monitor.db", window=100)
        for i in range(requests):
            k = i % 600
            begun = time.perf_counter()
            plain = x[k : k + 1], z[k : k + 1], images[i % 8 : i % 8 + 1]
            half = time.perf_counter()
            monitor.observe(plain[0], plain[1], quality=image_quality(plain[2]))
            found.append([half - begun, time.perf_counter() - half])
            time.sleep(0.002)  # a service that is busy with something else in between
        monitor.settle()
        judged, seconds = len(monitor.recent), float(np.median([w.seconds for w in monitor.recent]))
        monitor.close()
    extra = 1000 * (np.array(found)[:, 1] - np.array(found)[:, 0])
    return {"requests": requests, "p50 ms": float(np.median(extra)), "p99 ms": float(np.quantile(extra, 0.99)), "mean ms": float(extra.mean()), "windows judged meanwhile": judged, "seconds a window in the thread": seconds}


class Cells:
    "ELPV seen by EfficientNet-Lite0, with a linear probe."

    def __init__(self, size: int) -> None:
        import torch
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        from adaptkit.data.datasets import batches
        from adaptkit.data.sources import load_data
        from adaptkit.models.backbones import load_backbone
        from adaptkit.models.fusing import fused

        torch.set_num_threads(2)
        self.torch, self.batches, self.data = torch, batches, load_data("elpv", seed=0)
        backbone = load_backbone("efficientnet_lite0", size=size)
        self.reader, self.network = backbone.reader(), fused(backbone)
        train, rows = self.data.train, np.random.default_rng(0).permutation(len(self.data.train))
        learn = self.features(train, rows[:700])
        self.probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.003, max_iter=300, class_weight="balanced")).fit(learn[0], learn[1])
        rest, valid = self.features(train, rows[700:]), self.features(self.data.valid)
        self.reference = self.asked(tuple(np.concatenate(pair) if not isinstance(pair[0], dict) else {k: np.concatenate([p[k] for p in pair]) for k in pair[0]} for pair in zip(rest, valid, strict=True)))

    def features(self, samples: Any, rows: Any = None, **corruption: Any) -> tuple[Any, ...]:
        "Features, labels and measurements."
        rows, found = np.arange(len(samples)) if rows is None else rows, []
        with self.torch.inference_mode():
            for batch in self.batches(samples, rows, batch_size=32, spec=self.reader):
                x = spoilt(batch.x, **corruption, rows=batch.index.tolist()) if corruption else batch.x
                found.append((self.network.features(x).numpy(), batch.y.numpy(), image_quality(x.numpy())))
        quality = {k: np.concatenate([q[k] for *_, q in found]) for k in found[0][2]}
        return (*(np.concatenate([part[i] for part in found]) for i in (0, 1)), quality)

    def asked(self, told: tuple[Any, ...]) -> Asked:
        "With what the probe says."
        x, labels, quality = told
        right = self.probe.decision_function(x)
        return Asked(x, np.stack([np.zeros_like(right), right], 1).astype(np.float32), labels, quality)


def power(cells: Cells, images: int, repeats: int, levels: tuple[int, ...]) -> dict[str, Any]:
    "Samples needed for each camera corruption."
    test = cells.data.test
    rows = np.sort(np.random.default_rng(1).permutation(len(test))[:images])
    clean = cells.asked(cells.features(test, rows))
    seen = {(c, k): cells.asked(cells.features(test, rows, corruption=c, level=k, seed=0)) for c in CAMERA for k in levels}
    reference = referenced(cells.reference, 0)
    sizes = [s for s in (10, 20, 50, 100, 200) if s <= images]
    curve = power_curve(reference, seen, clean=clean, sizes=sizes, level=0.01, repeats=repeats)
    print(curve.table(), curve.false_alarms(), curve.errors.table(), sep="\n")
    accuracy = {"clean": clean.accuracy} | {f"{c} {k}": a.accuracy for (c, k), a in seen.items()}
    return {"images": images, "accuracy": accuracy, **curve.to_json(), "estimates": curve.errors.table().to_dict(), "stored error": with_errors(reference, curve).error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("windows", 200), ("requests", 3000), ("images", 200), ("repeats", 20), ("size", 96), ("window", 50)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    found: dict[str, Any] = {"overhead": overhead(asked.requests)}
    print(found, flush=True)
    cells = Cells(asked.size)
    found["false alarms"] = false_alarms(asked.windows, cells.reference, asked.window)
    print(found["false alarms"], flush=True)
    found["power"] = {"size": asked.size, **power(cells, asked.images, asked.repeats, tuple(asked.levels))}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
