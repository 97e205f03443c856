"""Failures of one rank of several, told to the others.

Errors that all ranks can exchange go through a collective. After one that breaks the
connections, the store of the process group is what is left.
"""

import math
import time
import traceback
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from axolotl_psft.ranks import DataRanks, gather

# Until the ranks that can still speak have spoken.
_ANSWER_SECONDS = 3.0

_FIRST = "axolotl_psft.failure"
_ANSWERS = "axolotl_psft.answer"


class PeerFailedError(RuntimeError):
    """Another rank failed; carries its message, or names the rank."""


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient norm became NaN or infinite; names step and rank."""


class DataWorkerError(RuntimeError):
    """A worker process of the data loader ended; says which checkpoint to resume."""


def describe(error: BaseException | None) -> str | None:
    """An error's type and message, as another rank shows it."""
    return None if error is None else f"{type(error).__name__}: {error}"


def raise_together(error: Exception | None) -> None:
    """Raise on every rank where any rank has an error. One collective.

    Raises:
        PeerFailedError: on ranks without an error, with that of the others.
    """
    texts = enumerate(gather(describe(error)))
    failures = [f"rank {rank}: {text}" for rank, text in texts if text]
    if error is not None:
        raise error
    if failures:
        raise PeerFailedError("; ".join(failures))


def stop_if_not_finite(
    loss: Tensor, grad_norm: float, *, step: int, is_updated: bool
) -> None:
    """Raise on every rank where any rank's loss, or the gradient, is not finite.

    One small all-reduce, and the one time in a step that the host waits for the device.

    Args:
        loss: of this rank in this step, a scalar.
        grad_norm: of all ranks' gradient.
        step: which optimizer step it is.
        is_updated: whether the weights have been updated already.

    Raises:
        NonFiniteLossError: names the ranks.
    """
    all_ranks = DataRanks.of_all()
    finite = torch.ones(all_ranks.size, device=loss.device)
    finite[all_ranks.rank] = torch.isfinite(loss)
    if dist.is_initialized():
        dist.all_reduce(finite)
    finite = finite > all_ranks.size - 1
    if finite.all() and math.isfinite(grad_norm):
        return
    ranks = (~finite).nonzero().flatten().tolist()
    what = (
        f"the loss of rank {', '.join(map(str, ranks))}"
        if ranks
        else f"the gradient norm ({grad_norm})"
    )
    weights = "" if is_updated else "The weights were not updated. "
    raise NonFiniteLossError(
        f"psft: {what} is not finite in optimizer step {step}. {weights}Earlier "
        "checkpoints are intact. Look at the data of this step and lower "
        "learning_rate, or use bf16/fp32 instead of fp16."
    )


def name_first(error: Exception, remedy: str) -> None:
    """Record this rank's failure, or raise that of the rank which was first.

    A rank that dies takes its connections with it, and the others then fail with
    nothing to say but that.

    Args:
        error: what ended this rank.
        remedy: what to do where a rank was lost, as sentences.

    Raises:
        PeerFailedError: this rank's failure is another's echo.
    """
    if not dist.is_initialized():
        return
    try:
        text = _first_failure(error, remedy)
    except dist.DistError as gone:
        # The store is in the first rank's process, unless the launcher holds it.
        raise PeerFailedError(
            f"the connection to rank 0 is gone: it was killed or ran out of memory. "
            f"{remedy}"
        ) from gone
    if text is not None:
        raise PeerFailedError(text) from error


def _first_failure(error: Exception, remedy: str) -> str | None:
    """The message of the rank that was first; None where it is this one."""
    store = dist.distributed_c10d._get_default_store()
    rank, size = dist.get_rank(), dist.get_world_size()
    lost: list[int] = []
    if not store.check([_FIRST]) and is_of_connection(error):
        lost = _silent_ranks(store, rank, size)
    if store.check([_FIRST]):
        return store.get(_FIRST).decode()
    if lost:
        ranks = ", ".join(map(str, lost))
        text = (
            f"rank {ranks} of {size} is lost: killed, out of memory, or still hanging "
            f"{_ANSWER_SECONDS:.0f} s after rank {rank} gave up. Look at its output and"
            f" at its machine. {remedy}"
        )
        store.set(_FIRST, text)
        return text
    store.set(_FIRST, f"rank {rank} of {size} failed first: {describe(error)}")
    return None


def is_of_data_worker(error: Exception) -> bool:
    """Whether ``error`` says that a worker process of the data loader ended.

    torch says so wherever the process was, or, where it was just about to take a
    micro-batch, what came of that.
    """
    if "DataLoader worker" in str(error):
        return True
    frames = traceback.walk_tb(error.__traceback__)
    modules = {str(frame.f_globals.get("__name__")) for frame, _ in frames}
    taking = {"torch.utils.data.dataloader", "multiprocessing.connection"} <= modules
    return taking and isinstance(error, (OSError, EOFError))


def is_of_connection(error: Exception) -> bool:
    """Whether ``error`` says that a collective failed: another rank has the reason."""
    if isinstance(error, dist.DistError):
        return True
    # gloo's are RuntimeErrors, as are those of autograd around them; most name a source
    # file of its.
    words = ("third_party/gloo/", "caused pair closure")
    return type(error) is RuntimeError and any(word in str(error) for word in words)


def _silent_ranks(store: Any, rank: int, size: int) -> list[int]:
    """The ranks that do not come here within some seconds.

    All of them do where a connection broke for no reason of theirs; where a rank had a
    reason, it is soon in the store.
    """
    store.set(f"{_ANSWERS}.{rank}", "")
    deadline = time.monotonic() + _ANSWER_SECONDS
    silent = list(range(size))
    while silent and time.monotonic() < deadline and not store.check([_FIRST]):
        silent = [r for r in silent if not store.check([f"{_ANSWERS}.{r}"])]
        time.sleep(0.05)
    return silent
