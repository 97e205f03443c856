"""The `psft:` block of an Axolotl YAML, and every rule about configuration.

Rules run inside Axolotl's own validation, before any model is loaded. What a run does
with the settings lives in trainer.py.
"""

import difflib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger
from pydantic import BaseModel, ConfigDict, Field, model_validator

from axolotl_psft import objective

LOG = get_logger(__name__)

# Of each number: whether it is whole, what it must be, what else to write.
_NUMBERS: dict[str, tuple[bool, Callable[[float], bool], str, str]] = {
    "epsilon": (False, lambda x: x > 0, "> 0", "0.2 (PPO's usual setting)"),
    "epsilon_high": (
        False,
        lambda x: x >= 0,
        ">= 0",
        "0.28 (the paper's setting), or leave it out to use epsilon",
    ),
    "refresh_steps": (
        True,
        lambda x: x >= 1,
        ">= 1",
        "8 (the paper's setting); 1 is plain SFT",
    ),
    "sft_warmup_steps": (True, lambda x: x >= 0, ">= 0", "0 for none"),
    "kl_coef": (
        False,
        lambda x: 0 <= x < math.inf,
        ">= 0 and finite",
        "0.5 (the paper's setting)",
    ),
}

# For better messages: the trainer refuses any loss function that arrives all the same.
_LOSS_OPTIONS = {
    "use_eaft": "it replaces the loss by entropy-aware focal training",
    "use_dft": "it replaces the loss, and psft.objective: dft is the same",
    "chunked_cross_entropy": "it replaces the loss; psft has a chunked head of its own",
    "cut_cross_entropy": "it replaces the loss; psft has a chunked head of its own",
    "liger_cross_entropy": "it replaces the loss; psft has a chunked head of its own",
    "liger_fused_linear_cross_entropy": (
        "it fuses the loss into the model's forward; psft has a chunked head of its own"
    ),
    "liger_use_token_scaling": "it replaces the loss by a token-weighted one",
    "kd_trainer": "it replaces the loss by knowledge distillation",
    "orpo_alpha": "it replaces the loss by ORPO",
    "label_smoothing_factor": "a smoothed target has no log-prob to form a ratio with",
    "diffusion": "it replaces the loss by a diffusion objective",
    "diffusion_lm": "it trains a diffusion language model",
    "diffusion_decision": "it trains a diffusion language model",
}

_CONTEXT_PARALLEL = (
    "each rank has a slice of every sequence, and the last token's log-prob of a slice "
    "is lost between two ranks. Set it to 1; tensor_parallel_size with "
    "psft.sequence_parallel splits the activations, too"
)
_UNSUPPORTED = {
    "context_parallel_size": _CONTEXT_PARALLEL,
    "sequence_parallel_degree": _CONTEXT_PARALLEL,
    "context_parallel": _CONTEXT_PARALLEL,
    "expert_parallel_size": "expert parallelism is not supported yet. Set it to 1",
}

# Why each cannot be set together with tensor_parallel_size, and what to do.
_NOT_TENSOR_PARALLEL = {
    "adapter": "only full fine-tuning is split. Remove `adapter`, or use "
    "`tensor_parallel_size: 1`, whose memory LoRA seldom exceeds",
    "load_in_4bit": "quantized weights are not split. Set it to false",
    "load_in_8bit": "quantized weights are not split. Set it to false",
    "gptq": "quantized weights are not split. Set it to false",
    "qat": "quantized weights are not split. Remove it",
    "fsdp": "Megatron-Core shards weights and optimizer itself. Remove it",
    "fsdp_config": "Megatron-Core shards weights and optimizer itself. Remove it",
    "deepspeed": "Megatron-Core shards weights and optimizer itself. Remove it",
    "fp16": "there is no loss scaling. Use `bf16: true`",
    "float16": "there is no loss scaling. Use `bf16: true`",
    "activation_offloading": "Megatron-Core's step does not offload. Use "
    "gradient_checkpointing, or psft.sequence_parallel",
    "layer_offloading": "each rank holds its shard. Remove it",
    "torch_compile": "compiled collectives are not tested. Set it to false",
    "fp32_norms": "all weights have one dtype; the optimizer's are float32. Remove it",
    "fix_untrained_tokens": "it edits whole embeddings. Remove it",
    "reinit_weights": "weights are read in slices, not made. Remove it",
    "embedding_lr": "one learning rate is supported. Remove it",
    "embedding_lr_scale": "one learning rate is supported. Remove it",
    "lr_groups": "one learning rate is supported. Remove it",
    "auto_find_batch_size": "a rank without memory would start over alone. Remove it",
    "gpu_memory_limit": "each rank holds its shard. Remove it",
    "max_memory": "each rank holds its shard. Remove it",
}

