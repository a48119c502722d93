"""Run by the Python of tests/oracles.py: what torchmetrics says about answers that come as JSON. Prints one line of JSON."""

from __future__ import annotations

import json
import sys

PINS = ("torchmetrics==1.9.0",)


def main() -> None:
    "Read [name, probabilities, labels, options] from standard input, as often as there are."
    import torch
    from torchmetrics.functional import classification

    said = []
    for name, probabilities, labels, options in json.load(sys.stdin):
        call = getattr(classification, f"multiclass_{name}")
        said.append(float(call(torch.tensor(probabilities), torch.tensor(labels), num_classes=len(probabilities[0]), **options)))
    print(json.dumps(said))


if __name__ == "__main__":
    main()
