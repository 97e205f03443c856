"""The forward step: a causal LM and a micro-batch in, token log-probs out.

`token_logprobs` is the one way there: training, scoring and evaluation call it, and a
loss is computed after it, where there is one. Below is what teaches a Hugging Face
model to return log-probs in place of logits; the maths of its head is logprobs.py.

The model's forward is replaced on the instance and its head takes targets, inside
whatever wraps the model later (PEFT, DDP, FSDP2, DeepSpeed, torch.compile), so that
every hook of theirs fires. Without ``logprob_targets`` the model is what it was.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from axolotl_psft.logprobs import linear_logprobs, vocab_parallel_logprobs
from axolotl_psft.packing import (
    IGNORE_INDEX,
    Batch,
    shift_left,
    shift_right,
    targets_of,
)

_MARK = "_axolotl_psft_original_forward"

# Of a micro-batch: what is not the model's.
_NOT_FOR_THE_MODEL = ("labels", "old_logprobs")


@dataclass
class TokenLogprobs(ModelOutput):
    """What the forward step returns; every field is [B, S].

    Entry [b, t] belongs to token t of row b, as its label does.
    """

    logprobs: Tensor
    """float32, nats; 0 where the target is -100."""
    # ModelOutput demands None as the default of every field but the first.
    entropy: Tensor = None  # type: ignore[assignment]
    """float32, nats, of the distribution that predicts token t. No gradient."""
    mask: Tensor = None  # type: ignore[assignment]
    """bool, True for active tokens."""


def token_logprobs(
    model: nn.Module, batch: Batch, *, with_entropy: bool = True
) -> TokenLogprobs:
    """Log-probs of a micro-batch's supervised tokens under ``model``, as it is.

    Gradients and dropout are as the caller has set them.

    Args:
        model: after :func:`install_logprobs_forward`, in whatever wrapper.
        batch: on the model's device: ``input_ids`` and ``labels`` [B, S],
            ``position_ids`` [B, S] where packed, what packing.py added.
        with_entropy: False returns zeros for the entropies, which then cost nothing.

    Raises:
        TypeError: the wrapper has cast the log-probs to 16 bits.
    """
    inputs = {k: v for k, v in batch.items() if k not in _NOT_FOR_THE_MODEL}
    output = model(
        **inputs, logprob_targets=targets_of(batch), with_entropy=with_entropy
    )
    if output.logprobs.dtype.itemsize < 4:
        raise TypeError(
            f"psft: log-probs came back as {output.logprobs.dtype}, not float32: "
            f"{type(model).__name__} casts the model's outputs. Turn that off in its "
            "mixed-precision policy."
        )
    return output


@dataclass(frozen=True)
class LogitsTransform:
    """What a model family does to its logits after the head."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config: Any) -> "LogitsTransform":
        """Read it from a Hugging Face model config (Gemma, Granite, Cohere)."""
        text = config.get_text_config()
        scale = getattr(text, "logit_scale", None) or 1.0
        divisor = getattr(text, "logits_scaling", None) or 1.0
        return cls(scale / divisor, getattr(text, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


class LogprobsHead(nn.Module):
    """An output head: log-probs where it is given targets, logits elsewhere."""

    weight: Any
    bias: Any
    transform = LogitsTransform()
    tp_group: dist.ProcessGroup | None = None
    """The ranks that hold the vocabulary's shards; None: it is whole."""

    def logprobs(self, hidden: Tensor, targets: Tensor, **options: Any) -> Any:
        """See :func:`axolotl_psft.linear_logprobs`."""
        return linear_logprobs(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            tp_group=self.tp_group,
            logits_scale=self.transform.scale,
            softcap=self.transform.softcap,
            **options,
        )


class DenseHead(LogprobsHead, nn.Linear):
    """What a plain lm_head becomes; megatron/layers.py has the vocabulary-parallel."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None = None, **options: Any
    ) -> Any:
        if targets is None:
            return super().forward(hidden)
        return self.logprobs(hidden, targets, **options)


def unwrap_peft(model: Any) -> PreTrainedModel:
    """The Hugging Face causal LM inside ``model`` (itself, or what PEFT wraps)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def install_logprobs_forward(model: PreTrainedModel) -> None:
    """Let ``model(..., logprob_targets=[B, S])`` return :class:`TokenLogprobs`.

    ``num_active``, the number of targets that are not -100, spares the head a wait for
    the device; without ``with_entropy`` entropies are 0. No cache is built. Idempotent.

    Raises:
        ValueError: if the model has no separate backbone and output head, or adds a
            loss of its own (MoE load balancing) that this objective would drop.
    """
    if hasattr(model, _MARK):
        return
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        raise ValueError(
            f"psft: {type(model).__name__} has no output head on top of a backbone. "
            "PSFT trains causal language models (AutoModelForCausalLM)."
        )
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise ValueError(
            "psft: output_router_logits is true in the model's config, got a "
            f"{type(model).__name__} that adds a load-balancing loss, which PSFT does "
            "not. Set `overrides_of_model_config: {output_router_logits: false}`."
        )
    transform = LogitsTransform.from_config(model.config)
    if type(head) is nn.Linear:
        _make_dense_head(head)
    if isinstance(head, LogprobsHead):
        head.transform = transform

    def forward(
        original: Callable[..., Any],
        *args: Any,
        logprob_targets: Tensor | None = None,
        num_active: int | None = None,
        with_entropy: bool = True,
        **kwargs: Any,
    ) -> Any:
        if logprob_targets is None:
            return original(*args, **kwargs)
        hidden = model.base_model(*args, **{**kwargs, "use_cache": False})[0]
        targets = shift_left(logprob_targets)
        options: Any = {"num_active": num_active, "with_entropy": with_entropy}
        flat = hidden.flatten(0, 1), targets.flatten()
        head = model.get_output_embeddings()
        if isinstance(head, LogprobsHead):
            logprobs, entropy = head(*flat, **options)
        else:
            logprobs, entropy = _logprobs_of_logits(head, transform, *flat, **options)
        return TokenLogprobs(
            logprobs=shift_right(logprobs.view(targets.shape)),
            entropy=shift_right(entropy.view(targets.shape)),
            mask=logprob_targets != IGNORE_INDEX,
        )

    _replace_forward(model, forward)


def prepare_model(model: Any, accelerator: Any) -> PreTrainedModel:
    """The causal LM in a trainer's ``model``, made ready to be asked for log-probs.

    Raises:
        ValueError: see :func:`install_logprobs_forward`.
    """
    _keep_output_dtype(getattr(accelerator.state, "fsdp_plugin", None))
    causal_lm = unwrap_peft(model)
    _keep_4bit_weights(causal_lm)
    install_logprobs_forward(causal_lm)
    return causal_lm


def _keep_output_dtype(fsdp_plugin: Any) -> None:
    """Let FSDP2 return float32 log-probs from a model of 16-bit weights.

    accelerate's policy casts every module's outputs to the weights' dtype: for hidden
    states a cast that changes nothing, for log-probs one that loses 16 bits.
    """
    policy = getattr(fsdp_plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        fsdp_plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def _keep_4bit_weights(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights on a CPU when they are first evaluated.

    Packed for inference in bf16, once and for all, they give training other log-probs
    and other gradients; scoring evaluates them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def _forward_name(module: nn.Module) -> str:
    """Under accelerate's hooks, where there are any (``device_map``).

    They move inputs to where the weights are.
    """
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def _make_dense_head(head: nn.Linear) -> None:
    head.__class__ = DenseHead
    if hasattr(head, "_hf_hook"):
        setattr(head, _forward_name(head), DenseHead.forward.__get__(head))


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let ``forward``, whose first argument is the original, take its place."""
    name = _forward_name(module)
    original = getattr(module, name)
    setattr(module, _MARK, original)

    # The Trainer reads the names of a model's inputs off the signature.
    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return forward(original, *args, **kwargs)

    setattr(module, name, replacement)


def _logprobs_of_logits(
    head: nn.Module,
    transform: LogitsTransform,
    hidden: Tensor,
    targets: Tensor,
    *,
    num_active: int | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """[T, H] and [T] -> log-probs and entropy [T], by a head that is no plain matrix.

    LoRA on lm_head, a quantized one: its logits must exist, but only for the rows that
    need them.
    """
    active = targets != IGNORE_INDEX
    if num_active is None:
        num_active = int(active.sum())
    rows = torch.nonzero_static(active, size=num_active).squeeze(1)
    logits = transform(head(hidden[rows]))
    logprobs, entropy = vocab_parallel_logprobs(
        logits, targets[rows], with_entropy=with_entropy, num_active=num_active
    )
    empty = logprobs.new_zeros(targets.shape)
    return empty.index_copy(0, rows, logprobs), empty.index_copy(0, rows, entropy)


@torch.no_grad()
def check_against_logits(
    model: nn.Module, input_ids: Tensor, *, low_precision: bool
) -> None:
    """Compare log-probs with those of the model's own logits, once, on a few tokens.

    An architecture may do to its logits what this module does not know of; then
    training would go on with wrong probabilities. This stops it before the first step.

    Args:
        model: after :func:`install_logprobs_forward`, in whatever wrapper.
        input_ids: [B, S]; the first 16 tokens of the first row are used.
        low_precision: whether the model computes in 16 bits.

    Raises:
        ValueError: if they differ by more than rounding explains.
    """
    tokens = input_ids[:1, :16]
    ours = token_logprobs(model, {"input_ids": tokens, "labels": tokens}).logprobs[
        :, 1:
    ]
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    own = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    if not own.numel():
        return
    error = (ours - own).abs().mean().item()
    # Half precision rounds a logit of 50 by up to 0.2; TF32 matmuls by 1e-2. A missing
    # scale or cap is off by whole nats on a trained model.
    limit = 0.25 if low_precision else 0.02
    if not error <= limit:
        raise ValueError(
            f"psft: log-probs of {type(model).__name__} differ from its own logits by "
            f"{error:.3g} nats a token (limit {limit}). The model transforms its "
            "logits in a way axolotl_psft does not know: please report the model type."
        )
