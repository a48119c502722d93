"""Which gates of the page that is there to be broken catch which planted fault?

Runs nbs/8_notebooks/31_target.ipynb for several seeds, which makes a baseline, then with seeds that the baseline hasn't seen: once as it is, and once with each fault.

    python benchmarks/fault_matrix.py [--seeds 5] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from adaptkit.notebooks.baselines import Baseline, learn
from adaptkit.notebooks.matrix import CLEAN, Matrix, fault_matrix
from adaptkit.notebooks.meter import hardware
from adaptkit.notebooks.runner import run_page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/fault_matrix.json"
NAME = "8_notebooks/31_target.ipynb"


def recorded(seeds: int) -> Baseline:
    "The page's baseline from fresh runs."
    runs, seconds = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            start = time.perf_counter()
            runs[seed] = run_page(ROOT / "nbs" / NAME, Path(folder, f"{seed}.ipynb"), {"seed": seed}, progress=False)
            seconds.append(round(time.perf_counter() - start, 1))
    return learn(runs, page=NAME, hardware=hardware(), seconds=tuple(seconds))


def tally(matrices: list[Matrix]) -> dict[str, str]:
    "By run: in how many of the repetitions at least one gate failed."
    names = list(matrices[0].runs)
    return {n: f"{sum(bool(m.caught(n)) or n in m.stopped for m in matrices)} of {len(matrices)}" for n in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    baseline = recorded(asked.seeds)
    limits = baseline.limits()
    print(json.dumps(limits, indent=1), flush=True)
    matrices = []
    for seed in range(100, 100 + asked.repeats):
        matrices.append(fault_matrix(ROOT / "nbs" / NAME, baseline, parameters={"seed": seed}))
        print(matrices[-1].table().to_string(), flush=True)
    told = {"seeds": asked.seeds, "matrix": matrices[0].to_json(), "caught": tally(matrices), "complete": [m.complete for m in matrices]}
    RESULTS.write_text(json.dumps({**told, "clean": CLEAN, "baseline": asdict(baseline)}, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
