"""Proximal Supervised Fine-Tuning (PSFT) for Axolotl: the public names.

Every name is imported on first use: importing this package imports neither torch,
nor axolotl, nor megatron.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "PSFTPlugin": "plugin",
    "PSFTConfig": "config",
    "PSFTTrainer": "trainer",
    "psft_loss": "objective",
    "linear_logprobs": "logprobs",
    "vocab_parallel_logprobs": "logprobs",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from axolotl_psft.config import PSFTConfig as PSFTConfig
    from axolotl_psft.logprobs import linear_logprobs as linear_logprobs
    from axolotl_psft.logprobs import (
        vocab_parallel_logprobs as vocab_parallel_logprobs,
    )
    from axolotl_psft.objective import psft_loss as psft_loss
    from axolotl_psft.plugin import PSFTPlugin as PSFTPlugin
    from axolotl_psft.trainer import PSFTTrainer as PSFTTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
