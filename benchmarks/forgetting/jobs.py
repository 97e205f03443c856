"""Runs jobs in a few worker processes and keeps each one's result in a file.

A job that has a result of the same version is not run again: an interrupted benchmark
goes on where it was. A worker serves many jobs, since importing Axolotl takes longer
than a small run.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ENVIRONMENT = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    # A worker a core, a thread a worker: the same sums whatever the machine has.
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Job:
    """A function with its arguments, and the name that its result is kept under."""

    name: str
    function: Callable[..., dict[str, Any] | None]
    arguments: tuple[Any, ...]


def code_version() -> str:
    """Changes with any code that a result may depend on."""
    root = Path(__file__).parents[2]
    files = [
        *root.glob("axolotl_psft/**/*.py"),
        *root.glob("examples/quickstart/*.py"),
        *(
            path
            for path in root.glob("benchmarks/forgetting/*.py")
            # What only draws, or only decides what is run.
            if path.stem not in ("report", "plan", "jobs", "__main__", "__init__")
        ),
    ]
    sha = hashlib.sha256()
    for path in sorted(files):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


class Jobs:
    """Worker processes and the folder of their results.

    Args:
        folder: ``results/`` and ``logs/`` go here.
        num_workers: processes, each with one thread.
    """

    def __init__(self, folder: Path, num_workers: int) -> None:
        self.folder = folder
        self.version = code_version()
        self._done: set[str] = set()
        self.num_expected = 0
        self._seconds, self._num_made = 0.0, 0
        self._num_workers = num_workers
        os.environ.update(_ENVIRONMENT)
        self._pool = ProcessPoolExecutor(
            num_workers, mp_context=multiprocessing.get_context("spawn")
        )

    def run(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The jobs' results by name; those at hand are read, the others made.

        Raises:
            RuntimeError: a job failed; names it and its log.
        """
        unique = {job.name: job for job in jobs}
        results = {name: self._read(name) for name in unique}
        missing = [unique[name] for name, result in results.items() if result is None]
        self._done |= unique.keys() - {job.name for job in missing}
        running: dict[Future[Any], Job] = {
            self._pool.submit(_work, job, self._log(job.name)): job for job in missing
        }
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                results[job.name] = self._finish(job, future)
        return results

    def close(self) -> None:
        """End the workers; what waits is not started."""
        self._pool.shutdown(cancel_futures=True)

    def _finish(self, job: Job, future: "Future[Any]") -> dict[str, Any]:
        try:
            result = future.result()
        except Exception as error:
            self.close()
            raise RuntimeError(
                f"{job.name} failed: {error}. Its log is {self._log(job.name)}; the "
                "same command goes on with what is missing."
            ) from error
        path = self._path(job.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"version": self.version, **result}))
        os.replace(partial, path)
        self._done.add(job.name)
        self._seconds += result["seconds"]
        self._num_made += 1
        left = max(self.num_expected - len(self._done), 0)
        print(
            f"[{len(self._done)}/{self.num_expected}] {job.name}: "
            f"{result['seconds']:.0f} s{self._estimate(left)}",
            flush=True,
        )
        return result

    def _estimate(self, left: int) -> str:
        minutes = self._seconds / self._num_made * left / self._num_workers / 60
        return f"; about {minutes:.0f} min left" if left else ""

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        if not path.is_file():
            return None
        result = json.loads(path.read_text())
        return result if result["version"] == self.version else None

    def _path(self, name: str) -> Path:
        return self.folder / "results" / f"{name}.json"

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"


def _work(job: Job, log: Path) -> dict[str, Any]:
    """In a worker: run the job with its output in a file."""
    started, cpu = time.perf_counter(), time.process_time()
    with _output_to(log):
        try:
            result = job.function(*job.arguments) or {}
        except BaseException:
            traceback.print_exc()
            raise
    return {
        **result,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu,
    }


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    log.parent.mkdir(parents=True, exist_ok=True)
    saved = os.dup(1), os.dup(2)
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
