"""Run all benchmarks, one after the other, and write their results where the site reads them.

    python benchmarks/run.py [--only time_to_accuracy loop_overhead memory duplicates]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ALL = ("time_to_accuracy", "loop_overhead", "memory", "duplicates", "texts", "large_table", "parallel_pages", "runner_overhead", "fault_matrix", "false_alarms", "panel_overhead", "panel_memory", "attacks", "adversarial_training", "corruptions", "distillation", "text_student", "students", "explanations", "serving_speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ALL, default=ALL)
    for name in parser.parse_args().only:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).with_name(f"{name}.py"))], check=True)


if __name__ == "__main__":
    main()
