"""Lets CPU ranks do what accelerate, torch and DeepSpeed do on GPUs only.

What is patched here decides where tensors live and which of two equal collectives is
called; everything that computes is what a GPU would run.
"""

import importlib
import os
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
