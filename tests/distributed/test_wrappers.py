"""The head inside DDP and FSDP2: their hooks gather weights and reduce gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.testing import assert_close

from tests.distributed.launch import run_distributed
from tests.tiny import qwen3

WORLD_SIZE = 2


def build(tied: bool) -> nn.Module:
    from axolotl_psft.token_logprobs import install_logprobs_forward

    model = qwen3(vocab_size=507, tie_word_embeddings=tied)
    install_logprobs_forward(model)
    return model


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if wrapper == "fsdp2, head apart":
        fully_shard(model.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(507, (2, 9), generator=generator)
    targets = ids.clone()
    targets[:, :3] = -100
    if rank == 1:
        # One rank with few targets, one row of it with none.
        targets[0] = -100
    return ids, targets


def step(model: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    ids, targets = batch(rank)
    with torch.no_grad():
        old = model(input_ids=ids, logprob_targets=targets).logprobs
    output = model(input_ids=ids, logprob_targets=targets)
    (-output.logprobs.sum()).backward()
    return old, output.logprobs.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    full = {}
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        full[name.removeprefix("module.")] = gradient.clone()
    return full


def in_ranks(tied: bool) -> dict[str, Any]:
    rank = dist.get_rank()
    wrappers = ["ddp", "fsdp2"] if tied else ["ddp", "fsdp2", "fsdp2, head apart"]
    results = {}
    for wrapper in wrappers:
        model = wrap(build(tied), wrapper)
        old, new = step(model, rank)
        results[wrapper] = (old, new, gradients(model))
    return results


@pytest.mark.parametrize("tied", [False, True])
def test_wrapped_equals_plain(tied: bool) -> None:
    ranks = run_distributed(in_ranks, WORLD_SIZE, tied, timeout=240)
    models = [build(tied) for _ in range(WORLD_SIZE)]
    plain = [step(model, rank) for rank, model in enumerate(models)]
    each = [gradients(model) for model in models]
    for rank, results in enumerate(ranks):
        for wrapper, (old, new, reduced) in results.items():
            # What the ratio needs: scored and trained log-probs are the same bits.
            assert torch.equal(old, new), wrapper
            assert torch.equal(new, plain[rank][1]), wrapper
            for name, gradient in reduced.items():
                mean = sum(g[name] for g in each) / WORLD_SIZE
                # Data parallelism averages; float32 sums in another order.
                assert_close(gradient, mean, rtol=1e-5, atol=1e-6, msg=wrapper + name)
