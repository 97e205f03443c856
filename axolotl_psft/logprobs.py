"""The loss head: hidden states x (vocabulary-sharded) weight -> token log-probs.

What the PSFT ratio needs of a language-model head, without a [tokens, vocabulary]
tensor. The ratio, the clip and the loss are in objective.py. Torch only.

The maths, for one token with logits x over the vocabulary and target y:

    lse = log sum_j exp(x_j)      logprob = x_y - lse      entropy = lse - sum_j p_j x_j
    d logprob / d x_j = [j = y] - p_j,  where  p_j = exp(x_j - lse)

A tile of the vocabulary contributes four numbers a token, relative to its own maximum;
numbers of two tiles, or of two ranks, combine exactly. The lse is all that backward
needs: it recomputes a tile's logits and turns them into their gradient. What is done to
a tile is in logit_tiles.py.
"""

import functools
import importlib.util
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from axolotl_psft.logit_tiles import (
    Head,
    WeightGradient,
    add_matmul,
    add_statistics,
    bias_of,
    cast,
    empty_statistics,
    finish,
    gradient,
    keeps_sums,
    logits_gradient,
    matmul,
    put,
    scratch,
    take,
    tiles,
)


# Compiled, it would recompile for every count of active rows, and its fused sums would
# round differently from those of the old log-probs.
@torch.compiler.disable
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    softcap: float | None = None,
    logits_scale: float = 1.0,
    with_entropy: bool = True,
    tile_shape: tuple[int, int] | None = None,
    num_active: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies, from hidden states, without logits.

    The result is a function of the inputs alone, bit for bit: grad mode and
    `with_entropy` do not change the log-probs, so a ratio on unmoved weights is 1.

    Ignored rows cost nothing; neither do weights or hidden states that need no
    gradient, nor, on a CPU, rows whose incoming gradient is exactly zero (clipped
    tokens). Sums are float32 whatever the inputs (float64 for float64 inputs). With
    `num_active` the host does not wait for the device, in forward or in backward.

    With `tp_group`, every rank passes the same hidden, targets and settings, and its
    equal shard of weight and bias, in rank order. Collectives: one all-gather of
    4 numbers a token in forward; one all-reduce of d_hidden in backward (pass hidden
    as it is, not through Megatron's copy-to-region). Both are joined with no row, too.

    Args:
        hidden: [T, H], any floating dtype, any strides.
        weight: [V/tp, H].
        targets: [T], integer, global vocabulary ids or `ignore_index`.
        bias: [V/tp], added to the logits.
        tp_group: process group of the vocabulary's shards; None: the whole vocabulary.
        ignore_index: rows with this target give 0 for both results.
        vocab_size: ids from here on are padding, added so that the vocabulary divides
            by tp; they take no part. None: there is no padding.
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma.
        logits_scale: factor on the logits, before the cap (Granite, Cohere).
        with_entropy: False returns zeros for the entropies.
        tile_shape: rows and vocabulary of one tile of logits; in backward on a GPU a
            quarter of the rows. None: 1024 x 1024; on a GPU 8192 x 8192.
        num_active: how many targets are not `ignore_index`, of a caller that knows, and
            that has seen to it that they are in the vocabulary. None: they are counted
            and checked here.

    Returns:
        Log-probs and entropies in nats, [T], float32 (float64 for float64 inputs).
        Entropies carry no gradient.

    Raises:
        ValueError: shapes that do not fit, or a target outside the vocabulary.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "hidden and weight must be [T, H] and [V/tp, H], got "
            f"{list(hidden.shape)} and {list(weight.shape)}. Flatten the batch."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be [V/tp] = {list(weight.shape[:1])}, got {list(bias.shape)}."
        )
    dtype = _matmul_dtype(hidden, weight)
    start, num_ids, num_all = _shard(len(weight), tp_group, vocab_size)
    rows = _active_rows(targets, hidden, num_all, ignore_index, num_active)
    if tile_shape is None:
        # A CPU's stays in its last cache; a GPU's is large enough that nothing but
        # matmuls counts. Neither depends on the number of rows: nor do a row's bits.
        tile_shape = (1024, 1024) if hidden.device.type == "cpu" else (8192, 8192)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    head = Head(
        start,
        num_ids,
        dtype,
        exact,
        tile_shape,
        None if exact == torch.float64 else _row_kernels(hidden.device),
        tp_group,
        softcap,
        logits_scale,
        with_entropy,
    )
    return _LinearLogprobs.apply(hidden, weight, bias, targets, rows, head)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, head):
        h, local = take(hidden, rows, head), targets[rows] - head.start
        stats = empty_statistics(h, len(rows), head)
        room = scratch(weight, head.dtype, head)
        with torch.autocast(h.device.type, enabled=False):
            for v in tiles(head.num_ids, head.tile[1]):
                w, b = cast(weight[v], room), bias_of(bias, v, head)
                column = local - v.start
                for r in tiles(len(rows), head.tile[0]):
                    x = matmul(h[r].to(head.dtype), w.t(), head.accumulate)
                    add_statistics(stats[:, r], x, b, column[r], head)
                    del x  # before the next tile's is made
        logprobs, entropy, lse = finish(stats, rows, len(hidden), head)
        ctx.save_for_backward(hidden, weight, bias, targets, rows, lse)
        ctx.head = head
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, bias, targets, rows, lse = ctx.saved_tensors
        head = ctx.head
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        rows, g, lse = _moving_rows(rows, grad, lse)
        g = g * head.scale
        h, local = take(hidden, rows, head), targets[rows] - head.start
        # Of so many rows the gradient of the logits is there at once: where it is all
        # of them, as mostly on a GPU, the weight's gradient needs no sum over strips.
        strip = head.tile[0] * (1 if h.device.type == "cpu" else 2)
        d_h = d_weight = d_bias = None
        if need_hidden:
            d_h = torch.zeros(h.shape, dtype=head.accumulate, device=h.device)
        if need_weight:
            d_weight = WeightGradient(weight, head, len(rows), strip)
        if need_bias:
            d_bias = torch.zeros_like(bias, dtype=head.accumulate)
        room = scratch(weight, head.dtype, head)

        with torch.autocast(h.device.type, enabled=False):
            for v in tiles(head.num_ids, head.tile[1]):
                w, b = cast(weight[v], room), bias_of(bias, v, head)
                column = local - v.start
                for r in tiles(len(rows), strip):
                    h_r = h[r].to(head.dtype)
                    d_x = logits_gradient(h_r, w, b, column[r], lse[r], g[r], head)
                    if d_bias is not None:
                        d_bias[v] += d_x.sum(0, dtype=head.accumulate)
                    if d_h is not None:
                        add_matmul(d_h[r], d_x, w)
                    if d_weight is not None:
                        d_weight.add(v, r, d_x.t(), h_r)
                    del d_x  # before the next strip's is made
        if d_h is not None:
            if head.group is not None:
                dist.all_reduce(d_h, group=head.group)
            d_h = put(hidden, rows, d_h)
        return (
            d_h,
            None if d_weight is None else d_weight.total,
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
            None,
        )


