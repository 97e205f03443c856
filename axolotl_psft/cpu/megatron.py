"""Stand-ins for the CUDA-only calls of Megatron-Core, where there is no accelerator.

Megatron-Core names the device "cuda" literally and asks for CUDA's stream. Inside
:func:`stand_ins` those calls mean the CPU; outside of it, or on a Megatron-Core that
asks for its device (patches/), nothing is changed.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import megatron.core.utils
import torch
from torch.overrides import TorchFunctionMode


def stand_ins() -> AbstractContextManager[None]:
    """A context in which Megatron-Core's "cuda" is the CPU. Re-entrant."""
    if hasattr(megatron.core.utils, "current_device"):
        return contextlib.nullcontext()
    if torch.cuda.current_device is _current_device:  # inside of one already
        return contextlib.nullcontext()
    return _stand_ins()


def _current_device() -> torch.device:
    return torch.device("cpu")


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    cuda: Any = torch.cuda
    originals = cuda.current_device, cuda.current_stream
    cuda.current_device, cuda.current_stream = _current_device, torch.cpu.current_stream
    try:
        with _CudaMeansCpu():
            yield
    finally:
        cuda.current_device, cuda.current_stream = originals


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            # Megatron tells dtypes apart by this name.
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _is_cuda(device: Any) -> bool:
    # None is the default device, that is, the CPU already.
    return device is not None and torch.device(device).type == "cuda"
