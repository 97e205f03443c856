"""Which ranks work on which data, and what all of them tell one another."""

from dataclasses import dataclass
from typing import Any

from torch import distributed as dist


@dataclass(frozen=True)
class DataRanks:
    """This rank among those whose micro-batches differ.

    Ranks that hold parts of one copy of the model share their micro-batches, and are
    one data rank together.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """None: all ranks."""
    is_first: bool = True
    """Whether this rank writes what the ranks with the same micro-batches share."""

    @classmethod
    def of_all(cls) -> "DataRanks":
        """Every rank has micro-batches of its own."""
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())


def is_first_rank() -> bool:
    """Whether this is rank 0, which writes what all ranks share."""
    return DataRanks.of_all().rank == 0


def gather(value: Any) -> list[Any]:
    """Every rank's ``value`` (picklable), in rank order. One collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
