"""Packed attention on a GPU: torch's varlen kernel behind the plugin's function."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_psft.attention import varlen_attention
from benchmarks.gpu.measure import Bench, Figure, relative_error

# Samples of 8k packed tokens; one of them a single token.
LENGTHS = [777, 2048, 123, 3072, 1, 2171]
TINY = [7, 1, 9]


def inputs(bench: Bench, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Query of 32 heads, key and value of 8, 128 dimensions each; [T, heads, D]."""
    total = sum(bench.size(LENGTHS, TINY))
    shape = bench.size((32, 8, 128), (4, 2, 16))
    heads = (shape[0], shape[1], shape[1])
    rng = torch.Generator(device=bench.device).manual_seed(0)
    options: dict[str, Any] = {"generator": rng, "device": bench.device}
    return [
        torch.randn(total, n, shape[2], **options).to(dtype).requires_grad_()
        for n in heads
    ]


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None = None
) -> Tensor:
    """The definition: each sample alone, by torch's own attention."""
    outputs = []
    for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        a, b, c = (x.transpose(0, 1)[None] for x in parts)
        mask = None
        if window is not None:
            seen = torch.ones(a.shape[2], a.shape[2], dtype=torch.bool, device=q.device)
            mask = seen.tril().triu(1 - window)
        out = F.scaled_dot_product_attention(
            a, b, c, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def flex(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Callable[[], Tensor]:
    """Compiled flex_attention over the same samples, its mask made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sample = torch.repeat_interleave(
        torch.arange(len(lengths), device=q.device),
        torch.tensor(lengths, device=q.device),
    )

    def same(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (sample[i] == sample[j]) & (i >= j)

    total = sum(lengths)
    mask = create_block_mask(same, None, None, total, total, device=q.device)
    compiled = torch.compile(flex_attention)
    rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
    return lambda: compiled(*rows, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def attention(bench: Bench) -> Iterator[Figure]:
    """Against float64 a sample at a time; a window; waits; time beside sdpa, flex."""
    lengths = bench.size(LENGTHS, TINY)
    q, k, v = inputs(bench)
    ends = torch.tensor([0, *lengths], device=bench.device).cumsum(0).to(torch.int32)
    packed = functools.partial(varlen_attention, q, k, v, ends, max_length=max(lengths))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)
    for window in (None, bench.size(512, 4)):
        expected = one_by_one(*exact, lengths, window)
        wanted = torch.autograd.grad(expected, exact, grad.double())
        got = packed(sliding_window=window)
        grads = torch.autograd.grad(got, (q, k, v), grad)
        pairs = zip(
            (got, *grads),
            (expected, *wanted),
            ("out", "d_q", "d_k", "d_v"),
            strict=True,
        )
        for a, b, name in pairs:
            # bfloat16 keeps 8 bits: of the operands, of p, and of the result.
            error = relative_error(a, b)
            yield Figure(f"error of {name}, window {window}", error, "", 1e-2)
    again = packed()
    yield Figure("repeats are equal", torch.equal(packed(), again))
    with bench.waits() as seen:
        packed().backward(grad)
    yield Figure("the host never waits", not seen)

    forwards: dict[str, Callable[[], Tensor]] = {
        "varlen": packed,
        "sdpa, a sample at a time": lambda: one_by_one(q, k, v, lengths),
    }
    if not bench.rehearsing:
        forwards["flex, compiled"] = flex(q, k, v, lengths)
    backwards: dict[str, Callable[[], Any]] = {
        name: lambda run=run: torch.autograd.grad(run(), (q, k, v), grad)  # type: ignore[misc]
        for name, run in forwards.items()
    }
    for name, took in bench.milliseconds(dict(forwards)).items():
        yield Figure(f"{name}: forward", took, "ms")
    for name, took in bench.milliseconds(backwards).items():
        yield Figure(f"{name}: forward + backward", took, "ms")
