"""Packed sequences: where one sample ends and the next begins.

Torch only. A packed row holds several samples; position_ids restart at 0 at each.
"""

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100

_GEMMA_4 = ("gemma4", "gemma4_unified")
# transformers finds their samples in a packed row by position_ids, and only where there
# is no mask, which Axolotl's collator gives.
_SAMPLES_BY_POSITION = ("gemma3", *_GEMMA_4)

Batch = dict[str, Any]
"""A micro-batch: ``input_ids``, ``labels`` [B, S] and whatever goes with them."""


def sample_starts(
    labels: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None = None
) -> Tensor:
    """Where samples begin.

    Args:
        labels: [B, S], for its shape.
        position_ids: [B, S], 0 at each sample's first token; None where rows are not
            packed.
        attention_mask: [B, S], 0 at padding; None where there is none. Needed only for
            rows that are padded on the left.

    Returns:
        [B, S] bool: True at the first token of every sample and of every row.
    """
    starts = torch.zeros_like(labels, dtype=torch.bool)
    starts[:, 0] = True
    if position_ids is not None:
        starts |= position_ids == 0
    if attention_mask is not None:
        attended = attention_mask != 0
        starts[:, 1:] |= attended[:, 1:] & ~attended[:, :-1]
    return starts


def supervised_targets(
    labels: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None = None
) -> Tensor:
    """Labels that some earlier token of the same sample can predict.

    The first token of a sample has no predecessor: the one before it in a packed row
    belongs to another sample, and training on that pair would leak across the boundary.

    Args:
        labels: [B, S] int64, -100 where not supervised.
        position_ids, attention_mask: see :func:`sample_starts`.

    Returns:
        [B, S] int64: ``labels`` with -100 at the first token of every sample.
    """
    starts = sample_starts(labels, position_ids, attention_mask)
    return labels.masked_fill(starts, IGNORE_INDEX)


def attention_lengths(position_ids: Tensor) -> dict[str, Any]:
    """What varlen attention kernels want to know of a packed batch.

    transformers hands them to flash-attn's kernels as they are; without them each layer
    derives them from the position ids again, and waits for the device each time.

    Args:
        position_ids: [B, S], 0 at each sample's first token.

    Returns:
        By transformers' names: ``cu_seq_lens_q`` and ``cu_seq_lens_k``, [N + 1] int32
        on the host, 0 and the end of each of the N samples in the flattened batch;
        ``max_length_q`` and ``max_length_k``, int, tokens of the longest. Waits for the
        device where ``position_ids`` are on one.
    """
    on_host = position_ids.cpu()
    starts = sample_starts(on_host, on_host).flatten().nonzero().flatten()
    ends = torch.cat([starts, torch.tensor([on_host.numel()])]).to(torch.int32)
    longest = int(ends.diff().max())
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def complete(batch: Batch, config: Any, *, is_packed: bool, with_lengths: bool) -> None:
    """Add what model and host must know of a micro-batch; of a window's, ahead of time.

    Into the caller's: one that is scored and then trained on has it twice for the price
    of once.

    Args:
        batch: as the collator made it.
        config: the model's.
        is_packed: whether the training data are.
        with_lengths: whether packed attention takes :func:`attention_lengths`.
    """
    count_on_host(batch, config.get_text_config().vocab_size)
    if config.model_type in _GEMMA_4 and "mm_token_type_ids" not in batch:
        # It wants to know of every token that it is text.
        batch["mm_token_type_ids"] = torch.zeros_like(batch["input_ids"])
    if not is_packed or "position_ids" not in batch:
        return
    if config.model_type in _SAMPLES_BY_POSITION:
        batch.pop("attention_mask", None)
    # Axolotl's collator has added them to what flash-attn gets.
    if with_lengths and "cu_seq_lens_q" not in batch:
        batch.update(attention_lengths(batch["position_ids"]))


def count_on_host(batch: Batch, vocab_size: int) -> None:
    """Add ``num_active``, the number of active tokens, to a micro-batch; once.

    The host must know it to prepare the head's work. Waits for the device: to be called
    while that has nothing to do.

    Args:
        batch: ``labels`` [B, S]; ``position_ids`` and ``attention_mask`` as in
            :func:`supervised_targets`.
        vocab_size: of the model.

    Raises:
        ValueError: a target is outside the vocabulary.
    """
    if "num_active" in batch:
        return
    targets = targets_of(batch).cpu()
    active = targets[targets != IGNORE_INDEX]
    outside = active[(active < 0) | (active >= vocab_size)]
    if len(outside):
        raise ValueError(
            f"labels: {int(outside[0])} is outside the model's vocabulary "
            f"[0, {vocab_size}). Use the model's own tokenizer, or resize_token_"
            "embeddings once and save."
        )
    batch["num_active"] = len(active)


def targets_of(batch: Batch) -> Tensor:
    """:func:`supervised_targets` of a micro-batch, on its device."""
    return supervised_targets(
        batch["labels"], batch.get("position_ids"), batch.get("attention_mask")
    )


def shift_left(targets: Tensor) -> Tensor:
    """Align targets with the positions that predict them.

    Args:
        targets: [B, S]; entry t is the token at position t.

    Returns:
        [B, S]; entry t is the token at position t + 1, -100 at the end of the row.
    """
    return torch.nn.functional.pad(targets[:, 1:], (0, 1), value=IGNORE_INDEX)


def shift_right(per_token: Tensor) -> Tensor:
    """Undo :func:`shift_left` for results: [B, S] back to the tokens' own positions."""
    return torch.nn.functional.pad(per_token[:, :-1], (1, 0))
