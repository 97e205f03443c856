"""pytest's tests with the marker `gpu`."""

import re
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.gpu.measure import Bench, Figure


def tests(bench: Bench) -> Iterator[Figure]:
    """`pytest --gpu`; in a rehearsal they are skipped."""
    # Every test with the marker is in this file; to collect the others takes half a
    # minute.
    command = [sys.executable, "-m", "pytest", "--gpu", "-q", "-p", "no:cacheprovider"]
    command.append("tests/test_gpu.py")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, file=sys.stderr)
    summary = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout)
    yield Figure("pytest --gpu", ", ".join(summary) or "nothing ran")
    yield Figure("none failed", done.returncode == 0)
