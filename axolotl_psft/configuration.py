"""What a configuration says, before or after Axolotl's validation: questions to it.

What follows from the answers is rules.py's table.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from axolotl_psft import objective

Config = Mapping[str, Any]


def tensor_parallel_size(cfg: Config) -> int:
    """``tensor_parallel_size`` of a configuration, before or after validation.

    Raises:
        ValueError: it is not a whole number of at least 1.
    """
    value = cfg.get("tensor_parallel_size") or 1
    if value in (1, "1"):
        value = cfg.get("psft_tensor_parallel_size") or 1
    try:
        size = float(value)
    except (TypeError, ValueError):
        size = 0.0
    if size < 1 or not size.is_integer():
        raise ValueError(
            f"tensor_parallel_size must be a whole number >= 1, got {value!r}. Use the "
            "number of GPUs that share one copy of the model; 1 for none."
        )
    return int(size)


def zero_stage(cfg: Config) -> int:
    """ZeRO's stage, of a DeepSpeed file or the YAML's own block; 0: none."""
    deepspeed = cfg.get("deepspeed")
    if isinstance(deepspeed, str):
        try:
            deepspeed = json.loads(Path(deepspeed).read_text())
        except (OSError, ValueError):
            return 0  # Axolotl's own validation says so.
    return int(_get(_get(deepspeed, "zero_optimization"), "stage") or 0)


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def objective_of(cfg: Config) -> objective.Objective:
    """The objective; SFT where there is none of that name."""
    # A block that is none, or names none, has an error of its own.
    try:
        return objective.find(str(_get(cfg.get("psft"), "objective") or "psft"))
    except ValueError:
        return objective.SFT


_DERIVED: dict[str, Callable[[Config], Any]] = {
    "psft.objective": lambda cfg: objective_of(cfg).name,
    "tensor_parallel_size": tensor_parallel_size,
    "zero_stage": zero_stage,
    "optimizer": lambda cfg: str(cfg.get("optimizer") or "adamw_torch_fused"),
    "attn_implementation": lambda cfg: cfg.get("attn_implementation") or "not set",
}


def value(cfg: Config, key: str) -> Any:
    """Of a key, dotted in a block; with the defaults that rules are about."""
    if key in _DERIVED:
        return _DERIVED[key](cfg)
    found: Any = cfg
    for part in key.split("."):
        found = _get(found, part)
    return found


def is_split(cfg: Config) -> bool:
    """Whether several ranks share one copy of the model."""
    return tensor_parallel_size(cfg) > 1


def is_sharded(cfg: Config) -> bool:
    """Whether FSDP or DeepSpeed shards something."""
    return bool(zero_stage(cfg) or cfg.get("fsdp") or cfg.get("fsdp_config"))


def _trains_weights(cfg: Config) -> bool:
    """Whether the optimizer's weights are the model's own, in their dtype."""
    return not (cfg.get("adapter") or cfg.get("deepspeed") or is_split(cfg))


def rounds_updates_away(cfg: Config) -> bool:
    """Whether weights are bf16 and updates too small for them.

    A bf16 number near 0.02, a usual weight, has its neighbours 1.2e-4 away, and Adam's
    update is about as large as the learning rate: below 1e-5 few of them round to
    anything. DeepSpeed keeps float32 copies of its own.
    """
    is_bf16 = cfg.get("bf16") or cfg.get("bfloat16")
    return bool(is_bf16) and _trains_weights(cfg) and float(cfg["learning_rate"]) < 1e-5


def scales_fp16_gradients(cfg: Config) -> bool:
    """Whether torch\'s scaler would meet gradients in fp16."""
    # In Axolotl bf16: true takes precedence. A CPU has no loss scaling.
    is_fp16 = cfg.get("bf16") is not True and torch.cuda.is_available()
    return is_fp16 and _trains_weights(cfg)


def restarts_without_adam(cfg: Config) -> bool:
    """Whether ReLoRA would reset the state of another optimizer than Adam."""
    is_adam = value(cfg, "optimizer").startswith(("adamw_", "paged_adamw_"))
    return bool(cfg.get("relora")) and not is_adam


def compares_with(reference: str) -> Callable[[Config], bool]:
    """Asks whether the objective compares with that policy."""
    return lambda cfg: objective_of(cfg).reference == reference


def is_set(key: str) -> Callable[[Config], bool]:
    """Asks whether a key says more than off."""
    return lambda cfg: bool(cfg.get(key))
