"""An environment of its own for the packages that ours is compared with: their pins would hurt ours."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PINS = ("torchattacks==3.5.1", "foolbox==3.3.4", "eagerpy==0.30.0", "adversarial-robustness-toolbox==1.20.1", "adv-lib==0.2.8", "pyautoattack==0.2.0")
PINS += ("setuptools==80.9.0",) if sys.version_info >= (3, 12) else ()  # adv-lib asks for distutils, which Python has given up
TEACHING = ("torchdistill==1.1.5",)


def interpreter(pins: tuple[str, ...] = PINS) -> Path:
    "A Python that has these packages beside everything that this one has; made once, in the folder for temporary files."
    key = hashlib.sha256("\n".join((*pins, sys.executable)).encode()).hexdigest()[:12]
    home = Path(tempfile.gettempdir()) / f"adaptkit-oracles-{key}"
    python = home / "bin" / "python"
    if not (home / "ready").exists():
        venv.create(home, with_pip=False, symlinks=True, clear=True)
        target = next((home / "lib").glob("python*/site-packages"))
        theirs = next(Path(p) for p in sys.path if p.endswith("site-packages") and Path(p).is_dir())
        uv = str(Path(sys.executable).with_name("uv"))
        done = subprocess.run([uv, "pip", "install", "--quiet", "--no-deps", "--python", str(python), *pins], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"The packages to compare with can't be installed: {done.stderr.strip()[-400:]}")
        (target / "visdom.py").write_text("class Visdom:\n    pass\n")  # adv-lib imports it for its plots, which nobody asks for here
        (target / "main.pth").write_text(f"{theirs}\n")
        (home / "ready").touch()
    return python
