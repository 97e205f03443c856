"""FSDP2: an adapter that is resumed on every rank.

accelerate 1.13 saves rank 0's shards of an adapter as if they were all of it, and loads
them on rank 0 only (state_dict_type FULL_STATE_DICT): the other ranks resume with the
adapter they were made with, and nothing tells. The adapter's own file has it whole.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def load_adapter(model: Any, checkpoint: Path) -> None:
    """Set an adapter's shards to what ``checkpoint`` has of them.

    Args:
        model: sharded by FSDP2; where it has no adapter, nothing is done.
        checkpoint: with ``adapter_model.safetensors``, whole tensors.

    Raises:
        ValueError: the file is missing or of another adapter.
    """
    if not isinstance(model, PeftModel):
        return
    path = checkpoint / SAFETENSORS_WEIGHTS_NAME
    # Views of the weights.
    shards = get_peft_model_state_dict(model)
    saved = load_file(path) if path.is_file() else {}
    if missing := shards.keys() - saved.keys():
        raise ValueError(
            f"resume_from_checkpoint: {path} has no {min(missing)}, and without it an "
            "adapter cannot be resumed in FSDP2. Resume from another checkpoint."
        )
    for name, shard in shards.items():
        whole = saved[name].to(shard.device, shard.dtype)
        if isinstance(shard, DTensor):
            whole = distribute_tensor(whole, shard.device_mesh, shard.placements)
        shard.copy_(whole)
