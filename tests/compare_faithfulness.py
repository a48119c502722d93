"""Our measures of maps beside those of quantus 0.6 and captum 0.9: the same network, images, maps and noise. Run by a Python that has both; prints one line of JSON for each pair.

    python tests/compare_faithfulness.py

"apart" is the largest difference, in parts of the largest value of theirs. In double precision. Three images that are higher than wide. quantus' ROAD and pixel flipping count each channel of a pixel on its own, so whole curves are compared on a network
that reads one channel; the filling itself is compared on three. Noise is drawn once and handed to both.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptkit.explanation.curves import deletion, ranking, road
from adaptkit.explanation.explain import explain
from adaptkit.explanation.grounds import imputed
from adaptkit.explanation.planted import learn_planted, planted
from adaptkit.explanation.stability import infidelity, likeness, maps_of, max_sensitivity

PINS = (
    "captum==0.9.0", "quantus==0.6.0", "opencv-python-headless==4.11.0.86", "scikit-image==0.25.2", "lazy-loader==0.4", "imageio==2.37.0", "tifffile==2025.5.10", "cachetools==5.5.2",
)  # fmt: skip
TARGET = torch.tensor([0, 2, 1])


class OneChannel(nn.Module):
    "A network that reads grey images."

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.expand(-1, 3, -1, -1))


def curves(model: nn.Module, x: Tensor, maps: Tensor) -> Iterator[tuple[str, str, Any, Any]]:
    from quantus import ROAD, PixelFlipping
    from quantus.functions.perturb_func import noisy_linear_imputation

    grey, one, pixels = OneChannel(model).eval(), x[:, :1], maps[0].numel()
    common: dict[str, Any] = {"normalise": False, "abs": False, "disable_warnings": True, "display_progressbar": False}
    batch = {"x_batch": one.numpy(), "y_batch": TARGET.numpy(), "a_batch": maps[:, None].numpy(), "channel_first": True, "device": "cpu"}
    for steps, base in ((11, 0.0), (21, 0.5)):
        flipping = PixelFlipping(features_in_step=pixels // (steps - 1), perturb_baseline=base, **common)
        theirs = np.array(flipping(model=grey, softmax=True, **batch))
        ours = deletion(grey, one, maps, TARGET, steps=steps, ground=torch.full_like(one, base)).values[:, 1:]
        yield f"deletion, {steps} frames to {base}", "quantus", ours, theirs
    for share in (0.1, 0.4, 0.8):
        hidden = ranking(maps) < int(share * pixels)
        theirs = [noisy_linear_imputation(z.numpy(), np.flatnonzero(h.numpy()), noise=0.0) for z, h in zip(x, hidden, strict=True)]
        yield f"filling {share} of the pixels", "quantus", imputed(x, hidden, noise=0.0), np.stack(theirs)
    shares = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    said = grey(one).argmax(1)
    measured = ROAD(percentages=[100 * s for s in shares], noise=0.0, **common)(model=grey, **{**batch, "y_batch": said.numpy()})
    yield "road", "quantus", road(grey, one, maps, said, shares=shares, noise=0.0).values.mean(0), np.array(list(measured.values()))


def bare(z: Any) -> Tensor:
    "Images, whether captum has put them into a tuple or not."
    return z[0] if isinstance(z, tuple) else z


def their_maps(model: nn.Module, z: Any, name: str) -> Tensor:
    "Maps of images, each of which may have been repeated."
    return explain(model, bare(z), TARGET.repeat_interleave(len(bare(z)) // 3), method=name).map.double()


def stability(model: nn.Module, x: Tensor, maps: Tensor) -> Iterator[tuple[str, str, Any, Any]]:
    from captum.metrics import infidelity as their_infidelity
    from captum.metrics import sensitivity_max
    from quantus.functions.similarity_func import correlation_pearson, correlation_spearman

    coarse = (maps * 5).round()
    for rank, theirs in ((True, correlation_spearman), (False, correlation_pearson)):
        ours = likeness(coarse, coarse.flip(1), by_rank=rank)
        yield theirs.__name__, "quantus", ours, np.array([theirs(a.flatten().numpy(), b.flatten().numpy()) for a, b in zip(coarse, coarse.flip(1), strict=True)])
    x, samples = 0.1 + 0.8 * x, 6  # noise stays inside [0, 1]
    draw = torch.Generator().manual_seed(3)
    noise = torch.stack([0.02 * (2 * torch.rand(x.shape[1:], generator=draw) - 1) for _ in range(samples)]).double()
    for name in ("gradient", "gradcam"):
        theirs = sensitivity_max(
            lambda z, name=name: (their_maps(model, z, name),), x, perturb_func=lambda z: bare(z) + noise.repeat(3, 1, 1, 1), n_perturb_samples=samples
        )  # fmt: skip
        yield f"max sensitivity of {name}", "captum", max_sensitivity(model, x, maps_of(name, TARGET), radius=0.02, samples=samples, seed=3), theirs
    draw = torch.Generator().manual_seed(5)
    taken = torch.stack([0.2 * torch.randn(x.shape[1:], generator=draw) for _ in range(samples)]).double()
    for name in ("gradient", "inputxgradient"):
        values = explain(model, x, TARGET, method=name).values
        for scaled in (False, True):
            change = taken.repeat(3, 1, 1, 1)
            theirs = their_infidelity(model, lambda z, c=change: (c, z - c), x, values, target=TARGET, n_perturb_samples=samples, normalize=scaled)
            yield f"infidelity of {name}{', scaled' * scaled}", "captum", infidelity(model, x, values, TARGET, samples=samples, scaled=scaled, seed=5), theirs


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    np.trapz = getattr(np, "trapz", np.trapezoid)  # quantus asks for the old name
    model, x = learn_planted(epochs=3).double(), planted(3, seed=1).x.double()
    maps = torch.rand(3, *x.shape[2:], generator=torch.Generator().manual_seed(2)).double()
    worst = 0.0
    for run in (curves, stability):
        for name, package, ours, theirs in run(model, x, maps):
            theirs = torch.as_tensor(np.asarray(theirs.detach() if isinstance(theirs, Tensor) else theirs)).double()
            far = float((ours.detach().double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))
            worst = max(worst, far)
            print(json.dumps({"measure": name, "package": package, "shape": list(ours.shape), "apart": far}), flush=True)
    sys.exit(f"{worst:.2g} apart: more than 1e-4" if not worst <= 1e-4 else 0)


if __name__ == "__main__":
    main()
