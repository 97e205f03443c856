"""Loss heads of others, by one signature: what benchmarks compare the head with.

Each takes hidden [T, H], weight [V, H] and targets [T], and returns log-probs [T] (or,
where it has none of its own, a sum of them) and entropies or None.
"""

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Any]]


def liger_chunked(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, None]:
    """Liger's chunked log-probs, torch operations."""
    from liger_kernel.chunked_loss import fused_linear_ppo

    function = fused_linear_ppo._ChunkedSelectiveLogProbFunction
    return function.apply(hidden, weight, targets, None, 1.0, 4096), None


def liger_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, None]:
    """Liger's fused linear cross-entropy: a sum only, its gradient made in forward."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return -loss(weight, hidden, targets), None


def cut_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, None]:
    """Apple's cut cross-entropy, Triton."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none"), None


def verl(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """verl's linear cross-entropy, Triton."""
    # `import verl` would want Ray: its folders alone will do.
    found = importlib.util.find_spec("verl")
    if "verl" not in sys.modules and found and found.submodule_search_locations:
        root = Path(found.submodule_search_locations[0])
        for name in ("verl", "verl.utils", "verl.utils.kernel"):
            module = types.ModuleType(name)
            module.__path__ = [str(root.parent.joinpath(*name.split(".")))]
            sys.modules[name] = module
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, 1.0)


def trl_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's chunked loss of its SFT trainer: a mean, its gradient checkpointed."""
    from trl.trainer.sft_trainer import _chunked_cross_entropy_loss

    loss, _, entropy, _ = _chunked_cross_entropy_loss(
        hidden[None], weight, 256, shift_labels=targets[None]
    )
    return -loss.expand(len(targets)), entropy


def trl_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """TRL's chunked log-probs of its GRPO trainer, torch operations."""
    from trl.trainer.utils import _ChunkedLogProbFunction

    return _ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 4096)


def gather_minus_logsumexp(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, None]:
    """What a user writes who wants no log_softmax."""
    logits = hidden @ weight.t()
    target = logits.gather(1, targets[:, None]).squeeze(1)
    return target - logits.logsumexp(1), None


PEERS: dict[str, Head] = {
    "gather - logsumexp": gather_minus_logsumexp,
    "Liger, chunked log-probs": liger_chunked,
    "TRL, chunked log-probs": trl_logprobs,
    "TRL, chunked loss": trl_loss,
}
ON_GPUS_ONLY: dict[str, Head] = {
    "Liger, Triton loss": liger_triton,
    "cut cross-entropy": cut_cross_entropy,
    "verl, Triton": verl,
}


def step(head: Head, hidden: Tensor, weight: Tensor, *rest: Tensor) -> list[Tensor]:
    """Forward and backward; returns the gradients.

    Args:
        rest: targets [T] and the gradient [T] that comes in (its sum into a sum).
    """
    targets, grad = rest
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    logprobs = head(*leaves, targets)[0]
    logprobs.backward(grad if logprobs.dim() else grad.mean())
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def bare(hidden: Tensor, weight: Tensor) -> None:
    """The three matmuls of forward and backward, and nothing else."""
    with torch.no_grad():
        logits = hidden @ weight.t()
        logits @ weight  # d_hidden
        logits.t() @ hidden  # d_weight
