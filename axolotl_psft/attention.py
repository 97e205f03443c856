"""Attention over packed sequences where a GPU's kernels are not to be had.

Registers one function with transformers, under the name ``NAME``, that takes the varlen
arguments of packing.attention_lengths as flash-attn's does: what differs between a run
on a CPU and one on a GPU is the kernel. When a run uses it is plugin.py's business.
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

NAME = "axolotl_psft_varlen"

# What models may hand to attention and this one does not know: soft caps (Gemma 2),
# sinks (GPT-OSS), a bias of positions (T5's kind).
_MISSING = ("softcap", "s_aux", "position_bias")


def register() -> None:
    """Make ``attn_implementation: axolotl_psft_varlen`` known. Idempotent."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


def trains_on_gpus_only(implementation: str | None) -> bool:
    """Whether an ``attn_implementation`` has no kernel, or no gradient, on a CPU.

    flash-attn's kernels are CUDA's; torch's flex_attention has a forward on a CPU, and
    no backward. :data:`NAME` computes the same.
    """
    return "flash" in str(implementation) or implementation == "flex_attention"


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
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal attention within each of several sequences that follow one another.

    Each sequence goes through torch's own kernel alone, so that it gets what it would
    get in a row of its own, and costs its own length squared, not the row's.

    Args:
        query: [T, heads, D].
        key, value: [T, key heads, D]; key heads divide heads.
        cu_seqlens: [N + 1] integers, 0 and the end of each sequence; the last is T.
        dropout: of attention weights.
        scaling: of the scores; None: 1 / sqrt(D).
        sliding_window: tokens that a token sees, itself included; None: all before it.

    Returns:
        [T, heads, D].

    Raises:
        ValueError: ``cu_seqlens`` does not cover the tokens.
    """
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
        cu_seq_lens_q = _rows(batch, length, attention_mask)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    output = varlen_attention(
        q,
        k,
        v,
        cu_seq_lens_q,
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
