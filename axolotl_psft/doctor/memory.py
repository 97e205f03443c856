"""An estimate of a run's memory on each GPU, from the model's config alone.

Without activations: they depend on kernels, recomputation and packing.
"""

import re
from typing import Any

import torch
from axolotl.loaders.utils import load_model_config
from torch import nn
from transformers import AutoModelForCausalLM

from axolotl_psft.configuration import tensor_parallel_size, zero_stage

# Bytes of float32 state a weight has, by a part of the optimizer's name; others: 8.
_STATES = {"sgd": 0, "adafactor": 0, "4bit": 1, "8bit": 2, "fp8": 2}
_STATES |= {"lion": 4, "muon": 4, "rmsprop": 4, "adagrad": 4}
# Of the logits that the head has at a time on a GPU: rows, vocabulary.
_TILE = (8192, 8192)
_GIB = 2**30


def in_words(cfg: Any, num_gpus: int) -> str:
    """What a GPU needs, and what for.

    Args:
        cfg: Axolotl's validated configuration.
        num_gpus: of the whole run.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            load_model_config(cfg), trust_remote_code=bool(cfg.trust_remote_code)
        )
    num_weights = sum(p.numel() for p in model.parameters())
    num_trained = _num_adapter_weights(cfg, model) if cfg.adapter else num_weights
    parts = _bytes(cfg, num_weights, num_trained, num_gpus)
    tp_size = tensor_parallel_size(cfg)
    rows = min(cfg.micro_batch_size * cfg.sequence_len, _TILE[0])
    parts["loss head"] = rows * min(model.config.vocab_size // tp_size, _TILE[1]) * 4
    listed = ", ".join(f"{part} {size / _GIB:.2f}" for part, size in parts.items())
    return (
        f"an estimate: {sum(parts.values()) / _GIB:.2f} GiB and activations on each of "
        f"{num_gpus} GPU(s): {listed}. {num_trained / 1e6:,.1f}M of "
        f"{num_weights / 1e6:,.1f}M weights are trained"
    )


def _bytes(
    cfg: Any, num_weights: int, num_trained: int, num_gpus: int
) -> dict[str, float]:
    tp_size = tensor_parallel_size(cfg)
    is_wide = not (cfg.bf16 or cfg.bfloat16 or cfg.fp16 or cfg.float16)
    held = 4.0 if is_wide else 2.0
    trained = 4.0 if cfg.adapter else held
    states = next((n for part, n in _STATES.items() if part in str(cfg.optimizer)), 8)
    gradients = trained
    if not is_wide and (tp_size > 1 or cfg.deepspeed):
        # Both have float32 copies of the weights, Megatron-Core float32 gradients, too.
        optimizer = states + 4.0
        gradients = 4.0 if tp_size > 1 else trained
    else:
        # Quantized states are as narrow as they are, others as wide as the weights.
        optimizer = states * trained / 4 if states > 2 else states
    if cfg.load_in_4bit or cfg.load_in_8bit:
        held = 0.5 if cfg.load_in_4bit else 1.0
    sizes = {
        "optimizer": num_trained * optimizer,
        "gradients": num_trained * gradients,
        "weights": num_weights * held + (num_trained * trained if cfg.adapter else 0),
    }
    # Of these, in this order, as many are split over the data-parallel ranks.
    num_sharded = 3 if cfg.fsdp or cfg.fsdp_config else zero_stage(cfg)
    num_sharded = 1 if tp_size > 1 else num_sharded
    width = max(num_gpus // tp_size, 1)
    return {
        part: size / tp_size / (width if i < num_sharded else 1)
        for i, (part, size) in enumerate(sizes.items())
    }


def _num_adapter_weights(cfg: Any, model: nn.Module) -> int:
    """Two matrices of rank r for each layer that is meant."""
    meant, total = cfg.lora_target_modules or [], 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name.endswith("lm_head"):
            continue
        last = name.rpartition(".")[2]
        is_named = (
            re.fullmatch(meant, name) if isinstance(meant, str) else last in meant
        )
        if cfg.lora_target_linear or is_named:
            total += (cfg.lora_r or 0) * (module.in_features + module.out_features)
    return total
