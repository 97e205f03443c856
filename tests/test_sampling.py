"""Data order: a function of seed and epoch, under every wrapper of accelerate's."""

import gc
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import (
    BatchSamplerShard,
    SkipBatchSampler,
    prepare_data_loader,
    skip_first_batches,
)
from axolotl.utils.samplers import MultipackBatchSampler
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from axolotl_psft.sampling import (
    EpochMultipackBatchSampler,
    EpochRandomSampler,
    set_sampler_epoch,
)

LENGTHS = np.random.default_rng(0).integers(2, 24, size=120)


def stock(sampler: Any = None, lengths: np.ndarray = LENGTHS) -> MultipackBatchSampler:
    return MultipackBatchSampler(
        RandomSampler(lengths) if sampler is None else sampler,
        batch_size=2,
        batch_max_len=32,
        lengths=lengths,
        bin_size=100,
        drop_last=True,
        num_processes=1,
    )


def packed(seed: int = 7, lengths: np.ndarray = LENGTHS) -> EpochMultipackBatchSampler:
    return EpochMultipackBatchSampler.from_stock(stock(lengths=lengths), seed)


def order(sampler: EpochMultipackBatchSampler, epoch: int) -> list[list[list[int]]]:
    sampler.set_epoch(epoch)
    sampler.sampler.set_epoch(epoch)
    return list(sampler)


@pytest.fixture(autouse=True)
def _no_garbage_collection(monkeypatch: pytest.MonkeyPatch):
    # Axolotl collects garbage after every packing: 0.4 s with all of it imported.
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


class Loader:
    """Anything with a batch sampler."""

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler


def test_a_permutation_of_seed_and_epoch():
    sampler = EpochRandomSampler(50, seed=3)
    orders = {}
    for epoch in (0, 1, 2, 0):
        sampler.set_epoch(epoch)
        orders.setdefault(epoch, []).append(list(sampler))
    assert orders[0][0] == orders[0][1]
    assert orders[0][0] != orders[1][0] != orders[2][0]
    assert sorted(orders[1][0]) == list(range(50)) and len(sampler) == 50
    assert list(EpochRandomSampler(50, seed=4)) != orders[0][0]


def test_packing_ignores_the_global_generator():
    torch.manual_seed(0)
    first = [order(packed(), epoch) for epoch in range(3)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    second = [order(packed(), epoch) for epoch in range(3)]
    assert first == second
    assert first[0] != first[1] != first[2]
    assert order(packed(seed=8), 0) != first[0]
    # Nor does it move it: dropout must not depend on the data order.
    assert torch.equal(torch.get_rng_state(), state)


def test_the_stock_sampler_does_not():
    # If this fails, Axolotl's own order became reproducible and ours can go.
    torch.manual_seed(0)
    first = list(stock())
    torch.manual_seed(1)
    assert list(stock()) != first


def test_an_epoch_reached_at_once_is_the_one_reached_step_by_step():
    walked = packed()
    for epoch in range(3):
        last = order(walked, epoch)
    assert order(packed(), 2) == last


def test_every_epoch_has_as_many_batches():
    # Lengths that pack into different numbers of rows in different orders.
    lengths = np.random.default_rng(2).integers(2, 32, size=100)
    sampler = packed(lengths=lengths)
    own = []
    for epoch in range(12):
        batches = order(sampler, epoch)
        own.append(len(sampler.generate_batches()))
        assert len(batches) == len(sampler)
        kept = min(own[-1], len(sampler))
        assert batches[:kept] == sampler.generate_batches()[:kept]
        # Where there are too few, it starts over.
        assert batches[kept:] == batches[: len(sampler) - kept]
    assert min(own) < own[0] < max(own), "choose lengths that vary both ways"


def test_packing_options_are_those_of_the_stock_sampler():
    before = stock()
    sampler = EpochMultipackBatchSampler.from_stock(before, seed=0)
    for name in ("batch_size", "batch_max_len", "lengths", "bin_size", "drop_last"):
        assert getattr(sampler, name) is getattr(before, name)
    for batch in order(sampler, 0):
        assert len(batch) == 2
        assert all(LENGTHS[row].sum() <= 32 for row in batch)


def test_the_stock_order_once_counted_is_forgotten():
    before = stock()
    torch.manual_seed(0)
    len(before)
    assert list(EpochMultipackBatchSampler.from_stock(before, 7)) == order(packed(), 0)


def test_a_sequential_order_stays():
    # curriculum_sampling
    before = stock(SequentialSampler(LENGTHS))
    sampler = EpochMultipackBatchSampler.from_stock(before, seed=0)
    assert sampler.sampler is before.sampler
    assert list(sampler) == list(before)


def nestings() -> list[Any]:
    def shard(sampler: Any) -> Any:
        return BatchSamplerShard(sampler, num_processes=2, process_index=1)

    return [
        pytest.param(lambda s: s, id="plain"),
        pytest.param(shard, id="shard"),
        pytest.param(lambda s: SkipBatchSampler(s, 1), id="skip"),
        pytest.param(lambda s: SkipBatchSampler(shard(s), 1), id="skip over shard"),
    ]


@pytest.mark.parametrize("wrap", nestings())
def test_the_epoch_reaches_the_sampler(wrap: Any):
    sampler = packed()
    set_sampler_epoch(Loader(wrap(sampler)), 5)
    assert sampler.epoch == sampler.sampler.epoch == 5
    assert list(sampler) == order(packed(), 5)


def test_the_epoch_reaches_through_accelerates_loaders_at_resume():
    sampler = packed()
    loader = DataLoader(range(len(LENGTHS)), batch_sampler=sampler, collate_fn=list)
    prepared = prepare_data_loader(
        loader, device=torch.device("cpu"), num_processes=2, process_index=1
    )
    resumed = skip_first_batches(prepared, 1)
    set_sampler_epoch(resumed, 4)
    # Every second batch from the second on, less the one that was trained on.
    assert list(resumed.batch_sampler) == order(packed(), 4)[1::2][1:]


def test_loaders_without_such_a_sampler_are_left_alone():
    set_sampler_epoch(Loader(None), 1)
    set_sampler_epoch(DataLoader(range(4), batch_size=2), 1)
    set_sampler_epoch([1, 2], 1)


def test_an_epoch_that_fills_no_batch_is_an_error(monkeypatch: pytest.MonkeyPatch):
    sampler = packed()
    monkeypatch.setattr(sampler, "generate_batches", lambda set_stats: [])
    with pytest.raises(ValueError, match=r"120 samples .* Lower micro_batch_size"):
        list(sampler)
