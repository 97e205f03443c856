"""Checkpoint folders: which are complete, and what to say where one is not.

A checkpoint is complete when `trainer_state.json`, the last file written to it, can be
read and no file that was there by then has gone. What the files hold is the trainer's.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger

from axolotl_psft import failures
from axolotl_psft.ranks import gather, is_first_rank

LOG = get_logger(__name__)

# transformers' names; its trainer, which has them, takes seconds to import.
_STATE = "trainer_state.json"
_PREFIX = "checkpoint"

# Names of the files of a checkpoint: most of those that are read at resume are looked
# for, and passed over without a word where they are not there.
_LIST = "psft_files.json"

# They have errors of their own (resume.py).
_UNLISTED = "psft_window_rank*"


class CheckpointError(RuntimeError):
    """A checkpoint that this rank could not write; says why and what to do."""


def begin(checkpoint: Path) -> None:
    """Remove what an earlier run left under this name, before any rank writes.

    The mark of completeness goes first: what is deleted or written by halves must not
    look complete. One collective.

    Raises:
        OSError: it cannot be removed; PeerFailedError on the other ranks.
    """
    error = None
    if is_first_rank():
        try:
            (checkpoint / _STATE).unlink(missing_ok=True)
            if checkpoint.is_dir():
                shutil.rmtree(checkpoint)
        except OSError as found:
            error = found
    failures.raise_together(error)


def list_files(checkpoint: Path) -> None:
    """Wait for every rank's files, and write down which there are.

    To be called by all ranks when only the last file, that of the trainer's state, is
    missing: once it is there, the checkpoint is complete. One collective.
    """
    gather(None)
    if not is_first_rank():
        return
    paths = (path for path in checkpoint.rglob("*") if path.is_file())
    names = [
        str(path.relative_to(checkpoint)) for path in paths if not path.match(_UNLISTED)
    ]
    (checkpoint / _LIST).write_text(json.dumps(sorted(names)))


def flaw(checkpoint: Path) -> str | None:
    """What a checkpoint lacks to be complete, as the end of a sentence; None: nothing.

    Reads no weights.
    """
    if not checkpoint.is_dir():
        return "is no folder"
    if not (checkpoint / _STATE).is_file():
        return f"has no {_STATE}: the run ended while it was being written"
    for name in (_STATE, _LIST):
        try:
            content = json.loads((checkpoint / name).read_text())
        except FileNotFoundError:  # the list, in a checkpoint of an earlier version
            return None
        except ValueError:
            return f"has half a {name}: the run ended while it was being written"
    gone = [name for name in content if not (checkpoint / name).is_file()]
    return f"lacks {', '.join(gone)}: a part of it was deleted" if gone else None


def in_folder(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoint folders of a run, complete or not, oldest step first."""
    found = Path(output_dir).glob(f"{_PREFIX}-*")
    name = re.compile(rf"{_PREFIX}-(\d+)")
    steps = [(match, path) for path in found if (match := name.fullmatch(path.name))]
    return [path for _, path in sorted((int(match[1]), path) for match, path in steps)]


def complete_in(output_dir: str | os.PathLike) -> list[Path]:
    """The complete ones, oldest step first."""
    return [path for path in in_folder(output_dir) if flaw(path) is None]


