"""A tensor-parallel PSFT step against the dense one and against the ideal, on a CPU.

    python -m benchmarks.tensor_parallel [--repeats N]

Run from the root of the repository. One window of PSFT, the old policy's scoring
included, by three programs on the same tokens: dense on one thread, Megatron's step at
TP 1, and at TP 2 on two processes of one thread each. Times are interleaved by barriers
in the same processes, the minimum of --repeats; memory is the rise of the peak (VmHWM)
over what was there before the model, in processes of its own. Ideal is a half of both.
What is lost of the time is split into collectives (measured alone, on tensors of the
same sizes) and the rest: what every rank repeats (norms, Python) and smaller matmuls.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.launch import run_distributed

WINDOW = 4
BATCH, LENGTH, VOCAB_SIZE = 1, 256, 8_192
MODEL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": False,
}


def write(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(
        folder, max_shard_size="20MB"
    )
    return folder


def batch() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCAB_SIZE, (BATCH, LENGTH), generator=generator)


def resident(key: str) -> float:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{key}:\s+(\d+)", text)
    assert found is not None
    return int(found[1]) / 1e3


def reset_peak() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def loss_func(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    from axolotl_psft import psft_loss

    ids, old = batch
    output = model(input_ids=ids, logprob_targets=ids)
    loss, _ = psft_loss(output.logprobs, old, output.mask)
    return loss


def score(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, logprob_targets=ids).logprobs


def dense(folder: Path) -> tuple[Callable[[], None], nn.Module]:
    from transformers import AutoModelForCausalLM

    from axolotl_psft.token_logprobs import install_logprobs_forward

    model = AutoModelForCausalLM.from_pretrained(folder)
    install_logprobs_forward(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    ids = batch()

    def window() -> None:
        olds = [score(model, ids) for _ in range(WINDOW - 1)]
        for old in [olds[0], *olds]:
            loss_func(model, (ids, old)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return window, model


def parallel(folder: Path, tp_size: int) -> tuple[Callable[[], None], Any]:
    from transformers import AutoModelForCausalLM

    from axolotl_psft.megatron import groups
    from axolotl_psft.megatron.layers import parallelize
    from axolotl_psft.megatron.step import MegatronStep, OptimizerSettings
    from axolotl_psft.megatron.weights import load_weights
    from axolotl_psft.token_logprobs import install_logprobs_forward

    layout = groups.initialize(tp_size)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "meta"})
    cpu = torch.device("cpu")
    parallelize(model, layout, dtype=torch.float32, device=cpu)
    load_weights(model, folder, layout)
    install_logprobs_forward(model)
    step = MegatronStep(model, layout, OptimizerSettings("adam", lr=1e-9))
    ids = batch()

    def window() -> None:
        olds = [score(step.ddp, ids) for _ in range(WINDOW - 1)]
        for old in [olds[0], *olds]:
            step.forward_backward([(ids, old)], loss_func)
            step.clip_grad_norm(1.0)
            step.update()

    return window, layout


def collectives(group: Any) -> Callable[[], None]:
    """A window's collectives and nothing else, sizes as in the step."""
    hidden = torch.zeros(BATCH, LENGTH, MODEL["hidden_size"])  # type: ignore[arg-type]
    stats = torch.zeros(4, BATCH * LENGTH)
    parts = [torch.empty_like(stats) for _ in range(group.size())]
    layers: Any = MODEL["num_hidden_layers"]

    def window() -> None:
        # Forward of training and scoring: two a layer and the embedding's; backward
        # of training: two a layer and the head's.
        forwards, backwards = 2 * WINDOW - 1, WINDOW
        num = forwards * (2 * layers + 1) + backwards * (2 * layers + 1)
        for _ in range(num):
            dist.all_reduce(hidden, group=group)
        for _ in range(forwards):
            dist.all_gather(parts, stats, group=group)

    return window


def seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure_peak(folder: Path, tp_size: int | None) -> float:
    """Megabytes that a rank's model and two windows need; None: the dense program."""
    from transformers import LlamaForCausalLM  # noqa: F401  the import is no model

    import axolotl_psft.megatron.step  # noqa: F401

    before = reset_peak()
    run, _ = dense(folder) if tp_size is None else parallel(folder, tp_size)
    run()
    run()
    return resident("VmHWM") - before


def measure_times(folder: Path, tp_size: int, repeats: int) -> dict[str, float]:
    """On each rank: a window's seconds; on rank 0 of a dense one, too."""
    run, layout = parallel(folder, tp_size)
    dense_run, _ = dense(folder)
    comm = collectives(layout.tp_group)
    times: dict[str, list[float]] = {"parallel": [], "dense": [], "collectives": []}
    for _ in range(repeats + 1):  # the first warms up
        dist.barrier()
        times["parallel"].append(seconds(run))
        dist.barrier()
        times["collectives"].append(seconds(comm))
        dist.barrier()
        if dist.get_rank() == 0:  # the other core idles, as it does for a dense user
            times["dense"].append(seconds(dense_run))
        dist.barrier()
    return {name: min(values[1:]) for name, values in times.items() if values}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tensor_parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print(
        "| TP | time / dense | ideal | efficiency | collectives | rest | "
        "peak / dense | ideal |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder))
        (dense_peak,) = run_distributed(measure_peak, 1, path, None, timeout=600)
        for tp_size in (1, 2):
            peaks = run_distributed(measure_peak, tp_size, path, tp_size, timeout=600)
            ranks = run_distributed(
                measure_times, tp_size, path, tp_size, repeats, timeout=1800
            )
            times = ranks[0]
            ratio, ideal = times["parallel"] / times["dense"], 1 / tp_size
            lost = times["collectives"] / times["dense"] if tp_size > 1 else 0.0
            print(
                f"| {tp_size} | {ratio:.3f} | {ideal:.3f} | {ideal / ratio:.0%} | "
                f"{lost:.3f} | {ratio - ideal - lost:.3f} | "
                f"{max(peaks) / dense_peak:.3f} | {ideal:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
