"""Are our attacks as strong as the published ones, and how fast are they?

Two small networks for digits (trained on images; trained on what PGD makes of them), 500 images they haven't seen, both norms, the standard budget; each attack of ours and the same attack of torchattacks, foolbox, ART, adv-lib and the published ensemble, one after the other in one process, with one thread (then the processor's seconds count) or more (the clock's). The packages live in an environment of their own.

    python benchmarks/attacks.py [--images 500] [--only ensemble PGD-20] [--models 0 1] [--norms linf l2]
    python benchmarks/attacks.py --only ensemble --threads 2
    python benchmarks/attacks.py --only memory
    python benchmarks/attacks.py --only network

The last says how often our ensemble asks the network, and what these answers alone cost.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "attacks.json"
sys.path.insert(0, str(ROOT / "tests"))

import oracles  # noqa: E402

def summary(row: dict) -> dict:
    "A row with the ratio of times and the difference of accuracies, against the fastest and the strongest."
    others = [v for k, v in row.items() if isinstance(v, dict) and k != "ours"]
    if not others:
        return row
    if "mib" in row["ours"]:
        return {**row, "share_of_the_most_modest": round(row["ours"]["mib"] / min(o["mib"] for o in others), 2)}
    clock = "seconds" if row.get("threads", 1) > 1 else "processor_seconds"
    quicker = min(o[clock] for o in others) / row["ours"][clock]
    return {**row, "times_faster_than_the_fastest": round(quicker, 2), "points_above_the_strongest": round(100 * (row["ours"]["accuracy"] - min(o["accuracy"] for o in others)), 2)}


def key(row: dict) -> tuple:
    "What was measured; there is one row of each."
    return row["attack"], row["norm"], row["robust"], row.get("threads", 1)


def main() -> None:
    command = [str(oracles.interpreter()), str(ROOT / "tests/compare_attacks.py"), *sys.argv[1:]]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if "memory" in sys.argv:
        env["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once, or the peak tells of the heap's gaps
    rows = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        for line in process.stdout:
            if line.startswith("{"):
                rows.append(summary(json.loads(line)))
                print(rows[-1], flush=True)
    if process.returncode:
        raise SystemExit(f"The comparison ended with {process.returncode}.")
    new = {key(r): r for r in rows}
    old = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    kept = {key(r): r for r in old} | new
    machine = {"system": platform.system(), "machine": platform.machine(), "packages": list(oracles.PINS)}
    RESULTS.write_text(json.dumps({"machine": machine, "rows": list(kept.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
