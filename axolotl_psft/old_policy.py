"""The window: optimizer steps that share one old policy, and its file in a checkpoint.

Collects the window's micro-batches ahead of time, holds their old log-probs, and saves
and restores them mid-window. Who computes the log-probs, and when, is trainer.py.
"""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from axolotl_psft import files

Batch = dict[str, Any]

_FORMAT = "axolotl_psft.window/2"


# Differing settings that an error names: a model of another family has dozens.
_MAX_NAMED = 6


class WindowFileError(RuntimeError):
    """A window file that cannot be used to resume; says which and what to do."""


@dataclass
class Step:
    """One optimizer step: its micro-batches and its active tokens over all ranks."""

    batches: list[Batch]
    num_tokens: Tensor | None = None


@dataclass
class Window:
    """The optimizer steps still to run under the current old policy.

    ``start_step`` is the global step of the last refresh. Every micro-batch but those
    of the step ``start_step`` has old log-probs attached. (With an objective that
    compares with the initial policy a window is one step, and they are that one's.)
    """

    start_step: int = 0
    steps: deque[Step] = field(default_factory=deque)


def attach(batch: Batch, logprobs: Tensor) -> None:
    """Let ``logprobs`` [B, S], float32, go with a micro-batch to its loss.

    As bits: what wraps a model casts what floats to the dtype of its weights, and the
    ratio of two policies a step apart is lost in 16 bits.
    """
    batch["old_logprobs"] = logprobs.view(torch.int32)


def attached(bits: Tensor) -> Tensor:
    """What :func:`attach` was given."""
    return bits.view(torch.float32)


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


def window_path(checkpoint: str | os.PathLike, rank: int) -> Path:
    """Where ``rank`` keeps its window in a checkpoint folder."""
    return Path(checkpoint) / f"psft_window_rank{rank}.safetensors"


def save_window(
    checkpoint: str | os.PathLike,
    window: Window,
    *,
    global_step: int,
    rank: int,
    world_size: int,
    settings: dict[str, Any],
    batching: dict[str, Any],
    initial_policy: str | None = None,
) -> None:
    """Write the rest of the window, atomically; without pickle.

    The micro-batches themselves are not saved: the data order is a function of seed
    and epoch, so the data loader gives them again. Their digests are, to prove it.

    Args:
        checkpoint: its folder.
        window: what is left of it.
        global_step, rank, world_size: when and where.
        settings: by the YAML's keys, what a run that resumes must have in common.
        batching: the same, but for a run that resumes at the end of a window with
            another number of processes.
        initial_policy: names the files that hold the initial policy's log-probs.
    """
    path = window_path(checkpoint, rank)
    batches = [batch for step in window.steps for batch in step.batches]
    # contiguous, and cloned off views: safetensors refuses both otherwise.
    tensors = {
        f"old_logprobs.{i}": attached(batch["old_logprobs"]).cpu().contiguous().clone()
        for i, batch in enumerate(batches)
    }
    header = {
        "global_step": global_step,
        "start_step": window.start_step,
        "rank": rank,
        "world_size": world_size,
        "settings": settings,
        "batching": batching,
        "initial_policy": initial_policy,
        "batches_per_step": [len(step.batches) for step in window.steps],
        "batch_digests": [digest(batch) for batch in batches],
    }
    files.write(path, tensors, header, format=_FORMAT)


@dataclass
class SavedWindow:
    """A window as read back from its file, before its micro-batches are there again."""

    path: Path
    start_step: int
    batches_per_step: list[int]
    batch_digests: list[str]
    old_logprobs: list[Tensor]
    world_size: int
    batching: dict[str, Any]
    """Of the run that saved it."""
    initial_policy: str | None = None

    def attach(self, batches: Iterator[Batch]) -> Window:
        """Take the window's micro-batches off the data loader and add old log-probs.

        Raises:
            WindowFileError: if the data loader gives other micro-batches than those
                whose old log-probs were saved.
        """
        window = Window(self.start_step)
        saved = zip(self.batch_digests, self.old_logprobs, strict=True)
        for num_batches in self.batches_per_step:
            (step,) = collect(batches, 1, num_batches) or [Step([])]
            if len(step.batches) != num_batches:
                raise self._other_data("the data set ends earlier")
            for batch in step.batches:
                expected, old_logprobs = next(saved)
                if digest(batch) != expected:
                    raise self._other_data("a micro-batch holds other tokens")
                attach(batch, old_logprobs.to(batch["input_ids"].device))
            window.steps.append(step)
        return window

    def _other_data(self, what: str) -> WindowFileError:
        return WindowFileError(
            f"{self.path}: {what} than when this window was saved. Resume with the same"
            " datasets, tokenizer, seed, sequence_len, micro_batch_size, "
            "gradient_accumulation_steps and number of processes."
        )


