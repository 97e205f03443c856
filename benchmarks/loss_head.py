"""The loss head against its targets, its limits and its peers.

    python -m benchmarks.loss_head [--quick] [--threads N]

Run from the root of the repository. Where there is a GPU, it runs what benchmarks.gpu
has of the head: milliseconds, ratios to three and to four bare matmuls, memory, errors,
peers. The rest of this file is for a CPU. Times are ratios of runs interleaved in one
process, the minimum of --repeats; memory is what a fresh process's peak (VmHWM, reset
before the run) rises beyond the inputs and the gradients.

'bare' is the three matmuls of forward and backward and nothing else. Where a CPU has no
bfloat16 matmul, torch's own is 10 to 100 times slower than float32's. 'bare', 'naive'
and Megatron-Core are then given float32 copies of their operands (copying included):
their fastest form, so that no ratio profits from a slow kernel.
"""

import argparse
import ctypes
import functools
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from axolotl_psft import linear_logprobs
from benchmarks import heads as others
from benchmarks.gpu import __main__ as gpu
from benchmarks.heads import Head, step
from tests.distributed.launch import run_distributed
from tests.reference import Watch, head_inputs, naive_logprobs

H = 1024


def inputs(num_tokens: int, vocab_size: int, dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, H, generator=rng)
    # Filled by tiles: a float32 weight would be the peak of the memory rows.
    weight = torch.empty(vocab_size, H, dtype=dtype)
    for tile in weight.split(4096):
        tile.copy_(torch.randn(tile.shape, generator=rng) * (2 / H**0.5))
    targets = torch.randint(vocab_size, (num_tokens,), generator=rng)
    return [hidden.to(dtype), weight, targets, torch.randn(num_tokens, generator=rng)]


# ---------------------------------------------------------------- heads, one rank


@functools.cache
def half_matmul_is_slow() -> bool:
    a = torch.randn(256, 256)
    half = a.bfloat16()
    seconds, seconds_float = best([lambda: half @ half, lambda: a @ a], 5)
    return seconds > 2 * seconds_float


def fastest(x: Tensor) -> Tensor:
    return x.float() if x.itemsize == 2 and half_matmul_is_slow() else x


# Whose matmuls have no faster form where a CPU has none in bfloat16.
STAYS_IN_16_BITS = (others.liger_chunked, others.trl_logprobs)


def bare(hidden: Tensor, weight: Tensor, grad_of: Tensor) -> None:
    h, w = fastest(hidden.detach()), fastest(weight.detach())
    logits = h @ w.t()
    logits @ w
    logits.t() @ h


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return naive_logprobs(fastest(hidden), fastest(weight), targets)


def gather_minus_logsumexp(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, None]:
    return others.gather_minus_logsumexp(fastest(hidden), fastest(weight), targets)


# ---------------------------------------------------------------- measuring


def best(runs: list[Callable[[], Any]], repeats: int = 3) -> list[float]:
    """Seconds of each, interleaved, the minimum. On one thread: of this process's CPU,
    which neighbours on the machine do not lengthen."""
    single = torch.get_num_threads() == 1
    clock = time.process_time if single else time.perf_counter
    times = [float("inf")] * len(runs)
    for _ in range(repeats):
        for i, run in enumerate(runs):
            start = clock()
            run()
            times[i] = min(times[i], clock() - start)
    return times


