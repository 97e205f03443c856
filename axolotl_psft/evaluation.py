"""Evaluation: the NLL and entropy of a data set, weighted by tokens."""

import math
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor
from torch import distributed as dist

from axolotl_psft.ranks import DataRanks
from axolotl_psft.token_logprobs import TokenLogprobs

LOG = get_logger(__name__)


class Evaluation:
    """Sums over all ranks' active tokens: each sample counts once.

    Args:
        device: of the sums.
        ranks: those whose micro-batches differ.
        gradient_state: accelerate's, which knows how many of the last batch's rows are
            no repetitions; None: there are none.
    """

    def __init__(
        self, device: torch.device | str, ranks: DataRanks, gradient_state: Any
    ) -> None:
        self._ranks = ranks
        self._state = gradient_state
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, tokens: TokenLogprobs) -> Tensor:
        """Add every rank's micro-batch; returns this one's mean NLL. One all-gather."""
        rows = torch.stack(
            [-tokens.logprobs.sum(1), tokens.entropy.sum(1), tokens.mask.sum(1)], dim=1
        )
        parts = [rows.double()]
        if dist.is_initialized():
            parts = [torch.empty_like(parts[0]) for _ in range(self._ranks.size)]
            dist.all_gather(parts, rows.double().contiguous(), group=self._ranks.group)
        num_rows = None
        if self._state is not None and self._state.end_of_dataloader:
            num_rows = self._state.remainder if self._state.remainder > 0 else None
        self._sums += torch.cat(parts)[:num_rows].sum(0)
        nll, _, num_tokens = rows.sum(0)
        return nll / num_tokens.clamp(min=1)

    def metrics(self, prefix: str) -> dict[str, float]:
        """``loss`` (the NLL) and ``psft/entropy`` in nats a token, by their names."""
        nll, entropy, num_tokens = self._sums.tolist()
        if num_tokens == 0:
            LOG.warning(f"{prefix}: no supervised token in the evaluation data.")
            num_tokens = math.nan
        return {
            f"{prefix}_loss": nll / num_tokens,
            f"{prefix}_psft/entropy": entropy / num_tokens,
        }
