"""The engine's parts on real ranks: memory, collectives, dropout, files, errors."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.testing import assert_close

from tests.distributed.launch import run_distributed
from tests.reference import Watch
from tests.tiny import causal_lm

TP = 2
LAYERS = 3


def split(
    model_type: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """The model of `folder`, built without weights, split over all ranks, loaded."""
    from transformers import AutoModelForCausalLM

    from axolotl_psft.megatron import groups
    from axolotl_psft.megatron.layers import parallelize
    from axolotl_psft.megatron.weights import load_weights

    layout = groups.initialize(dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "meta"})
    cpu = torch.device("cpu")
    parallelize(model, layout, dtype=dtype, device=cpu, **options)
    load_weights(model, folder, layout)
    return model, layout


def written(
    tmp_path: Path,
    model_type: str = "qwen3",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Path:
    sizes = {"vocab_size": 64, "num_hidden_layers": LAYERS, **options}
    model = causal_lm(model_type, **sizes).to(dtype)
    model.save_pretrained(tmp_path / "model", max_shard_size="8MB")
    return tmp_path / "model"


# ---------------------------------------------------------------- memory


def peak(reset: bool = False) -> int:
    """Most resident bytes of this process since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) * 1024


def load_and_save(folder: Path, small_folder: Path, output: Path) -> tuple[int, int]:
    # What is imported, and the first groups, are not the model's.
    import axolotl_psft.megatron.layers  # noqa: F401
    from axolotl_psft.megatron.weights import save_weights

    # Nor are the pages of libraries that this process is the first to touch: once with
    # a small model.
    small, layout = split("llama", small_folder)
    save_weights(small, output / "small", layout, max_shard_size="8MB")
    before = peak(reset=True)
    model, layout = split("llama", folder)
    loaded = peak() - before
    peak(reset=True)
    save_weights(model, output, layout, max_shard_size="8MB")
    return loaded, peak() - before


def test_no_rank_ever_holds_the_whole_model(tmp_path: Path) -> None:
    big = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    folder = written(tmp_path, "llama", **big, **heads, vocab_size=2048)
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    assert size > 250e6
    small, output = written(tmp_path / "small", "llama"), tmp_path / "again"
    for loaded, saved in run_distributed(load_and_save, TP, folder, small, output):
        # Half the model, files of 8 MB, and what loading costs besides.
        assert 0.4 * size < loaded < 0.65 * size
        assert 0.4 * size < saved < 0.75 * size
    assert [path.name for path in sorted(output.glob("*.safetensors"))] == [
        path.name for path in files
    ]
    assert tensors(output).keys() == tensors(folder).keys()
    for name, tensor in tensors(folder).items():
        assert torch.equal(tensors(output)[name], tensor), name


def tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    files = folder.glob("*.safetensors")
    return {name: t for path in files for name, t in load_file(path).items()}


def gathered_bytes(folder: Path, output: Path, dtype: torch.dtype) -> list[int]:
    """What this rank's device gets from the others while it saves, each time."""
    from axolotl_psft.megatron import weights

    weights.GATHERED_BYTES = 2000
    model, layout = split("llama", folder, dtype)
    original, sizes = dist.gather, []

    def gather(rows: Tensor, parts: Any, **kwargs: Any) -> None:
        sizes.append(sum(part.untyped_storage().nbytes() for part in parts or []))
        original(rows, parts, **kwargs)

    dist.gather = gather
    weights.save_weights(model, output, layout)
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saving_takes_a_few_rows_at_a_time(tmp_path: Path, dtype: torch.dtype) -> None:
    # Columns, rows and biases; the last chunk of most is smaller than the others.
    sizes = {"attention_bias": True, "mlp_bias": True, "intermediate_size": 78}
    model = written(tmp_path, "llama", dtype, **sizes, tie_word_embeddings=False)
    output = tmp_path / "again"
    first, second = run_distributed(gathered_bytes, TP, model, output, dtype)
    assert 1000 < max(first) <= 2000
    assert not any(second)
    ours, theirs = (path / "model.safetensors" for path in (output, model))
    assert ours.read_bytes() == theirs.read_bytes()


# ---------------------------------------------------------------- collectives


def count_collectives(folder: Path, sequence_parallel: bool) -> dict[str, Any]:
    from axolotl_psft.megatron.step import MegatronStep, OptimizerSettings
    from axolotl_psft.token_logprobs import install_logprobs_forward

    model, layout = split("qwen3", folder, sequence_parallel=sequence_parallel)
    install_logprobs_forward(model)
    step = MegatronStep(model, layout, OptimizerSettings("sgd", lr=0.1))
    ids = torch.arange(9)[None]
    counts: dict[str, Any] = {}

    def loss(wrapped: Any, batch: Tensor) -> Tensor:
        with Watch() as watch:
            output = wrapped(input_ids=batch, logprob_targets=batch)
        counts["forward"] = sorted(watch.collectives)
        return -output.logprobs.sum()

    # The first time that it clips, Megatron-Core asks all ranks about parameters that
    # are clipped apart.
    step.forward_backward([ids], loss)
    step.clip_grad_norm(1.0)
    with Watch() as watch:
        step.forward_backward([ids, ids], loss)
        counts["gradients of two micro-batches"] = len(watch.collectives)
        step.clip_grad_norm(1.0)
        step.update()
    counts["step"] = len(watch.collectives)
    counts["logprobs"] = float(
        step.ddp(input_ids=ids, logprob_targets=ids).logprobs.sum()
    )
    return counts


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_collectives_are_those_documented(
    tmp_path: Path, sequence_parallel: bool
) -> None:
    folder = written(tmp_path)
    first, second = run_distributed(count_collectives, TP, folder, sequence_parallel)
    assert first == second
    if sequence_parallel:
        # A gather into each block and a scatter out of it; one gather for the head.
        expected = ["_allgather_base_"] * (2 * LAYERS + 1)
        expected += ["_reduce_scatter_base_"] * (2 * LAYERS)
        backward = 4 * LAYERS + 1  # the same, transposed; the first split is a gather
    else:
        expected = ["allreduce_"] * 2 * LAYERS
        backward = 2 * LAYERS
    # The embedding's sum, and the head's statistics.
    assert first["forward"] == sorted([*expected, "allreduce_", "_allgather_base_"])
    forward = len(expected) + 2
    # d_hidden of the head; once a step, the gradients of the data-parallel group (of
    # one rank here), those of the q and k norms (with sequence parallelism of all
    # norms), and the gradient norm.
    gradients = 2 * (forward + backward + 1) + 2
    assert first["gradients of two micro-batches"] == gradients
    assert first["step"] == gradients + 1


