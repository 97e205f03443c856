"""What a run needs where there is no accelerator: tests, the quickstart, a laptop.

Megatron-Core's part of it is megatron/cpu.py, the attention kernel attention.py.
"""

from typing import Any

import torch


def let_ranks_start() -> None:
    """Let Axolotl start several ranks on a machine without a GPU driver.

    It asks whether GPUs reach one another, and only one of torch's two errors is an
    answer to it: that of a build without CUDA. patches/axolotl-0.21.0/0005 mends it
    there.
    """
    if not torch.accelerator.is_available():
        torch.cuda.can_device_access_peer = lambda device, peer_device: True


def place_model(cfg: Any) -> None:
    """Load on the CPU: Axolotl sets the rank's number, as if each had a GPU.

    patches/axolotl-0.21.0/0003 is the same for Axolotl itself.
    """
    if cfg.device == "cpu" and cfg.device_map:
        cfg.device_map = {"": "cpu"}
