"""Lets CPU ranks do what accelerate, torch and DeepSpeed do on GPUs only.

What is patched here decides where tensors live and which of two equal collectives is
called; everything that computes is what a GPU would run.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def allow_bf16() -> None:
    """Mixed precision on a CPU: transformers wants a GPU, or a key Axolotl lacks."""
    import transformers.training_args

    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def allow_mesh() -> None:
    """Axolotl asks for a mesh of CUDA devices."""
    from accelerate.parallelism_config import ParallelismConfig

    build = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda self, _: build(self, "cpu")


def allow_sharding() -> None:
    """FSDP2 and DeepSpeed on gloo ranks."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    # accelerate knows shards on several *GPUs* only.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    backend = ("gloo", DistributedType.MULTI_GPU)
    PartialState._prepare_backend = lambda *_: backend


def allow_zero() -> None:
    """ZeRO-1 and ZeRO-2: gloo's gather into one tensor refuses DeepSpeed's views."""
    torch_backend: Any = importlib.import_module("deepspeed.comm.torch").TorchBackend
    torch_backend.has_all_gather_into_tensor = lambda self: False


def without_compiler() -> None:
    """Optimizers' own compiled kernels, uncompiled: a minute of C++ each."""
    import torch

    torch.compiler.set_stance("force_eager")


def distributed_muon() -> None:
    """One process with the Muon that Axolotl has for several: it is another one.

    Other coefficients, momentum and scale of the update than the single-process one.
    """
    from axolotl.contribs.mit import muon

    muon.MuonOptimizerFactory = muon.DistMuonOptimizerFactory


def overlap(late: bool = False) -> None:
    """Megatron's data-parallel collectives beside the computation.

    Args:
        late: they run when somebody waits for them: whoever does not finds what was
            there before, which on a machine this fast would be luck.
    """
    from megatron.core.distributed import param_and_grad_buffer

    from axolotl_psft.megatron import step

    step.can_overlap = lambda layout: True
    if late:
        group = param_and_grad_buffer._ParamAndGradBucketGroup
        group.start_param_sync = _late(group.start_param_sync, "param_gather_handle")
        group.start_grad_sync = _late(group.start_grad_sync, "grad_reduce_handle")


@dataclass(eq=False)
class _Late:
    """A handle of a collective that has not begun, nor have those after it."""

    start: Callable[..., None]
    group: Any
    name: str

    def wait(self) -> None:
        while self in _NOT_BEGUN:
            _NOT_BEGUN.pop(0)._run()

    def _run(self) -> None:
        setattr(self.group, self.name, None)
        self.start(self.group)
        getattr(self.group, self.name).wait()
        setattr(self.group, self.name, self)  # for whoever waits for it


_NOT_BEGUN: list[_Late] = []


def _late(start: Callable[..., None], name: str) -> Callable[..., None]:
    def start_late(group: Any, force_sync: bool = False, **kwargs: Any) -> None:
        if force_sync:
            start(group, force_sync=True)
            return
        assert getattr(group, name) is None
        handle = _Late(start, group, name)
        setattr(group, name, handle)
        _NOT_BEGUN.append(handle)
        group.param_gather_dispatched |= name == "param_gather_handle"

    return start_late
