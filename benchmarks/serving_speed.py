"""How quick is a model once it has left the notebook?

EfficientNet-Lite0 with a linear head, 224 pixels: PyTorch as it is (evaluation mode, no gradients), the same with its maps as most libraries lay them out (channels first; adaptkit lays them out the other way on a processor), the same through torch.compile, and the exports of its model folder on ONNX Runtime, all with the same number of threads, in one
process, in turn. Each round asks every one of them once, in another order each time, and speeds are compared round by round: the machine may be busy, the comparison stays fair. Beside the times: how far the logits are from PyTorch's.

    python benchmarks/serving_speed.py [--rounds 30] [--batches 1 16] [--threads 2] [--size 224] [--backbone efficientnet_lite0] [--no-compile]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from adaptkit.deployment.export import export
from adaptkit.heads.heads import Model, Named, build_model
from adaptkit.training.runs import surroundings

RESULTS = Path(__file__).parent / "results" / "serving_speed.json"
GOAL = {"1": 2.0, "16": 3.5}  # ONNX Runtime against eager PyTorch, by images at once
Ask = Callable[[torch.Tensor], np.ndarray]


def ways(model: Model, folder: Path, threads: int, *, compiled: bool) -> dict[str, Ask]:
    "The same model, asked in several ways."
    made = export(model, ["onnx", "onnx-half"], out=folder)
    sessions = {name: made.session(name, threads=threads) for name in made.manifest["exports"]}

    def asked(network: Callable[[torch.Tensor], torch.Tensor]) -> Ask:
        def ask(x: torch.Tensor) -> np.ndarray:
            with torch.no_grad():
                return network(x).numpy()

        return ask

    def channels_first(x: torch.Tensor) -> torch.Tensor:
        with patch("adaptkit.models.stages.arranged", torch.Tensor.contiguous):
            return usual(x)

    usual = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    return {
        "eager": asked(model),
        "eager, channels first": asked(channels_first),
        **({"compiled": asked(torch.compile(model, dynamic=False))} if compiled else {}),
        **{name: lambda x, s=s: s({"images": x.numpy()}).logits for name, s in sessions.items()},
    }


def measured(how: dict[str, Ask], x: torch.Tensor, rounds: int) -> dict[str, dict[str, float]]:
    "Seconds for one batch, and how many times as quick as eager, by pairs."
    names, rng = list(how), np.random.default_rng(0)
    for name in names:
        for _ in range(3):
            how[name](x)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in rng.permutation(names):
            start = time.perf_counter()
            how[name](x)
            seconds[name].append(time.perf_counter() - start)
    eager, right = seconds["eager"], how["eager"](x)
    told = {}
    for name in names:
        ratios = sorted(e / s for e, s in zip(eager, seconds[name], strict=True))
        far = float(abs(how[name](x) - right).max())
        told[name] = {
            "milliseconds": round(1000 * statistics.median(seconds[name]), 2),
            "images_per_second": round(len(x) / statistics.median(seconds[name]), 1),
            "times_eager": round(statistics.median(ratios), 2),
            "times_eager_quartiles": [round(ratios[len(ratios) // 4], 2), round(ratios[3 * len(ratios) // 4], 2)],
            "logit_difference": float(f"{far:.2e}"),
            "logit_difference_of_largest": float(f"{far / abs(right).max():.2e}"),
        }
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model = build_model(a.backbone, Named(("a", "b", "c", "d")), size=a.size, seed=0).eval()
    with tempfile.TemporaryDirectory() as place:
        how = ways(model, Path(place) / "model", a.threads, compiled=not a.no_compile)
        found = {str(n): measured(how, model.backbone.example(n, seed=n), a.rounds) for n in a.batches}
    reached = {n: found[n]["onnx"]["times_eager"] >= goal for n, goal in GOAL.items() if n in found}
    told = {"goal": GOAL, "reached": reached, "backbone": a.backbone, "size": a.size, "rounds": a.rounds, "threads": a.threads, "batches": found}
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(told | {"where": surroundings()}, indent=1) + "\n")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
