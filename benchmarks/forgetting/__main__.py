"""What PSFT does to what a model knew: fine-tunes, measures, and writes the report.

    python -m benchmarks.forgetting [--quick]

Small models are trained from nothing but the repository, then fine-tuned through the
real Axolotl plugin; see docs/evidence.md. Interrupted, the same command goes on.
"""

import argparse
import os
import time
from pathlib import Path

from benchmarks.forgetting import report, text
from benchmarks.forgetting.evidence import Evidence
from benchmarks.forgetting.jobs import Jobs
from benchmarks.forgetting.plan import FULL, QUICK

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed, fewer steps, no ablations"
    )
    parser.add_argument(
        "--output-dir", type=Path, help="default: outputs/evidence[-quick]"
    )
    parser.add_argument(
        "--workers", type=int, default=min(os.cpu_count() or 1, 2), help="processes"
    )
    args = parser.parse_args()
    name = "evidence-quick" if args.quick else "evidence"
    folder = (args.output_dir or ROOT / "outputs" / name).resolve()
    with_text = text.is_present()
    if not with_text:
        print(f"No real samples in {text.DATA}: the second experiment is left out.")
    started = time.perf_counter()
    jobs = Jobs(folder, args.workers)
    try:
        scale = QUICK if args.quick else FULL
        results = Evidence(scale, folder, jobs, with_text).run()
    finally:
        jobs.close()
    # Only a whole run replaces what the repository says.
    target = folder if args.quick else ROOT / "docs"
    report.write(target, scale, results)
    minutes = (time.perf_counter() - started) / 60
    print(f"Wrote the report to {target} ({minutes:.0f} min).")


if __name__ == "__main__":
    main()
