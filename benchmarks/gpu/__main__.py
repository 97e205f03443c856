"""Is everything right on this machine's GPU, and how fast? In ten minutes.

    python -m benchmarks.gpu [FOLDER] [--only STEP ...] [--rehearse]

Run from the root of the repository. Steps run in the order of what matters most, each
in a process of its own and for no longer than its limit; one that fails does not stop
the next. Each figure is a JSON line in FOLDER/figures.jsonl once its step has ended; a
table comes at the end. `python -m benchmarks.gpu.report FOLDER` makes docs/gpu.md of
figures that were had on a GPU. --rehearse: every step, tiny, on a CPU.
"""

import argparse
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu.measure import Bench, Figure
from benchmarks.gpu.report import table

# Where each step is, and the seconds it may take; an H100 needs some two thirds.
STEPS: dict[str, tuple[str, int]] = {
    "machine": ("benchmarks.gpu.machine", 30),
    "correctness": ("benchmarks.gpu.head", 50),
    "bits": ("benchmarks.gpu.head", 40),
    "waiting": ("benchmarks.gpu.head", 30),
    "speed": ("benchmarks.gpu.head", 60),
    "step": ("benchmarks.gpu.training", 70),
    "axolotl": ("benchmarks.gpu.training", 90),
    "megatron": ("benchmarks.gpu.training", 50),
    "tests": ("benchmarks.gpu.tests", 80),
    "attention": ("benchmarks.gpu.attention", 50),
    "peers": ("benchmarks.gpu.head", 50),
}
# By --only: for whoever tunes the head.
EXTRA: dict[str, tuple[str, int]] = {
    "tiles": ("benchmarks.gpu.head", 120),
    "profile": ("benchmarks.gpu.head", 60),
}
# No network; and Axolotl's copy of stdout would keep the pipe open.
ENVIRONMENT = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "AXOLOTL_TEE_STDOUT": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default="outputs/gpu", type=Path)
    every = [*STEPS, *EXTRA]
    parser.add_argument(
        "--only",
        nargs="+",
        choices=every,
        metavar="STEP",
        help="of: " + ", ".join(every),
    )
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--step", choices=every, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        _run_step(args.step, Bench("cpu" if args.rehearse else "cuda"))
        return
    _check_machine(args.rehearse)
    sys.exit(run(args.folder, args.only or list(STEPS), args.rehearse))


def _check_machine(rehearse: bool) -> None:
    import torch

    if not rehearse and not torch.cuda.is_available():
        sys.exit(
            "No GPU: torch.cuda.is_available() is False. On a machine without one, "
            "`python -m benchmarks.gpu --rehearse` runs every step tiny on the CPU."
        )


def run(folder: Path, steps: list[str], rehearse: bool) -> int:
    """Run the steps, write figures.jsonl, print the table; 1 where one failed."""
    folder.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.gpu" + (" --rehearse" if rehearse else "")
    head = {"command": command, "date": time.strftime("%Y-%m-%d")}
    lines: list[dict[str, Any]] = [head]
    with (folder / "figures.jsonl").open("w") as file:
        file.write(json.dumps(head) + "\n")
        for step in steps:
            for line in _figures_of(step, rehearse, folder):
                lines.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()
    print(table(lines), flush=True)
    return int(any("failed" in line for line in lines))


def _figures_of(step: str, rehearse: bool, folder: Path) -> Any:
    """The lines of one step, in a child process that may not outlast its limit."""
    limit = (STEPS | EXTRA)[step][1] * (5 if rehearse else 1)
    environment = os.environ | ENVIRONMENT
    if rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        environment["OMP_NUM_THREADS"] = "1"
    start, log = time.monotonic(), folder / f"{step}.log"
    failure = None
    with log.open("w") as errors:
        child = subprocess.Popen(
            _command(step, rehearse),
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
            start_new_session=True,
        )
        try:
            out, _ = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            out, _ = child.communicate()
            failure = f"stopped after {limit} s"
    for line in out.splitlines():
        if line.startswith('{"step"'):
            yield json.loads(line)
    if failure is None and child.returncode:
        failure = f"exit status {child.returncode}"
    if failure:
        tail = log.read_text()[-1500:]
        yield {"step": step, "failed": f"{failure}; the end of {log.name}: {tail}"}
    seconds = round(time.monotonic() - start, 1)
    print(f"{step}: {failure or 'done'}, {seconds} s", flush=True)
    yield {"step": step, "seconds": seconds}


def _command(step: str, rehearse: bool) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--step", step]
    return [*command, "--rehearse"] if rehearse else command


def _run_step(name: str, bench: Bench) -> None:
    """In the child: print a line for each figure."""
    module, _ = (STEPS | EXTRA)[name]
    try:
        for figure in getattr(importlib.import_module(module), name)(bench):
            if bench.rehearsing:  # targets are for the card
                figure = dataclasses.replace(figure, at_most=None)
            print(json.dumps(_line(name, figure)), flush=True)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _line(step: str, figure: Figure) -> dict[str, Any]:
    line = {"step": step, **dataclasses.asdict(figure), "verdict": figure.verdict}
    return {key: value for key, value in line.items() if value not in (None, "")}


if __name__ == "__main__":
    main()
