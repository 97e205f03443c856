"""The loss head on a GPU: right, repeatable, without waiting, and how fast."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from axolotl_psft import linear_logprobs, logprobs
from benchmarks.gpu.measure import Bench, Figure, relative_error
from benchmarks.heads import ON_GPUS_ONLY, PEERS, bare, step
from tests.reference import naive_logprobs

BF16 = torch.bfloat16
# Tokens, hidden size, vocabulary; the first is the one with targets.
SHAPES = [
    (8192, 4096, 128_256),
    (8192, 3584, 152_064),
    (8192, 1536, 151_936),
    (1024, 4096, 128_256),
]


def problem(
    bench: Bench, size: tuple[int, int, int], dtype: torch.dtype = BF16
) -> list[Tensor]:
    """Hidden states, weight, targets and an incoming gradient; logits of spread 2."""
    num_tokens, hidden_size, vocab_size = size
    rng = torch.Generator(device=bench.device).manual_seed(0)
    options: dict[str, Any] = {"generator": rng, "device": bench.device}
    hidden = torch.randn(num_tokens, hidden_size, **options).to(dtype)
    weight = torch.empty(vocab_size, hidden_size, dtype=dtype, device=bench.device)
    for tile in weight.split(8192):
        tile.copy_(torch.randn(tile.shape, **options) * (2 / hidden_size**0.5))
    targets = torch.randint(vocab_size, (num_tokens,), **options)
    return [hidden, weight, targets, torch.randn(num_tokens, **options)]


def torch_path() -> contextlib.AbstractContextManager[Any]:
    """Without the kernels."""
    return mock.patch.object(logprobs, "_row_kernels", lambda device: None)


# ---- Right ----

CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bf16": (BF16, {}),
    "fp16": (torch.float16, {}),
    "fp32": (torch.float32, {}),
    "fp32, TF32 matmuls": (torch.float32, {"tf32": True}),
    "fp32 weights, bf16 autocast": (torch.float32, {"autocast": True}),
    "bf16, bias": (BF16, {"bias": True}),
    "bf16, softcap 5": (BF16, {"softcap": 5.0}),
    "bf16, scale 1/4": (BF16, {"logits_scale": 0.25}),
    "bf16, 100 padding ids": (BF16, {"padding": 100}),
}
# Log-probs (absolute) and gradients (relative norm). Operands are exact, but Hopper's
# tensor cores align the products of 16-bit operands before they add them, and drop bits
# that float32 has: 4e-5 measured, on logits up to 9. Gradients are rounded to the dtype
# twice: p, and the result.
LIMITS: dict[str, tuple[float, float]] = {
    "bf16": (1e-4, 8e-3),
    "fp16": (1e-4, 1e-3),
    "fp32": (1e-5, 1e-5),
    "fp32, TF32 matmuls": (2e-2, 2e-3),
    "fp32 weights, bf16 autocast": (8e-2, 2e-2),
}


def correctness(bench: Bench) -> Iterator[Figure]:
    """Against float64, with the kernels and without; the bf16 error beside naive's."""
    size = bench.size((1024, 2048, 32_000), (24, 32, 507))
    for name, (dtype, options) in CASES.items():
        logprob_limit, grad_limit = LIMITS.get(name, LIMITS["bf16"])
        for path in ("kernels", "torch"):
            errors = _errors(bench, size, dtype, path == "torch", **options)
            which = f"{name}, {path}"
            yield Figure(f"log-prob, max, {which}", errors[0], "", logprob_limit)
            yield Figure(f"entropy, max, {which}", errors[1], "", logprob_limit)
            yield Figure(f"d_hidden, {which}", errors[2], "", grad_limit)
            yield Figure(f"d_weight, {which}", errors[3], "", grad_limit)
    naive = _errors(bench, size, BF16, head=naive_logprobs)
    ours = _errors(bench, size, BF16)
    for i, what in ((2, "d_hidden"), (3, "d_weight")):
        yield Figure(f"{what}, bf16, over naive's error", ours[i] / naive[i], "", 1.1)
    hidden, weight, targets, grad = problem(bench, size)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    logp, entropy = linear_logprobs(*leaves, targets.fill_(-100))
    grads = torch.autograd.grad(logp, leaves, grad)
    nothing = not any(bool(x.any()) for x in (logp, entropy, *grads))
    yield Figure("all masked: zeros", nothing)