def peak_mb(run: Callable[[], list[Tensor]]) -> float:
    """Megabytes beyond what was there before, and beyond what `run` returns."""

    def status(key: str) -> int:
        text = Path("/proc/self/status").read_text()
        found = re.search(rf"{key}:\s+(\d+)", text)
        assert found is not None
        return int(found[1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is no room for this run
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    results = run()
    kept = sum(x.numel() * x.itemsize for x in results)
    return (status("VmHWM") - before - kept) / 1e6


def transient(num_tokens: int, vocab_size: int, threads: int) -> float:
    """Row 3, in a process of its own."""
    torch.set_num_threads(threads)
    step(linear_logprobs, *inputs(64, 4096, torch.bfloat16))  # libraries' own buffers
    data = inputs(num_tokens, vocab_size, torch.bfloat16)
    return peak_mb(lambda: step(linear_logprobs, *data))


# ---------------------------------------------------------------- heads, two ranks


def tensor_parallel(
    num_tokens: int, vocab_size: int, dtype: torch.dtype, repeats: int
) -> dict[str, tuple[float, float, int, int]]:
    """On each rank: seconds, peak MB, collectives forward and backward of each head."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        vocab_parallel_cross_entropy,
    )
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    warnings.simplefilter("ignore")
    size = dist.get_world_size()
    parallel_state.initialize_model_parallel(size)
    group = parallel_state.get_tensor_model_parallel_group()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (size,))

    def entropy_of(logits: Tensor) -> Tensor:  # as verl's: three all-reduces
        maximum = logits.amax(1)
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=group)
        e = (logits - maximum[:, None]).exp_()
        total, weighted = e.sum(1), (e * logits).sum(1)
        dist.all_reduce(total, group=group)
        dist.all_reduce(weighted, group=group)
        return maximum + total.log() - weighted / total

    def megatron(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        h = copy_to_tensor_model_parallel_region(h)
        logits = fastest(h) @ fastest(w).t()
        with torch.no_grad():
            entropy = entropy_of(logits)
        loss = vocab_parallel_cross_entropy(logits[:, None], t[:, None])
        return -loss[:, 0], entropy

    def dtensor(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, None]:
        h = copy_to_tensor_model_parallel_region(h)
        logits = fastest(h) @ fastest(w).t()
        sharded = DTensor.from_local(logits, mesh, [Shard(1)])
        loss = torch.nn.functional.cross_entropy(sharded, t, reduction="none")
        return -loss.full_tensor(), None

    def ours(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprobs(h, w, t, tp_group=group)

    def run(head: Head, data: list[Tensor]) -> list[Tensor]:
        if head is not dtensor:
            return step(head, *data)
        with loss_parallel():  # its backward must run inside
            return step(head, *data)

    heads: dict[str, Head] = {"ours": ours, "megatron": megatron, "dtensor": dtensor}
    small = inputs(64, 2048, dtype)
    for name, head in list(heads.items()):
        try:
            run(head, small)
        except Exception as error:  # a peer that does not run here is left out
            if dist.get_rank() == 0:
                print(f"{name}: {str(error).splitlines()[0]}", flush=True)
            del heads[name]
    data = inputs(num_tokens, vocab_size // size, dtype)
    data[2] %= vocab_size
    results = {}
    runs = [functools.partial(run, head, data) for head in heads.values()]
    peaks = [peak_mb(one) for one in runs]
    times = best(runs, repeats)
    for (name, head), peak, seconds in zip(heads.items(), peaks, times, strict=True):
        leaves = [x.detach().requires_grad_() for x in small[:2]]
        context = loss_parallel() if head is dtensor else torch.enable_grad()
        with context:
            with Watch() as forward:
                loss = head(*leaves, small[2])[0]
            with Watch() as backward:
                loss.backward(small[3])
        counts = len(forward.collectives), len(backward.collectives)
        results[name] = (seconds, peak, *counts)
    return results


# ---------------------------------------------------------------- the table

ROWS: list[tuple[str, str, str, str, str]] = []


def row(number: str, what: str, value: float, limit: float, unit: str = "") -> None:
    verdict = "pass" if value <= limit else "MISS"
    show = "{:.1e}" if limit < 1e-3 else "{:.0f}" if limit >= 10 else "{:.3f}"
    target = f"<= {limit:g}{unit}"
    ROWS.append((number, what, target, show.format(value) + unit, verdict))
    print_row(ROWS[-1])


def peer(what: str, value: str) -> None:
    ROWS.append(("", what, "", value, ""))
    print_row(ROWS[-1])


def print_row(cells: tuple[str, ...]) -> None:
    print("| {:2} | {:52} | {:9} | {:>9} | {:4} |".format(*cells), flush=True)


def times(num_tokens: int, vocab_size: int, dtype: torch.dtype, repeats: int) -> None:
    """Rows 1, 2 and 6."""
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    data = inputs(num_tokens, vocab_size, dtype)
    hidden, weight, targets, _ = data
    no_entropy = functools.partial(linear_logprobs, with_entropy=False)
    heads: dict[str, Head] = {
        "naive": naive,
        "ours": linear_logprobs,
        "no entropy": no_entropy,
        **others.PEERS,
        "gather - logsumexp": gather_minus_logsumexp,  # its fastest form here
    }
    runs: dict[str, Callable[[], Any]] = {
        "bare": functools.partial(bare, hidden, weight, targets)
    }
    for key, head in heads.items():
        slow = dtype == torch.bfloat16 and half_matmul_is_slow()
        if slow and head in STAYS_IN_16_BITS:
            continue  # minutes
        runs[key] = functools.partial(step, head, *data)
    seconds = dict(zip(runs, best(list(runs.values()), repeats), strict=True))
    where = f"{name} {num_tokens} x {vocab_size}"
    ours = seconds["ours"]
    row("1", f"fwd+bwd over bare, {where}", ours / seconds["bare"], 1.5)
    limit = 0.95 if dtype == torch.bfloat16 else 1.15
    row("2", f"over naive, {where}", ours / seconds["naive"], limit)
    row("6", f"entropy's surcharge, {where}", ours / seconds["no entropy"], 1.04)
    for key in heads:
        if key in seconds and key not in ("ours", "no entropy"):
            peer(f"{key} over bare, {name}", f"{seconds[key] / seconds['bare']:.3f}")


def naive_as_written(num_tokens: int, vocab_size: int, repeats: int) -> None:
    """Row 2 where bfloat16 is slow: what a user's own three lines cost there."""
    data = inputs(num_tokens, vocab_size, torch.bfloat16)
    heads = (naive_logprobs, linear_logprobs)
    theirs, ours = best([functools.partial(step, h, *data) for h in heads], repeats)
    what = f"over naive as written, bf16 {num_tokens} x {vocab_size}"
    row("2", what, ours / theirs, 0.95)


def skipping(num_tokens: int, vocab_size: int, repeats: int) -> None:
    """Row 7."""
    hidden, weight, targets, grad = inputs(num_tokens, vocab_size, torch.bfloat16)
    index = torch.arange(num_tokens)
    half_masked = targets.masked_fill(index % 2 == 0, -100)
    head = functools.partial(step, linear_logprobs, hidden, weight)
    runs = [functools.partial(head, targets, grad)]
    percent = (0, 20, 40)
    for clipped in percent:
        g = grad.masked_fill(index // 2 % 5 < clipped // 20, 0)
        runs.append(functools.partial(head, half_masked, g))
    whole, *parts = best(runs, repeats)
    for clipped, seconds in zip(percent, parts, strict=True):
        # A forward matmul of the active rows, three in backward of the moving ones.
        ideal = 0.5 * (1 + 3 * (1 - clipped / 100)) / 4
        what = f"half masked, {clipped}% clipped, {num_tokens} x {vocab_size}"
        row("7", f"over ideal, {what}", seconds / whole / ideal, 1.08)


def accuracy() -> None:
    """Rows 9 and 10."""
    for dtype, sizes in ((torch.float32, (252, 32_000)), (torch.bfloat16, (64, 4_000))):
        hidden, weight, targets, grad = head_inputs(*sizes, dtype=dtype)
        exact = naive_logprobs(hidden.double(), weight.double(), targets)
        d_exact = step(naive_logprobs, hidden.double(), weight.double(), targets, grad)
        errors = []
        for head in (linear_logprobs, naive_logprobs):
            d = step(head, hidden, weight, targets, grad)
            pairs = zip(d, d_exact, strict=True)
            errors.append(max(float((x - y).norm() / y.norm()) for x, y in pairs))
        if dtype == torch.float32:
            logp, entropy = linear_logprobs(hidden, weight, targets)
            row("9", "fp32 log-prob error", float((logp - exact[0]).abs().max()), 1e-5)
            error = float((entropy - exact[1]).abs().max())
            row("9", "fp32 entropy error", error, 1e-5)
            row("9", "fp32 gradient error (relative norm)", errors[0], 1e-5)
        else:
            row("10", "bf16 gradient error over naive's", errors[0] / errors[1], 1.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute")
    parser.add_argument("--repeats", type=int, default=3, help="minimum of so many")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="1: CPU time instead of wall time, for a machine that is not idle",
    )
    args = parser.parse_args()
    if torch.cuda.is_available():
        steps = ["machine", "correctness", "speed", "peers"]
        sys.exit(gpu.run(Path("outputs/loss_head"), steps, rehearse=False))
    torch.set_num_threads(args.threads)
    big = (512, 8_192) if args.quick else (1024, 32_768)
    wide = (1024, 16_384) if args.quick else (4096, 151_936)
    parallel = (512, 16_384) if args.quick else (4096, 151_936)
    parallel_timed = parallel if args.quick else (1024, 65_536)

    load = os.getloadavg()[0]
    print(
        f"torch {torch.__version__}, {platform.machine()}, {args.threads} threads, "
        f"load {load:.1f}, {time.strftime('%Y-%m-%d')}; "
        f"bf16 matmul in hardware: {'no' if half_matmul_is_slow() else 'yes'}"
    )
    print_row(("#", "what", "target", "measured", ""))
    print("|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        times(*big, dtype, args.repeats)
    if half_matmul_is_slow():
        naive_as_written(64, 2048, args.repeats)
    skipping(2 * big[0], big[1], args.repeats)

    peaks = [
        run_distributed(transient, 1, wide[0], size, args.threads, timeout=3600)[0]
        for size in (wide[1], 2 * wide[1])
    ]
    row("3", f"transient, bf16 {wide[0]} x {wide[1]}", peaks[0], 60, " MB")
    row("3", "the same with twice the vocabulary, over it", peaks[1] / peaks[0], 1.2)

    for dtype in (torch.bfloat16, torch.float32):
        name = "bf16" if dtype == torch.bfloat16 else "fp32"
        results = run_distributed(
            tensor_parallel, 2, *parallel_timed, dtype, args.repeats, timeout=3600
        )[0]
        ours, megatron = results["ours"], results["megatron"]
        where = f"{name} {parallel_timed[0]} x {parallel_timed[1]}"
        row("4", f"TP=2 over Megatron + entropy, {where}", ours[0] / megatron[0], 1.0)
        if dtype == torch.bfloat16:
            row("5", "collectives forward", ours[2], 1)
            row("5", "collectives backward (d_hidden)", ours[3], 1)
            # DTensor's run below the level at which they are counted: 3 in forward.
            counts = f"{megatron[2]} + {megatron[3]}"
            peer("megatron: collectives forward + backward", counts)
        for key, r in results.items():
            peer(f"{key}: seconds, transient, {name}", f"{r[0]:.2f} {r[1]:.0f} MB")
    if parallel != parallel_timed:
        results = run_distributed(
            tensor_parallel, 2, *parallel, torch.bfloat16, 0, timeout=3600
        )[0]
        for key, r in results.items():
            peer(f"{key}: transient, {parallel[0]} x {parallel[1]}", f"{r[1]:.0f} MB")
    share = 100 * results["ours"][1] / results["megatron"][1]
    row("4", f"memory of it, {parallel[0]} x {parallel[1]}", share, 2, "%")
    accuracy()
    misses = sum(cells[-1] == "MISS" for cells in ROWS)
    print(f"{misses} missed" if misses else "all targets met")


if __name__ == "__main__":
    main()
