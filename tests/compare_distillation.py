"""Our distillation losses and their gradients beside those of torchdistill, on random logits; one line of JSON for each."""

from __future__ import annotations

import json

import torch
from torch import nn
from torchdistill.losses import mid_level

from adaptkit.distillation.losses import correlation, soft_targets, standardised

PATHS = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".", "teacher_module_io": "output"}


def theirs(name: str, temperature: float) -> nn.Module:
    "The loss of theirs; cross-entropy has the weight 1, for without it they leave the temperature's square out."
    makers = {
        "soft": lambda: mid_level.KDLoss(**PATHS, temperature=temperature, alpha=1.0, beta=1.0),
        "standardised": lambda: mid_level.LogitStdKDLoss(**PATHS, temperature=temperature, alpha=1.0, beta=1.0),
        "correlation": lambda: mid_level.DISTLoss(**PATHS, tau=temperature, beta=0.7, gamma=1.3),
    }
    return makers[name]()


def main() -> None:
    ours = {"soft": soft_targets, "standardised": standardised, "correlation": lambda s, t, *, temperature: correlation(s, t, temperature=temperature, beta=0.7, gamma=1.3)}
    for name, loss in ours.items():
        for images, classes, temperature in ((5, 3, 1.0), (7, 10, 4.0), (2, 13, 2.5)):
            rng = torch.Generator().manual_seed(images)
            s, t = (2 * torch.randn(images, classes, generator=rng) for _ in "st")
            s.requires_grad_()
            y = torch.randint(classes, (images,), generator=rng)
            a = loss(s, t, temperature=temperature)
            b = theirs(name, temperature)({".": {"output": s}}, {".": {"output": t}}, y)
            b = b if name == "correlation" else b - nn.functional.cross_entropy(s, y)
            (ga,), (gb,) = torch.autograd.grad(a, s), torch.autograd.grad(b, s)
            print(json.dumps({"loss": name, "value": a.item(), "apart": abs((a - b).item()), "gradients_apart": float((ga - gb).abs().max())}))


if __name__ == "__main__":
    main()
