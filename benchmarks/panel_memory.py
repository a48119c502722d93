"""What does a panel that has seen 100,000 batches take: in the saved notebook, and in the browser that shows it?

JupyterLab in Chromium shows a panel. Its history is told of 100,000 batches and 100 epochs (made up, so that it takes minutes and not hours) while the panel is brought up to date as often as a run that takes a good twenty minutes would do it. After a collection of garbage, before and behind: what JavaScript holds, what the process that draws the page holds, how many nodes the page has.

    python benchmarks/panel_memory.py [--steps 100000] [--updates 5000] [--small]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from browser import browser, chromium, lab_server, long_run

from adaptkit.training.runs import surroundings

RESULTS = Path(__file__).parent / "results" / "panel_memory.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--updates", type=int, default=5_000)
    parser.add_argument("--small", action="store_true", help="2,000 batches, 100 times brought up to date; nothing is written")
    args = parser.parse_args()
    steps, updates = (2_000, 100) if args.small else (args.steps, args.updates)
    chromium()
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as work, lab_server(Path(root), Path(work)) as url, browser() as started:
        found = long_run(started.new_page(viewport={"width": 1280, "height": 1000}), url, Path(root), steps=steps, updates=updates)
        version = started.version
    grown = {name: found["after"][name] - found["before"][name] for name in found["after"]}
    print(f"{steps:,} batches, {updates:,} times brought up to date: {found['saved_mb']:.2f} MB saved, JavaScript {grown['heap']:+.1f} MiB, process {grown['process']:+.1f} MiB, {grown['nodes']:+.0f} nodes")
    if not args.small:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps({**found, "grown": grown, "chromium": version, "where": surroundings()}) + "\n")


if __name__ == "__main__":
    main()
