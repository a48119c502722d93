"""How often does a page of ours fail although nothing is broken?

Runs a page with seeds that its baseline hasn't seen, and counts the runs that fail a gate, beside what the stated rate of false alarms allows.

    python benchmarks/false_alarms.py [8_notebooks/31_target.ipynb] [--seeds 20]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from scipy.stats import binom

from adaptkit.notebooks.check import Suite, job, preloads
from adaptkit.notebooks.declarations import declared
from adaptkit.notebooks.gates import judge
from adaptkit.notebooks.jobs import own_folder, run_jobs
from adaptkit.notebooks.meter import hardware

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/false_alarms.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path, default=Path("8_notebooks/31_target.ipynb"))
    parser.add_argument("--seeds", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(ROOT / "nbs", baselines=ROOT / "tests/baselines", out=Path(folder), root=ROOT, hardware=hardware(), preload=preloads(ROOT))
        baseline, plain, known = suite.baseline(asked.page), job(suite, asked.page), declared(suite.folder / asked.page)
        jobs = [replace(plain, parameters={**plain.parameters, "seed": s}, out=Path(folder, f"{s}.ipynb")) for s in range(100, 100 + asked.seeds)]
        alarms: dict[str, str] = {}
        for done in run_jobs([own_folder(one, known) for one in jobs]):
            assert not done.error, done.error
            wrong = "; ".join(v.why for v in judge(done.records, baseline) if not v.passed)
            print(Path(done.job.out).stem, {n: r.value for n, r in done.records.items()}, wrong or "passed", flush=True)
            alarms |= {Path(done.job.out).stem: wrong} if wrong else {}
    low, high = (int(n) for n in binom.interval(0.95, asked.seeds, baseline.rate))
    told = {"page": asked.page.as_posix(), "seeds": asked.seeds, "rate": baseline.rate, "alarms": alarms, "allowed": [low, high], "limits": baseline.limits()}
    print(f"{len(alarms)} of {asked.seeds} runs failed; at a rate of {baseline.rate} {low} to {high} are to be expected (95 %)")
    RESULTS.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