def _errors(
    bench: Bench,
    size: tuple[int, int, int],
    dtype: torch.dtype,
    without_kernels: bool = False,
    head: Callable[..., Any] = linear_logprobs,
    tf32: bool = False,
    autocast: bool = False,
    bias: bool = False,
    padding: int = 0,
    **options: Any,
) -> list[float]:
    hidden, weight, targets, grad = problem(bench, size, dtype)
    targets[::5] = -100
    grad[::3] = 0
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    named = dict(options)
    if bias:
        named["bias"] = torch.linspace(-2, 2, size[2], device=bench.device).to(dtype)
    doubled = {k: v.double() if k == "bias" else v for k, v in named.items()}
    expected = naive_logprobs(*exact, targets, **doubled)
    wanted = torch.autograd.grad(expected[0], exact, grad.double())
    if padding:
        extra = torch.full((padding, size[1]), 9.0, dtype=dtype, device=bench.device)
        leaves[1] = torch.cat((leaves[1].detach(), extra)).requires_grad_()
        named["vocab_size"] = size[2]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with (
            torch_path() if without_kernels else contextlib.nullcontext(),
            torch.autocast(bench.device, BF16, enabled=autocast),
        ):
            got = head(*leaves, targets, **named)
        grads = torch.autograd.grad(got[0], leaves, grad.to(got[0].dtype))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    values = [float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)]
    pairs = zip((grads[0], grads[1][: size[2]]), wanted, strict=True)
    return values + [relative_error(a, b) for a, b in pairs]


# ---- Repeatable, without waiting ----


def bits(bench: Bench) -> Iterator[Figure]:
    """What makes a ratio exactly 1 on weights that have not moved."""
    size = bench.size((4096, 2048, 151_936), (24, 32, 507))
    for dtype in (BF16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        hidden, weight, targets, grad = problem(bench, size, dtype)
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]

        def run(leaves: Any = leaves, targets: Any = targets, grad: Any = grad) -> Any:
            logp, entropy = linear_logprobs(*leaves, targets)
            return logp.detach(), entropy, *torch.autograd.grad(logp, leaves, grad)

        first, again = run(), run()
        same = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        yield Figure(f"{name}: repeats are equal", same)
        with torch.no_grad():
            old, _ = linear_logprobs(*leaves, targets, with_entropy=False)
        scored = torch.equal(old, first[0])
        yield Figure(f"{name}: scoring without entropy is equal", scored)
        few = len(targets) // 8
        with torch.no_grad():
            part, _ = linear_logprobs(hidden[:few], weight, targets[:few])
        # cuBLAS may take another kernel for another number of rows.
        apart = float((part - first[0][:few]).abs().max())
        yield Figure(f"{name}: an eighth of the rows, difference", apart, "nats")


def waiting(bench: Bench) -> Iterator[Figure]:
    """Host synchronizations of the head."""
    size = bench.size((1024, 512, 32_000), (24, 32, 507))
    hidden, weight, targets, grad = problem(bench, size)
    targets[::2] = -100
    count = int((targets >= 0).sum())
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def run() -> None:
        logp, _ = linear_logprobs(*leaves, targets, num_active=count)
        logp.backward(grad)

    run()
    with bench.waits() as seen:
        run()
    yield Figure("the host never waits for the head", not seen)
    if seen:
        yield Figure("it waits at", ", ".join(sorted(set(seen))))


# ---- Fast ----


def speed(bench: Bench) -> Iterator[Figure]:
    """Time over bare matmuls, memory, masking; without kernels and naive beside it."""
    for i, shape in enumerate(bench.size(SHAPES, [(64, 32, 507)])):
        yield from _speed(bench, shape, with_targets=i == 0)
        if not bench.rehearsing:
            torch.cuda.empty_cache()


def _speed(
    bench: Bench, shape: tuple[int, int, int], with_targets: bool
) -> Iterator[Figure]:
    hidden, weight, targets, grad = problem(bench, shape)
    where = f"T {shape[0]}, H {shape[1]}, V {shape[2]}"
    half, clipped = targets.clone(), grad.clone()
    half[::2] = -100
    clipped[1::10] = 0

    def both(targets: Tensor = targets, grad: Tensor = grad, share: int = 1) -> Any:
        head = functools.partial(linear_logprobs, num_active=shape[0] // share)
        return step(head, hidden, weight, targets, grad)

    def four_matmuls() -> None:
        bare(hidden, weight)
        hidden @ weight.t()

    @torch.no_grad()
    def score(with_entropy: bool = False) -> Any:
        return linear_logprobs(
            hidden,
            weight,
            targets,
            with_entropy=with_entropy,
            num_active=shape[0],
        )

    def without_kernels() -> Any:
        with torch_path():
            return both()

    runs: dict[str, Callable[[], Any]] = {
        "three bare matmuls": lambda: bare(hidden, weight),
        "one bare matmul": lambda: hidden @ weight.t(),
        "forward + backward": both,
        "scoring": score,
        "half masked, 20% clipped": lambda: both(half, clipped, share=2),
        "four bare matmuls": four_matmuls,
        "scoring with entropy": lambda: score(with_entropy=True),
        "without kernels": without_kernels,
        "naive": lambda: step(naive_in_float32, hidden, weight, targets, grad),
    }
    # Each pair on its own, turn by turn: a GPU at its limit of power is slower after
    # hot work than after cool, and so would be whatever came after a third one.
    pairs: list[tuple[str, str, float | None]] = [
        ("forward + backward", "three bare matmuls", 1.5),
        ("scoring", "one bare matmul", 1.2),
        ("forward + backward", "four bare matmuls", None),
        ("half masked, 20% clipped", "forward + backward", 0.5),
        ("scoring with entropy", "scoring", 1.04),
        ("without kernels", "three bare matmuls", None),
        ("naive", "three bare matmuls", None),
    ]
    for a, b, target in pairs if with_targets else pairs[:4]:
        times = bench.milliseconds({name: runs[name] for name in (a, b)})
        yield Figure(f"{a}, {where}", times[a], "ms")
        yield Figure(f"{b}, {where}", times[b], "ms")
        limit = target if with_targets else None
        yield Figure(f"{a} over {b}, {where}", times[a] / times[b], "", limit)
    most = 300 if with_targets else None
    yield Figure(f"memory, {where}", bench.peak_mb(both), "MB", most)
    if with_targets:
        yield Figure(f"naive's memory, {where}", bench.peak_mb(runs["naive"]), "MB")


def naive_in_float32(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, None]:
    """Three lines of a user's: logits in 16 bits, the rest in float32."""
    logp = (hidden @ weight.t()).float().log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), None


