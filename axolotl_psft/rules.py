"""Every rule about configurations: what is refused, what is warned of, and why.

One table, applied inside Axolotl's validation, before any model is loaded; printed as
docs/rules.md by `python -m axolotl_psft.rules`. Keys and ranges of the `psft:` block
itself are config.py's.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from axolotl_psft.configuration import (
    Config,
    compares_with,
    is_set,
    is_sharded,
    is_split,
    objective_of,
    restarts_without_adam,
    rounds_updates_away,
    scales_fp16_gradients,
    value,
    zero_stage,
)

_PLACE = re.compile(r"{([\w.]+)}")


@dataclass(frozen=True)
class Rule:
    """A setting that does not go with the rest of a configuration.

    Its message: "key: value conflict: why. remedy." {key} there is another's value.
    """

    setting: str
    """Keys, each with a rule of its own, and patterns of the values that are meant:
    `a b: x, y*`. Without patterns: every value that is not off."""
    why: str
    remedy: str = "Remove it or the psft block"
    conflict: str = "cannot be combined with a psft block"
    when: Callable[[Config], Any] = lambda cfg: True
    """Of the rest of the configuration."""
    kind: Literal["refusal", "warning"] = "refusal"
    since: str = "0.1"
    """Release of this package, or the one of Axolotl that brought the setting."""
    validated: bool = False
    """Whether it is about what Axolotl's validation makes of the YAML."""

    def messages(self, cfg: Config) -> Iterator[str]:
        """What to tell of a configuration."""
        keys, _, values = self.setting.partition(": ")
        for key in keys.split():
            shown = _shown(key, value(cfg, key), values)
            if shown is not None and self.when(cfg):
                text = f"{self.conflict}: {self.why}. {self.remedy}."
                text = _PLACE.sub(lambda match: str(value(cfg, match[1])), text)
                yield f"{key}: {shown} {text}"


