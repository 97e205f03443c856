"""Data-parallel collectives beside the computation change no bit of a step.

Gloo runs them so, too, where it is told to. Whole runs: test_tensor_parallel.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from tests.distributed.cpu_ranks import overlap
from tests.distributed.launch import run_distributed
from tests.distributed.test_megatron import tensors, written

STEPS = 4
# So few parameters that every layer has buckets of its own.
BUCKET = 2000


def build(folder: Path, tp_size: int, optimizer: str) -> Any:
    """A step on a model with parallel layers, its weights those of `folder`."""
    from transformers import AutoModelForCausalLM

    from axolotl_psft.megatron import groups, step
    from axolotl_psft.megatron.layers import parallelize
    from axolotl_psft.megatron.weights import load_weights
    from axolotl_psft.token_logprobs import install_logprobs_forward

    layout = groups.initialize(tp_size)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "meta"})
    parallelize(
        model,
        layout,
        dtype=torch.float32,
        device=torch.device("cpu"),
        sequence_parallel=tp_size > 1,
    )
    load_weights(model, folder, layout)
    model.base_model.layers[1].mlp.requires_grad_(False)  # unfrozen_parameters
    install_logprobs_forward(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step._bucket_size = lambda layout: BUCKET
    return step.MegatronStep(model, layout, step.OptimizerSettings(optimizer, lr=0.01))


def micro_batches(number: int, dp_rank: int) -> list[tuple[Tensor, Tensor]]:
    """Ids and targets, [2, 9] each; other ones on every data-parallel rank.

    An epoch's last step may have fewer of them.
    """
    rng = torch.Generator().manual_seed(10 * number + dp_rank)
    ids = torch.randint(64, (3 - number % 2, 2, 9), generator=rng)
    targets = ids.clone()
    if number == dp_rank:
        targets[-1] = -100  # a rank's last micro-batch without an active token
    return list(zip(ids, targets, strict=True))


def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    ids, targets = batch
    return -model(input_ids=ids, logprob_targets=targets).logprobs.sum() / 100


def train(
    kind: str, folder: Path, start: Path, output: Path, tp_size: int, optimizer: str
) -> dict[str, Any]:
    """What each step gave, from the checkpoint `start` where there is one."""
    from axolotl_psft.megatron.weights import load_weights, save_weights

    if kind != "off":
        overlap(late=kind == "late")
    step = build(folder, tp_size, optimizer)
    assert kind == "off" or len(step.ddp.bucket_groups) > 5
    first = 0
    if start.is_dir():
        load_weights(step.ddp.module.model, start, step.layout)
        step.load_optimizer(start)
        first = int(start.name)
    results: dict[str, Any] = {"losses": [], "norms": [], "scores": []}
    ids = torch.arange(18).view(2, 9)

    def scores() -> list[list[float]]:
        step.ddp.eval()
        with torch.no_grad():
            return step.ddp(input_ids=ids, logprob_targets=ids).logprobs.tolist()

    # What one data-parallel rank scores need not be matched by another.
    is_first = step.layout.dp_rank == 0
    if is_first:
        scores()
    dist.barrier(group=step.layout.dp_group)
    for number in range(first, STEPS):
        batches = micro_batches(number, step.layout.dp_rank)
        step.ddp.train()
        results["losses"].append(step.forward_backward(batches, loss).item())
        # The second step's gradients are clipped, the others' measured.
        norm = step.clip_grad_norm(0.1) if number == 1 else step.grad_norm()
        results["norms"].append(float(norm))
        step.update()
        results["waits"] = [
            group.param_gather_handle is not None for group in step.ddp.bucket_groups
        ]
        folder = output / str(number + 1)
        if number % 2:
            if is_first:
                scores()
            save_weights(step.ddp.module.model, folder, step.layout)
        results["scores"].append(scores())
        if number % 2 == 0:
            save_weights(step.ddp.module.model, folder, step.layout)
        step.save_optimizer(folder)
        dist.barrier()
    return results


def check(ranks: list[Any], expected: list[Any], *folders: Path) -> None:
    for ours, theirs in zip(ranks, expected, strict=True):
        for key in ("losses", "norms", "scores"):
            assert ours[key] == theirs[key][-len(ours[key]) :], key
    ours, theirs = map(tensors, folders)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


SOAK = pytest.mark.soak


@pytest.mark.parametrize(
    ("tp_size", "optimizer"),
    [
        (2, "adam"),
        (1, "sgd"),
        pytest.param(1, "adam", marks=SOAK),
        pytest.param(2, "sgd", marks=SOAK),
    ],
)
def test_overlap_changes_no_bit(tmp_path: Path, tp_size: int, optimizer: str) -> None:
    model_type, tied = {1: ("llama", False), 2: ("qwen3", True)}[tp_size]
    folder = written(tmp_path, model_type, tie_word_embeddings=tied)

    def ranks(kind: str, output: Path, start: Path = Path("none")) -> list[Any]:
        args = (folder, start, output, tp_size, optimizer)
        return run_distributed(train, 2 * tp_size, kind, *args)

    off = ranks("off", tmp_path / "off")
    assert not any(off[0]["waits"])
    assert len(set(off[0]["scores"][0][0])) > 1
    assert off[0]["losses"] != off[-1]["losses"], "ranks have their own data"
    for kind in ("on", "late"):
        ours = ranks(kind, tmp_path / kind)
        # SGD has the whole weights on every rank: there is nothing to gather.
        assert ours[0]["waits"] == [optimizer == "adam"] * len(ours[0]["waits"])
        for number in range(1, STEPS + 1):
            check(ours, off, tmp_path / kind / str(number), tmp_path / f"off/{number}")
    # A checkpoint of either resumes as the other.
    for kind, start in (("late", "off"), ("off", "late")):
        output = tmp_path / f"{start} resumed"
        ours = ranks(kind, output, tmp_path / start / "2")
        assert len(ours[0]["losses"]) == 2
        check(ours, off, output / str(STEPS), tmp_path / f"off/{STEPS}")
