"""Run functions in processes forked off one that has imported Axolotl already.

With gloo ranks (`run_distributed`), or alone (`run_alone`): the import costs more than
most of what is tested. What the processes compute is in the tests.
"""

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

# Forked off a server that never computes anything: a process that has computed cannot
# be forked, since the locks of torch's thread pools go with it.
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.distributed.preload"])

# Importing in the server, once; the first run waits for it.
_START_SECONDS = 120.0


class Processes:
    """Processes that run ``func(*args)``, each from a fresh fork.

    Args:
        func: a module-level function (it is pickled by name).
        world_size: number of ranks of a gloo process group that is initialized around
            ``func``, with a launcher's environment variables; None: one process alone.
        *args: anything picklable.
        collective_timeout: seconds until a collective is given up.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        world_size: int | None,
        *args: Any,
        collective_timeout: float = 30.0,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name)
        _run_server()
        job = (func, args, world_size, self._folder.name, collective_timeout)
        # Not daemons: those may not have data-loader workers.
        self.all = [
            _CONTEXT.Process(target=_run, args=(rank, *job))
            for rank in range(world_size or 1)
        ]
        for process in self.all:
            process.start()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        self._folder.cleanup()

    def kill(self) -> None:
        """kill -9 each process and what it has started."""
        for process in self.all:
            _kill_group(process)
        for process in self.all:
            process.join()

    def wait(self, timeout: float, *, for_all: bool = False) -> None:
        """Until all have ended, or one has failed: the others may wait for ever.

        Raises:
            TimeoutError: a process did not end in time.
        """
        deadline = time.monotonic() + timeout
        running = {process.sentinel: process for process in self.all}
        while running:
            left = max(0.0, deadline - time.monotonic())
            ended = connection.wait(list(running), left)
            if not ended:
                late = [i for i, process in enumerate(self.all) if process.is_alive()]
                raise TimeoutError(f"ranks {late} still ran after {timeout} s")
            codes = [running.pop(sentinel).exitcode for sentinel in ended]  # type: ignore[index]
            if any(codes) and not for_all:
                return

    def errors(self) -> list[str]:
        """Tracebacks, first failure first (the others are often its echo)."""
        failures = sorted(self.path.glob("*.failed"), key=os.path.getmtime)
        return [path.read_text() for path in failures]

    def results(self) -> list[Any]:
        """Each rank's result, in rank order.

        Raises:
            RuntimeError: a rank failed; the message holds the tracebacks.
        """
        if errors := self.errors():
            raise RuntimeError("\n".join(errors))
        exits = [process.exitcode for process in self.all]
        if any(exits):
            raise RuntimeError(f"exit codes of the ranks: {exits}, without a traceback")
        paths = [self.path / f"{rank}.result" for rank in range(len(self.all))]
        return [pickle.loads(path.read_bytes()) for path in paths]


def run_distributed(
    func: Callable[..., Any], world_size: int, *args: Any, timeout: float = 60.0
) -> list[Any]:
    """Call `func(*args)` on every rank of a fresh gloo process group.

    Args:
        func: a module-level function; `torch.distributed` is initialized around it.
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
    limits = {"collective_timeout": timeout / 2}
    with Processes(func, world_size, *args, **limits) as processes:
        processes.wait(timeout)
        processes.kill()
        return processes.results()


def run_alone(func: Callable[..., Any], *args: Any, timeout: float = 120.0) -> Any:
    """Call `func(*args)` in one fresh process without a process group; its result.

    Raises:
        RuntimeError: it failed; the message holds the traceback.
        TimeoutError: it did not end in time.
    """
    with Processes(func, None, *args) as processes:
        processes.wait(timeout)
        return processes.results()[0]


def keep_process_group() -> None:
    """Let a process run Axolotl several times in one process group."""
    import axolotl.train

    # Axolotl ends its process group after a run, and a second one over the same store
    # meets the keys of the first and waits for ever.
    axolotl.train.cleanup_distributed = lambda: None


_is_running = False


def _run_server() -> None:
    global _is_running
    if _is_running:
        return
    process = _CONTEXT.Process(target=_nothing)
    process.start()
    process.join(_START_SECONDS)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"importing took more than {_START_SECONDS} s")
    _is_running = True


def _nothing() -> None:
    pass


def _kill_group(process: Any) -> None:
    if process.pid is None:
        return
    # The group of its own that _run has made, if it came that far.
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        process.kill()


def _run(
    rank: int,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    world_size: int | None,
    folder: str,
    collective_timeout: float,
) -> None:
    os.setpgid(0, 0)
    import torch
    from torch import distributed as dist

    torch.set_num_threads(1)
    try:
        if world_size is not None:
            names = {"RANK": rank, "LOCAL_RANK": rank}
            names |= {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            os.environ.update({name: str(value) for name, value in names.items()})
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=collective_timeout),
            )
        result = func(*args)
        Path(folder, f"{rank}.result").write_bytes(pickle.dumps(result))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        report = f"rank {rank} of {world_size}:\n{traceback.format_exc()}"
        Path(folder, f"{rank}.failed").write_text(report)
        # Without the clean-up of a process group whose peers may be gone.
        os._exit(1)
