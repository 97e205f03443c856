"""Tiles of logits: what one contributes to log-probs and entropies, and its gradient.

The maths is in logprobs.py, whose loops over tiles call these; this is the reference
and runs anywhere. Where Triton does, row_kernels.py takes the place of `_statistics`
with `_merge`, and of `gradient`: they read a tile once. Torch only.
"""

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """What forward and backward share beside tensors."""

    start: int  # this rank holds the vocabulary ids start, start + 1, ...
    num_ids: int  # so many of them; rows of the weight beyond are padding
    dtype: torch.dtype  # of the operands of a matmul
    accumulate: torch.dtype  # of logits, statistics and gradient sums
    tile: tuple[int, int]  # rows, vocabulary
    kernels: ModuleType | None  # row_kernels, where it runs
    group: dist.ProcessGroup | None = None
    softcap: float | None = None
    scale: float = 1.0
    with_entropy: bool = True


def add_statistics(
    stats: Tensor, x: Tensor, bias: Tensor | None, local: Tensor, head: Head
) -> None:
    """Merge the statistics of a tile, a matmul's result [R, C], into [4, R], in place.

    Overwrites x. `local` is the target's column; outside [0, C) it is another tile's.
    """
    if head.kernels is not None:
        head.kernels.add_statistics(stats, x, local, bias, head.scale, head.softcap)
        return
    tile = _statistics(_logits(x, bias, head), local, head.with_entropy)
    stats.copy_(_merge(torch.stack((stats, tile))))


def _statistics(x: Tensor, local: Tensor, with_entropy: bool) -> Tensor:
    """[R, C] logits -> [4, R]: m = max, sum e^(x-m), sum e^(x-m) (x-m), x_target.

    Overwrites x. x_target is 0 where another tile has the target.
    """
    hit, column = _column(local, x)
    target = x.gather(1, column).squeeze(1).where(hit, 0)
    maximum = x.amax(1).clamp_(min=torch.finfo(x.dtype).min)  # -inf - -inf is nan
    x -= maximum[:, None]
    if not with_entropy:
        return torch.stack((maximum, x.exp_().sum(1), torch.zeros_like(target), target))
    e = x.exp()
    # nansum: 0 * -inf, the part of a logit masked with -inf, is 0.
    return torch.stack((maximum, e.sum(1), x.mul_(e).nansum(1), target))


def _merge(stats: Tensor) -> Tensor:
    """Statistics of n parts of the vocabulary, [n, 4, R] -> [4, R]."""
    m, s, u, target = stats.unbind(1)
    maximum = m.amax(0)
    shift = m - maximum
    factor = shift.exp()
    return torch.stack(
        (
            maximum,
            (factor * s).sum(0),
            (factor * (u + shift * s)).sum(0),
            target.sum(0),
        )
    )


