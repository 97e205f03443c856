"""Attention over packed sequences where flash-attn is not installed.

Registers one function with transformers, under the name ``NAME``, that takes the varlen
arguments of packing.attention_lengths as flash-attn's does. On a GPU it runs torch's
own varlen kernel, on a CPU one sequence after another.
"""

import functools
import inspect
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from axolotl.utils.logging import get_logger
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

LOG = get_logger(__name__)

NAME = "axolotl_psft_varlen"

# What models may hand to attention and this one does not know: soft caps (Gemma 2),
# sinks (GPT-OSS), a bias of positions (T5's kind).
_MISSING = ("softcap", "s_aux", "position_bias")


def register() -> None:
    """Make ``attn_implementation: axolotl_psft_varlen`` known. Idempotent."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


def choose(cfg: Any) -> None:
    """Let packed ``sdpa`` on a GPU have :data:`NAME`.

    It is what Axolotl advises without flash-attn, but its own way to torch's varlen
    kernel finds the samples in every layer again, waiting for the device, and repeats
    the key heads. Axolotl's ``sdpa_varlen: false`` keeps sdpa.

    Args:
        cfg: of a run whose model is not loaded yet; ``attn_implementation`` is changed.
    """
    packed = cfg.sample_packing and cfg.sdpa_varlen is not False
    if cfg.attn_implementation == "sdpa" and packed and _has_kernel(cfg.torch_dtype):
        use(cfg, "masks whole rows")


def use(cfg: Any, why: str) -> None:
    """Let the run have :data:`NAME`; ``why`` not what it asks for."""
    LOG.info(
        f"psft: attn_implementation: {cfg.attn_implementation} {why}; {NAME} computes "
        "the same, sample by sample."
    )
    register()
    cfg.attn_implementation = NAME


def takes_lengths(model: PreTrainedModel) -> bool:
    """Whether the model's attention wants packing.attention_lengths of a batch.

    Others isolate samples by a mask of the position ids, made once a forward (sdpa,
    eager, flex_attention), or look at the position ids themselves (xformers, sage).
    """
    implementation = str(model.config.get_text_config()._attn_implementation)
    return implementation == NAME or "flash" in implementation


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    max_length: int | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention within each of several sequences that follow one another.

    Each sequence costs its own length squared, not the row's. On a GPU, in 16 bits and
    without dropout, one kernel of torch's does them all and the host does not wait;
    otherwise each goes through torch's own attention alone, so that it gets what it
    would get in a row of its own.

    Args:
        query: [T, heads, D].
        key, value: [T, key heads, D]; key heads divide heads.
        cu_seqlens: [N + 1] int32, 0 and the end of each sequence; the last is T.
        max_length: tokens of the longest; None: T serves.
        dropout: of attention weights.
        scaling: of the scores; None: 1 / sqrt(D).
        sliding_window: tokens that a token sees, itself included; None: all before it.

    Returns:
        [T, heads, D].

    Raises:
        ValueError: ``cu_seqlens`` does not cover the tokens; unless one kernel does it.
    """
    if _fits_kernel(query, value) and not dropout:
        longest = len(query) if max_length is None else max_length
        on_device = cu_seqlens.to(query.device, torch.int32, non_blocking=True)
        # Tokens that a token sees before itself; after it, none.
        before = -1 if sliding_window is None else sliding_window - 1
        return _kernel()(
            query,
            key,
            value,
            on_device,
            on_device,
            longest,
            longest,
            scale=scaling,
            window_size=(before, 0),
        )
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != len(query):
        raise ValueError(
            f"cu_seqlens must run from 0 to the {len(query)} tokens, got {ends[0]} to "
            f"{ends[-1]}. Count the padding as a sequence."
        )
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    outputs = [
        _attend_whole(q, k, v, dropout, scaling, sliding_window)
        for q, k, v in zip(
            query.split(lengths), key.split(lengths), value.split(lengths), strict=True
        )
    ]
    return torch.cat(outputs)


def _has_kernel(dtype: torch.dtype) -> bool:
    """Whether torch has its varlen kernel for this machine's GPUs and a dtype."""
    return (
        dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability() >= (8, 0)
    )


def _fits_kernel(query: Tensor, value: Tensor) -> bool:
    # It is flash-attention's, whose heads have at most 256 dimensions, all of one size.
    fits = query.shape[-1] == value.shape[-1] <= 256
    return query.is_cuda and fits and _has_kernel(query.dtype)


@functools.cache
def _kernel() -> Any:
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.12 it takes fewer key heads without being told.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return functools.partial(varlen_attn, enable_gqa=True)
    return varlen_attn


def _attend_whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    length, mask = len(query), None
    if sliding_window is not None and sliding_window < length:
        seen = torch.ones(length, length, dtype=torch.bool, device=query.device)
        mask = seen.tril().triu(1 - sliding_window)
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[0].transpose(0, 1)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: [B, heads, S, D] in, [B, S, heads, D] out."""
    asked = [name for name in _MISSING if kwargs.get(name) is not None]
    if key.shape[2] != query.shape[2]:
        asked.append("a cache")
    if asked:
        raise ValueError(
            f"attn_implementation: {NAME} has no {' and no '.join(asked)}, which "
            f"{type(module).__name__} asks for. Use attn_implementation: eager."
        )
    batch, _, length, _ = query.shape
    if cu_seq_lens_q is None:
        cu_seq_lens_q, max_length_q = _rows(batch, length, attention_mask), length
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        # As sdpa does. Axolotl's norms are float32, and what they make of query and key
        # would have no kernel.
        dtype = torch.get_autocast_dtype(query.device.type)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))
    output = varlen_attention(
        q,
        k,
        v,
        cu_seq_lens_q,
        max_length=max_length_q,
        dropout=dropout,
        scaling=scaling,
        sliding_window=sliding_window,
    )
    return output.view(batch, length, *output.shape[1:]), None


def _rows(batch: int, length: int, attention_mask: Tensor | None) -> Tensor:
    """Rows that are not packed: one sequence each, padding another before or after."""
    starts = torch.zeros(batch, length, dtype=torch.bool)
    starts[:, 0] = True
    if attention_mask is not None:
        attended = attention_mask.cpu() != 0
        starts[:, 1:] |= attended[:, 1:] != attended[:, :-1]
    ends = starts.flatten().nonzero().flatten().tolist()
    return torch.tensor([*ends, batch * length])
