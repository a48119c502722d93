"""Our losses of features and their gradients beside those of torchdistill, on random maps; one line of JSON for each."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor
from torchdistill.losses import mid_level

from adaptkit.distillation.feature_losses import attention, relational, similarity, vectors

PAIR = {"pair": {"student": {"io": "output", "path": "."}, "teacher": {"io": "output", "path": "."}}}


class RowsOfLengthOne(mid_level.SPKDLoss):
    "Theirs, with the rows' Euclidean length: `normalize(z, 1)` asks for the sum of absolute values, which is not the paper's."

    def matmul_and_normalize(self, z: Tensor) -> Tensor:
        z = z.flatten(1)
        return torch.nn.functional.normalize(z @ z.T, p=2, dim=1)


def theirs(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    "The loss of theirs, from two maps; relations are taken of the same vectors as ours."
    paths = {"student_output_path": ".", "teacher_output_path": "."}
    makers = {
        "attention": lambda: mid_level.ATLoss(PAIR, mode="code"),
        "similarity": lambda: RowsOfLengthOne(**paths, reduction="batchmean"),
        "relational": lambda: mid_level.RKDLoss(**paths, dist_factor=0.7, angle_factor=1.3, reduction="mean"),
    }
    made, seen = makers[name](), vectors if name == "relational" else lambda x: x
    return lambda s, t: made({".": {"output": seen(s)}}, {".": {"output": seen(t)}})


def main() -> None:
    ours = {"attention": attention, "similarity": similarity, "relational": lambda s, t: relational(s, t, distance=0.7, angle=1.3)}
    for name, loss in ours.items():
        for b, c, d, h, w in ((5, 3, 4, 6, 2), (7, 10, 8, 3, 4), (3, 13, 2, 5, 7)):
            rng = torch.Generator().manual_seed(b)
            s, t = (2 * torch.randn(b, n, h, w, generator=rng) for n in (c, d))
            s.requires_grad_()
            x, y = loss(s, t), theirs(name)(s, t)
            (gx,), (gy,) = torch.autograd.grad(x, s), torch.autograd.grad(y, s)
            print(json.dumps({"loss": name, "value": x.item(), "apart": abs((x - y).item()), "slope": float(gy.abs().max()), "gradients_apart": float((gx - gy).abs().max())}))


if __name__ == "__main__":
    main()
