"""The launcher keeps its promises: results in order, tracebacks, no process left."""

import multiprocessing
import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launch import run_distributed


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def sum_of_ranks(addend: int) -> tuple[int, float]:
    total = torch.tensor(float(dist.get_rank() + addend))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


def rank_1_fails(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "exception":
            raise KeyError("the reason")
        if how == "exit":
            os._exit(3)
        time.sleep(600)
    if how != "exit":
        dist.barrier()


def test_results_in_rank_order() -> None:
    assert run_distributed(sum_of_ranks, 2, 10) == [(0, 21.0), (1, 21.0)]


def test_failing_rank_is_named_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="rank 1 of 2:\nTraceback") as error:
        run_distributed(rank_1_fails, 2, "exception")
    assert "in rank_1_fails" in str(error.value)
    assert "KeyError: 'the reason'" in str(error.value)


def test_rank_that_exits() -> None:
    with pytest.raises(RuntimeError, match=r"exit codes of the ranks: \[.*, 3\]"):
        run_distributed(rank_1_fails, 2, "exit")


def test_rank_that_hangs() -> None:
    # The other rank's barrier is given up after half of the time, with its traceback.
    start = time.monotonic()
    with pytest.raises((RuntimeError, TimeoutError), match="rank"):
        run_distributed(rank_1_fails, 2, "hang", timeout=12.0)
    assert time.monotonic() - start < 20
