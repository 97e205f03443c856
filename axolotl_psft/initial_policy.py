"""The initial policy: scored once, kept beside the checkpoints, looked up by sample.

Here are a sample's digest, the order of scoring and the files. The old policy of a
window, and the scorer, are old_policy.py.
"""

import hashlib
import itertools
import os
import shutil
import uuid
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.samplers import get_dataset_lengths
from torch import Tensor
from torch.utils.data import DataLoader

from axolotl_psft import files
from axolotl_psft.packing import (
    IGNORE_INDEX,
    Batch,
    sample_starts,
    supervised_targets,
)
from axolotl_psft.ranks import DataRanks, gather, is_first_rank

_FORMAT = "axolotl_psft.initial_logprobs/1"


@dataclass(frozen=True)
class Sample:
    """One sample in a micro-batch, in whatever row and with whatever padding."""

    row: int
    columns: Tensor
    """[n] int64, ascending: its active tokens in that row."""
    digest: int
    """Of its tokens up to the last active one, and of which are active."""


def samples(batch: Batch) -> Iterator[Sample]:
    """The samples of a micro-batch that have active tokens.

    Args:
        batch: ``input_ids`` and ``labels`` [B, S]; ``position_ids`` where packed;
            ``attention_mask`` where padded on the left.
    """
    where = (batch["labels"], batch.get("position_ids"), batch.get("attention_mask"))
    targets = supervised_targets(*where).cpu()
    starts = sample_starts(*where).cpu()
    ids = batch["input_ids"].cpu()
    for row in range(len(ids)):
        bounds = [*starts[row].nonzero().flatten().tolist(), ids.shape[1]]
        for begin, end in itertools.pairwise(bounds):
            active = (targets[row, begin:end] != IGNORE_INDEX).nonzero().flatten()
            if not len(active):  # padding, too
                continue
            columns = begin + active
            # What follows the last active token bears on no log-prob, and may be
            # padding.
            span = slice(begin, int(columns[-1]) + 1)
            yield Sample(row, columns, _digest(ids[row, span], targets[row, span]))


def _digest(ids: Tensor, targets: Tensor) -> int:
    # 64 bits of it: among a million samples, two alike are a matter of 1 in 30 million.
    sha = hashlib.sha256(torch.stack([ids, targets]).numpy().tobytes())
    return int.from_bytes(sha.digest()[:8], "little", signed=True)


