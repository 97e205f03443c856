"""What stops a wrong resume: what identifies a run, its comparison, the window's file.

A checkpoint's window file says of which run it is, by named values that are small and
cheap to get for any size of model and data: what is too large is a digest of a spread
of it. A run that resumes must have the same ones.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger
from torch import Tensor

from axolotl_psft import checkpoints, failures, files, fingerprints, relora
from axolotl_psft.dataset import is_stream
from axolotl_psft.objective import Objective
from axolotl_psft.old_policy import Step, Window, attach, attached, collect
from axolotl_psft.packing import Batch
from axolotl_psft.ranks import gather

LOG = get_logger(__name__)

_FORMAT = "axolotl_psft.window/2"

# Differing settings that an error names: a model of another family has dozens.
_MAX_NAMED = 6

# By the YAML's key: what decides the order of the data and where a step's data end.
_ORDER = {
    "seed": "seed",
    "sequence_len": "max_seq_length",
    "sample_packing": "sample_packing",
    "sample_packing_sequentially": "sample_packing_sequentially",
    "sample_packing_bin_size": "sample_packing_bin_size",
    "sample_packing_group_size": "sample_packing_group_size",
    "multipack_real_batches": "multipack_real_batches",
    "curriculum_sampling": "curriculum_sampling",
    "balance_labels": "balance_labels",
    "label_balance_window_optim_steps": "label_balance_window_optim_steps",
    "group_by_length": "train_sampling_strategy",
    "dataloader_drop_last": "dataloader_drop_last",
}

# Another number of processes may share a global batch out otherwise.
_BATCHING = {
    "micro_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}

# Of the `psft:` block: what changes no step.
_CHANGE_NO_STEP = {"sequence_parallel", "check_data_files"}


# ---- What identifies a run ----


@dataclass(frozen=True)
class Run:
    """Of a run, what its checkpoints hold and are compared with."""

    rank: int
    world_size: int
    settings: dict[str, Any]
    """By the YAML's keys: what a run that resumes must have in common."""
    batching: dict[str, Any]
    """The same, but for a run that resumes at the end of a window with another number
    of processes."""

    @classmethod
    def of(cls, trainer: Any) -> "Run":
        """Of a trainer's arguments, `psft:` block, model, tokenizer and samples."""
        args = trainer.args
        block = _objective_settings(trainer.psft, trainer.objective)
        return cls(
            rank=args.process_index,
            world_size=args.world_size,
            settings={
                **{f"psft.{key}": value for key, value in block.items()},
                **_by_key(args, _ORDER),
                **fingerprints.tokenizer(trainer.processing_class),
                **fingerprints.model(trainer.accelerator.unwrap_model(trainer.model)),
                **fingerprints.samples(trainer.train_dataset),
            },
            batching=_by_key(args, _BATCHING),
        )

    @property
    def step_size(self) -> int:
        """Rows of an optimizer step."""
        return math.prod(self.batching.values()) * self.world_size


def _objective_settings(psft: Any, objective: Objective) -> dict[str, Any]:
    if objective.reference == "initial policy":
        return psft.model_dump(include={"objective", *objective.settings})
    # Of an objective without settings all the others, as ever.
    others = set() if "kl_coef" in objective.settings else {"kl_coef"}
    return {
        **psft.model_dump(exclude=_CHANGE_NO_STEP | others),
        # What takes part in the objective, not how it was written.
        "epsilon": psft.epsilon if psft.epsilon_high is None else None,
    }


def _by_key(args: Any, names: dict[str, str]) -> dict[str, Any]:
    return {
        key: fingerprints.plain(getattr(args, name, None))
        for key, name in names.items()
    }


# ---- The checkpoint ----


def read_checkpoint(
    trainer: Any, checkpoint: Path | None, run: Run
) -> "SavedWindow | None":
    """Before weights are read: is it complete, and of a run like this one?

    Every rank must call it. Two small collectives.

    Raises:
        ValueError: the checkpoint was never completed, ranks found others, or its
            place in the data cannot be found again.
        FileError: its window is missing, damaged or another run's.
        PeerFailedError: another rank found that.
    """
    found = gather(checkpoint and str(checkpoint))
    if len(set(found)) > 1:
        raise ValueError(
            f"resume_from_checkpoint: the ranks found {found}. output_dir must be on a "
            "disk that all nodes see."
        )
    if checkpoint is None:
        return None
    window, error = None, None
    try:
        state = checkpoints.check(checkpoint)
        window = load_window(checkpoint, run, global_step=state["global_step"])
        _check_position(trainer, state["global_step"], state["epoch"] or 0.0)
    except Exception as problem:
        error = problem
    failures.raise_together(error)
    return window


def _check_position(trainer: Any, step: int, epoch: float) -> None:
    """Refuse a place in the run that cannot be found again.

    Raises:
        ValueError: names the step and the remedy.
    """
    restart_steps = trainer.args.jagged_restart_steps
    # At 1 exactly it was the run that ended, in the first pass.
    if is_stream(trainer.train_dataset) and epoch > 1:
        raise ValueError(
            f"resume_from_checkpoint: step {step} lies in pass {int(epoch) + 1} over a "
            "stream, where it can only be found again in the first. Resume from an "
            "earlier checkpoint, or train without `streaming`."
        )
    if relora.callbacks_of(trainer) and restart_steps and step >= restart_steps:
        raise ValueError(
            f"resume_from_checkpoint: step {step} comes after a ReLoRA restart "
            f"(jagged_restart_steps: {restart_steps}), and Axolotl's checkpoints do not"
            " hold what it merged into the weights in a form that it reads. Start a new"
            " run with base_model set to the merged weights (the relora folder of a "
            "checkpoint), or use `adapter: lora` without relora."
        )


