"""What an Axolotl run needs on a CPU: its ranks, its model's place, its attention."""

from typing import Any

import torch
from axolotl.utils.logging import get_logger

from axolotl_psft import attention

LOG = get_logger(__name__)


def let_ranks_start() -> None:
    """Let Axolotl start several ranks on a machine without a GPU driver.

    It asks whether GPUs reach one another, and only one of torch's two errors is an
    answer to it: that of a build without CUDA. patches/axolotl-0.21.0/0005 mends it
    there.
    """
    torch.cuda.can_device_access_peer = lambda device, peer_device: True


def prepare(cfg: Any) -> None:
    """Place the model on the CPU, and give it attention that trains there.

    Axolotl sets the rank's number as its place, as if each had a GPU
    (patches/axolotl-0.21.0/0003 is the same for Axolotl itself).

    Args:
        cfg: of a run whose model is not loaded yet; is changed.

    Raises:
        ValueError: attention computes something that has no gradient here.
    """
    if cfg.device_map:
        cfg.device_map = {"": "cpu"}
    implementation = cfg.attn_implementation
    if not trains_on_gpus_only(implementation):
        return
    if cfg.scaling_softmax:
        raise ValueError(
            f"scaling_softmax: {cfg.scaling_softmax} is part of flex_attention, "
            "which has no gradient on a CPU. Train on a GPU, or remove it."
        )
    attention.use(cfg, "cannot train on a CPU")


def trains_on_gpus_only(implementation: str | None) -> bool:
    """Whether an ``attn_implementation`` has no kernel, or no gradient, on a CPU.

    flash-attn's kernels are CUDA's; torch's flex_attention has a forward on a CPU, and
    no backward.
    """
    return "flash" in str(implementation) or implementation == "flex_attention"