def load_window(
    checkpoint: str | os.PathLike,
    *,
    global_step: int,
    rank: int,
    world_size: int,
    settings: dict[str, Any],
    batching: dict[str, Any],
) -> SavedWindow:
    """Read ``rank``'s window from a checkpoint and check that it belongs to this run.

    Raises:
        WindowFileError: if the file is missing, damaged, of another step, rank, world
            size (mid-window) or of a run with other settings. Names the file, the
            settings with both their values, and the remedy.
    """
    path = window_path(checkpoint, rank)
    first = window_path(checkpoint, 0)
    if not path.is_file() and first.is_file() and _read(first)[0]["world_size"] <= rank:
        # A rank that the run which saved did not have goes on from what the first one
        # has; that must be the end of a window.
        path, rank = first, 0
    header, tensors = _read(path)
    _check_belongs(path, header, global_step=global_step, rank=rank)
    mid_window = bool(header["batches_per_step"])
    saved = header["settings"]
    if mid_window or header["world_size"] == world_size:
        saved, settings = saved | header["batching"], settings | batching
    _check_settings(path, saved, settings)
    if mid_window and header["world_size"] != world_size:
        raise WindowFileError(
            f"{path}: saved in the middle of a window by {header['world_size']} "
            f"processes, this run has {world_size}. Resume with "
            f"{header['world_size']}, or from a checkpoint at the end of a window "
            "(save_steps a multiple of psft.refresh_steps)."
        )
    return SavedWindow(
        path=path,
        start_step=header["start_step"],
        batches_per_step=header["batches_per_step"],
        batch_digests=header["batch_digests"],
        old_logprobs=[tensors[f"old_logprobs.{i}"] for i in range(len(tensors))],
        world_size=header["world_size"],
        batching=header["batching"],
        initial_policy=header.get("initial_policy"),
    )


def digest(batch: Batch) -> str:
    """SHA-256 over a micro-batch's tokens, labels and segment boundaries."""
    names = ("input_ids", "labels", "position_ids")
    return files.digest_tensors({name: batch[name] for name in names if name in batch})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        return files.read(path, format=_FORMAT)
    except FileNotFoundError as error:
        raise WindowFileError(
            f"{path}: not found. The checkpoint was not written by a psft run, or not "
            "completely. Resume from another checkpoint, or start a new run with "
            "base_model set to this one."
        ) from error
    except files.OtherVersionError as error:
        raise WindowFileError(
            f"{path}: its format is {error}, this version of axolotl_psft reads "
            f"{_FORMAT}. Resume with the version that wrote it, or start a new run with"
            " base_model set to the checkpoint."
        ) from error
    except files.NotIntactError as error:
        raise WindowFileError(
            f"{path}: truncated, damaged or not a psft window file. Resume from another"
            " checkpoint; the window is never restarted silently, since the run would "
            "then differ from the one that wrote this checkpoint."
        ) from error


def _check_belongs(
    path: Path, header: dict[str, Any], *, global_step: int, rank: int
) -> None:
    if (header["global_step"], header["rank"]) != (global_step, rank):
        raise WindowFileError(
            f"{path}: belongs to step {header['global_step']}, rank {header['rank']}; "
            f"this is step {global_step}, rank {rank}. The file was copied from "
            "another checkpoint: resume from an unmixed one."
        )


def _check_settings(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    # In the caller's order, which is that of cause and effect; the objective first.
    keys = sorted({**current, **saved}, key=lambda key: key != "psft.objective")
    differing = [key for key in keys if saved.get(key) != current.get(key)]
    if not differing:
        return
    named = [
        f"{key} was {saved.get(key)} when the checkpoint was written and is "
        f"{current.get(key)} now"
        for key in differing[:_MAX_NAMED]
    ]
    if len(differing) > _MAX_NAMED:
        named.append(f"{len(differing) - _MAX_NAMED} more differ")
    raise WindowFileError(
        f"{path}: {'; '.join(named)}. Restore what was changed, or start a new run with"
        " base_model set to the checkpoint."
    )
