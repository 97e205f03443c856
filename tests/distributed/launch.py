"""Run a function on real gloo ranks. What the ranks compute is in the tests."""

import datetime
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_distributed(
    func: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0
) -> list[Any]:
    """Call `func(*args)` on every rank of a fresh gloo process group.

    Args:
        func: a module-level function (it is pickled by name); `torch.distributed` is
            initialized around it.
        world_size: number of processes.
        *args: anything picklable.
        timeout: seconds until the whole run is given up. A collective is given up
            after half of it, so that the rank that hangs gets to say where.

    Returns:
        Each rank's result, in rank order.

    Raises:
        RuntimeError: a rank failed; the message holds the tracebacks, first failure
            first (the others are often its echo).
        TimeoutError: a rank did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = (func, args, world_size, folder, timeout / 2)
        # Spawned, not forked: a fork copies the locks of torch's thread pools.
        context = get_context("spawn")
        ranks = [
            context.Process(target=_run_rank, args=(rank, *job), daemon=True)
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            _wait(ranks, timeout)
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()
        failures = sorted(Path(folder).glob("*.failed"), key=os.path.getmtime)
        if failures:
            raise RuntimeError("\n".join(path.read_text() for path in failures))
        exits = [process.exitcode for process in ranks]
        if any(exits):
            raise RuntimeError(f"exit codes of the ranks: {exits}, without a traceback")
        results = [Path(folder, f"{rank}.result") for rank in range(world_size)]
        return [pickle.loads(path.read_bytes()) for path in results]


def _wait(ranks: list[Any], timeout: float) -> None:
    """Until all have ended, or one has failed: the others may wait for it for ever."""
    deadline = time.monotonic() + timeout
    running = {process.sentinel: process for process in ranks}
    while running:
        ended = connection.wait(list(running), max(0.0, deadline - time.monotonic()))
        if not ended:
            late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
            raise TimeoutError(f"ranks {late} still ran after {timeout} s")
        if any(running.pop(sentinel).exitcode for sentinel in ended):
            return


def _run_rank(
    rank: int,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    world_size: int,
    folder: str,
    timeout: float,
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        result = func(*args)
        Path(folder, f"{rank}.result").write_bytes(pickle.dumps(result))
        dist.destroy_process_group()
    except BaseException:
        report = f"rank {rank} of {world_size}:\n{traceback.format_exc()}"
        Path(folder, f"{rank}.failed").write_text(report)
        # Without the clean-up of a process group whose peers may be gone.
        os._exit(1)
