"""ReLoRA on several ranks: a restart draws the same adapters on all of them.

Axolotl draws new adapters, and which moments of Adam stay, from each rank's own random
state. Where the states have parted (dropout over batches of other shapes, a stream that
one rank reads for all) each rank would train on with weights of its own, and nothing
would tell. patches/axolotl-0.21.0/0004 is the same for Axolotl itself.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from axolotl.monkeypatch import relora
from axolotl.monkeypatch.relora import ReLoRACallback
from torch import distributed as dist

from axolotl_psft.ranks import gather


def callbacks_of(trainer: Any) -> list[ReLoRACallback]:
    """Those of Axolotl's that restart ReLoRA."""
    callbacks = trainer.callback_handler.callbacks
    return [each for each in callbacks if isinstance(each, ReLoRACallback)]


def share_draws(callback: ReLoRACallback) -> None:
    """Let the callback's restarts draw from rank 0's random state on every rank."""
    if hasattr(relora, "main_process_random_state"):  # of the patch
        return
    begin_step = callback.on_step_begin

    def on_step_begin(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        step, every = state.global_step, callback.jagged_restart_steps
        if not dist.is_initialized() or step == 0 or step % every:
            return begin_step(args, state, control, **kwargs)
        with _random_state_of_rank_0(args.device):
            return begin_step(args, state, control, **kwargs)

    callback.on_step_begin = on_step_begin


@contextlib.contextmanager
def _random_state_of_rank_0(device: torch.device) -> Iterator[None]:
    """Rank 0 draws as it would; the others as rank 0, then on as if nothing had been.

    One collective.
    """
    mine = _random_state(device)
    first = gather(mine)[0]
    _set_random_state(first, device)
    try:
        yield
    finally:
        if dist.get_rank() > 0:
            _set_random_state(mine, device)


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1], device)