def _shown(key: str, value: Any, patterns: str) -> str | None:
    """A value as a message shows it; None: it is not meant."""
    if not patterns:
        # One rank is none of several.
        is_off = not value or ("parallel" in key and str(value) == "1")
        return None if is_off else str(value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    for pattern in patterns.split(", ") if value is not None else ():
        if fnmatchcase(text.lower(), pattern):
            return str(value) if set("*[") & set(pattern) else pattern
    return None


def refuse(cfg: Config, *, validated: bool = False) -> None:
    """Refuse a configuration that the `psft` block cannot work with.

    Args:
        cfg: the YAML as a mapping, with a `psft` block.
        validated: it has been through Axolotl's validation; other rules apply then.

    Raises:
        ValueError: a line for each key at fault, with its value and the remedy.
    """
    rules = [r for r in RULES if r.kind == "refusal" and r.validated == validated]
    if messages := [text for rule in rules for text in rule.messages(cfg)]:
        raise ValueError("\n".join(messages))


def warnings(cfg: Config) -> list[str]:
    """What a validated configuration is warned of; of its block what the YAML set."""
    rules = [rule for rule in RULES if rule.kind == "warning"]
    return [text for rule in rules for text in rule.messages(cfg)]


# ---- The table ----


def _split(setting: str, why: str, remedy: str = "Remove it") -> Rule:
    return Rule(setting, why, remedy, _NOT_SPLIT, is_split)


def _zero(stages: tuple[int, ...], setting: str, why: str, remedy: str) -> Rule:
    conflict = "cannot be combined with DeepSpeed's ZeRO-{zero_stage}"
    return Rule(setting, why, remedy, conflict, lambda cfg: zero_stage(cfg) in stages)


def _packed(key: str) -> Rule:
    return Rule(
        # Of kernels from the hub nobody knows; Axolotl warns there.
        "attn_implementation: not set, fp8",
        "the samples of a packed row would see each other",
        "Use flash_attention_2, or sdpa where flash-attn is not installed",
        f"cannot be combined with {key}: True and a psft block",
        is_set(key),
        validated=True,
    )


def _unread(key: str) -> Rule:
    return Rule(
        f"psft.{key}: *",
        "that objective does not read it",
        "Remove it",
        "has no effect with psft.objective: {psft.objective}",
        lambda cfg: key not in objective_of(cfg).settings,
        "warning",
    )


def _noise(setting: str, remedy: str, reference: str, what: str, whose: str) -> Rule:
    return Rule(
        setting,
        f"{whose} scored without it",
        remedy,
        f"adds noise to {{psft.objective}}'s {what}",
        compares_with(reference),
        "warning",
    )


_NOT_SPLIT = "cannot be combined with tensor_parallel_size: {tensor_parallel_size}"
_SPLIT_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
_OWN_HEAD = "it replaces the loss; psft has a chunked head of its own"
_SLICES = (
    "each rank has a slice of every sequence, and the last token's log-prob of a slice "
    "is lost between two ranks"
)
_SPLIT = (
    "Set it to 1; tensor_parallel_size with psft.sequence_parallel splits the "
    "activations, too"
)
_OLD = ("old policy", "ratio", "old log-probs are")
_INITIAL = ("initial policy", "penalty", "the initial policy is")

RULES: tuple[Rule, ...] = (
    # What is trained. The trainer refuses any other loss function all the same.
    Rule("rl", "psft is supervised fine-tuning", "Remove one of them"),
    Rule("reward_model process_reward_model", "psft trains a language model"),
    Rule("use_eaft", "it replaces the loss by entropy-aware focal training"),
    Rule(
        "use_dft",
        "it replaces the loss, and psft.objective: dft is the same",
        since="Axolotl 0.21",
    ),
    Rule("chunked_cross_entropy cut_cross_entropy liger_cross_entropy", _OWN_HEAD),
    Rule("liger_fused_linear_cross_entropy", _OWN_HEAD),
    Rule("liger_use_token_scaling", "it replaces the loss by a token-weighted one"),
    Rule("kd_trainer", "it replaces the loss by knowledge distillation"),
    Rule("orpo_alpha", "it replaces the loss by ORPO"),
    Rule("label_smoothing_factor", "a smoothed target has no log-prob for a ratio"),
    Rule("diffusion", "it replaces the loss by a diffusion objective"),
    Rule(
        "diffusion_lm diffusion_decision",
        "it trains a diffusion language model",
        since="Axolotl 0.21",
    ),
    Rule("context_parallel_size sequence_parallel_degree", _SLICES, _SPLIT),
    Rule("context_parallel.size", _SLICES, _SPLIT, since="Axolotl 0.21"),
    Rule("expert_parallel_size", "it is not supported yet", "Set it to 1"),
    Rule("trainer_cls", "psft brings its own", "Remove it"),
    Rule("processor_type is_multimodal", "multimodal models are not supported yet"),
    Rule(
        "streaming pretraining_dataset",
        "the initial policy scores every sample before the first step",
        "Use `datasets:` alone",
        "cannot be combined with psft.objective: {psft.objective}",
        compares_with("initial policy"),
    ),
    _packed("sample_packing"),
    _packed("eval_sample_packing"),
    Rule(
        "fp16: true",
        "torch's gradient scaler stops with 'Attempting to unscale FP16 gradients'",
        "Use bf16: true, or an adapter",
        "cannot be combined with full fine-tuning on a GPU",
        scales_fp16_gradients,
        since="0.2",
    ),
    # Optimizers and adapters that are not what they are called in some places.
    Rule(
        "optimizer: lomo, adalomo, *_layerwise",
        "it updates the weights inside each micro-batch's backward pass, before the "
        "rest of the step and the check for NaN",
        "Use adamw_torch_fused",
    ),
    Rule(
        "optimizer",
        "a ReLoRA restart resets the state of Adam only",
        "Use adamw_torch",
        "cannot be combined with relora: true",
        restarts_without_adam,
    ),
    Rule(
        "optimizer: adafactor",
        "its factors of rows and columns need whole weights, not shards",
        "Use adamw_torch_fused",
        "cannot be combined with FSDP or DeepSpeed",
        is_sharded,
    ),
    _zero(
        (1, 2),
        "optimizer: adamw_torch_[48]bit, ao_adamw_*",  # torchao's
        "DeepSpeed cuts its state between the blocks it is quantized in, or finds no "
        "whole block and keeps 32 bits",
        "Use adamw_bnb_8bit",
    ),
    _zero(
        (3,),
        "optimizer: schedule_free*",
        "ZeRO-3 calls it once for each group of weights, and it takes each call for a "
        "step of all",
        "Use ZeRO-2 or adamw_torch_fused",
    ),
    _zero(
        (3,),
        "peft_use_dora",
        "DoRA takes norms of whole weights",
        "Use ZeRO-2, or FSDP2",
    ),
    # Tensor parallelism.
    Rule(
        "psft.sequence_parallel: true",
        "there is none",
        "Set tensor_parallel_size, or remove it",
        "splits work within a tensor-parallel group",
        lambda cfg: not is_split(cfg),
    ),
    Rule(
        "tensor_parallel_size",
        "it is not installed",
        "Run `pip install 'axolotl_psft[megatron]'`",
        "needs Megatron-Core",
        lambda cfg: importlib.util.find_spec("megatron") is None,
    ),
    _split(
        "adapter",
        "only full fine-tuning is split",
        "Remove it, or use `tensor_parallel_size: 1`, whose memory LoRA seldom exceeds",
    ),
    _split("load_in_4bit load_in_8bit gptq qat", "quantized weights are not split"),
    _split("fsdp fsdp_config deepspeed", "Megatron-Core shards everything itself"),
    _split("fp16 float16", "there is no loss scaling", "Use `bf16: true`"),
    _split(
        "activation_offloading",
        "Megatron-Core's step does not offload",
        "Use gradient_checkpointing, or psft.sequence_parallel",
    ),
    _split("layer_offloading gpu_memory_limit max_memory", "each rank holds its shard"),
    _split("torch_compile", "compiled collectives are not tested", "Set it to false"),
    _split("fp32_norms", "all weights have one dtype; the optimizer's are float32"),
    _split("fix_untrained_tokens", "it edits whole embeddings"),
    _split("reinit_weights", "weights are read in slices, not made"),
    _split("embedding_lr embedding_lr_scale lr_groups", "there is one learning rate"),
    _split("auto_find_batch_size", "a rank without memory would start over alone"),
    Rule(
        "optimizer",
        "Megatron-Core has its own",
        f"Use one of {', '.join(_SPLIT_OPTIMIZERS)}",
        _NOT_SPLIT,
        lambda cfg: is_split(cfg) and value(cfg, "optimizer") not in _SPLIT_OPTIMIZERS,
    ),
    # Without effect, or with one that nobody would expect.
    _unread("epsilon"),
    _unread("epsilon_high"),
    _unread("kl_coef"),
    _unread("refresh_steps"),
    _unread("sft_warmup_steps"),
    Rule(
        "psft.kl_coef: 0",
        "the distance is logged only",
        "Use 0.5 (the paper's setting)",
        "does not hold the model near the initial policy",
        compares_with("initial policy"),
        "warning",
    ),
    Rule(
        "psft.epsilon",
        "psft.epsilon_high: {psft.epsilon_high} sets the upper bound, and with "
        "advantage 1 the lower bound never acts",
        "Remove it",
        "has no effect",
        lambda cfg: (
            compares_with("old policy")(cfg)
            and value(cfg, "psft.epsilon_high") is not None
        ),
        "warning",
    ),
    Rule(
        "psft.refresh_steps: 1",
        "the ratio is always 1 and nothing is ever clipped",
        "Use 8 (the paper's setting)",
        "is plain SFT",
        compares_with("old policy"),
        "warning",
    ),
    Rule(
        "learning_rate",
        "Axolotl trains a full model on bf16 weights, in which steps this small are "
        "rounded away",
        "Use tensor_parallel_size (float32 copies of the weights), an adapter, or bf16:"
        " false with tf32: true",
        "with bf16: {bf16}",
        rounds_updates_away,
        "warning",
    ),
    _noise("lora_dropout", "Set lora_dropout: 0", *_OLD),
    _noise("neftune_noise_alpha", "Remove it", *_OLD),
    _noise("lora_dropout", "Set lora_dropout: 0", *_INITIAL),
    _noise("neftune_noise_alpha", "Remove it", *_INITIAL),
    Rule(
        "optimizer: sgd*, schedule_free*",
        "this run cannot be resumed, since torch does not read the optimizer's state "
        "back",
        "Use adamw_torch_fused to resume",
        "in FSDP",
        is_set("fsdp_config"),
        "warning",
    ),
)


def page() -> str:
    """The table in Markdown."""
    lines = [
        "# Rules",
        "",
        "What a YAML with a `psft:` block may not say, and what it is warned of,",
        "before a model is loaded. `…` is the YAML's own value, `since` the release of",
        "this package, or the one of Axolotl that brought the setting. Printed by",
        "`python -m axolotl_psft.rules`.",
    ]
    for kind, title in (("refusal", "Refused"), ("warning", "Warned of")):
        lines += ["", f"## {title}", "", "| setting | | why | remedy | since |"]
        lines += ["|---|---|---|---|---|"]
        for rule in (rule for rule in RULES if rule.kind == kind):
            keys, colon, values = rule.setting.partition(": ")
            settings = ", ".join(f"`{key}{colon}{values}`" for key in keys.split())
            cells = (settings, rule.conflict, rule.why, rule.remedy, rule.since)
            lines.append("| " + _PLACE.sub("…", " | ".join(cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
