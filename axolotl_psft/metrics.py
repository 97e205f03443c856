"""Token sums and the metrics made of them: names, formulas, reduction.

Sums travel (over micro-batches, ranks and the logging window) and are divided last, so
that every metric is weighted by tokens. Where they are logged lives in trainer.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch import distributed as dist

_SUMS = (
    "num_tokens",
    "nll_sum",
    # Of the trainer: the objective's own value, and entropy, which is none of its.
    "surrogate_sum",
    "entropy_sum",
    "ratio_sum",
    "clipped_sum",
    "approx_kl_sum",
)
_MAX = "ratio_max"


class TokenSums:
    """Running sums over active tokens, kept on the device in float64."""

    def __init__(self, device: torch.device | str) -> None:
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self._max = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Add one micro-batch: the objective's sums and those above, scalars."""
        self._sums += torch.stack([sums[name].to(self._sums) for name in _SUMS])
        self._max = torch.maximum(self._max, sums[_MAX].to(self._max))

    def reduce(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Reduce over the data-parallel ranks and return the metrics.

        Every rank of ``group`` (None: the default group, where there is one) must
        call. Two all-reduces of a few bytes; one device synchronization.

        Returns:
            ``nll`` and ``entropy`` in nats a token, ``surrogate`` (the objective's
            value), ``clip_frac``, ``ratio_mean``, ``ratio_max``, ``approx_kl``. Empty
            where no token was active.
        """
        sums, maximum = self._sums.clone(), self._max.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        total = dict(zip(_SUMS, sums.tolist(), strict=True))
        num_tokens = total["num_tokens"]
        if num_tokens == 0:
            return {}
        return {
            "nll": total["nll_sum"] / num_tokens,
            "surrogate": total["surrogate_sum"] / num_tokens,
            "entropy": total["entropy_sum"] / num_tokens,
            "clip_frac": total["clipped_sum"] / num_tokens,
            "ratio_mean": total["ratio_sum"] / num_tokens,
            "ratio_max": maximum.item(),
            "approx_kl": total["approx_kl_sum"] / num_tokens,
        }