@torch.compiler.disable
def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    with_entropy: bool = True,
    inplace_backward: bool = False,
    num_active: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the targets and entropies, from logits that exist already.

    For models whose head cannot be split from the rest; `linear_logprobs` needs less
    memory. Beside the logits there is their gradient in backward, in their own dtype,
    and nothing else of that size. With `tp_group`, one all-gather of 4 numbers a token
    in forward, and no collective in backward.

    Args:
        logits: [T, V/tp], any floating dtype, any strides. Never written to, unless
            `inplace_backward`.
        targets: [T], integer, global vocabulary ids or `ignore_index`.
        tp_group: process group of the vocabulary's shards; None: the whole vocabulary.
        ignore_index: rows with this target give 0 for both results.
        vocab_size: ids from here on are padding, added so that the vocabulary divides
            by tp; they take no part. None: there is no padding.
        with_entropy: False returns zeros for the entropies.
        inplace_backward: backward overwrites the logits with their gradient. For
            callers that drop the logits; autograd raises an error where another
            function still needs them.
        num_active: see :func:`linear_logprobs`.

    Returns:
        Log-probs and entropies in nats, [T], float32 (float64 for float64 inputs).
        Entropies carry no gradient.

    Raises:
        ValueError: shapes that do not fit, or a target outside the vocabulary.
    """
    # Megatron-Core's vocab_parallel_cross_entropy is not called: it overwrites float32
    # logits in forward, takes -100 for a token of another rank (so a masked row gets a
    # finite loss and a gradient), needs three all-reduces and a float32 copy of the
    # logits, and gives no entropy. Its fused form casts the gradient to bfloat16. On
    # active rows the results agree, which a test checks.
    if logits.dim() != 2:
        raise ValueError(f"logits must be [T, V/tp], got {list(logits.shape)}.")
    start, num_ids, num_all = _shard(logits.shape[1], tp_group, vocab_size)
    rows = _active_rows(targets, logits, num_all, ignore_index, num_active)
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # Rows enough to amortize a call, few enough to stay in the last cache (a CPU's) or
    # to be small beside the logits.
    area = 1 << (21 if logits.device.type == "cpu" else 26)
    head = Head(
        start,
        num_ids,
        exact,
        exact,
        (max(1, area // logits.shape[1]), num_ids),
        None if exact == torch.float64 else _row_kernels(logits.device),
        tp_group,
        with_entropy=with_entropy,
    )
    return _VocabParallelLogprobs.apply(logits, targets, rows, head, inplace_backward)


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, rows, head, inplace):
        local, n = targets[rows] - head.start, head.num_ids
        stats = empty_statistics(logits, len(rows), head)
        for r in tiles(len(rows) if n else 0, head.tile[0]):
            add_statistics(stats[:, r], logits[rows[r], :n], None, local[r], head)
        logprobs, entropy, lse = finish(stats, rows, len(logits), head)
        ctx.save_for_backward(logits, targets, rows, lse)
        ctx.head, ctx.inplace = head, inplace
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        logits, targets, rows, lse = ctx.saved_tensors
        head, n = ctx.head, ctx.head.num_ids
        rows, g, lse = _moving_rows(rows, grad, lse)
        local = targets[rows] - head.start
        d_logits = logits.detach() if ctx.inplace else torch.empty_like(logits)
        still = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        for r in tiles(len(rows) if n else 0, head.tile[0]):
            x = logits[rows[r], :n]
            gradient(x, x, None, local[r], lse[r], g[r], head)
            d_logits[rows[r], :n] = x
        d_logits[:, n:] = 0
        d_logits.masked_fill_(still.index_fill_(0, rows, False)[:, None], 0)
        return d_logits, None, None, None, None


def _shard(
    length: int, group: dist.ProcessGroup | None, vocab_size: int | None
) -> tuple[int, int, int]:
    """This rank's first id, how many ids it holds, and how many all ranks hold."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    num_all = length * size if vocab_size is None else vocab_size
    if not 0 < num_all <= length * size:
        raise ValueError(
            f"vocab_size must be from 1 to {length * size} (all shards), got {num_all}."
        )
    start = rank * length
    return start, min(max(num_all - start, 0), length), num_all