def tiles(bench: Bench) -> Iterator[Figure]:
    """Which tile is fastest here: for whoever tunes the defaults."""
    shape = bench.size(SHAPES[0], (64, 32, 507))
    data = problem(bench, shape)
    shapes = bench.size(
        [(r, c) for c in (4096, 6144, 8192) for r in (1024, 2048, 4096, 8192)],
        [(8, 64)],
    )

    def head(tile: tuple[int, int]) -> Callable[..., Any]:
        return functools.partial(linear_logprobs, tile_shape=tile, num_active=shape[0])

    @torch.no_grad()
    def score(tile: tuple[int, int]) -> None:
        head(tile)(*data[:3], with_entropy=False)

    runs: dict[str, Callable[[], Any]] = {}
    for tile in shapes:
        name = "{} x {}".format(*tile)
        runs[f"forward, {name}"] = functools.partial(score, tile)
        runs[f"both, {name}"] = functools.partial(step, head(tile), *data)
    for name, took in bench.milliseconds(runs, 3).items():
        yield Figure(f"tile: {name}", took, "ms")


def profile(bench: Bench) -> Iterator[Figure]:
    """Where a forward and backward pass spends the device's time, kernel by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    data = problem(bench, bench.size(SHAPES[0], (64, 32, 507)))
    head = functools.partial(linear_logprobs, num_active=len(data[2]))
    step(head, *data)
    kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profiler(activities=kinds[: bench.size(2, 1)]) as p:
        step(head, *data)
        bench.synchronize()

    def spent(event: Any) -> float:
        times = (event.self_device_time_total, event.self_cpu_time_total)
        return times[bench.rehearsing] / 1e3

    for event in sorted(p.key_averages(), key=spent, reverse=True)[:8]:
        yield Figure(f"{event.count} x {event.key[:60]}", spent(event), "ms")


def peers(bench: Bench) -> Iterator[Figure]:
    """Others' heads: time over three bare matmuls, memory, error."""
    size = bench.size((8192, 4096, 128_256), (64, 32, 507))
    small = bench.size((512, 1024, 32_000), (24, 32, 507))
    data, exact = problem(bench, size), problem(bench, small)
    leaves = [x.double().requires_grad_() for x in exact[:2]]
    expected = naive_logprobs(*leaves, exact[2])[0]
    ones = torch.ones_like(exact[3])
    wanted = torch.autograd.grad(expected, leaves, ones.double())
    heads = {"ours": linear_logprobs, **PEERS, **bench.size(ON_GPUS_ONLY, {})}
    base = bench.milliseconds({"": lambda: bare(*data[:2])}, 5)[""]
    for name, head in heads.items():
        try:
            run = functools.partial(step, head, *data[:3], torch.ones_like(data[3]))
            took = bench.milliseconds({"": run}, 3)[""]
            yield Figure(f"{name}: forward + backward", took, "ms")
            yield Figure(f"{name}: over three bare matmuls", took / base)
            yield Figure(f"{name}: memory", bench.peak_mb(run), "MB")
            grads = step(head, *exact[:3], ones)
            # A mean's gradient has another length and the same direction.
            pairs = [
                (g.double() / g.double().norm(), w / w.norm())
                for g, w in zip(grads, wanted, strict=True)
            ]
            errors = [relative_error(a, b) for a, b in pairs]
            yield Figure(f"{name}: error of d_hidden", errors[0])
            yield Figure(f"{name}: error of d_weight", errors[1])
        except Exception as error:
            yield Figure(name, f"not run: {str(error).splitlines()[0][:200]}")
        if not bench.rehearsing:
            torch.cuda.empty_cache()