def newest_complete(output_dir: str | os.PathLike) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint and, of each newer one, what it lacks."""
    skipped: list[str] = []
    for path in reversed(in_folder(output_dir)):
        what = flaw(path)
        if what is None:
            return path, skipped
        skipped.append(f"{path.name} {what}")
    return None, skipped


def choose(cfg: Any) -> None:
    """With auto_resume_from_checkpoints, resume from the newest complete checkpoint.

    Axolotl takes the newest, be it the one that the run was killed over.
    """
    if not cfg.auto_resume_from_checkpoints or cfg.resume_from_checkpoint is not None:
        return
    newest, skipped = newest_complete(cfg.output_dir)
    if skipped:
        begin = "starts anew" if newest is None else f"resumes from {newest.name}"
        LOG.warning(
            f"auto_resume_from_checkpoints: the run {begin}: {'; '.join(skipped)}."
        )
    if newest is None:
        cfg.auto_resume_from_checkpoints = False
    else:
        cfg.resume_from_checkpoint = str(newest)


def check(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state in the checkpoint to resume from.

    Raises:
        ValueError: it is not complete. Names the complete ones beside it.
    """
    if what := flaw(checkpoint):
        others = [path.name for path in complete_in(checkpoint.parent)]
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} {what}. Delete it and resume from a "
            f"complete one; here are {others or 'none'}."
        )
    return json.loads((checkpoint / _STATE).read_text())


def how_to_resume(output_dir: str | os.PathLike, resumed_from: Path | None) -> str:
    """What to do after a failure that was not the run's own fault, as sentences."""
    newest = newest_complete(output_dir)[0] or resumed_from
    if newest is None:
        return f"There is no complete checkpoint in {output_dir}: start the run again."
    return (
        f"Checkpoints are intact; the newest complete one is {newest}. Resume with "
        f"`resume_from_checkpoint: {newest}` or `auto_resume_from_checkpoints: true`."
    )


def check_writable(output_dir: str) -> None:
    """Create a run's output folder where there is none, and a file in it.

    Raises:
        ValueError: that is not possible. Names the folder, the reason and the remedy.
    """
    try:
        os.makedirs(output_dir, exist_ok=True)
        # Not os.access: root is told yes on a read-only disk.
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir: {output_dir} cannot be written to ({error.strerror}): no "
            "checkpoint and no model could be saved. Set output_dir to a folder that "
            "this user may write to, on a disk that is not full or read-only."
        ) from error


def not_written(
    checkpoint: Path, error: Exception, resumed_from: Path | None
) -> CheckpointError:
    """The error of a checkpoint that ``error`` has kept this rank from writing.

    What there is of it is removed: it is of no use, and the disk may be full of it.
    """
    output_dir = checkpoint.parent
    shutil.rmtree(checkpoint, ignore_errors=True)
    try:
        free = f"{shutil.disk_usage(output_dir).free / 1e6:,.1f} MB"
    except OSError:
        free = "no readable number of bytes"
    return CheckpointError(
        f"{checkpoint.name} could not be written to {output_dir}: "
        f"{failures.describe(error)}. {free} are free there. Make room "
        "(save_total_limit keeps fewer checkpoints) or see to the disk, then resume: "
        "what was trained since the last checkpoint is trained again. "
        f"{how_to_resume(output_dir, resumed_from)}"
    )


def explain(
    error: Exception, args: Any, *, being_saved: Path | None, resumed_from: Path | None
) -> None:
    """Raise the failure that ``error``, which ended a run, is the consequence of.

    Args:
        error: what this rank met.
        args: the trainer's arguments.
        being_saved: the checkpoint that was being written, if one was.
        resumed_from: the checkpoint the run began with, if any.

    Raises:
        CheckpointError: this rank could not write a checkpoint.
        DataWorkerError: a process of the data loader ended.
        PeerFailedError: another rank failed before.
    """
    remedy = how_to_resume(args.output_dir, resumed_from)
    cause = error
    is_echo = isinstance(error, failures.PeerFailedError)
    if being_saved is not None and not is_echo and not failures.is_of_connection(error):
        cause = not_written(being_saved, error, resumed_from)
    elif failures.is_of_data_worker(error):
        cause = failures.DataWorkerError(
            f"dataloader_num_workers: {args.dataloader_num_workers}: one of them has "
            f"ended ({failures.describe(error)}). They are killed where memory or "
            f"/dev/shm runs out: use fewer if that was it. {remedy}"
        )
    failures.name_first(cause, remedy)
    if cause is not error:
        raise cause from error
