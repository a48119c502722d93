"""What does our engine cost over papermill's default one, on the same pages?

Three pages: many small cells, cells that show pictures, and one that computes for some seconds. Both engines run each page in this process, in turn, A B B A ..., and the difference is taken pair by pair. Wall time wavers by more than the
engines differ when the machine is busy, so the CPU time of the runner (this process) is reported beside it: the kernels do the same work either way.

    python benchmarks/runner_overhead.py [--pairs 6] [--only small]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path

import nbformat
import papermill
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from adaptkit.training.runs import surroundings

RESULTS = Path(__file__).parent / "results" / "runner_overhead.json"
PICTURE = "from IPython.display import display\nimport os, base64\ndisplay({'image/png': base64.b64encode(os.urandom(60_000)).decode(), 'text/plain': 'picture'}, raw=True)"
PAGES = {
    "small": [f"x = {i}\nx + 1" for i in range(40)],
    "pictures": [PICTURE] * 40,
    "working": ["import time\nend = time.perf_counter() + 1\nwhile time.perf_counter() < end: sum(range(10**5))\nprint('.', flush=True)"] * 5,
}
GOAL = {"share": 0.05, "seconds": 0.2}


def write(folder: Path, name: str) -> Path:
    "A page with a heading and its code cells."
    cells = [new_markdown_cell(f"# {name}"), *map(new_code_cell, PAGES[name])]
    spec = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def cost(page: Path, engine: str | None) -> tuple[float, float]:
    "Wall seconds of one run, and CPU seconds of the runner."
    start, used = time.perf_counter(), time.process_time()
    quiet = {"progress_bar": False, "extra_arguments": ["--log-level=ERROR"]}
    papermill.execute_notebook(page, page.with_suffix(f".{engine}.ipynb"), engine_name=engine, **quiet)
    return time.perf_counter() - start, time.process_time() - used


def paired(page: Path, pairs: int) -> dict[str, float]:
    "Medians over the pairs."
    for engine in (None, "adaptkit"):
        cost(page, engine)
    rows = []
    for pair in range(pairs):
        order = (None, "adaptkit") if pair % 2 == 0 else ("adaptkit", None)
        one = {engine: cost(page, engine) for engine in order}
        rows.append((one[None], one["adaptkit"]))
    extra = [ours[0] - theirs[0] for theirs, ours in rows]
    return {
        "default_seconds": round(statistics.median(t[0] for t, _ in rows), 3),
        "adaptkit_seconds": round(statistics.median(o[0] for _, o in rows), 3),
        "extra_seconds": round(statistics.median(extra), 3),
        "extra_share": round(statistics.median(o[0] / t[0] - 1 for t, o in rows), 3),
        "default_runner_cpu_seconds": round(statistics.median(t[1] for t, _ in rows), 3),
        "adaptkit_runner_cpu_seconds": round(statistics.median(o[1] for _, o in rows), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=tuple(PAGES), default=list(PAGES))
    given = parser.parse_args()
    logging.getLogger("papermill").setLevel(logging.ERROR)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            found[name] = paired(write(Path(folder), name), given.pairs)
            print(name, found[name], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"goal": GOAL, "pairs": given.pairs, "pages": found, "where": surroundings()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
