"""Process groups and layout: which rank holds which shard, and which data.

Ranks that share one copy of the model are neighbours: rank = data_rank * size + rank
within the copy. Megatron-Core's parallel_state holds the groups.
"""

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta

import torch
from megatron.core import parallel_state
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from axolotl_psft.ranks import DataRanks


@dataclass(frozen=True)
class Layout:
    """Where this rank stands."""

    tp_size: int
    tp_rank: int
    dp_size: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    """The ranks that share one copy of the model, and one batch."""
    dp_group: dist.ProcessGroup
    """The ranks that hold the same shard, of different batches."""

    def describe(self) -> str:
        return f"tensor parallel {self.tp_size} x data parallel {self.dp_size}"

    @property
    def data_ranks(self) -> DataRanks:
        """This rank among those whose micro-batches differ."""
        is_first = self.tp_rank == 0
        return DataRanks(self.dp_rank, self.dp_size, self.dp_group, is_first)


def initialize(tp_size: int, *, timeout_minutes: float = 30.0) -> Layout:
    """Create the groups, or take them where they exist with this size.

    Every rank must call it, with torch.distributed initialized.

    Raises:
        ValueError: if the number of processes is not a multiple of ``tp_size``.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    check_world_size(tp_size, world_size)
    exist = parallel_state.model_parallel_is_initialized()
    if exist and parallel_state.get_tensor_model_parallel_world_size() != tp_size:
        parallel_state.destroy_model_parallel()
        exist = False
    if not exist:
        parallel_state.initialize_model_parallel(
            tp_size,
            distributed_timeout_minutes=timeout_minutes,
            create_gloo_process_groups=False,
        )
    return Layout(
        tp_size=tp_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
    )


def check_world_size(tp_size: int, world_size: int) -> None:
    """Raise a ValueError unless ``world_size`` processes fit ``tp_size``."""
    if world_size % tp_size or world_size < tp_size:
        more = -(-world_size // tp_size) * tp_size
        raise ValueError(
            f"tensor_parallel_size: {tp_size} does not divide the number of processes, "
            f"{world_size}. Launch {more}: `accelerate launch --num_processes {more} -m"
            " axolotl.cli.train config.yaml`."
        )


def data_mesh(layout: Layout, timeout: timedelta) -> DeviceMesh:
    """The mesh by which accelerate gives a tensor-parallel group one batch."""
    # Unchecked, it is the one that torch was built for.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = "cpu" if accelerator is None else accelerator.type
    mesh = dist.device_mesh.init_device_mesh(
        device,
        (layout.dp_size, layout.tp_size),
        mesh_dim_names=("dp_replicate", "tp"),
    )
    # It gives its groups torch's own.
    for group in mesh.get_all_groups():
        dist.distributed_c10d._set_pg_timeout(timeout, group)
    return mesh


def on_this_device() -> AbstractContextManager[None]:
    """A context in which Megatron-Core computes where this process does. Re-entrant.

    It names the device "cuda" literally: right on a GPU, and on a CPU a stand-in.
    """
    if torch.accelerator.is_available():
        return contextlib.nullcontext()
    from axolotl_psft.cpu.megatron import stand_ins

    return stand_ins()
