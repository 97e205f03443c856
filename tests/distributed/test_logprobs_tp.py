"""The loss head with its vocabulary on several ranks: one rank's results, few messages.

Each world is spawned once, works through all cases and hands back tensors; the tests
compare them here with the textbook form on one rank.
"""

import functools
import importlib.util
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from axolotl_psft import linear_logprobs, vocab_parallel_logprobs
from tests.distributed.launch import run_distributed
from tests.reference import Watch, head_inputs, naive_logprobs_of

# float64 on both sides, as in test_logprobs.py.
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}
CASES = [
    *((t, v, i) for t in (1, 7, 252) for v in (507, 32_000) for i in (0.2, 1.0)),
    (252, 151_936, 0.2),
]
Result = dict[str, Any]


def shard_of(weight: Tensor) -> Tensor:
    """This rank's rows, padded with noise where the vocabulary does not divide."""
    rank, size = dist.get_rank(), dist.get_world_size()
    length = -(-len(weight) // size)
    shard = weight[rank * length : (rank + 1) * length]
    padding = torch.full((length - len(shard), weight.shape[1]), 9.0).to(shard)
    return torch.cat((shard, padding))


def bad_target_and_frozen_hidden() -> tuple[str, list[str]]:
    hidden, weight, targets, grad = head_inputs(7, 508)
    shard = shard_of(weight).requires_grad_()
    with Watch() as watch:
        logp, _ = linear_logprobs(hidden, shard, targets, tp_group=dist.group.WORLD)
        logp.backward(grad)
    targets[3] = 508
    with pytest.raises(ValueError) as error:
        linear_logprobs(hidden, shard, targets, tp_group=dist.group.WORLD)
    return str(error.value), watch.collectives


def both_heads() -> list[Result]:
    """Runs on each rank: all cases, through the weight and through logits."""
    results = []
    for num_tokens, vocab_size, ignored in CASES:
        hidden, weight, targets, grad = head_inputs(num_tokens, vocab_size, ignored)
        shard = shard_of(weight).requires_grad_()
        hidden.requires_grad_()
        group = {"tp_group": dist.group.WORLD, "vocab_size": vocab_size}
        with Watch() as forward:
            logp, entropy = linear_logprobs(
                hidden, shard, targets, tile_shape=(100, 3001), **group
            )
        with Watch() as backward:
            logp.backward(grad)
        logits = (hidden @ shard.t()).detach().requires_grad_()
        with Watch() as of_logits:
            logp_of, entropy_of = vocab_parallel_logprobs(logits, targets, **group)
            logp_of.backward(grad)
        results.append(
            {
                "logp": logp.detach(),
                "entropy": entropy,
                "d_hidden": hidden.grad,
                "d_weight": shard.grad,
                "of_logits": (logp_of.detach(), entropy_of),
                "d_logits": logits.grad,
                "collectives": [
                    watch.collectives for watch in (forward, backward, of_logits)
                ],
            }
        )
    error, frozen = bad_target_and_frozen_hidden()
    results.append({"error": error, "frozen": frozen})
    return results


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[list[Result]]:
    return run_distributed(both_heads, request.param, timeout=200)


@functools.cache
def expected_of(case: tuple[int, int, float]) -> tuple[Tensor, ...]:
    hidden, weight, targets, grad = head_inputs(*case)
    hidden.requires_grad_(), weight.requires_grad_()
    logits = hidden @ weight.t()
    logp, entropy = naive_logprobs_of(logits, targets)
    gradients = torch.autograd.grad(logp, (hidden, weight, logits), grad)
    return (logp.detach(), entropy, *gradients)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_one_rank(
    ranks: list[list[Result]], case: tuple[int, int, float]
) -> None:
    results = [rank[CASES.index(case)] for rank in ranks]
    logp, entropy, d_hidden, d_weight, d_logits = expected_of(case)
    for result in results:
        assert_close(result["logp"], logp, **EXACT)
        assert_close(result["entropy"], entropy, **EXACT)
        assert_close(result["d_hidden"], d_hidden, **EXACT)
        assert_close(result["of_logits"], (logp, entropy), **EXACT)
        # Ranks that clip different tokens would not fit together in backward.
        assert torch.equal(result["logp"], results[0]["logp"])
    vocab_size = case[1]
    whole = torch.cat([result["d_weight"] for result in results])
    assert_close(whole[:vocab_size], d_weight, **EXACT)
    assert not whole[vocab_size:].any()
    whole = torch.cat([result["d_logits"] for result in results], 1)
    assert_close(whole[:, :vocab_size], d_logits, **EXACT)
    assert not whole[:, vocab_size:].any()


def test_one_collective_each_way(ranks: list[list[Result]]) -> None:
    gather, reduce = ["_allgather_base_"], ["allreduce_"]
    for rank in ranks:
        for result in rank[:-1]:  # up to 26 x 3 tiles a rank, and no active row at all
            assert result["collectives"] == [gather, reduce, gather]
        assert rank[-1]["frozen"] == gather  # no d_hidden to reduce


def test_target_outside_the_vocabulary(ranks: list[list[Result]]) -> None:
    for rank in ranks:
        message = "targets[3] is 508, outside the vocabulary [0, 508)"
        assert message in rank[-1]["error"]


def with_row_kernels() -> Result:
    """Runs on each rank: a head of float32 with the kernels of a GPU, interpreted."""
    from axolotl_psft import logprobs, row_kernels

    hidden, weight, targets, grad = head_inputs(9, 507, dtype=torch.float32)
    shard = shard_of(weight).requires_grad_()
    hidden.requires_grad_()
    group = {"tp_group": dist.group.WORLD, "vocab_size": 507}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "_row_kernels", lambda device: row_kernels)
        logp, entropy = linear_logprobs(hidden, shard, targets, **group)
        logp.backward(grad.float())
    results = {"logp": logp.detach(), "entropy": entropy}
    return {**results, "d_hidden": hidden.grad, "d_weight": shard.grad}


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is on Linux only"
)
def test_row_kernels_agree_with_one_rank() -> None:
    ranks = run_distributed(with_row_kernels, 2, timeout=120)
    logp, entropy, d_hidden, d_weight, _ = expected_of((9, 507, 0.2))
    # As in test_row_kernels.py.
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    for result in ranks:
        assert_close(result["logp"], logp, **close)
        assert_close(result["entropy"], entropy, **close)
        assert_close(result["d_hidden"], d_hidden, **close)
    whole = torch.cat([result["d_weight"] for result in ranks])
    assert_close(whole[:507], d_weight, **close)
    assert not whole[507:].any()


