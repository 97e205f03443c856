"""Token sums to metrics, on one process; over ranks: tests/distributed."""

import math

import pytest
import torch

from axolotl_psft.metrics import TokenSums
from axolotl_psft.objective import psft_loss

DEVICE = "cpu"


def sums(**changes: float) -> dict[str, torch.Tensor]:
    """A micro-batch of one token; ``changes`` to its sums."""
    values = {
        "num_tokens": 1,
        "nll_sum": 2.0,
        "surrogate_sum": -1.0,
        "entropy_sum": 3.0,
        "ratio_sum": 1.5,
        "clipped_sum": 1,
        "approx_kl_sum": 0.25,
        "ratio_max": 1.5,
        **changes,
    }
    return {name: torch.tensor(value) for name, value in values.items()}


def test_sums_are_divided_last():
    total = TokenSums(DEVICE)
    total.add(sums())
    total.add(
        sums(
            num_tokens=7,
            nll_sum=6.0,
            surrogate_sum=-3.0,
            entropy_sum=5.0,
            ratio_sum=6.5,
            clipped_sum=3,
            approx_kl_sum=0.75,
            ratio_max=1.25,
        )
    )
    # The mean of the two means would be (2 + 6/7) / 2 for nll.
    assert total.reduce() == {
        "nll": 8 / 8,
        "surrogate": -4 / 8,
        "entropy": 8 / 8,
        "clip_frac": 4 / 8,
        "ratio_mean": 8 / 8,
        "ratio_max": 1.5,
        "approx_kl": 1 / 8,
    }


@pytest.mark.parametrize("order", [(0.5, 3.0, 2.0), (3.0, 2.0, 0.5)])
def test_ratio_max_is_a_maximum(order: tuple[float, ...]):
    total = TokenSums(DEVICE)
    for value in order:
        total.add(sums(ratio_max=value))
    assert total.reduce()["ratio_max"] == 3.0


def test_no_active_token_gives_no_metric():
    total = TokenSums(DEVICE)
    assert total.reduce() == {}
    total.add(sums(**dict.fromkeys(sums(), 0)))
    assert total.reduce() == {}


def test_reduce_changes_nothing():
    total = TokenSums(DEVICE)
    total.add(sums())
    first = total.reduce()
    assert total.reduce() == first != {}


def test_many_small_terms_are_not_lost():
    # float32 stops counting at 2**24: 16777216 + 1 == 16777216.
    total = TokenSums(DEVICE)
    total.add(sums(num_tokens=1, nll_sum=2.0**24))
    for _ in range(3):
        total.add(sums(num_tokens=0, nll_sum=1.0))
    assert total.reduce()["nll"] == 2.0**24 + 3


def test_takes_what_the_objective_gives():
    new, old = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0 - math.log(2)])
    _, given = psft_loss(new, old, torch.tensor([True, True]))
    total = TokenSums(DEVICE)
    own = {"surrogate_sum": torch.tensor(-2.0), "entropy_sum": torch.tensor(5.0)}
    total.add({**given, **own})
    metrics = total.reduce()
    # float32 log-probs.
    assert metrics["ratio_mean"] == pytest.approx(1.5, rel=1e-6)
    assert metrics["ratio_max"] == pytest.approx(2.0, rel=1e-6)
    assert (metrics["nll"], metrics["entropy"], metrics["clip_frac"]) == (1.5, 2.5, 0.5)
