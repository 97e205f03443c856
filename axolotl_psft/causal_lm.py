"""Teaches a Hugging Face causal LM to return token log-probs instead of logits.

The model's forward and its head's forward are replaced on the instance, inside
whatever wraps the model later (PEFT, DDP, FSDP2, DeepSpeed, torch.compile), so that
every hook of theirs fires. Without ``logprob_targets`` the model is what it was.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from axolotl_psft.logprobs import linear_logprobs, vocab_parallel_logprobs
from axolotl_psft.packing import IGNORE_INDEX, shift_left, shift_right

_MARK = "_axolotl_psft_original_forward"


@dataclass
class TokenLogprobsOutput(ModelOutput):
    """What the model returns for ``logprob_targets``; every field is [B, S].

    Entry [b, t] belongs to token t of row b, as its label does.
    """

    logprobs: Tensor
    """float32, nats; 0 where the target is -100."""
    # ModelOutput demands None as the default of every field but the first.
    entropy: Tensor = None  # type: ignore[assignment]
    """float32, nats, of the distribution that predicts token t. No gradient."""
    mask: Tensor = None  # type: ignore[assignment]
    """bool, True for active tokens."""
    old_logprobs: Tensor | None = None
    """As they were given, for the loss."""


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


def unwrap_peft(model: Any) -> PreTrainedModel:
    """The Hugging Face causal LM inside ``model`` (itself, or what PEFT wraps)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def install_logprobs_forward(model: PreTrainedModel) -> None:
    """Let ``model(..., logprob_targets=[B, S])`` return :class:`TokenLogprobsOutput`.

    ``num_active``, the number of targets that are not -100, spares the head a wait for
    the device; without ``with_entropy`` entropies are 0 and cost nothing;
    ``old_logprobs`` are handed through to the output. Idempotent.
    ``labels`` are ignored in such a call and no cache is built.

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
    # A vocabulary-parallel head (megatron/layers.py) has a group.
    if type(head) is nn.Linear or hasattr(head, "tp_group"):
        _install_head_forward(head, transform)

    def forward(
        original: Callable[..., Any],
        *args: Any,
        logprob_targets: Tensor | None = None,
        num_active: int | None = None,
        with_entropy: bool = True,
        old_logprobs: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if logprob_targets is None:
            return original(*args, **kwargs)
        kwargs.pop("labels", None)
        hidden = model.base_model(*args, **{**kwargs, "use_cache": False})[0]
        targets = shift_left(logprob_targets)
        logprobs, entropy = _head_logprobs(
            model.get_output_embeddings(),
            hidden.flatten(0, 1),
            targets.flatten(),
            num_active,
            with_entropy,
            transform,
        )
        return TokenLogprobsOutput(
            logprobs=shift_right(logprobs.view(targets.shape)),
            entropy=shift_right(entropy.view(targets.shape)),
            mask=logprob_targets != IGNORE_INDEX,
            old_logprobs=old_logprobs,
        )

    _replace_forward(model, forward)


def _install_head_forward(head: nn.Linear, transform: LogitsTransform) -> None:
    def forward(
        original: Callable[..., Any],
        hidden: Tensor,
        targets: Tensor | None = None,
        num_active: int | None = None,
        with_entropy: bool = True,
    ) -> Any:
        if targets is None:
            return original(hidden)
        return linear_logprobs(
            hidden,
            head.weight,
            targets,
            bias=head.bias,
            tp_group=getattr(head, "tp_group", None),
            logits_scale=transform.scale,
            softcap=transform.softcap,
            with_entropy=with_entropy,
            num_active=num_active,
        )

    _replace_forward(head, forward)


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let ``forward``, whose first argument is the original, take its place.

    Under accelerate's hooks, where there are any (``device_map`` over several devices):
    they move inputs to where the weights are.
    """
    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    original = getattr(module, name)
    setattr(module, _MARK, original)

    # The Trainer reads the names of a model's inputs off the signature.
    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return forward(original, *args, **kwargs)

    setattr(module, name, replacement)


def _head_logprobs(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    num_active: int | None,
    with_entropy: bool,
    transform: LogitsTransform,
) -> tuple[Tensor, Tensor]:
    """[T, H] and [T] -> log-probs and entropy [T], through the head's own call."""
    if hasattr(head, _MARK):
        return head(hidden, targets, num_active, with_entropy)
    # A head that is more than a matrix (LoRA on lm_head, quantized): its logits must
    # exist, but only for the rows that need them.
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
        model: with :func:`install_logprobs_forward` applied, in whatever wrapper.
        input_ids: [B, S]; the first 16 tokens of the first row are used.
        low_precision: whether the model computes in 16 bits.

    Raises:
        ValueError: if they differ by more than rounding explains.
    """
    tokens = input_ids[:1, :16]
    targets = tokens.clone()
    targets[:, 0] = IGNORE_INDEX
    ours = model(input_ids=tokens, logprob_targets=targets).logprobs[:, 1:]
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