# ---- The window's file ----


def window_path(checkpoint: str | os.PathLike, rank: int) -> Path:
    """Where ``rank`` keeps its window in a checkpoint folder."""
    return Path(checkpoint) / f"psft_window_rank{rank}.safetensors"


def save_window(
    checkpoint: str | os.PathLike,
    window: Window,
    run: Run,
    *,
    global_step: int,
    initial_policy: str | None = None,
) -> None:
    """Write the rest of the window, atomically; without pickle.

    The micro-batches themselves are not saved: the data order is a function of seed
    and epoch, so the data loader gives them again. Their digests are, to prove it.

    Args:
        checkpoint: its folder.
        window: what is left of it.
        run: whose it is.
        global_step: when.
        initial_policy: names the files that hold the initial policy's log-probs.
    """
    batches = [batch for step in window.steps for batch in step.batches]
    # contiguous, and cloned off views: safetensors refuses both otherwise.
    tensors = {
        f"old_logprobs.{i}": logprobs.cpu().contiguous().clone()
        for i, batch in enumerate(batches)
        if (logprobs := attached(batch)) is not None
    }
    header = {
        "global_step": global_step,
        "start_step": window.start_step,
        "rank": run.rank,
        "world_size": run.world_size,
        "settings": run.settings,
        "batching": run.batching,
        "initial_policy": initial_policy,
        "batches_per_step": [len(step.batches) for step in window.steps],
        "batch_digests": [digest(batch) for batch in batches],
    }
    files.write(window_path(checkpoint, run.rank), tensors, header, format=_FORMAT)


@dataclass
class SavedWindow:
    """A window as read back from its file, before its micro-batches are there again."""

    path: Path
    start_step: int
    batches_per_step: list[int]
    batch_digests: list[str]
    old_logprobs: list[Tensor]
    initial_policy: str | None = None

    def restore(self, window: Window, batches: Iterator[Batch]) -> None:
        """Take the window's micro-batches off the data loader and add old log-probs.

        Raises:
            FileError: if the data loader gives other micro-batches than those whose old
                log-probs were saved.
        """
        steps = []
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
            steps.append(step)
        window.restore(steps, self.start_step)

    def _other_data(self, what: str) -> files.FileError:
        return files.FileError(
            f"{self.path}: {what} than when this window was saved. Resume with the same"
            " datasets, tokenizer, seed, sequence_len, micro_batch_size, "
            "gradient_accumulation_steps and number of processes."
        )


def load_window(
    checkpoint: str | os.PathLike, run: Run, *, global_step: int
) -> SavedWindow:
    """Read this rank's window from a checkpoint and check that it belongs to this run.

    Raises:
        FileError: if the file is missing, damaged, of another step, rank, world size
            (mid-window) or of a run with other settings. Names the file, the settings
            with both their values, and the remedy.
    """
    rank, first = run.rank, window_path(checkpoint, 0)
    path = window_path(checkpoint, rank)
    if not path.is_file() and first.is_file() and _read(first)[0]["world_size"] <= rank:
        # A rank that the run which saved did not have goes on from what the first one
        # has; that must be the end of a window.
        path, rank = first, 0
    header, tensors = _read(path, {"global_step": global_step, "rank": rank})
    mid_window = bool(header["batches_per_step"])
    saved, current = header["settings"], run.settings
    if mid_window or header["world_size"] == run.world_size:
        saved, current = saved | header["batching"], current | run.batching
    _check_settings(path, saved, current)
    if mid_window and header["world_size"] != run.world_size:
        raise files.FileError(
            f"{path}: saved in the middle of a window by {header['world_size']} "
            f"processes, this run has {run.world_size}. Resume with "
            f"{header['world_size']}, or from a checkpoint at the end of a window "
            "(save_steps a multiple of psft.refresh_steps)."
        )
    _warn_of_other_steps(header, run)
    return SavedWindow(
        path=path,
        start_step=header["start_step"],
        batches_per_step=header["batches_per_step"],
        batch_digests=header["batch_digests"],
        old_logprobs=[tensors[f"old_logprobs.{i}"] for i in range(len(tensors))],
        initial_policy=header.get("initial_policy"),
    )


def digest(batch: Batch) -> str:
    """SHA-256 over a micro-batch's tokens, labels and segment boundaries."""
    names = ("input_ids", "labels", "position_ids")
    return files.digest_tensors({name: batch[name] for name in names if name in batch})


def _read(
    path: Path, belongs: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    remedy = (
        "Resume from another checkpoint that a psft run has completed, or start a new "
        "run with base_model set to this one. The window is never restarted silently: "
        "the run would then differ from the one that wrote this checkpoint."
    )
    return files.read(path, format=_FORMAT, remedy=remedy, belongs=belongs)


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
    raise files.FileError(
        f"{path}: {'; '.join(named)}. Restore what was changed, or start a new run with"
        " base_model set to the checkpoint."
    )


def _warn_of_other_steps(header: dict[str, Any], run: Run) -> None:
    saved = Run(0, header["world_size"], {}, header["batching"])
    if saved.step_size != run.step_size and run.rank == 0:
        LOG.warning(
            f"psft: the checkpoint was written with world size {saved.world_size} and "
            f"{saved.batching}; now it is {run.world_size}, with {run.batching}. An "
            "optimizer step has another number of samples, and the place in the data is"
            " counted in steps: some samples come again in this epoch, or not at all. "
            "Keep the product of the three to go on exactly there."
        )
