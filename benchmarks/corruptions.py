"""How fast are the common corruptions, beside the package imagecorruptions?

The same images (drawn test cards, 224 pixels), the same level, one thread, one process, and pairs: first one, then the other, again and again. Batches of ours are made whole, the peer takes one image at a time. Run it with the Python of an
environment that has both, as tests/test_corruptions.py makes one (elastic_transform is left out: the package changed its definition).

    python benchmarks/corruptions.py [--images 32] [--pairs 5] [--level 3]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "corruptions.json"


def measure(n: int, pairs: int, level: int) -> dict[str, Any]:
    "CPU milliseconds for an image, ours and theirs, by corruption; the median pair of each."
    import imagecorruptions
    import numpy as np
    import torch

    from adaptkit.robustness.corruptions import COMMON, corrupt
    from adaptkit.robustness.promises import cards

    torch.set_num_threads(1)
    x = cards(n, 3, 224, 224)
    pixels = [i.numpy() for i in (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1)]
    found = {}
    for name in (c for c in COMMON if c != "elastic_transform"):
        both = []
        for pair in range(pairs + 1):  # the first is a warm-up: numba compiles, windows freeze
            started = time.process_time()
            corrupt(x, name, level=level, seed=pair)
            half = time.process_time()
            for image in pixels:
                imagecorruptions.corrupt(image, corruption_name=name, severity=level)
            both.append([1000 * (half - started) / n, 1000 * (time.process_time() - half) / n])
        ours, theirs = np.array(both[1:]).T
        ratio = theirs / ours
        found[name] = {"ours": float(np.median(ours)), "theirs": float(np.median(theirs)), "faster": float(np.median(ratio)), "least": float(ratio.min()), "most": float(ratio.max())}
        print(name, {k: round(v, 2) for k, v in found[name].items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--level", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="measure in this environment")
    asked = parser.parse_args()
    if not asked.here:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from test_corruptions import oracle

        roots = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
        told = [str(oracle()), __file__, "--here", "--images", str(asked.images), "--pairs", str(asked.pairs), "--level", str(asked.level)]
        subprocess.run(told, check=True, env={**os.environ, "PYTHONPATH": roots, "OMP_NUM_THREADS": "1"})
        return
    found = measure(asked.images, asked.pairs, asked.level)
    total = {who: sum(row[who] for row in found.values()) for who in ("ours", "theirs")}
    result = {"images": asked.images, "pairs": asked.pairs, "level": asked.level, "pixels": 224, "unit": "CPU ms per image, one thread", "total": total, "corruptions": found}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"all: ours {total['ours']:.1f} ms, theirs {total['theirs']:.1f} ms, {total['theirs'] / total['ours']:.2f} times")


if __name__ == "__main__":
    main()
