"""The loss head's two passes over a tile of logits, as Triton kernels.

logit_tiles.py has both in torch, logprobs.py decides where these are used: there they
read each logit once, where torch reads and writes it ten times. Both take
what a matmul left (float32, or whatever dtype given logits have), and add the bias,
scale and cap the logits on the way.

A row's statistics are one program's work, in blocks of a fixed size, one after another:
their bits depend on that row alone.
"""

import triton
import triton.language as tl
from torch import Tensor

# Logits that a program holds at once: 8 a thread with 8 warps. Part of the result's
# bits, so not tuned by size.
_BLOCK = 2048
_WARPS = 8
# What the cache should know: a logit is read once, a bias by every row.
_ONCE, _OFTEN = tl.constexpr("evict_first"), tl.constexpr("evict_last")


def add_statistics(
    stats: Tensor,
    x: Tensor,
    local: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    """Merge a tile's statistics into those of the tiles before it.

    Args:
        stats: [4, R] float32, as logit_tiles._statistics and _merge; overwritten.
        x: [R, C], matmul's result; rows may be strided, columns not. Not written to.
        local: [R] int64, the target's column, outside [0, C) in another tile.
        bias: [C] float32.
        scale, softcap: as in linear_logprobs.
    """
    num_rows, num_columns = x.shape
    if not num_rows:
        return
    _add_statistics[(num_rows,)](
        stats,
        stats.stride(0),
        x,
        x.stride(0),
        num_columns,
        local,
        bias,
        scale,
        softcap or 1.0,
        **_constants(num_columns, bias, softcap),
    )


def gradient(
    out: Tensor,
    x: Tensor,
    local: Tensor,
    lse: Tensor,
    g: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    """The gradient of sum(g * logprob) by a matmul's result, but for the factor scale.

    Args:
        out: [R, C], any floating dtype; may be x. Rows may be strided.
        lse, g: [R] float32.
        x, local, bias, scale, softcap: see :func:`add_statistics`.
    """
    num_rows, num_columns = x.shape
    if not num_rows:
        return
    _gradient[(num_rows, triton.cdiv(num_columns, _BLOCK))](
        out,
        out.stride(0),
        x,
        x.stride(0),
        num_columns,
        local,
        lse,
        g,
        bias,
        scale,
        softcap or 1.0,
        **_constants(num_columns, bias, softcap),
    )


def _constants(
    num_columns: int, bias: Tensor | None, softcap: float | None
) -> dict[str, int]:
    """What a kernel is compiled for."""
    return {
        "HAS_BIAS": bias is not None,
        "HAS_CAP": softcap is not None,
        "IS_WHOLE": num_columns % _BLOCK == 0,
        "BLOCK": _BLOCK,
        "num_warps": _WARPS,
    }


@triton.jit
def _load(x, column, num_columns, IS_WHOLE: tl.constexpr, POLICY: tl.constexpr):
    if IS_WHOLE:  # a mask costs a fifth of the time
        v = tl.load(x + column, eviction_policy=POLICY)
    else:
        v = tl.load(x + column, mask=column < num_columns, other=0.0)
    return v.to(tl.float32)


@triton.jit
def _tanh(x):
    # tl has no tanh that runs everywhere. Of |x|, so that exp cannot overflow.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _add_statistics(
    stats,
    stats_stride,
    x,
    x_stride,
    num_columns,
    local,
    bias,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    x += row.to(tl.int64) * x_stride
    stats += row
    maximum = tl.load(stats)
    s = tl.load(stats + stats_stride)
    u = tl.load(stats + 2 * stats_stride)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        v = _load(x, column, num_columns, IS_WHOLE, _ONCE)
        if HAS_BIAS:
            v += _load(bias, column, num_columns, IS_WHOLE, _OFTEN)
        v *= scale
        if HAS_CAP:
            v = softcap * _tanh(v / softcap)
        if not IS_WHOLE:
            v = tl.where(column < num_columns, v, float("-inf"))
        before = maximum
        maximum = tl.maximum(before, tl.max(v, 0))
        v -= maximum
        e = tl.exp(v)
        shift = before - maximum
        factor = tl.exp(shift)
        # 0 * -inf, the part of a logit masked with -inf, is 0.
        u = factor * (u + shift * s) + tl.sum(tl.where(e == 0, 0.0, e * v), 0)
        s = factor * s + tl.sum(e, 0)
    tl.store(stats, maximum)
    tl.store(stats + stats_stride, s)
    tl.store(stats + 2 * stats_stride, u)

    target = tl.load(local + row)
    if (target >= 0) & (target < num_columns):
        v = tl.load(x + target).to(tl.float32)
        if HAS_BIAS:
            v += tl.load(bias + target)
        v *= scale
        if HAS_CAP:
            v = softcap * _tanh(v / softcap)
        tl.store(stats + 3 * stats_stride, v)


@triton.jit
def _gradient(
    out,
    out_stride,
    x,
    x_stride,
    num_columns,
    local,
    lse,
    g,
    bias,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x += row.to(tl.int64) * x_stride
    v = _load(x, column, num_columns, IS_WHOLE, _ONCE)
    if HAS_BIAS:
        v += _load(bias, column, num_columns, IS_WHOLE, _OFTEN)
    v *= scale
    slope = tl.load(g + row)
    if HAS_CAP:
        t = _tanh(v / softcap)
        v = softcap * t
        d = slope * (1.0 - t * t)
    else:
        d = slope
    hit = column == tl.load(local + row)
    d *= tl.where(hit, 1.0, 0.0) - tl.exp(v - tl.load(lse + row))
    out += row.to(tl.int64) * out_stride
    d = d.to(out.dtype.element_ty)
    if IS_WHOLE:
        tl.store(out + column, d)
    else:
        tl.store(out + column, d, mask=column < num_columns)