def finish(
    stats: Tensor, rows: Tensor, num_rows: int, head: Head
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's statistics [4, R] -> log-probs [T], entropies [T], lse [R]."""
    if head.group is not None:
        size = dist.get_world_size(head.group)
        shards = stats.new_empty(size * 4, stats.shape[1])
        dist.all_gather_into_tensor(shards, stats, group=head.group)
        stats = _merge(shards.view(size, *stats.shape))
    maximum, s, u, target = stats
    log_s = s.log()
    lse = maximum + log_s
    logprobs = stats.new_zeros(num_rows).index_copy_(0, rows, target - lse)
    entropy = stats.new_zeros(num_rows)
    if head.with_entropy:
        entropy.index_copy_(0, rows, log_s - u / s)
    return logprobs, entropy, lse


def empty_statistics(like: Tensor, num_rows: int, head: Head) -> Tensor:
    """Statistics of no tile at all; the lowest finite maximum keeps _merge finite."""
    stats = torch.zeros(4, num_rows, dtype=head.accumulate, device=like.device)
    stats[0] = torch.finfo(head.accumulate).min
    return stats


def logits_gradient(
    h: Tensor,
    w: Tensor,
    bias: Tensor | None,
    local: Tensor,
    lse: Tensor,
    g: Tensor,
    head: Head,
) -> Tensor:
    """Gradient of sum(g * logprob) by a strip of matmul results, [R, C], head.dtype."""
    d_x = h.new_empty(len(h), len(w))
    # A GPU has the strip beside the tile.
    rows = head.tile[0] if h.device.type == "cpu" else max(head.tile[0] // 4, 1)
    for r in tiles(len(h), rows):
        if head.dtype == head.accumulate:
            x = torch.mm(h[r], w.t(), out=d_x[r])
        else:
            x = matmul(h[r], w.t(), head.accumulate)
        gradient(d_x[r], x, bias, local[r], lse[r], g[r], head)
        del x
    return d_x


def gradient(
    out: Tensor,
    x: Tensor,
    bias: Tensor | None,
    local: Tensor,
    lse: Tensor,
    g: Tensor,
    head: Head,
) -> None:
    """The gradient by a tile of matmul results x, [R, C], into `out`, which x may be.

    Of sum(g * logprob), but for the factor head.scale. Overwrites x.
    """
    if head.kernels is not None:
        head.kernels.gradient(out, x, local, lse, g, bias, head.scale, head.softcap)
        return
    x = _logits(x, bias, head)
    hit, column = _column(local, x)
    slope = None if head.softcap is None else 1 - (x / head.softcap).square_()
    x.sub_(lse[:, None]).exp_().mul_(-g[:, None])
    # One column a row: scatter is deterministic here, and scatter_add need not be.
    x.scatter_(1, column, x.gather(1, column) + (g * hit)[:, None])
    if slope is not None:
        x.mul_(slope)
    if x.data_ptr() != out.data_ptr():
        out.copy_(x)


def _logits(x: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """A matmul's result -> logits in the accumulation dtype; in place where it fits."""
    x = x.to(head.accumulate)
    if bias is not None:
        x += bias
    if head.scale != 1.0:
        x *= head.scale
    if head.softcap is not None:
        x.div_(head.softcap).tanh_().mul_(head.softcap)
    return x


def _column(local: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Is the target in this tile, and its column (some column where it is not)."""
    num_columns = x.shape[1]
    hit = (local >= 0) & (local < num_columns)
    return hit, local.clamp(0, num_columns - 1)[:, None]


class WeightGradient:
    """The sum of d_x.t() @ h over strips of rows, one tile of the vocabulary at a time.

    One strip's product is written where it belongs; several are summed in the
    accumulation dtype first.
    """

    def __init__(self, weight: Tensor, head: Head, num_rows: int, strip: int) -> None:
        self.total = torch.empty_like(weight)
        # Padding, and everything where there is no row.
        self.total[head.num_ids if num_rows else 0 :] = 0
        self._num_rows = num_rows
        self._sum = None
        if num_rows > strip:
            self._sum = scratch(weight, head.accumulate, head)

    def add(self, v: slice, r: slice, a: Tensor, b: Tensor) -> None:
        """Add a @ b, [C, R] by [R, H] of the rows `r`, to the tile `v`; in order."""
        total = self.total[v]
        partial = total if self._sum is None else self._sum[: len(total)]
        if r.start == 0:
            _matmul_to(partial, a, b)
        else:
            add_matmul(partial, a, b)
        if r.stop == self._num_rows and partial is not total:
            total.copy_(partial)


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    if a.dtype != dtype and keeps_sums(a.device):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def _matmul_to(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif out.dtype == torch.float32 and keeps_sums(a.device):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif keeps_sums(a.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b)


@functools.cache
def keeps_sums(device: torch.device) -> bool:
    """Whether a matmul of 16-bit operands can leave its float32 sums unrounded.

    cuBLAS can from Ampere on; elsewhere, ROCm's "cuda" too, torch may raise.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def scratch(weight: Tensor, dtype: torch.dtype, head: Head) -> Tensor | None:
    """Room to cast one tile of the weight: the whole never exists twice.

    Taken once a call, for a heap fragments when tiles of this size come and go. None
    where there is nothing to cast.
    """
    if weight.dtype == dtype:
        return None
    size = min(head.tile[1], head.num_ids), weight.shape[1]
    return torch.empty(size, dtype=dtype, device=weight.device)


def cast(tile: Tensor, room: Tensor | None) -> Tensor:
    """The tile of a weight in the dtype of :func:`scratch`'s ``room``, there."""
    return tile if room is None else room[: len(tile)].copy_(tile)


def bias_of(bias: Tensor | None, v: slice, head: Head) -> Tensor | None:
    return None if bias is None else bias[v].to(head.accumulate)


def take(hidden: Tensor, rows: Tensor, head: Head) -> Tensor:
    """The rows; on a GPU cast once, on a CPU, with less room, tile by tile later."""
    h = hidden if len(rows) == len(hidden) else hidden[rows]
    return h if h.device.type == "cpu" else h.to(head.dtype)


def put(hidden: Tensor, rows: Tensor, d_h: Tensor) -> Tensor:
    """The inverse of take, for gradients: rows that were not taken get zeros."""
    d_h = d_h.to(hidden.dtype)
    if len(rows) == len(hidden):
        return d_h
    return torch.zeros_like(hidden).index_copy_(0, rows, d_h)


def tiles(length: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]
