"""Counts how often a computation would make a host wait for its device."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators of which the host must know a number before it goes on.
_OPERATORS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select"}
# Methods that no operator shows: on a CPU there is nothing to copy.
_METHODS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}


class HostWaits(TorchDispatchMode):
    """Within it, what needs numbers of a tensor: ``.item()``, ``nonzero``, ``if``,
    ``.tolist()``, ``.cpu()``, an index of bools. Backward is part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._methods = _Methods(self)

    def __enter__(self) -> "HostWaits":
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self._methods.__exit__(*exc_info)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.total += name in _OPERATORS or (name == "index" and _by_bools(args[1]))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func not in _METHODS:
            return func(*args, **(kwargs or {}))
        with uncounted(self._waits):
            result = func(*args, **(kwargs or {}))
        self._waits.total += 1
        return result


@contextlib.contextmanager
def uncounted(waits: HostWaits) -> Iterator[None]:
    """What a kernel for CPUs looks at, and a GPU's need not."""
    before = waits.total
    yield
    waits.total = before


def _by_bools(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