def megatron_cross_entropy(tp_size: int) -> list[tuple[Tensor, Tensor]]:
    """Log-probs and their gradient by the hidden states: Megatron-Core's, and ours."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel(tp_size)
    group = parallel_state.get_tensor_model_parallel_group()
    hidden, weight, targets, grad = head_inputs(252, 32_000, 0.0, dtype=torch.float32)
    shard = shard_of(weight) if tp_size > 1 else weight

    def of_megatron(logits: Tensor) -> Tensor:  # [s, b, v]
        return -vocab_parallel_cross_entropy(logits[:, None], targets[:, None])[:, 0]

    def of_logits(logits: Tensor) -> Tensor:
        return vocab_parallel_logprobs(logits, targets, tp_group=group)[0]

    results = []
    for head in (of_megatron, of_logits):
        logits = (hidden @ shard.t()).requires_grad_()
        logp = head(logits * 1)  # a copy: Megatron overwrites its argument
        logp.backward(grad.float())
        d_hidden = logits.grad @ shard
        dist.all_reduce(d_hidden, group=group)
        results.append((logp.detach(), d_hidden))
    hidden.requires_grad_()
    logp, _ = linear_logprobs(hidden, shard, targets, tp_group=group)
    logp.backward(grad.float())
    parallel_state.destroy_model_parallel()
    return [*results, (logp.detach(), hidden.grad)]


def megatron_with_1_and_2_ranks() -> list[list[tuple[Tensor, Tensor]]]:
    return [megatron_cross_entropy(tp_size) for tp_size in (1, 2)]


@pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="needs the megatron extra"
)
def test_agrees_with_megatron() -> None:
    for rank in run_distributed(megatron_with_1_and_2_ranks, 2, timeout=120):
        for megatron, *ours in rank:
            for result in ours:
                # float32 on both sides: logits reach 15, where an ulp is 1e-6, and
                # the two sum in another order.
                assert_close(result, megatron, rtol=1e-5, atol=1e-5)
