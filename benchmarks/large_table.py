"""Loads a table of texts that is far larger than the memory it may take.

    python benchmarks/large_table.py --gb 5

Writes a CSV file of about 500 bytes per row into a temporary folder (twice its size has to be free there), loads it in a fresh
process, draws a batch, takes the fingerprint, and prints the seconds and the peak of resident memory as JSON. The promise is a peak
under 1.5 GiB at 5 GB. The result goes to benchmarks/results/large_table.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "large_table.json"
WORDS = "the a lamp phone works broken late nice never again very cheap good bad parcel came colour 😀 质量 too".split()


def write(path: Path, gb: float) -> int:
    "A table of so many gigabytes; a few texts have commas, quotes and line breaks. Returns the number of rows."
    rng, rows = np.random.default_rng(0), 0
    picked = np.array(WORDS)[rng.integers(0, len(WORDS), (20_000, 96))]
    texts = [" ".join(line) for line in picked]
    texts[::50] = [f'"{text[:200]}, says ""she"",\n{text[200:]}"' for text in texts[::50]]
    with open(path, "w", encoding="utf-8", newline="") as f:
        f.write("id,text,stars,customer\n")
        size = 0
        while size < gb * 1e9:
            block = "".join(f"{rows + i},{text},{1 + (rows + i) % 5},{(rows + i) // 7}\n" for i, text in enumerate(texts))
            size += len(block.encode())
            rows += len(texts)
            f.write(block)
    return rows


def worker(path: Path, group: str) -> None:
    "Load, read some rows, take the fingerprint; print what it cost."
    from adaptkit.data.sources import load_data

    def peak() -> float:
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)

    before, began, busy = peak(), time.perf_counter(), time.process_time()
    data = load_data(path, **({"group": group} if group else {}))
    loaded, busy, after = time.perf_counter() - began, time.process_time() - busy, peak()
    some = np.random.default_rng(0).integers(0, len(data.train), 10_000)
    began = time.perf_counter()
    characters = sum(len(data.train.text(int(i))) for i in some)
    drawn, began = time.perf_counter() - began, time.perf_counter()
    fingerprint, seconds = data.fingerprint, time.perf_counter() - began
    rows = sum(map(len, data.splits.values()))
    print(
        json.dumps(
            {
                "rows": rows,
                "group": group,
                "seconds_load": round(loaded, 1),
                "cpu_seconds_load": round(busy, 1),
                "microseconds_per_text": round(drawn / len(some) * 1e6, 1),
                "seconds_fingerprint": round(seconds, 1),
                "peak_mib_imports": before,
                "peak_mib_load": after,
                "peak_mib": peak(),
                "characters": characters,
                "fingerprint": fingerprint,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=5.0, help="size of the table, 10^9 bytes")
    parser.add_argument("--group", default="", help="the column customer keeps groups together")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.group)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "reviews.csv"
        rows = write(path, args.gb)
        command = [sys.executable, __file__, "--worker", str(path), "--group", args.group]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = {"gb": round(os.path.getsize(path) / 1e9, 2), **json.loads(done.stdout.splitlines()[-1])}
        assert result["rows"] == rows, f"{rows} rows were written, {result['rows']} read"
    print(json.dumps(result))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