# ---------------------------------------------------------------- dropout


def masks(folder: Path) -> list[float]:
    from axolotl_psft.megatron import groups
    from axolotl_psft.megatron.layers import _split_dropout

    class Block(torch.nn.Module):
        attention_dropout = 0.5

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.dropout(x, 0.5)

    layout = groups.initialize(dist.get_world_size())
    block = Block().train()
    _split_dropout(block, layout)
    torch.manual_seed(0)
    inside = [block(torch.ones(64)).tolist() for _ in range(2)]
    return [inside, torch.rand(4).tolist()]  # type: ignore[list-item]


def test_dropout_differs_inside_blocks_and_agrees_outside(tmp_path: Path) -> None:
    (first, outside), (second, outside_too) = run_distributed(masks, TP, tmp_path)  # type: ignore[misc]
    assert first[0] != second[0]
    assert first[0] != first[1]
    assert outside == outside_too


# ---------------------------------------------------------------- embedding


def embedding_gradient(folder: Path) -> Tensor:
    model, layout = split("qwen3", folder)
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx == 3
    embedding(torch.tensor([[3, 4, 3, 40]])).sum().backward()
    assert embedding.weight.grad is not None
    whole = [torch.empty_like(embedding.weight.grad) for _ in range(TP)]
    dist.all_gather(whole, embedding.weight.grad, group=layout.tp_group)
    return torch.cat(whole).sum(1)


def test_the_padding_id_gets_no_gradient(tmp_path: Path) -> None:
    folder = written(tmp_path, pad_token_id=3)
    for gradient in run_distributed(embedding_gradient, TP, folder):
        assert gradient.nonzero().flatten().tolist() == [4, 40]


# ---------------------------------------------------------------- inference, files


def logits(folder: Path) -> Tensor:
    model, _ = split("llama", folder)
    with torch.no_grad():
        return model(input_ids=torch.arange(9)[None]).logits


def test_head_gives_all_logits_without_targets(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama", tie_word_embeddings=False)
    options = {"vocab_size": 64, "num_hidden_layers": LAYERS}
    model = causal_lm("llama", **options, tie_word_embeddings=False)
    expected = model(input_ids=torch.arange(9)[None]).logits.detach()
    for ours in run_distributed(logits, TP, folder):
        assert_close(ours, expected)


def load_errors(folder: Path) -> list[str]:
    from safetensors.torch import save_file

    model, layout = split("qwen3", folder)
    from axolotl_psft.megatron.weights import load_weights

    errors = []
    whole = tensors(folder)
    cases = {
        "missing": {k: v for k, v in whole.items() if k != "model.norm.weight"},
        "shape": whole | {"model.norm.weight": torch.ones(7)},
        "empty": None,
    }
    for name, content in cases.items():
        other = folder.parent / f"{name}-{dist.get_rank()}"
        other.mkdir()
        if content is not None:
            save_file(content, other / "model.safetensors")
        try:
            load_weights(model, other, layout)
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_checkpoints_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for missing, shape, empty in run_distributed(load_errors, TP, written(tmp_path)):
        assert "the first is model.norm.weight" in missing
        assert "model.norm.weight is [7] in the checkpoint and [32] in" in shape
        assert "has no safetensors files" in empty


def old_optimizer(folder: Path) -> str:
    from axolotl_psft.megatron import step

    model, layout = split("qwen3", folder)
    ours = step.MegatronStep(model, layout, step.OptimizerSettings("sgd", lr=0.1))
    ours.save_optimizer(folder)
    path = folder / f"megatron_optimizer_tp{layout.tp_rank}_dp0.pt"
    ours.load_optimizer(folder)
    torch.save(
        {**torch.load(path), "format": "axolotl_psft.megatron_optimizer/2"}, path
    )
    with pytest.raises(step.FileError) as caught:
        ours.load_optimizer(folder)
    return str(caught.value)


def test_an_optimizer_of_another_version_is_refused(tmp_path: Path) -> None:
    for error in run_distributed(old_optimizer, TP, written(tmp_path)):
        assert "megatron_optimizer/2, this version of axolotl_psft reads" in error
        assert "base_model" in error


def test_nothing_of_it_is_imported_without_tensor_parallelism() -> None:
    import subprocess
    import sys

    code = "import axolotl_psft.trainer, sys; print('megatron' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr[-2000:]
