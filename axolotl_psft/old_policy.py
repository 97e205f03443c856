"""The old policy: windows of optimizer steps that share one, scored when they start.

Collects a window's micro-batches ahead of time, has the current model's log-probs go
with them, and hands out its steps. What a checkpoint keeps of a window is resume.py;
how log-probs are computed is token_logprobs.py.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor
from torch import distributed as dist
from tqdm.auto import tqdm

from axolotl_psft.initial_policy import InitialPolicy
from axolotl_psft.packing import Batch
from axolotl_psft.token_logprobs import check_against_logits, token_logprobs

LOG = get_logger(__name__)

# Scoring that takes longer than this shows a progress bar.
_PROGRESS_AFTER_SECONDS = 5.0


@dataclass
class Step:
    """One optimizer step: its micro-batches and its active tokens over all ranks."""

    batches: list[Batch]
    num_tokens: Tensor | None = None


@dataclass
class Window:
    """The optimizer steps still to run under the current old policy.

    Every micro-batch has the log-probs attached that the objective compares it with,
    but those of the step at which the window starts: there the weights are still the
    old policy's, whose log-probs are the training pass's own. (With an objective that
    compares with the initial policy a window is one step, and they are that one's.)
    """

    step_size: int
    """Micro-batches of an optimizer step."""
    num_steps: Callable[[int], int]
    """Of a window that starts at a global step."""
    scorer: "Scorer"
    initial_policy: InitialPolicy | None = None
    """What to compare with instead of the old policy."""
    is_stream: bool = False
    """Whether the data end where nobody knows."""
    start_step: int = 0
    """The global step of the last refresh."""
    steps: deque[Step] = field(default_factory=deque)
    """What is left."""

    def next_step(self, batches: Iterator[Batch], global_step: int) -> Step:
        """The next one; a new window where none is left.

        Without micro-batches at the end of the data, where a window ends, too. It does
        not end with the run: one that is resumed with more steps finds the rest.
        """
        if not self.steps:
            steps = collect(batches, self.num_steps(global_step), self.step_size)
            if self.is_stream:
                _drop_unfilled(steps, self.step_size)
            self._begin(steps, global_step)
        return self.steps.popleft() if self.steps else Step([])

    def _begin(self, steps: list[Step], global_step: int) -> None:
        """Begin anew with ``steps``: count their tokens, attach log-probs."""
        self.start_step = global_step
        self.steps = deque(steps)
        if not steps:
            return
        self.scorer.count_tokens(steps)
        self.scorer.check_once(steps[0].batches[0]["input_ids"])
        if self.initial_policy is None:
            self.scorer.attach(_batches(steps[1:]))
            return
        for batch in _batches(steps):
            attach(batch, self.initial_policy.logprobs(batch))

    def restore(self, steps: list[Step], start_step: int) -> None:
        """Go on with what a checkpoint kept of a window, log-probs attached."""
        self.start_step = start_step
        self.steps = deque(steps)
        if steps:
            self.scorer.count_tokens(steps)


def _batches(steps: list[Step]) -> list[Batch]:
    return [batch for step in steps for batch in step.batches]


def _drop_unfilled(steps: list[Step], step_size: int) -> None:
    """Leave out a stream's last micro-batches where they do not fill a step.

    The Trainer counts micro-batches to know when to step, and does not know where a
    stream ends: their gradients would be added to the next pass's first step.
    """
    if steps and len(steps[-1].batches) < step_size:
        left_out = len(steps.pop().batches)
        LOG.info(
            f"psft: {left_out} micro-batches at the end of the stream do not fill "
            f"gradient_accumulation_steps: {step_size} and are left out."
        )


def collect(batches: Iterator[Batch], num_steps: int, num_batches: int) -> list[Step]:
    """Take up to ``num_steps`` x ``num_batches`` micro-batches off the iterator.

    The last step is shorter, and steps are fewer, where the iterator ends.
    """
    steps = []
    for _ in range(num_steps):
        taken = [batch for _, batch in zip(range(num_batches), batches, strict=False)]
        if not taken:
            break
        steps.append(Step(taken))
        if len(taken) < num_batches:
            break
    return steps


class Scorer:
    """Log-probs of micro-batches under a trainer's model as it is now.

    Args:
        trainer: whose model, data ranks and device they are.

    Attributes:
        seconds: spent scoring so far.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._is_checked = False
        self.seconds = 0.0

    def count_tokens(self, steps: list[Step]) -> None:
        """Active tokens of each optimizer step over all ranks: one all-reduce."""
        for batch in _batches(steps):
            self._trainer.complete(batch)
        sums = [sum(batch["num_active"] for batch in step.batches) for step in steps]
        counts = torch.tensor(sums, device=self._trainer.args.device)
        if dist.is_initialized():
            dist.all_reduce(counts, group=self._trainer.data_ranks.group)
        for step, count in zip(steps, counts, strict=True):
            # An optimizer step without a supervised token: loss and gradient are zero.
            step.num_tokens = count.clamp(min=1)

    def check_once(self, input_ids: Tensor) -> None:
        """See :func:`check_against_logits`; the first time only."""
        if self._is_checked:
            return
        self._is_checked = True
        accelerator, model = self._trainer.accelerator, self._trainer.model_wrapped
        low_precision = accelerator.mixed_precision != "no" or any(
            parameter.dtype.itemsize < 4 for parameter in model.parameters()
        )
        tokens = input_ids.to(self._trainer.args.device)
        model.eval()
        # Through every wrapper, which may hold shards of the weights, but not compiled:
        # no other call has these shapes.
        with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            check_against_logits(model, tokens, low_precision=low_precision)
        model.train()

    @torch.no_grad()
    def scored(
        self, batches: Iterable[Batch], whose: str
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Each micro-batch with its log-probs, [B, S] float32: no gradient, no dropout.

        The model is in evaluation mode meanwhile, and in training mode afterwards.

        Args:
            batches: as the data loader gives them.
            whose: log-probs they are, for a person who waits.
        """
        started = time.perf_counter()
        trainer = self._trainer
        model = trainer.model_wrapped
        # Schedule-free optimizers swap weights for evaluation: score the trained ones.
        if callable(train := getattr(trainer.optimizer, "train", None)):
            train()
        model.eval()
        progress = tqdm(
            batches,
            desc=f"Scoring {whose}",
            delay=_PROGRESS_AFTER_SECONDS,
            leave=False,
            disable=trainer.args.disable_tqdm or not trainer.is_local_process_zero(),
        )
        for batch in progress:
            inputs = trainer.on_device(batch)
            with trainer.compute_loss_context_manager():
                logprobs = token_logprobs(model, inputs, with_entropy=False).logprobs
            yield batch, logprobs
        model.train()
        if trainer.args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.seconds += time.perf_counter() - started

    def attach(self, batches: list[Batch]) -> None:
        """Let the model's log-probs, the old policy's from now on, go with them."""
        if batches:
            for batch, logprobs in self.scored(batches, "the old policy"):
                attach(batch, logprobs)


def attach(batch: Batch, logprobs: Tensor) -> None:
    """Let ``logprobs`` [B, S], float32, go with a micro-batch to its loss.

    As bits: DeepSpeed's integration casts what floats to the dtype of the weights, and
    the ratio of two policies a step apart is lost in 16 bits.
    """
    batch["old_logprobs"] = logprobs.view(torch.int32)


def attached(batch: Batch) -> Tensor | None:
    """What :func:`attach` was given; None: nothing yet."""
    bits = batch.get("old_logprobs")
    return None if bits is None else bits.view(torch.float32)
