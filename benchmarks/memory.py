"""Does memory stay flat when the folder grows?

Trains on the ELPV cells, and on a folder with ten copies of each, one process each, and compares the largest resident memory that the operating system saw.

    python benchmarks/memory.py [--size 64] [--times 10]
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "memory.json"


def make_folder(root: Path, times: int) -> Path:
    "A folder of images by class, each image copied `times` times."
    from adaptkit.data.sources import load_data

    data = load_data("elpv")
    for samples in data.splits.values():
        for path, label in zip(samples.items, samples.labels, strict=True):
            for i in range(times):
                target = root / data.classes[label] / f"{Path(path).stem}-{i}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
    return root


def worker(folder: Path, size: int) -> None:
    "Train for one epoch; print the peak of resident memory in MiB."
    from adaptkit.data.sources import load_data
    from adaptkit.heads.heads import build_model
    from adaptkit.training.finetune import FineTune
    from adaptkit.training.loop import fit
    from adaptkit.training.session import Plan

    data = load_data(folder)
    model = build_model("efficientnet_lite0", data, size=size)
    with tempfile.TemporaryDirectory() as out:
        fit(
            model,
            data,
            FineTune(),
            plan=Plan(epochs=1, views=1),
            observers=[],
            out=Path(out) / "run",
            cache=Path(out) / "cache",
        )
    print(
        json.dumps(
            {
                "images": sum(map(len, data.splits.values())),
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.size)
    rows = []
    for times in (1, args.times):
        with tempfile.TemporaryDirectory() as name:
            folder = make_folder(Path(name) / "cells", times)
            command = [sys.executable, __file__, "--worker", str(folder), "--size", str(args.size)]
            rows.append(
                json.loads(
                    subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
                )
            )
            print(rows[-1], flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(
        json.dumps({"size": args.size, "rows": rows, "ratio": rows[1]["peak_mib"] / rows[0]["peak_mib"]}) + "\n"
    )


if __name__ == "__main__":
    main()
