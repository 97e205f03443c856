"""Data order as a function of seed and epoch only, so that a resumed run sees it again.

Axolotl's packing counts its batches in orders drawn from the global generator, whose
state may differ at resume, and has epochs of different lengths.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from axolotl.utils.samplers import MultipackBatchSampler
from torch.utils.data import RandomSampler, Sampler
from transformers import trainer


class EpochRandomSampler(Sampler[int]):
    """A permutation drawn from ``seed + epoch`` and nothing else."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.num_samples, generator=generator).tolist()

    def __len__(self) -> int:
        return self.num_samples


class EpochMultipackBatchSampler(MultipackBatchSampler):
    """Axolotl's packing over an :class:`EpochRandomSampler`.

    Every epoch yields as many batches as epoch 0: one that packs into more is cut, one
    that packs into fewer starts over. The Trainer counts steps and finds its place at
    resume by one number for all epochs.
    """

    @classmethod
    def from_stock(
        cls, stock: MultipackBatchSampler, seed: int
    ) -> "EpochMultipackBatchSampler":
        """The same packing options; a random order becomes one of seed and epoch."""
        sampler = cls.__new__(cls)
        sampler.__dict__.update(stock.__dict__)
        if isinstance(stock.sampler, RandomSampler):
            sampler.sampler = EpochRandomSampler(len(stock.lengths), seed)
            sampler._batches = sampler._len_across_ranks = None
            # Counted now, in epoch 0, and once: its order is not drawn anew.
            sampler.num_count_samples = 1
            len(sampler)
        return sampler

    def __iter__(self) -> Iterator[list[list[int]]]:
        length = len(self)
        batches = self.generate_batches(set_stats=True)
        if length and not batches:
            raise ValueError(
                f"sample_packing: the {len(self.lengths)} samples do not fill one "
                "micro-batch in every epoch. Lower micro_batch_size or sequence_len."
            )
        for index in range(length):
            yield batches[index % len(batches)]


def set_sampler_epoch(dataloader: Any, epoch: int) -> None:
    """Tell every sampler under ``dataloader`` the epoch.

    accelerate's wrappers pass it on through some nestings only, and transformers 5.20
    reaches one further: not through SkipBatchSampler over BatchSamplerShard, that is,
    not at resume on several ranks. patches/accelerate-1.15.0/0001 does.
    """
    pending = [getattr(dataloader, "batch_sampler", None)]
    while pending:
        sampler = pending.pop()
        if sampler is None:
            continue
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        pending += [
            getattr(sampler, name, None) for name in ("batch_sampler", "sampler")
        ]


@functools.cache
def keep_mesh_when_skipping() -> None:
    """Let a resumed stream's loader know which ranks share their batches.

    accelerate 1.15 makes a new loader to skip what was trained on, without the device
    mesh of the first: the ranks of a tensor-parallel group would get different batches.
    patches/accelerate-1.15.0/0002 passes the mesh on; then this sets it again.
    """
    skip_first_batches = trainer.skip_first_batches

    def skip(dataloader: Any, num_batches: int = 0) -> Any:
        skipped = skip_first_batches(dataloader, num_batches)
        for name in ("torch_device_mesh", "submesh_tp", "submesh_dp", "submesh_fsdp"):
            if hasattr(dataloader, name):
                setattr(skipped, name, getattr(dataloader, name))
        return skipped

    trainer.skip_first_batches = skip