# Of scored log-probs: what is computed from them, and whose they are.
_SCORED = {
    "old policy": ("ratio", "old log-probs are"),
    "initial policy": ("penalty", "the initial policy is"),
}

# Attention that gets packed rows as one sequence each. Of kernels from the hub nobody
# knows; Axolotl warns there.
_SEE_EACH_OTHER = (None, "fp8")
# torchao's, with a state quantized in blocks.
_LOW_BIT_OPTIMIZERS = (
    *("adamw_torch_8bit", "adamw_torch_4bit"),
    *("ao_adamw_8bit", "ao_adamw_4bit", "ao_adamw_fp8"),
)

_TENSOR_PARALLEL_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


class PSFTConfig(BaseModel):
    """The settings of the `psft:` block."""

    model_config = ConfigDict(extra="forbid")

    epsilon: float = Field(
        default=0.2,
        description="Trust region. The upper bound 1 + epsilon where epsilon_high is "
        "not set; otherwise without effect.",
    )
    epsilon_high: float | None = Field(
        default=None,
        description="Upper bound of the ratio: a token whose ratio is above "
        "1 + epsilon_high gets no gradient. Default: epsilon.",
    )
    refresh_steps: int = Field(
        default=8,
        description="Optimizer steps between two refreshes of the old policy.",
    )
    sft_warmup_steps: int = Field(
        default=0, description="Optimizer steps of plain SFT before PSFT starts."
    )
    sequence_parallel: bool = Field(
        default=False,
        description="With tensor_parallel_size: split the hidden states between blocks "
        "along the sequence. Less memory for activations, the same losses.",
    )
    objective: str = Field(
        default="psft",
        description="`sft`, `sft_kl`, `dft` and `asft` train baselines with the same "
        "metrics; an import path is an objective of your own.",
    )
    kl_coef: float = Field(
        default=0.5,
        description="With objective: sft_kl or asft, the weight of the KL term that "
        "holds the model near the initial policy.",
    )

    check_data_files: bool = Field(
        default=True,
        description="Read local data files through before Axolotl does, so that a row "
        "at fault is an error with file and line.",
    )

    @model_validator(mode="before")
    @classmethod
    def _keys_and_values(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise ValueError(
                f"psft must be a block of settings, got {data!r}. "
                "Write `psft: {}` to use the defaults."
            )
        for key in data:
            if key not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                close = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                hint = f"Did you mean `{close[0]}`? " if close else ""
                raise ValueError(
                    f"psft.{key} is not a setting, got {data[key]!r}. "
                    f"{hint}Known settings: {known}."
                )
        try:
            objective.find(str(data.get("objective", "psft")))
        except ValueError as error:
            raise ValueError(
                f"psft.objective must be an objective, got {data['objective']!r}. "
                f"{error}"
            ) from error
        for key in ("sequence_parallel", "check_data_files"):
            default = cls.model_fields[key].default
            if not isinstance(data.get(key, default), bool):
                raise ValueError(
                    f"psft.{key} must be true or false, got {data[key]!r}. Use "
                    f"{str(default).lower()}."
                )
        # Here and not in field types: pydantic's own messages know no remedy, and it
        # takes `true` for 1.
        return {**data, **_numbers(data)}

    def settings_without_effect(self) -> list[str]:
        """Warnings about settings that change nothing, each one sentence or two."""
        rule = objective.find(self.objective)
        unused = self.model_fields_set & _NUMBERS.keys() - rule.settings
        warnings = [
            f"psft.{key} has no effect with psft.objective: {self.objective}."
            for key in sorted(unused)
        ]
        if rule.reference == "initial policy" and self.kl_coef == 0:
            warnings.append(
                "psft.kl_coef: 0 does not hold the model near the initial policy; the "
                "distance is logged only. Use 0.5 (the paper's setting)."
            )
        if rule.reference != "old policy":
            return warnings
        if "epsilon" in self.model_fields_set and self.epsilon_high is not None:
            warnings.append(
                f"psft.epsilon: {self.epsilon} has no effect: psft.epsilon_high: "
                f"{self.epsilon_high} sets the upper bound, and with advantage 1 the "
                "lower bound never acts."
            )
        if self.refresh_steps == 1:
            warnings.append(
                "psft.refresh_steps: 1 is plain SFT: the ratio is always 1 and nothing "
                "is ever clipped. Use 8 (the paper's setting)."
            )
        return warnings


def _numbers(block: Mapping[str, Any]) -> dict[str, float | None]:
    """The block's numbers; YAML gives some as strings (2e-1).

    Raises:
        ValueError: names the key, its value and the remedy.
    """
    numbers: dict[str, float | None] = {}
    for key, (whole, holds, bound, remedy) in _NUMBERS.items():
        if key not in block or (key == "epsilon_high" and block[key] is None):
            continue
        value = block[key]
        kind = "a whole number" if whole else "a number"
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isnan(number) or (whole and not number.is_integer()):
            raise ValueError(f"psft.{key} must be {kind}, got {value!r}. Use {remedy}.")
        if not holds(number):
            raise ValueError(f"psft.{key} must be {bound}, got {value}. Use {remedy}.")
        numbers[key] = int(number) if whole else number
    return numbers


class PSFTArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration: the `psft` key and its rules."""

    psft: PSFTConfig | None = Field(
        default=None, description="Proximal SFT; absent: the plugin does nothing."
    )
    psft_tensor_parallel_size: int | None = Field(
        default=None,
        description="Not for users: the plugin moves tensor_parallel_size here, since "
        "Axolotl would start its own tensor parallelism where it sees it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fits_the_rest(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("psft") is None:
            return data
        check_combination(data)
        tp_size = tensor_parallel_size(data)
        if tp_size == 1:
            return data
        return {**data, "tensor_parallel_size": 1, "psft_tensor_parallel_size": tp_size}

    @model_validator(mode="after")
    def _fits_what_axolotl_made_of_it(self) -> "PSFTArgs":
        if self.psft is not None:
            cfg = self.model_dump()
            check_packing(cfg)
            warnings = self.psft.settings_without_effect()
            warnings += combination_warnings(cfg)
            for warning in warnings:
                _warn_once(warning)
        return self


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    # Axolotl validates a configuration more than once.
    if message not in _warned:
        _warned.add(message)
        LOG.warning(message)


def check_combination(cfg: Mapping[str, Any]) -> None:
    """Refuse an Axolotl configuration that the `psft` block cannot work with.

    Args:
        cfg: the YAML as a mapping, with a `psft` block.

    Raises:
        ValueError: names the key, its value and the remedy.
    """
    if cfg.get("rl"):
        _refuse("rl", cfg["rl"], "psft is supervised fine-tuning. Remove one of them")
    for key in ("reward_model", "process_reward_model"):
        if cfg.get(key):
            _refuse(key, cfg[key], "psft trains a language model. Remove one of them")
    for key, reason in _LOSS_OPTIONS.items():
        if cfg.get(key):
            _refuse(key, cfg[key], f"{reason}. Remove `{key}` or the psft block")
    for key, what in _UNSUPPORTED.items():
        value = cfg.get(key)
        if isinstance(value, Mapping):  # context_parallel: {size: 2}
            key, value = f"{key}.size", value.get("size")
        if value and value not in (1, "1"):
            _refuse(key, value, what)
    if cfg.get("trainer_cls"):
        _refuse("trainer_cls", cfg["trainer_cls"], "psft brings its own. Remove it")
    if cfg.get("processor_type") or cfg.get("is_multimodal"):
        _refuse(
            "processor_type",
            cfg.get("processor_type"),
            "multimodal models are not supported yet. Remove the psft block",
        )
    _check_stream(cfg)
    _check_optimizer(cfg)
    _check_zero(cfg)
    _check_tensor_parallel(cfg)


def check_packing(cfg: Mapping[str, Any]) -> None:
    """Refuse packed rows whose samples would see each other.

    Axolotl warns of it; here it would also be other numbers than unpacked.

    Args:
        cfg: after validation, where attn_implementation has replaced older keys.

    Raises:
        ValueError: names the key, its value and the remedy.
    """
    for key in ("sample_packing", "eval_sample_packing"):
        if cfg.get(key) and cfg.get("attn_implementation") in _SEE_EACH_OTHER:
            _refuse(
                "attn_implementation",
                cfg.get("attn_implementation") or "not set",
                "the samples of a packed row would see each other. Use "
                "flash_attention_2, or sdpa where flash-attn is not installed",
                other=f"{key}: {cfg[key]} and a psft block",
            )


def tensor_parallel_size(cfg: Mapping[str, Any]) -> int:
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


def _check_stream(cfg: Mapping[str, Any]) -> None:
    for key in ("streaming", "pretraining_dataset"):
        rule = _objective(cfg)
        if cfg.get(key) and rule.reference == "initial policy":
            why = "every sample is scored before the first step. Use `datasets:` alone"
            _refuse(key, cfg[key], why, other=f"psft.objective: {rule.name}")


def _objective(cfg: Mapping[str, Any]) -> objective.Objective:
    # A block that is none, or names none, has an error of its own.
    block = cfg.get("psft")
    name = block.get("objective", "psft") if isinstance(block, Mapping) else "psft"
    try:
        return objective.find(str(name))
    except ValueError:
        return objective.SFT


def _check_optimizer(cfg: Mapping[str, Any]) -> None:
    """Optimizers and adapters that are not what they are called in some places."""
    optimizer = str(cfg.get("optimizer") or "adamw_torch_fused")
    if optimizer in ("lomo", "adalomo") or optimizer.endswith("_layerwise"):
        why = (
            "it updates the weights inside each micro-batch's backward pass, before the"
            " rest of the step and the check for NaN. Use adamw_torch_fused"
        )
        _refuse("optimizer", optimizer, why)
    if cfg.get("relora") and not optimizer.startswith(("adamw_", "paged_adamw_")):
        why = "a ReLoRA restart resets the state of Adam only. Use adamw_torch"
        _refuse("optimizer", optimizer, why, other="relora: true")
    is_sharded = _zero_stage(cfg) or cfg.get("fsdp") or cfg.get("fsdp_config")
    if optimizer == "adafactor" and is_sharded:
        why = (
            "its factors of rows and columns need whole weights, not shards. Use "
            "adamw_torch_fused"
        )
        _refuse("optimizer", optimizer, why, other="FSDP or DeepSpeed")


def _check_zero(cfg: Mapping[str, Any]) -> None:
    """What DeepSpeed's stages do not do right, or stop at in the first step."""
    stage = _zero_stage(cfg)
    optimizer = str(cfg.get("optimizer"))
    if stage in (1, 2) and optimizer in _LOW_BIT_OPTIMIZERS:
        why = (
            "DeepSpeed cuts its state between the blocks it is quantized in, or finds "
            "no whole block and keeps 32 bits. Use adamw_bnb_8bit"
        )
        _refuse("optimizer", optimizer, why, other=f"DeepSpeed's ZeRO-{stage}")
    if stage != 3:
        return
    zero_3 = "DeepSpeed's ZeRO-3"
    if optimizer.startswith("schedule_free"):
        why = (
            "ZeRO-3 calls it once for each group of weights, and it takes each call for"
            " a step of all. Use ZeRO-2 or adamw_torch_fused"
        )
        _refuse("optimizer", optimizer, why, other=zero_3)
    if cfg.get("peft_use_dora"):
        why = "DoRA takes norms of whole weights. Use ZeRO-2, or FSDP2"
        _refuse("peft_use_dora", True, why, other=zero_3)


def _zero_stage(cfg: Mapping[str, Any]) -> int:
    """ZeRO's stage, of a DeepSpeed file or the YAML's own block; 0: none."""
    deepspeed = cfg.get("deepspeed")
    if isinstance(deepspeed, str):
        try:
            deepspeed = json.loads(Path(deepspeed).read_text())
        except (OSError, ValueError):
            return 0  # Axolotl's own validation says so.
    if not isinstance(deepspeed, Mapping):
        return 0
    zero = deepspeed.get("zero_optimization")
    return int(zero.get("stage") or 0) if isinstance(zero, Mapping) else 0


def _check_tensor_parallel(cfg: Mapping[str, Any]) -> None:
    size = tensor_parallel_size(cfg)
    if size == 1:
        if isinstance(cfg["psft"], Mapping) and cfg["psft"].get("sequence_parallel"):
            raise ValueError(
                "psft.sequence_parallel: true splits work within a tensor-parallel "
                "group, and there is none. Set tensor_parallel_size, or remove it."
            )
        return
    if importlib.util.find_spec("megatron") is None:
        raise ValueError(
            f"tensor_parallel_size: {size} needs Megatron-Core. "
            "`pip install 'axolotl_psft[megatron]'`."
        )
    other = f"tensor_parallel_size: {size}"
    for key, why in _NOT_TENSOR_PARALLEL.items():
        if cfg.get(key):
            _refuse(key, cfg[key], why, other=other)
    optimizer = cfg.get("optimizer") or "adamw_torch_fused"
    if optimizer not in _TENSOR_PARALLEL_OPTIMIZERS:
        names = ", ".join(_TENSOR_PARALLEL_OPTIMIZERS)
        why = f"Megatron-Core has its own. Use one of {names}"
        _refuse("optimizer", optimizer, why, other=other)


def _refuse(key: str, value: Any, why: str, *, other: str = "a psft block") -> None:
    raise ValueError(f"{key}: {value} cannot be combined with {other}: {why}.")


def combination_warnings(cfg: Mapping[str, Any]) -> list[str]:
    """Settings elsewhere in the YAML that psft makes ineffective or noisy."""
    rule = _objective(cfg)
    warnings = []
    if (
        rule.reference == "old policy"
        and cfg.get("loss_watchdog_threshold") is not None
    ):
        warnings.append(
            f"loss_watchdog_threshold: {cfg['loss_watchdog_threshold']} has no effect "
            "with psft: the loss stays near -1. Watch psft/nll."
        )
    if _trains_bf16_weights(cfg):
        warnings.append(
            f"learning_rate: {cfg['learning_rate']} with bf16: {cfg['bf16']}: Axolotl "
            "trains a full model on bf16 weights, in which steps this small are rounded"
            " away. Use tensor_parallel_size (float32 copies of the weights), an "
            "adapter, or bf16: false with tf32: true."
        )
    for key, remedy in (
        ("lora_dropout", "Set lora_dropout: 0"),
        ("neftune_noise_alpha", "Remove it"),
    ):
        if cfg.get(key) and rule.reference is not None:
            noisy, scored = _SCORED[rule.reference]
            warnings.append(
                f"{key}: {cfg[key]} adds noise to {rule.name}'s {noisy}: {scored} "
                f"scored without it. {remedy}."
            )
    optimizer = str(cfg.get("optimizer"))
    if cfg.get("fsdp_config") and optimizer.startswith(("sgd", "schedule_free")):
        warnings.append(
            f"optimizer: {optimizer} in FSDP: this run cannot be resumed, since torch "
            "does not read the optimizer's state back. Use adamw_torch_fused to resume."
        )
    return warnings


def _trains_bf16_weights(cfg: Mapping[str, Any]) -> bool:
    """Whether weights are bf16 and updates too small for them.

    A bf16 number near 0.02, a usual weight, has its neighbours 1.2e-4 away, and Adam's
    update is about as large as the learning rate: below 1e-5 few of them round to
    anything. DeepSpeed keeps float32 copies of its own.
    """
    if cfg.get("adapter") or cfg.get("deepspeed") or tensor_parallel_size(cfg) > 1:
        return False
    learning_rate = cfg.get("learning_rate")
    return bool(cfg.get("bf16") or cfg.get("bfloat16")) and (
        learning_rate is not None and float(learning_rate) < 1e-5
    )
