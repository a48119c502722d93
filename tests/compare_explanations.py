"""Our maps beside those of captum 0.9 and grad-cam 1.5: the same network, images and classes. Run by a Python that has both; prints one line of JSON for each pair.

    python tests/compare_explanations.py

"apart" is the largest difference, in parts of the largest value of theirs. In double precision: a network with kinks takes another side of them where a point of the way differs in its last bit. Two things are made alike first: grad-cam's Score-CAM
spreads its stencils with the corners aligned, ours (and the paper's) without; captum's guided backpropagation leaves ReLU6 alone, so it is compared where there is none.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from adaptkit.explanation.class_activation import GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM
from adaptkit.explanation.explain import explain
from adaptkit.explanation.gradients import IntegratedGradients
from adaptkit.explanation.planted import learn_planted, planted
from adaptkit.heads.heads import Model, Named, build_model
from adaptkit.models.backbones import load_backbone

PINS = ("captum==0.9.0", "grad-cam==1.5.5", "ttach==0.0.3", "opencv-python-headless==4.11.0.86")
Pair = tuple[str, str, Tensor, Tensor]  # method, package, ours, theirs


def subjects() -> Iterator[tuple[str, Model, Tensor, Tensor, str]]:
    "Networks, batches of three images that are higher than wide, classes, a stage."
    yield "cnn", learn_planted(epochs=2), planted(3, seed=1).x, torch.tensor([0, 2, 1]), "middle"
    lite = build_model(load_backbone("efficientnet_lite0"), Named(tuple("abcd")), seed=0).eval()
    x = torch.rand(3, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    yield "efficientnet_lite0", lite, x, torch.tensor([3, 0, 2]), "blocks.4"


def gradients(model: Model, x: Tensor, target: Tensor) -> Iterator[Pair]:
    from captum.attr import GuidedBackprop, InputXGradient, NoiseTunnel, Saliency

    yield "gradient", "captum", explain(model, x, target, method="gradient").values, Saliency(model).attribute(x, target=target, abs=False)
    yield "inputxgradient", "captum", explain(model, x, target, method="inputxgradient").values, InputXGradient(model).attribute(x, target=target)
    if not any(isinstance(m, nn.ReLU6) for m in model.modules()):
        yield "guidedbackprop", "captum", explain(model, x, target, method="guidedbackprop").values, GuidedBackprop(model).attribute(x, target=target)
    tunnel = NoiseTunnel(Saliency(model)).attribute(x, nt_type="smoothgrad", nt_samples=3, stdevs=0.0, target=target, abs=False)
    yield "smoothgrad without noise", "captum", explain(model, x, target, method="gradient").values, tunnel


def integrated(model: Model, x: Tensor, target: Tensor) -> Iterator[Pair]:
    from captum.attr import IntegratedGradients as Theirs

    for steps, baseline in ((50, 0.0), (20, 0.5)):
        ours = explain(model, x, target, method=IntegratedGradients(steps, baseline=baseline))
        theirs, gap = Theirs(model).attribute(x, baselines=torch.full_like(x, baseline), target=target, n_steps=steps, return_convergence_delta=True)
        yield f"integratedgradients, {steps} steps from {baseline}", "captum", ours.values, theirs
        yield f"its error, {steps} steps from {baseline}", "captum", ours.error, gap


def activations(model: Model, x: Tensor, target: Tensor, stage: str) -> Iterator[Pair]:
    import pytorch_grad_cam as peer
    from captum.attr import LayerGradCam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    module = model.backbone.stages[model.backbone.stage_names.index(stage)]
    ours = explain(model, x, target, method=GradCAM(stage)).values
    yield "gradcam", "captum", ours, LayerGradCam(model, module).attribute(x, target=target, relu_attributions=True)[:, 0]
    ways = {"gradcam": (GradCAM(stage), peer.GradCAM), "gradcamplusplus": (GradCAMPlusPlus(stage), peer.GradCAMPlusPlus), "layercam": (LayerCAM(stage), peer.LayerCAM), "scorecam": (ScoreCAM(stage, channels=None), peer.ScoreCAM)}
    for name, (method, other) in ways.items():
        with other(model=model, target_layers=[module]) as cam:
            theirs = cam(input_tensor=x.clone(), targets=[ClassifierOutputTarget(int(k)) for k in target])
        values = explain(model, x, target, method=method).values
        yield name, "grad-cam", scaled(nn.functional.interpolate(scaled(values)[:, None], x.shape[2:], mode="bilinear")[:, 0]), scaled(torch.from_numpy(theirs))


def scaled(maps: Tensor) -> Tensor:
    "From 0 to 1 in each image, as grad-cam does."
    low = maps.amin((1, 2), keepdim=True)
    return (maps - low) / (maps.amax((1, 2), keepdim=True) - low + 1e-7)


def compared(name: str, run: Callable[[], Iterator[Pair]]) -> Iterator[dict[str, object]]:
    for method, package, ours, theirs in run():
        far = (ours.detach().double() - theirs.detach().double()).abs().max() / max(float(theirs.abs().max()), 1e-12 if "error" not in method else 1.0)
        yield {"network": name, "method": method, "package": package, "shape": list(ours.shape), "apart": float(far)}


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    nn.UpsamplingBilinear2d = lambda size: nn.Upsample(size=size, mode="bilinear", align_corners=False)
    worst = 0.0
    for name, model, x, target, stage in subjects():
        model, x = model.double(), x.double()
        for run in (lambda m=model, x=x, t=target: gradients(m, x, t), lambda m=model, x=x, t=target: integrated(m, x, t), lambda m=model, x=x, t=target, s=stage: activations(m, x, t, s)):
            for row in compared(name, run):
                worst = max(worst, float(np.float64(row["apart"])))
                print(json.dumps(row), flush=True)
    sys.exit(f"{worst:.2g} apart: more than 1e-4" if worst > 1e-4 else 0)


if __name__ == "__main__":
    main()