def _active_rows(
    targets: Tensor,
    scores: Tensor,
    num_all: int,
    ignore_index: int,
    num_active: int | None = None,
) -> Tensor:
    """Indices of the rows that are not ignored; refuses ids outside [0, num_all)."""
    if targets.shape != scores.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"targets must be integers of shape [T] = {list(scores.shape[:1])}, got "
            f"{targets.dtype} {list(targets.shape)}."
        )
    active = targets != ignore_index
    if num_active is None:
        num_active = _count(targets, active, num_all, ignore_index)
    return torch.nonzero_static(active, size=num_active).squeeze(1)


def _count(targets: Tensor, active: Tensor, num_all: int, ignore_index: int) -> int:
    outside = active & ((targets < 0) | (targets >= num_all))
    # The one device sync of forward: how many rows are active, and is any id bad.
    num_active, num_outside = torch.stack((active.sum(), outside.sum())).tolist()
    if num_outside:
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"targets[{row}] is {int(targets[row])}, outside the vocabulary "
            f"[0, {num_all}). Use ids of the model's own tokenizer, or {ignore_index} "
            "for a row without a target."
        )
    return num_active


def _moving_rows(
    rows: Tensor, grad: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the active rows, those with an incoming gradient: a clipped token has none.

    Ranks of one tp group see the same gradient bits, so they keep the same rows. On a
    device that the host runs ahead of, all are kept: to count them is to wait for it.
    """
    g = grad[rows].to(lse.dtype)
    if g.device.type != "cpu":
        return rows, g, lse
    keep = g.nonzero().squeeze(1)
    return rows[keep], g[keep], lse[keep]


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    # Without hardware for it, a CPU's half-precision matmul is 10 to 100 times slower
    # than float32, which holds the same operands exactly.
    native = dtype == torch.bfloat16 and (
        torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    )
    if device == "cpu" and dtype.itemsize == 2 and not native:
        return torch.float32
    return dtype


@functools.cache
def _row_kernels(device: torch.device) -> ModuleType | None:
    """row_kernels.py, for a device that it runs on."""
    if not keeps_sums(device) or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("axolotl_psft.row_kernels")
