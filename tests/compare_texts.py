"""Our values of words beside captum 0.9: MiniLM's table of vectors, the same three texts, classes and starting points. Run by a Python that has it; prints one line of JSON for each pair.

    python tests/compare_texts.py

"apart" is the largest difference, in parts of the largest value of theirs, in double precision. Captum is handed all three texts at once, padded; ours reads them one by one. Attention is compared with the formulas of its papers in test_text_explanations.py.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from adaptkit.explanation.fading import token_table
from adaptkit.explanation.gradients import IntegratedGradients
from adaptkit.explanation.pieces import read_text
from adaptkit.explanation.texts import explain_text
from adaptkit.heads.heads import Model, Named, build_model

TEXTS = ["Unforgettable photosynthesis isn't cheap.", "这个产品很好", "Who wrote it?"]
TARGET = torch.tensor([2, 0, 1])
Pair = tuple[str, Tensor, Tensor]  # method, ours, theirs


def subject() -> Model:
    model = build_model("minilm", Named(("a", "b", "c")), size=16, seed=0)
    with torch.no_grad():
        model.head[-1].weight.mul_(20)
    return model.double().eval().requires_grad_(False)


def words(model: Model, pieces: Tensor) -> Tensor:
    "Their values [B, T, D], summed over the pieces of each word, all texts one after the other."
    reads = [read_text(model.reader, text) for text in TEXTS]
    return torch.cat([r.merged(row[: len(r.ids)].sum(1))[0] for r, row in zip(reads, pieces, strict=True)])


def pairs(model: Model) -> Iterator[Pair]:
    from captum.attr import LayerGradientXActivation, LayerIntegratedGradients

    tokenizer = model.reader.tokenizer
    table, tokens = token_table(model, tokenizer), model.reader.load(TEXTS)

    def forward(ids: Tensor) -> Tensor:
        mask = tokens[:, 1].repeat(len(ids) // len(tokens), 1)
        return model(torch.stack([ids, mask], 1))

    reads = [read_text(model.reader, text) for text in TEXTS]
    for steps, baseline in ((50, "mask"), (20, "pad")):
        found = explain_text(model, TEXTS, TARGET, method=IntegratedGradients(steps), baseline=baseline)
        blank = {"mask": tokenizer.inner.token_to_id("[MASK]"), "pad": 0}[baseline]
        start = tokens[:, 0].clone()
        for row, read in zip(start, reads, strict=True):
            row[: len(read.ids)][read.places >= 0] = blank
        theirs, gap = LayerIntegratedGradients(forward, table).attribute(tokens[:, 0], baselines=start, target=TARGET, n_steps=steps, return_convergence_delta=True)
        yield f"integratedgradients, {steps} steps from {baseline}", torch.cat(found.values), words(model, theirs)
        yield f"its error, {steps} steps from {baseline}", found.error, gap
    theirs = LayerGradientXActivation(forward, table).attribute(tokens[:, 0], target=TARGET)
    ours = explain_text(model, TEXTS, TARGET, method="inputxgradient", baseline="zero")
    yield "inputxgradient", torch.cat(ours.values), words(model, theirs)


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    worst = 0.0
    for method, ours, theirs in pairs(subject()):
        scale = 1.0 if "error" in method else max(float(theirs.abs().max()), 1e-12)
        apart = float((ours.detach().double() - theirs.detach().double()).abs().max()) / scale
        worst = max(worst, apart)
        print(json.dumps({"network": "minilm", "method": method, "package": "captum", "shape": list(ours.shape), "apart": apart}), flush=True)
    sys.exit(f"{worst:.2g} apart: more than 1e-4" if worst > 1e-4 else 0)


if __name__ == "__main__":
    main()
