"""Tokenized samples: is their number known, and is anything in them supervised."""

from typing import Any

import numpy as np
from axolotl.utils.logging import get_logger
from transformers.trainer_utils import has_length

from axolotl_psft.packing import IGNORE_INDEX

LOG = get_logger(__name__)


def is_stream(samples: Any) -> bool:
    """Whether the samples are read on the way, and their number is not known."""
    return not has_length(samples)


def check_supervised(samples: Any) -> None:
    """Refuse a data set without a supervised token; warn of samples without one.

    Args:
        samples: with ``labels``; of a stream nothing is known.

    Raises:
        ValueError: every label is -100.
    """
    if is_stream(samples):
        return
    num_masked = _num_masked(samples)
    remedy = "Check train_on_inputs, roles_to_train and the chat template or prompt"
    if num_masked == len(samples):
        raise ValueError(
            f"psft: no supervised token in the {num_masked} samples: every label "
            f"is -100, and there is nothing to train on. {remedy} format."
        )
    if num_masked:
        LOG.warning(
            f"psft: {num_masked:,} of {len(samples):,} samples have no supervised "
            f"token. They change no gradient, but fill micro-batches. {remedy} "
            "format; with sample_packing they are left out."
        )


def _num_masked(samples: Any) -> int:
    """How many samples of a data set have no supervised token."""
    num_masked = 0
    for table in samples.select_columns("labels").with_format("arrow").iter(1000):
        labels = table["labels"].combine_chunks()
        supervised = np.asarray(labels.flatten()) != IGNORE_INDEX
        before = np.concatenate([[0], supervised.cumsum()])
        ends = np.asarray(labels.value_lengths()).cumsum()
        num_masked += int((np.diff(before[ends], prepend=0) == 0).sum())
    return num_masked
