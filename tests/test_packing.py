"""Segment boundaries and the shift between a token and what predicts it."""

import pytest
import torch

from axolotl_psft.packing import (
    IGNORE_INDEX,
    count_on_host,
    shift_left,
    shift_right,
    supervised_targets,
)

X = IGNORE_INDEX


def test_unpacked_rows_lose_their_first_label():
    labels = torch.tensor([[5, 6, 7], [X, 8, X]])
    assert supervised_targets(labels, None).tolist() == [[X, 6, 7], [X, 8, X]]
    assert labels[0, 0] == 5


def test_a_packed_sample_is_not_predicted_by_the_one_before():
    labels = torch.tensor([[1, 2, 3, 4, 5, 6], [X, 7, 8, X, 9, 10]])
    position_ids = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2]])
    assert supervised_targets(labels, position_ids).tolist() == [
        [X, 2, X, 4, 5, X],
        [X, 7, 8, X, 9, 10],
    ]


def test_a_row_that_starts_mid_sample_loses_its_first_label_too():
    # Nothing in the row comes before it, whatever its position id says.
    labels, position_ids = torch.tensor([[1, 2]]), torch.tensor([[4, 5]])
    assert supervised_targets(labels, position_ids).tolist() == [[X, 2]]


def test_padding_on_the_left_predicts_nothing():
    labels = torch.tensor([[X, X, 1, 2], [3, 4, 5, 6]])
    attention_mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    expected = [[X, X, X, 2], [X, 4, 5, 6]]
    assert supervised_targets(labels, None, attention_mask).tolist() == expected
    # On the right it follows; packed rows number their samples' masks.
    for mask in ([[1, 1, 1, 0]], [[1, 1, 2, 2]]):
        targets = supervised_targets(labels[1:], None, torch.tensor(mask))
        assert targets.tolist() == expected[1:]


def test_shifts_are_inverse_where_there_is_a_predecessor():
    targets = torch.tensor([[X, 2, 3], [X, 5, X]])
    assert shift_left(targets).tolist() == [[2, 3, X], [5, X, X]]
    assert shift_right(shift_left(targets)).tolist() == [[0, 2, 3], [0, 5, X]]


@pytest.mark.parametrize("length", [1, 2])
def test_shortest_rows(length: int):
    rows = torch.arange(1, length + 1)[None]
    assert shift_left(rows).tolist() == [[2, X][2 - length :]]
    assert shift_right(rows.float()).tolist() == [[0.0, 1.0][:length]]
    assert supervised_targets(rows, None).tolist() == [[X, 2][:length]]


def test_a_gradient_passes_through_the_shift():
    logprobs = torch.zeros(1, 3, requires_grad=True)
    (shift_right(logprobs) * torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
    assert logprobs.grad.tolist() == [[2.0, 3.0, 0.0]]


def test_active_tokens_are_counted_once():
    batch = {"labels": torch.tensor([[5, 6, 7], [X, 8, X]])}
    count_on_host(batch, vocab_size=9)
    assert batch["num_active"] == 3
    batch["labels"].fill_(X)
    count_on_host(batch, vocab_size=9)
    assert batch["num_active"] == 3


@pytest.mark.parametrize("label", [9, -1])
def test_a_label_outside_the_vocabulary_is_named(label: int):
    with pytest.raises(ValueError, match=rf"labels: {label} is outside .* \[0, 9\)"):
        count_on_host({"labels": torch.tensor([[1, label]])}, vocab_size=9)
