"""Objectives: token log-probs in, loss and token sums out.

Pure torch maths, PSFT's and its baselines'; at the end of the file each of them is a
value, and to add one is to add a function and an entry there. What the old policy is,
when it is scored and how sums become the metrics a person reads lives in old_policy.py,
trainer.py and metrics.py.
"""

import difflib
import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

# The authors' code bounds the log-ratio before exp; e**20 is far beyond any clip.
MAX_LOG_RATIO = 20.0


def psft_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    num_tokens: Tensor | int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Proximal SFT loss: PPO's clipped surrogate with advantage 1.

    With ``r = exp(clamp(logprobs - old_logprobs, -20, 20))`` the loss is

    .. math:: -\frac{1}{N} \sum_t \min(r_t, \mathrm{clip}(r_t, 1 - \epsilon,
              1 + \epsilon_{high}))

    over the active tokens. Its gradient is ``r * grad logprobs`` where
    ``r <= 1 + epsilon_high`` and exactly zero above. The advantage is positive, so the
    lower bound never acts: ``min(r, clip(r)) = min(r, 1 + epsilon_high)``.

    Args:
        logprobs: log-probs of the targets under the current policy, in nats, any
            shape, float32 or float64. Carries the gradient.
        old_logprobs: the same tokens under the old policy, same shape. Never
            differentiated.
        mask: bool, same shape; True for active (supervised) tokens. Whatever stands
            at the other positions, NaN included, reaches neither loss nor gradient.
        epsilon: the upper bound where ``epsilon_high`` is None; otherwise without
            effect (accepted because PPO users write both).
        epsilon_high: upper bound; a token with ratio > 1 + epsilon_high is clipped.
        num_tokens: the divisor N: active tokens of the whole optimizer step, over all
            micro-batches and data-parallel ranks. None: the active tokens given here.

    Returns:
        The loss (a scalar of ``logprobs``' dtype) and its sums over the active tokens,
        detached scalars that add up over micro-batches and ranks: ``num_tokens``,
        ``nll_sum``, ``ratio_sum``, ``clipped_sum``, ``approx_kl_sum`` (k3 estimator,
        (r - 1) - log r); and ``ratio_max``, which combines by maximum (0 where no
        token is active).

    Raises:
        ValueError: if the shapes differ, ``mask`` is not bool or a bound is out of
            range.

    Source: Zhu et al., Proximal Supervised Fine-Tuning, arXiv 2508.17784.
    """
    upper = upper_bound(epsilon, epsilon_high)
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    ratio = log_ratio.exp()
    surrogate = torch.where(mask, _bounded(ratio, -math.inf, upper), 0.0)
    active = mask.sum()
    divisor = active.clamp(min=1) if num_tokens is None else num_tokens
    loss = -surrogate.sum() / divisor

    with torch.no_grad():
        metrics = {
            "num_tokens": active,
            "nll_sum": -torch.where(mask, logprobs, 0.0).sum(),
            "ratio_sum": torch.where(mask, ratio, 0.0).sum(),
            "clipped_sum": (mask & (ratio > upper)).sum(),
            # Masked positions hold log-ratio 0, ratio 1: they add nothing here.
            "approx_kl_sum": (ratio - 1 - log_ratio).sum(),
            "ratio_max": torch.where(mask, ratio, 0.0).amax()
            if mask.numel()
            else ratio.new_zeros(()),
        }
    return loss, metrics


def sft_loss(
    logprobs: Tensor, mask: Tensor, *, num_tokens: Tensor | int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean negative log-likelihood, with the sums that :func:`psft_loss` returns.

    Its gradient equals PSFT's at ratio 1; its value is the NLL instead of -1. The
    ratio's sums are those of a policy compared with itself.

    Args, Returns, Raises: see :func:`psft_loss`.
    """
    current = logprobs.detach()
    _, metrics = psft_loss(current, current, mask)
    nll_sum = -torch.where(mask, logprobs, 0.0).sum()
    return nll_sum / _divisor(metrics, num_tokens), metrics


def sft_kl_loss(
    logprobs: Tensor,
    initial_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.5,
    num_tokens: Tensor | int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""SFT with a penalty on the distance to the initial policy (the paper's SFT-KL).

    With ``d = clamp(initial_logprobs - logprobs, -20, 20)`` the loss is

    .. math:: \frac{1}{N} \sum_t -\log p_t + \beta (e^{d_t} - d_t - 1)

    over the active tokens. The penalty is the k3 estimator of KL(p, p0) in the form
    that verl, on which the authors' code builds, calls low_var_kl. An estimate it is
    only as far as tokens are drawn from the policy, and these are the data's: it is
    zero where p = p0 and positive elsewhere, but not the KL divergence. verl also cuts
    a token's penalty off at 10, and so its gradient where p has fallen below p0 / 14,
    where the pull is strongest; this does not.

    The penalty's gradient is ``(1 - e**d) * grad logprobs``, so a token's whole
    gradient is ``-(1 - kl_coef * (1 - p0 / p)) * grad logprobs``: for p far above p0
    that of SFT times ``1 - kl_coef``, for p below p0 a stronger pull than SFT's.

    Args:
        logprobs, mask, num_tokens: see :func:`psft_loss`.
        initial_logprobs: the same tokens under the initial policy, same shape. Never
            differentiated.
        kl_coef: the penalty's weight; 0 is plain SFT.

    Returns:
        As :func:`sft_loss`, but ``approx_kl_sum`` is the sum of the penalties before
        they are weighted.

    Raises:
        ValueError: if the shapes differ or ``mask`` is not bool.

    Source: Zhu et al., Proximal Supervised Fine-Tuning, arXiv 2508.17784.
    """
    nll, metrics = sft_loss(logprobs, mask, num_tokens=num_tokens)
    kl_sum = _penalty(logprobs, initial_logprobs, mask)
    metrics = {**metrics, "approx_kl_sum": kl_sum.detach()}
    return nll + kl_coef * kl_sum / _divisor(metrics, num_tokens), metrics


def dft_loss(
    logprobs: Tensor, mask: Tensor, *, num_tokens: Tensor | int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Dynamic fine-tuning: SFT whose tokens weigh as much as they are likely.

    .. math:: -\frac{1}{N} \sum_t \mathrm{sg}(p_t) \log p_t

    over the active tokens, sg: not differentiated. The gradient is ``-p * grad
    logprobs``, that is, ``-grad p``: an unlikely token pulls little.

    Args, Returns, Raises: see :func:`psft_loss`; the sums are those of
    :func:`sft_loss`.

    Source: Wu et al., On the Generalization of SFT, arXiv 2508.05629.
    """
    _, metrics = sft_loss(logprobs, mask, num_tokens=num_tokens)
    # Selected first: what stands at masked positions must not meet a weight.
    active = torch.where(mask, logprobs, 0.0)
    weighted = active.detach().exp() * active
    return -weighted.sum() / _divisor(metrics, num_tokens), metrics


def asft_loss(
    logprobs: Tensor,
    initial_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.5,
    num_tokens: Tensor | int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Anchored fine-tuning: :func:`dft_loss` and the penalty of :func:`sft_kl_loss`.

    The paper's KL term is over the whole vocabulary; this one is of the token alone, as
    in :func:`sft_kl_loss`, for of the initial policy nothing else is kept.

    Args, Returns, Raises: see :func:`sft_kl_loss`.

    Source: Zhu et al., Anchored Supervised Fine-Tuning, arXiv 2509.23753.
    """
    dft, metrics = dft_loss(logprobs, mask, num_tokens=num_tokens)
    kl_sum = _penalty(logprobs, initial_logprobs, mask)
    metrics = {**metrics, "approx_kl_sum": kl_sum.detach()}
    return dft + kl_coef * kl_sum / _divisor(metrics, num_tokens), metrics


def _penalty(logprobs: Tensor, initial_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The sum of the active tokens' ``e**d - d - 1``."""
    # Masked positions hold 0 here, and e**0 - 0 - 1 adds nothing. expm1: near p0, where
    # every run starts, e**d - 1 would be nothing but rounding.
    d = -_log_ratio(logprobs, initial_logprobs, mask)
    return (d.expm1() - d).sum()


def _divisor(
    metrics: dict[str, Tensor], num_tokens: Tensor | int | None
) -> Tensor | int:
    return metrics["num_tokens"].clamp(min=1) if num_tokens is None else num_tokens


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``logprobs - old_logprobs``, bounded; 0 at masked positions.

    Raises:
        ValueError: if the shapes differ or ``mask`` is not bool.
    """
    if not logprobs.shape == old_logprobs.shape == mask.shape:
        raise ValueError(
            "logprobs, old_logprobs and mask must have one shape, got "
            f"{tuple(logprobs.shape)}, {tuple(old_logprobs.shape)}, "
            f"{tuple(mask.shape)}."
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}. Use labels != -100.")
    # Selecting the difference, not the inputs, keeps NaN and inf at masked positions
    # out of the backward pass too.
    log_ratio = torch.where(mask, logprobs - old_logprobs.detach(), 0.0)
    return _bounded(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _bounded(x: Tensor, low: float, high: float) -> Tensor:
    """``x.clamp(low, high)`` whose gradient is 1 at the bounds, too.

    torch has none there from 2.14 on, and had one before: with ``epsilon_high: 0``
    all of a window's first step lies at the bound.
    """
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


def upper_bound(epsilon: float, epsilon_high: float | None) -> float:
    """The largest unclipped ratio, ``1 + epsilon_high`` (or ``1 + epsilon``).

    Raises:
        ValueError: if ``epsilon`` is not positive or ``epsilon_high`` is negative.
    """
    if not epsilon > 0:
        raise ValueError(
            f"epsilon must be > 0, got {epsilon}. Use 0.2 (PPO's usual setting)."
        )
    if epsilon_high is not None and not epsilon_high >= 0:
        raise ValueError(
            f"epsilon_high must be >= 0, got {epsilon_high}. "
            "Use 0.28 (the paper's setting), or leave it out to use epsilon."
        )
    return 1.0 + (epsilon if epsilon_high is None else epsilon_high)


# ---- Objectives as values ----

Loss = Callable[
    [Tensor, Tensor, Tensor, Tensor | int | None, Any],
    tuple[Tensor, dict[str, Tensor]],
]
"""(log-probs, those it compares with, mask, number of tokens, settings of the `psft:`
block) -> (loss, sums of :func:`psft_loss`). Where it compares with none, the second are
the first, detached."""


@dataclass(frozen=True)
class Objective:
    """What a run minimizes."""

    name: str
    reference: Literal["old policy", "initial policy"] | None
    """Whose log-probs it compares with. The old policy's are scored each
    ``refresh_steps`` optimizer steps, the initial policy's once."""
    loss: Loss
    settings: frozenset[str] = frozenset()
    """Numbers of the `psft:` block that it reads."""


_WINDOW = frozenset({"refresh_steps", "sft_warmup_steps"})

SFT = Objective("sft", None, lambda p, _, mask, n, s: sft_loss(p, mask, num_tokens=n))
OBJECTIVES: dict[str, Objective] = {
    each.name: each
    for each in (
        Objective(
            "psft",
            "old policy",
            lambda p, old, mask, n, s: psft_loss(
                p,
                old,
                mask,
                epsilon=s.epsilon,
                epsilon_high=s.epsilon_high,
                num_tokens=n,
            ),
            _WINDOW | {"epsilon", "epsilon_high"},
        ),
        SFT,
        Objective(
            "sft_kl",
            "initial policy",
            lambda p, initial, mask, n, s: sft_kl_loss(
                p, initial, mask, kl_coef=s.kl_coef, num_tokens=n
            ),
            frozenset({"kl_coef"}),
        ),
        Objective(
            "dft", None, lambda p, _, mask, n, s: dft_loss(p, mask, num_tokens=n)
        ),
        Objective(
            "asft",
            "initial policy",
            lambda p, initial, mask, n, s: asft_loss(
                p, initial, mask, kl_coef=s.kl_coef, num_tokens=n
            ),
            frozenset({"kl_coef"}),
        ),
    )
}


@functools.cache
def find(name: str) -> Objective:
    """An objective by its name, or by the import path of a user's own.

    The path is that of an :class:`Objective`, or of a function with the signature of
    :data:`Loss`, which then compares with the old policy. Sums that it does not return
    are those of :func:`psft_loss`.

    Raises:
        ValueError: there is none; says why.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        close = difflib.get_close_matches(name, OBJECTIVES, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise ValueError(
            f"{hint}Use {', '.join(OBJECTIVES)}, or the import path of your own."
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"It cannot be imported ({error}). Run from the folder that it is in, or "
            "install it."
        ) from error
    if isinstance(found, Objective):
        return found
    if not callable(found):
        raise ValueError("It is neither a function nor an axolotl_psft Objective.")
    everything = _WINDOW | {"epsilon", "epsilon_high", "kl_coef"}
    return Objective(name, "old policy", _with_all_sums(found), everything)


def _with_all_sums(function: Loss) -> Loss:
    @functools.wraps(function)
    def loss(
        logprobs: Tensor, old: Tensor, mask: Tensor, num_tokens: Any, settings: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        value, sums = function(logprobs, old, mask, num_tokens, settings)
        bounds = {"epsilon": settings.epsilon, "epsilon_high": settings.epsilon_high}
        return value, {**psft_loss(logprobs.detach(), old, mask, **bounds)[1], **sums}

    return loss
