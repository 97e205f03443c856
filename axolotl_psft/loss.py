"""The training loss of a micro-batch: the objective applied, and its sums kept.

Objectives, as pure functions, are objective.py; sums and metrics are metrics.py.
"""

from typing import Any

import torch
from torch import Tensor

from axolotl_psft.metrics import TokenSums
from axolotl_psft.objective import SFT, Objective
from axolotl_psft.ranks import DataRanks
from axolotl_psft.token_logprobs import TokenLogprobs


class TrainingLoss:
    """Losses of a run's micro-batches.

    Args:
        objective: what is minimized.
        settings: the `psft:` block.
        ranks: those whose micro-batches differ.
        device: of the sums.

    Attributes:
        of_step: what was returned since it was set to zero, summed up.
    """

    def __init__(
        self,
        objective: Objective,
        settings: Any,
        ranks: DataRanks,
        device: torch.device | str,
    ) -> None:
        self._objective, self._settings, self._ranks = objective, settings, ranks
        self._sums = TokenSums(device)
        self.of_step = torch.zeros((), device=device)

    def in_psft_phase(self, step: int) -> bool:
        """Whether the old policy takes part in a global step."""
        warmup = self._settings.sft_warmup_steps
        return self._objective.reference == "old policy" and step >= warmup

    def __call__(
        self, tokens: TokenLogprobs, old: Tensor | None, num_tokens: Any, step: int
    ) -> Tensor:
        """A micro-batch's part of the loss of the global step ``step``, a scalar.

        Its value is the NLL, comparable with every other run's; its gradient is the
        objective's, over ``num_tokens``, the active tokens of the whole step.

        Args:
            tokens: of the forward step, [B, S].
            old: the log-probs to compare with, [B, S]; None: the current ones.
            num_tokens: over all micro-batches and ranks.
            step: the global one.
        """
        compares = self._objective.reference == "old policy"
        warms_up = compares and not self.in_psft_phase(step)
        surrogate, sums = (SFT if warms_up else self._objective).loss(
            tokens.logprobs,
            tokens.logprobs.detach() if old is None else old,
            tokens.mask,
            num_tokens,
            self._settings,
        )
        own = {
            "surrogate_sum": surrogate.detach() * num_tokens,
            "entropy_sum": tokens.entropy.sum(),
        }
        self._sums.add({**sums, **own})
        nll = sums["nll_sum"] / num_tokens
        # Data parallelism averages gradients over ranks; the divisor already counts
        # the tokens of all of them.
        loss = (surrogate + (nll - surrogate).detach()) * self._ranks.size
        self.of_step += loss.detach()
        return loss

    def metrics(self) -> dict[str, float]:
        """See :meth:`TokenSums.reduce`; of what came since the last call."""
        metrics = self._sums.reduce(self._ranks.group)
        self._sums = TokenSums(self.of_step.device)
        return metrics
