"""Figures, and how a step measures them on a GPU (or, rehearsing, on a CPU)."""

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Figure:
    """One thing that was seen."""

    what: str
    value: Any
    """A number, a text, or True where what was expected holds."""
    unit: str = ""
    at_most: float | None = None
    """The target, where there is one."""

    @property
    def verdict(self) -> str:
        """``pass``, ``MISS``, or nothing where nothing was asked."""
        if isinstance(self.value, bool):
            return "pass" if self.value else "MISS"
        if self.at_most is None:
            return ""
        return "pass" if self.value <= self.at_most else "MISS"


class _HostEvent:
    """torch.cuda.Event on a CPU."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "_HostEvent") -> float:
        return 1e3 * (end.seconds - self.seconds)


@dataclass(frozen=True)
class Bench:
    """Where a step runs, and how large."""

    device: str
    """``cuda``, or ``cpu`` in a rehearsal."""

    @property
    def rehearsing(self) -> bool:
        """Whether sizes are tiny and figures mean nothing."""
        return self.device == "cpu"

    def size(self, real: Any, tiny: Any) -> Any:
        """The one of the two that this run takes."""
        return tiny if self.rehearsing else real

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.rehearsing:
            torch.cuda.synchronize()

    def milliseconds(
        self, runs: dict[str, Callable[[], Any]], repeats: int = 7
    ) -> dict[str, float]:
        """Median time of each run, interleaved, by the device's clock.

        A GPU that is hot or capped runs slower: interleaved, for all alike. The host
        runs ahead, as in training: no time of a run is the host's, unless it is slower.
        """
        for run in runs.values():  # kernels are compiled and loaded at their first call
            run()
        timers: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
        for _ in range(self.size(repeats + 1, 1)):
            for name, run in runs.items():
                begin, end = self._timer(), self._timer()
                begin.record()
                run()
                end.record()
                timers[name].append((begin, end))
        self.synchronize()
        return {
            name: statistics.median(begin.elapsed_time(end) for begin, end in pairs)
            for name, pairs in timers.items()
        }

    def _timer(self) -> Any:
        return _HostEvent() if self.rehearsing else torch.cuda.Event(enable_timing=True)

    def peak_mb(self, run: Callable[[], Any]) -> float:
        """Most megabytes (1e6) beyond what was allocated, and what `run` returns."""
        if self.rehearsing:
            run()
            return 0.0
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run()
        self.synchronize()
        kept = sum(x.numel() * x.itemsize for x in results or () if x is not None)
        return (torch.cuda.max_memory_allocated() - before - kept) / 1e6

    @contextlib.contextmanager
    def waits(self) -> Iterator[list[str]]:
        """Where the host waited for the device within, by torch's own account."""
        seen: list[str] = []
        if self.rehearsing:  # a CPU is its own host
            yield seen
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield seen
            finally:
                torch.cuda.set_sync_debug_mode("default")
                seen += [
                    f"{each.filename}:{each.lineno}"
                    for each in caught
                    # torch warns of the mode itself, too.
                    if "called a synchronizing" in str(each.message)
                ]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is right."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())
