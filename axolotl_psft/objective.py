"""The PSFT objective: token log-probs in, loss and token sums out.

Pure torch maths. What the old policy is, when it is scored and how sums become the
metrics a person reads lives in old_policy.py, trainer.py and metrics.py.
"""

import math

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
    divisor = metrics["num_tokens"].clamp(min=1) if num_tokens is None else num_tokens
    return -torch.where(mask, logprobs, 0.0).sum() / divisor, metrics


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
    # Masked positions hold 0 here, and e**0 - 0 - 1 adds nothing. expm1: near p0, where
    # every run starts, e**d - 1 would be nothing but rounding.
    d = -_log_ratio(logprobs, initial_logprobs, mask)
    kl_sum = (d.expm1() - d).sum()
    divisor = metrics["num_tokens"].clamp(min=1) if num_tokens is None else num_tokens
    return nll + kl_coef * kl_sum / divisor, {
        **metrics,
        "approx_kl_sum": kl_sum.detach(),
    }


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
