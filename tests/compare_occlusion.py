"""Our occlusion and Shapley values beside those of captum 0.9: the same network, images, classes, windows, regions and orders. Run by a Python that has both; prints one line of JSON for each pair.

    python tests/compare_occlusion.py

"apart" is the largest difference, in parts of the largest value of theirs. Orders are drawn by ours and handed to captum, whose own have no reverses; captum's exact values go through all orders of the players, ours through all coalitions.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator

import torch
from compare_explanations import Pair, compared, subjects
from torch import Tensor

from adaptkit.explanation.explain import explain
from adaptkit.explanation.occlusion import Occlusion, emptied, grid_regions
from adaptkit.explanation.shapley import Shapley, paired_orders
from adaptkit.heads.heads import Model

def hidden(model: Model, x: Tensor, target: Tensor) -> Iterator[Pair]:
    from captum.attr import FeatureAblation
    from captum.attr import Occlusion as Theirs

    for window, stride, baseline in (((10, 8), (5, 8), 0.5), ((17, 19), (11, 8), None), ((64, 5), (3, 3), "blur")):
        window = (min(window[0], x.shape[2]), window[1])
        ours = explain(model, x, target, method=Occlusion(window, stride, baseline=baseline, batch=7)).map
        start = emptied(x, baseline).expand_as(x)
        theirs = Theirs(model).attribute(x, sliding_window_shapes=(3, *window), strides=(3, *stride), baselines=start, target=target)
        yield f"occlusion, window {window}, stride {stride}, baseline {baseline}", "captum", ours, theirs[:, 0]
    cells = grid_regions(*x.shape[2:], cells=(4, 3))
    each = torch.stack([cells, cells.flip(0), cells % 5])
    for name, regions in (("one map", cells), ("a map for each image", each)):
        ours = explain(model, x, target, method=Occlusion(baseline="blur", regions=regions)).map
        labels = regions.expand(len(x), *x.shape[2:])
        theirs = [FeatureAblation(model).attribute(x[i : i + 1], baselines=emptied(x, "blur")[i : i + 1], feature_mask=labels[i][None, None], target=target[i : i + 1]) for i in range(len(x))]
        yield f"regions, {name}", "captum", ours, torch.cat(theirs)[:, 0]


def shared(model: Model, x: Tensor, target: Tensor) -> Iterator[Pair]:
    from captum.attr import ShapleyValues, ShapleyValueSampling

    for rows, columns, permutations, baseline in ((4, 3, 4, 0.25), (2, 5, 10, "blur")):
        cells, seed = grid_regions(*x.shape[2:], cells=(rows, columns)), permutations
        ours = explain(model, x, target, method=Shapley(permutations, baseline=baseline, regions=cells), seed=seed)
        sampler = ShapleyValueSampling(model)
        orders = paired_orders(rows * columns, permutations, generator=torch.Generator().manual_seed(seed))
        sampler.permutation_generator = lambda n, k, orders=orders: iter(orders.tolist())
        theirs = sampler.attribute(x, baselines=emptied(x, baseline).expand_as(x), target=target, feature_mask=cells[None, None], n_samples=permutations)
        yield f"shapley, {permutations} orders, baseline {baseline}", "captum", ours.map, theirs[:, 0]
    cells = grid_regions(*x.shape[2:], cells=(2, 2))
    ours = explain(model, x, target, method=Shapley(permutations=8, baseline=0.5, regions=cells))
    assert ours.deviation is None
    theirs = ShapleyValues(model).attribute(x, baselines=0.5, target=target, feature_mask=cells[None, None])
    yield "shapley, exact", "captum", ours.map, theirs[:, 0]


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    worst = 0.0
    for name, model, x, target, _ in subjects():
        model, x = model.double(), x.double()
        for run in (lambda m=model, x=x, t=target: hidden(m, x, t), lambda m=model, x=x, t=target: shared(m, x, t)):
            for row in compared(name, run):
                worst = max(worst, float(str(row["apart"])))
                print(json.dumps(row), flush=True)
    sys.exit(f"{worst:.2g} apart: more than 1e-4" if worst > 1e-4 else 0)


if __name__ == "__main__":
    main()
