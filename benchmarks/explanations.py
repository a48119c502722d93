"""How fast are Grad-CAM, integrated gradients, occlusion, and a click in the lab, beside captum?

EfficientNet-Lite0 at 224 pixels, the same images, classes and numbers of steps, one thread, one process, and pairs: first one, then the other, again and again. captum passes as many images at once as ours does (except for occlusion: there ours passes what fits a processor's cache, captum all images with one window, its default). A click chooses an
image that the lab hasn't seen: map, four pictures, facts, and a PNG for the browser; beside it stands captum's map of one image as captum draws it, a PNG, too. Processor seconds, so that it doesn't matter what else runs. Run it with
the Python of an environment that has both; without one it is made, as tests/oracles.py makes them.

    python benchmarks/explanations.py [--images 16] [--steps 50] [--pairs 3] [--only occlusion]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "explanations.json"


def seconds(run: Callable[[], Any]) -> float:
    "Processor seconds of one run."
    began = time.process_time()
    run()
    return time.process_time() - began


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], pairs: int) -> dict[str, float]:
    "Medians of both, and of their ratio; and the least and the most of it."
    import numpy as np

    both = np.array([[seconds(ours), seconds(theirs)] for _ in range(pairs)])
    ratio = both[:, 1] / both[:, 0]
    mine, other = np.median(both, axis=0)
    return {"ours": float(mine), "captum": float(other), "faster": float(np.median(ratio)), "least": float(ratio.min()), "most": float(ratio.max())}


def measure(n: int, steps: int, pairs: int, only: str) -> dict[str, Any]:
    "By method; occlusion with windows of 32 pixels, 16 apart."
    import torch
    from captum.attr import IntegratedGradients as Theirs
    from captum.attr import LayerGradCam
    from captum.attr import Occlusion as TheirOcclusion

    from adaptkit.explanation.explain import explain
    from adaptkit.explanation.gradients import IntegratedGradients
    from adaptkit.explanation.occlusion import Occlusion
    from adaptkit.heads.heads import Named, build_model
    from adaptkit.models.backbones import load_backbone

    torch.set_num_threads(1)
    model = build_model(load_backbone("efficientnet_lite0"), Named(tuple("abcd")), seed=0).eval()
    x = torch.rand(n, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    target = torch.arange(n) % 4
    peer = LayerGradCam(model, model.backbone.stages[-1])
    runs = {
        "gradcam": (lambda: explain(model, x, target), lambda: peer.attribute(x, target=target), pairs + 1),
        "integratedgradients": (
            lambda: explain(model, x, target, method=IntegratedGradients(steps, batch=n)),
            lambda: Theirs(model).attribute(x, target=target, n_steps=steps, internal_batch_size=n),
            pairs,
        ),
        "occlusion": (
            lambda: explain(model, x, target, method=Occlusion(32, 16, baseline=0.5, batch=n)),
            lambda: TheirOcclusion(model).attribute(x, sliding_window_shapes=(3, 32, 32), strides=(3, 16, 16), baselines=0.5, target=target),
            pairs,
        ),
    }
    runs["gradcam"][0](), runs["gradcam"][1]()  # a warm-up
    runs = {name: run for name, run in runs.items() if only in ("", name)}
    found = {name: paired(ours, theirs, k) for name, (ours, theirs, k) in runs.items()}
    for name, row in found.items():
        print(name, {k: round(v, 2) for k, v in row.items()}, flush=True)
    return found


def click(n: int) -> dict[str, float]:
    "Choose one image after the other in the lab; its widgets find nobody to talk to."
    import io
    from unittest.mock import patch

    import comm
    import torch
    from captum.attr import LayerAttribution, LayerGradCam
    from captum.attr import visualization as drawing

    from adaptkit.heads.heads import Named, build_model
    from adaptkit.models.backbones import load_backbone
    from adaptkit.widgets.explanation_lab import ExplanationLab

    model = build_model(load_backbone("efficientnet_lite0"), Named(tuple("abcd")), seed=0).eval()
    x = torch.rand(n, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    peer = LayerGradCam(model, model.backbone.stages[-1])
    first, second = iter(range(1, n)), iter(range(1, n))

    def theirs() -> None:
        i = next(second)
        target = int(model(x[i : i + 1]).argmax())
        found = LayerAttribution.interpolate(peer.attribute(x[i : i + 1], target=target), (224, 224), "bilinear")[0].detach()
        pictures = [v.permute(1, 2, 0).numpy() for v in (found, x[i])]
        figure, _ = drawing.visualize_image_attr(*pictures, method="blended_heat_map", sign="positive", use_pyplot=False)
        figure.savefig(io.BytesIO(), format="png", dpi=100)

    with patch("comm.create_comm", comm.DummyComm):
        lab = ExplanationLab(model, x)
        assert lab.panel.box is not None  # what is shown in a browser
        lab.set(image=next(first)), theirs()  # a warm-up
        found = paired(lambda: lab.set(image=next(first)), theirs, n - 2)
    print("click", {k: round(v, 2) for k, v in found.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("images", 16), ("steps", 50), ("pairs", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", default="", help="one method; the results of the others stay")
    parser.add_argument("--here", action="store_true", help="measure in this environment")
    asked = parser.parse_args()
    if not asked.here:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from compare_explanations import PINS
        from oracles import interpreter

        told = [str(interpreter(PINS)), __file__, "--here", *(f"--{k}={getattr(asked, k)}" for k in ("images", "steps", "pairs", "only"))]
        roots = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
        subprocess.run(told, check=True, env={**os.environ, "PYTHONPATH": roots, "OMP_NUM_THREADS": "1"})
        return
    found = {} if asked.only == "click" else measure(asked.images, asked.steps, asked.pairs, asked.only)
    found |= {"click": click(asked.pairs + 5)} if asked.only in ("", "click") else {}
    stands = json.loads(RESULTS.read_text())["methods"] if asked.only and RESULTS.exists() else {}
    settings = {"images": asked.images, "steps": asked.steps, "pairs": asked.pairs}
    found = {**stands, **{name: {**row, **settings} for name, row in found.items()}}
    result = {"pixels": 224, "unit": "processor seconds for all images, one thread; of a click, for one", "methods": found}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