def scoring_batches(
    lengths: Sequence[int],
    *,
    num_rows: int,
    row_tokens: int | None,
    ranks: DataRanks,
) -> list[list[Any]]:
    """This rank's share of the data set, as micro-batches of indices.

    Similar lengths come together, for little padding, and the longest first: if memory
    does not suffice, it is seen at once. All ranks get the same number of micro-batches
    (some repeated), since a sharded model's forward needs all of them.

    Args:
        lengths: tokens of each sample.
        num_rows: rows of a micro-batch.
        row_tokens: what a row holds where samples are packed; None: one sample.
        ranks: those whose data differ.

    Returns:
        Micro-batches: lists of indices or, packed, of rows of indices.
    """
    order: list[Any] = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if row_tokens is not None:
        order = _filled_rows(order, lengths, row_tokens)
    batches = [order[i : i + num_rows] for i in range(0, len(order), num_rows)]
    total = -(-len(batches) // ranks.size) * ranks.size
    share = itertools.islice(itertools.cycle(batches), ranks.rank, total, ranks.size)
    return list(share)


def scoring_dataloader(
    training: DataLoader, args: Any, batch_size: int, ranks: DataRanks
) -> DataLoader:
    """Every sample once, as training sees it: same columns, packing and padding.

    Args:
        training: the training data loader.
        args: the trainer's arguments.
        batch_size: rows of a micro-batch.
        ranks: those whose data differ.
    """
    num_rows, row_tokens = batch_size, None
    if args.sample_packing:
        row_tokens = args.max_seq_length
        if not args.multipack_real_batches:
            num_rows, row_tokens = 1, num_rows * row_tokens
    batches = scoring_batches(
        get_dataset_lengths(training.dataset).tolist(),
        num_rows=num_rows,
        row_tokens=row_tokens,
        ranks=ranks,
    )
    return DataLoader(
        training.dataset,
        batch_sampler=batches,
        collate_fn=training.collate_fn,
        num_workers=args.dataloader_num_workers,
        # Of its own: the global one decides the order of training.
        generator=torch.Generator(),
    )


def score(
    batches: Iterable[tuple[Batch, Tensor]], folder: Path, ranks: DataRanks
) -> "InitialPolicy":
    """Write the initial policy, each data rank its share, and read all of it.

    Two collectives beside those of the model.

    Args:
        batches: this rank's micro-batches of the data set, with log-probs [B, S].
        folder: :func:`folder_in` the run's output folder.
        ranks: those whose data differ.
    """
    if is_first_rank():
        clear(folder)
    # The first rank's; and nobody writes before that has cleared.
    run_id = gather(uuid.uuid4().hex)[0]
    scores = Scores()
    for batch, logprobs in batches:
        scores.add(batch, logprobs)
    if ranks.is_first:
        scores.save(folder, run_id=run_id, part=ranks.rank, num_parts=ranks.size)
    # Nobody reads before all have written.
    gather(None)
    return InitialPolicy(folder, run_id)


def find(
    trainer: Any,
    scorer: Any,
    training: DataLoader,
    checkpoint: Path | None,
    run_id: str | None,
) -> "InitialPolicy":
    """Score the data set with the model as it is, or read what was scored.

    Args:
        trainer: whose data they are.
        scorer: of its model.
        training: its data loader.
        checkpoint: that the run goes on from; the files are beside it.
        run_id: of the scoring, as the checkpoint knows it.
    """
    folder = folder_in(trainer.args.output_dir)
    if checkpoint is not None:
        assert run_id is not None, "the checkpoint's objective was compared"
        policy = InitialPolicy(folder_in(checkpoint.parent), run_id)
        # This run's checkpoints must find it beside them, too.
        if trainer.is_world_process_zero():
            policy.copy_to(folder)
        return policy
    batches = scoring_dataloader(
        training, trainer.args, trainer._train_batch_size, trainer.data_ranks
    )
    scorer.check_once(torch.as_tensor([batches.dataset[0]["input_ids"]]))
    scored = scorer.scored(batches, "the initial policy")
    return score(scored, folder, trainer.data_ranks)


def _filled_rows(
    order: list[int], lengths: Sequence[int], row_tokens: int
) -> list[list[int]]:
    rows: list[list[int]] = []
    room = 0
    for index in order:
        if not rows or lengths[index] > room:
            rows.append([])
            room = row_tokens
        rows[-1].append(index)
        room -= lengths[index]
    return rows


class Scores:
    """One rank's share while it is being scored, in memory until it is saved."""

    def __init__(self) -> None:
        self._digests: list[int] = []
        self._sizes: list[int] = []
        self._logprobs: list[Tensor] = []

    def add(self, batch: Batch, logprobs: Tensor) -> None:
        """Keep the active tokens of ``logprobs`` [B, S], float32."""
        logprobs = logprobs.cpu()
        found = list(samples(batch))
        self._digests += [sample.digest for sample in found]
        self._sizes += [len(sample.columns) for sample in found]
        parts = [logprobs[sample.row, sample.columns] for sample in found]
        if parts:
            self._logprobs.append(torch.cat(parts))

    def save(self, folder: Path, *, run_id: str, part: int, num_parts: int) -> None:
        """Write the share.

        Args:
            folder: :func:`folder_in` the run's output folder.
            run_id: the same in all parts of one scoring, and in no other's.
            part, num_parts: which share this is, of how many.
        """
        sizes = torch.tensor(self._sizes, dtype=torch.int64)
        tensors = {
            "digests": torch.tensor(self._digests, dtype=torch.int64),
            "ends": sizes.cumsum(0),
            "logprobs": torch.cat([torch.zeros(0), *self._logprobs]),
        }
        header = {"run_id": run_id, "part": part, "num_parts": num_parts}
        files.write(_path(folder, part), tensors, header, format=_FORMAT)


def folder_in(output_dir: str | os.PathLike) -> Path:
    """Where a run keeps its initial policy: beside its checkpoints."""
    return Path(output_dir) / "psft_initial_logprobs"


def clear(folder: Path) -> None:
    """Delete an earlier run's parts."""
    for path in folder.glob("part-*"):
        path.unlink()


class InitialPolicy:
    """Log-probs of all samples under the initial policy.

    16 bytes a sample are in memory; the log-probs are read from their files.

    Args:
        folder: where the parts are.
        run_id: what :meth:`Scores.save` was given.

    Raises:
        files.FileError: a part is missing, damaged or another run's. Names the file
            and the remedy.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        self.folder = folder
        self.run_id = run_id
        header, first = _read(folder, 0, run_id)
        self._parts = [first]
        for part in range(1, header["num_parts"]):
            self._parts.append(_read(folder, part, run_id)[1])
        self._firsts = [0]
        for tensors in self._parts[:-1]:
            self._firsts.append(self._firsts[-1] + len(tensors["digests"]))
        digests = torch.cat([tensors["digests"] for tensors in self._parts])
        self._digests, self._samples = digests.sort(stable=True)

    def logprobs(self, batch: Batch) -> Tensor:
        """[B, S] float32, on the micro-batch's device; 0 where no token is active.

        Raises:
            files.FileError: a sample was not scored.
        """
        logprobs = torch.zeros(batch["labels"].shape, dtype=torch.float32)
        for sample in samples(batch):
            found = self._find(sample.digest)
            if found is None:
                raise files.FileError(
                    f"{self.folder}: no log-probs for a sample with "
                    f"{len(sample.columns)} supervised tokens in columns "
                    f"{sample.columns[0]} to {sample.columns[-1]}. The data are not "
                    "those that were scored when the run started. Resume with the same "
                    "datasets, tokenizer, chat template, train_on_inputs, sequence_len,"
                    " val_set_size and seed, or start a new run with base_model set to "
                    "the checkpoint."
                )
            logprobs[sample.row, sample.columns] = found
        return logprobs.to(batch["labels"].device)

    def _find(self, digest: int) -> Tensor | None:
        place = int(torch.searchsorted(self._digests, digest))
        if place == len(self._digests) or int(self._digests[place]) != digest:
            return None
        index = int(self._samples[place])
        part = bisect_right(self._firsts, index) - 1
        index -= self._firsts[part]
        ends = self._parts[part]["ends"]
        begin = int(ends[index - 1]) if index else 0
        return self._parts[part]["logprobs"][begin : int(ends[index])]

    def copy_to(self, folder: Path) -> None:
        """Put the parts beside another run's checkpoints, instead of what is there."""
        if folder.resolve() == self.folder.resolve():
            return
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        for part in range(len(self._parts)):
            with files.replacing(_path(folder, part)) as partial:
                shutil.copyfile(_path(self.folder, part), partial)


def _path(folder: Path, part: int) -> Path:
    return folder / f"part-{part}.safetensors"


def _read(
    folder: Path, part: int, run_id: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    remedy = (
        f"It holds log-probs of the initial policy. Put back {folder.name} of the run "
        "that wrote the checkpoint, on a disk that all nodes share, or start a new run "
        "with base_model set to the checkpoint; it is never scored again silently, "
        "since the model has changed."
    )
    return files.read(
        _path(folder, part),
        format=_FORMAT,
        remedy=remedy,
        belongs={"run_id": run_id, "part": part},
    )
