"""How much sooner are four independent pages done when two run at a time?

Each page computes, without sleeping, until its process has used so many seconds of a processor. Two programs in turn, A B B A ..., each in a fresh process whose start and imports count: one calls `run_page` four times,
the other `run_jobs` with two cores. The ratio is taken pair by pair. The gain is less than two because a kernel needs time to start, and because `run_jobs` starts processes that import papermill once more; so it
is measured for short pages and for longer ones.

The load of the machine before each pair is kept, too: on a machine whose cores are taken by others there is nothing to gain.

    python benchmarks/parallel_pages.py [--pairs 5] [--seconds 2 8]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

RESULTS = Path(__file__).parent / "results" / "parallel_pages.json"
WORK = "import time\n\nn, total = 0, 0\nwhile time.process_time() < seconds:\n    n += 1\n    total += n % 7"
ALONE = """
from adaptkit.notebooks.runner import run_page
for n in range(4):
    run_page({page!r}, {out!r} + f"/{{n}}.ipynb", {{"seconds": {seconds}}}, progress=False)
"""
TOGETHER = """
from adaptkit.notebooks.jobs import Budget, Job, run_jobs
jobs = [Job({page!r}, {out!r} + f"/{{n}}.ipynb", {{"seconds": {seconds}}}) for n in range(4)]
assert not [o.error for o in run_jobs(jobs, budget=Budget(cores=2)) if o.error]
"""


def write_page(folder: Path) -> Path:
    "A page that computes for a given time."
    cells = [new_code_cell("seconds = 1.0"), new_code_cell(WORK)]
    cells[0].metadata["tags"] = ["parameters"]
    spec = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), folder / "page.ipynb")
    return folder / "page.ipynb"


def timed(program: str, page: Path, seconds: float) -> float:
    "Seconds of the clock that a program takes, with its start."
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", program.format(page=str(page), out=out, seconds=seconds)], check=True)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, nargs="+", default=[2.0, 8.0], help="of computing a page")
    args = parser.parse_args()
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        page = write_page(Path(name))
        for seconds in args.seconds:
            pairs = []
            for turn in range(args.pairs):
                load = os.getloadavg()[0]
                together = timed(TOGETHER, page, seconds) if turn % 2 else None
                alone = timed(ALONE, page, seconds)
                together = timed(TOGETHER, page, seconds) if together is None else together
                pairs.append({"alone": alone, "together": together, "load_before": load})
                print(f"{seconds:g} s a page: one by one {alone:.1f} s, two at a time {together:.1f} s, {alone / together:.2f} times (load {load:.1f})", flush=True)
            ratios = [p["alone"] / p["together"] for p in pairs]
            found[f"{seconds:g}"] = {"pairs": pairs, "ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    where = {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version(), "machine": platform.machine()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"pages": 4, "at_a_time": 2, "seconds": found, "where": where}) + "\n")
    for seconds, one in found.items():
        print(f"{seconds} s a page: {one['ratio']:.2f} times sooner ({one['low']:.2f} to {one['high']:.2f})")


if __name__ == "__main__":
    main()
