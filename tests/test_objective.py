"""The losses against hand-worked numbers and a plain float64 reference."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from axolotl_psft.config import PSFTConfig
from axolotl_psft.objective import (
    OBJECTIVES,
    Objective,
    asft_loss,
    dft_loss,
    find,
    psft_loss,
    sft_kl_loss,
    sft_loss,
    upper_bound,
)

INF, NAN = math.inf, math.nan
# math.exp and torch.exp differ by an ulp or two; sums here have a few terms.
EXACT = {"rtol": 1e-13, "atol": 1e-15}


def reference(
    new: list[float], old: list[float], mask: list[bool], upper: float, divisor: float
) -> tuple[float, list[float], dict[str, float]]:
    """Loss, gradient and sums, one token at a time; log-probs must be finite."""
    loss, grad = 0.0, []
    sums = dict.fromkeys(
        ("num_tokens", "nll_sum", "ratio_sum", "clipped_sum", "approx_kl_sum"), 0.0
    )
    sums["ratio_max"] = 0.0
    for n, o, active in zip(new, old, mask, strict=True):
        if not active:
            grad.append(0.0)
            continue
        inside = -20.0 <= n - o <= 20.0
        log_ratio = min(max(n - o, -20.0), 20.0)
        ratio = math.exp(log_ratio)
        loss -= min(ratio, upper) / divisor
        grad.append(-ratio / divisor if inside and ratio <= upper else 0.0)
        sums["num_tokens"] += 1
        sums["nll_sum"] -= n
        sums["ratio_sum"] += ratio
        sums["clipped_sum"] += ratio > upper
        sums["approx_kl_sum"] += (ratio - 1) - log_ratio
        sums["ratio_max"] = max(sums["ratio_max"], ratio)
    return loss, grad, sums


def f64(values: list[float], **kwargs: bool) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, **kwargs)


def loss_and_grad(new: Tensor, old: Tensor, mask: Tensor, **kwargs):
    new = new.clone().requires_grad_()
    loss, sums = psft_loss(new, old, mask, **kwargs)
    loss.backward()
    return loss.detach(), new.grad, sums


def check(new: list[float], old: list[float], mask: list[bool], **kwargs) -> None:
    upper = 1 + kwargs.get("epsilon_high", kwargs.get("epsilon", 0.2))
    divisor = kwargs.get("num_tokens", max(sum(mask), 1))
    loss, grad, sums = loss_and_grad(f64(new), f64(old), torch.tensor(mask), **kwargs)
    expected_loss, expected_grad, expected_sums = reference(
        new, old, mask, upper, divisor
    )
    torch.testing.assert_close(loss, f64([expected_loss]).squeeze(), **EXACT)
    torch.testing.assert_close(grad, f64(expected_grad), **EXACT)
    # approx_kl subtracts numbers near 1 of each other: absolute error of an ulp of
    # the ratio, which is at most e**20.
    torch.testing.assert_close(
        {name: float(value) for name, value in sums.items()},
        expected_sums,
        rtol=1e-12,
        atol=1e-14,
    )


def test_numbers_worked_by_hand():
    # epsilon_high = 0.5, so the bound is 1.5; N = 4 active tokens.
    #
    # token  ratio  surrogate       gradient = -r/N      nll    k3 = (r-1) - log r
    #   0     1     1               -1/4                 0.5    0
    #   1     2     1.5 (clipped)    0                   1.0    1 - log 2
    #   2     1/2   1/2             -1/8                 2.0    -1/2 + log 2
    #   3     -     (masked)         0                   -      -
    #   4     5/4   5/4             -5/16                0.25   1/4 - log 5/4
    #
    # surrogates: 4.25, loss -17/16; ratios: 4.75, clipped 1, nll 3.75,
    # k3: 3/4 - log 5/4, maximum 2.
    log2, log54 = math.log(2), math.log(1.25)
    new = f64([-0.5, -1.0, -2.0, -9.0, -0.25])
    old = f64([-0.5, -1.0 - log2, -2.0 + log2, -1.0, -0.25 - log54])
    mask = torch.tensor([True, True, True, False, True])
    loss, grad, sums = loss_and_grad(new, old, mask, epsilon_high=0.5)

    torch.testing.assert_close(loss, f64([-17 / 16]).squeeze(), **EXACT)
    torch.testing.assert_close(grad, f64([-1 / 4, 0, -1 / 8, 0, -5 / 16]), **EXACT)
    expected = {
        "num_tokens": 4.0,
        "nll_sum": 3.75,
        "ratio_sum": 4.75,
        "clipped_sum": 1.0,
        "approx_kl_sum": 0.75 - log54,
        "ratio_max": 2.0,
    }
    torch.testing.assert_close(
        {name: float(value) for name, value in sums.items()}, expected, **EXACT
    )


@pytest.mark.parametrize("log_ratio", [0.0, 1e-6, -1e-6, 25.0, -25.0, 20.0, -20.0])
@pytest.mark.parametrize("bounds", [{}, {"epsilon": 0.3}, {"epsilon_high": 0.28}])
def test_one_log_ratio(log_ratio: float, bounds: dict[str, float]):
    # 16 is exact in binary and leaves log_ratio at most 2e-15 off.
    check([-16.0 + log_ratio, -1.0], [-16.0, -1.0], [True, True], **bounds)


@pytest.mark.parametrize("bound", [1 - 0.2, 1 + 0.28], ids=["lower", "upper"])
@pytest.mark.parametrize("offset", [-1e-9, 1e-9], ids=["below", "above"])
def test_both_sides_of_both_bounds(bound: float, offset: float):
    log_ratio = math.log(bound) + offset
    new = f64([log_ratio])
    mask = torch.tensor([True])
    _, grad, sums = loss_and_grad(new, f64([0.0]), mask, epsilon=0.2, epsilon_high=0.28)
    clipped = bound > 1 and offset > 0
    assert sums["clipped_sum"] == clipped
    if clipped:
        assert grad.item() == 0.0
    else:
        torch.testing.assert_close(grad, -new.exp(), **EXACT)
    check([log_ratio], [0.0], [True], epsilon=0.2, epsilon_high=0.28)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_itself_is_inside(dtype: torch.dtype):
    new, old = torch.tensor([0.2], dtype=dtype), torch.zeros(1, dtype=dtype)
    ratio = new.exp()
    mask = torch.ones(1, dtype=torch.bool)
    # A ratio in [1, 2] minus 1 is exact, so this bound is the ratio to the last bit.
    at = ratio.item() - 1
    _, grad, sums = loss_and_grad(new, old, mask, epsilon_high=at)
    assert grad == -ratio and sums["clipped_sum"] == 0

    one_ulp_lower = torch.nextafter(ratio, torch.zeros_like(ratio)).item() - 1
    loss, grad, sums = loss_and_grad(new, old, mask, epsilon_high=one_ulp_lower)
    assert grad == 0 and sums["clipped_sum"] == 1
    assert loss.item() == -(1 + one_ulp_lower)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_step_of_a_window_is_sft_to_the_last_bit(dtype: torch.dtype):
    new = torch.randn(3, 7, dtype=dtype, generator=torch.Generator().manual_seed(0))
    mask = new < 0.5
    _, grad, sums = loss_and_grad(new, new.clone(), mask)
    same = new.clone().requires_grad_()
    loss, sft_sums = sft_loss(same, mask)
    loss.backward()
    assert torch.equal(grad, same.grad)
    assert sums["ratio_max"] == 1 and sums["clipped_sum"] == 0
    assert sums["approx_kl_sum"] == 0
    assert sums == sft_sums


def test_sft_loss_is_the_mean_nll():
    new = f64([-0.5, -3.0, NAN, -1.0], requires_grad=True)
    mask = torch.tensor([True, True, False, True])
    loss, _ = sft_loss(new, mask)
    loss.backward()
    assert loss.item() == 1.5
    torch.testing.assert_close(new.grad, f64([-1 / 3, -1 / 3, 0, -1 / 3]), **EXACT)
    assert sft_loss(new, mask, num_tokens=9)[0].item() == 0.5
    assert sft_loss(new, mask & False)[0].item() == 0


@pytest.mark.parametrize(
    "new, old, surrogate",
    [
        (-INF, -1.0, math.exp(-20)),  # impossible now: as far down as the clamp goes
        (-1.0, -INF, 1.2),  # was impossible: clipped
        (INF, -1.0, 1.2),
        (-1.0, INF, math.exp(-20)),
    ],
)
def test_infinite_logprobs_have_a_finite_loss_and_no_gradient(new, old, surrogate):
    loss, grad, sums = loss_and_grad(
        f64([new, -1.0]), f64([old, -1.0]), torch.tensor([True, True])
    )
    torch.testing.assert_close(loss, f64([-(surrogate + 1) / 2]).squeeze(), **EXACT)
    assert grad.tolist() == [0.0, -0.5]
    assert all(sums[name].isfinite() for name in sums if name != "nll_sum")


def test_an_undefined_ratio_is_not_hidden():
    # The trainer stops the run on it.
    loss, _ = psft_loss(f64([-INF]), f64([-INF]), torch.tensor([True]))
    assert loss.isnan()


@pytest.mark.parametrize("shape", [(3,), (2, 4), (0,), (2, 0)])
def test_everything_masked(shape: tuple[int, ...]):
    new = torch.full(shape, NAN, requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool)
    for loss, sums in (
        psft_loss(new, torch.full(shape, INF), mask),
        sft_loss(new, mask),
    ):
        new.grad = None
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(new.grad, torch.zeros(shape))
        assert {name: value.item() for name, value in sums.items()} == dict.fromkeys(
            sums, 0
        )


@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_masked_positions_reach_nothing(junk: float):
    new, old = f64([-1.0, -2.0, -3.0, -4.0]), f64([-1.1, -2.0, -2.5, -4.0])
    mask = torch.tensor([True, False, True, False])
    clean = loss_and_grad(new, old, mask)
    for which in (new, old):
        which[1] = junk
    old[3] = junk
    loss, grad, sums = loss_and_grad(new, old, mask)
    assert loss == clean[0] and sums == clean[2]
    assert torch.equal(grad, clean[1])


@pytest.mark.parametrize("epsilon", [1e-3, 0.2, 0.9, 5.0])
def test_lower_epsilon_is_inert(epsilon: float):
    new, old = f64([-1.0, -2.0, -3.0]), f64([-0.2, -2.3, -3.2])
    mask = torch.ones(3, dtype=torch.bool)
    loss, grad, sums = loss_and_grad(new, old, mask, epsilon=epsilon, epsilon_high=0.28)
    expected = loss_and_grad(new, old, mask, epsilon=0.5, epsilon_high=0.28)
    assert loss == expected[0] and sums == expected[2]
    assert torch.equal(grad, expected[1])


def test_old_logprobs_are_never_differentiated():
    new, old = f64([-1.0], requires_grad=True), f64([-1.1], requires_grad=True)
    psft_loss(new, old, torch.tensor([True]))[0].backward()
    assert old.grad is None and new.grad is not None


def test_sums_carry_no_gradient():
    _, sums = psft_loss(
        f64([-1.0], requires_grad=True), f64([-1.1]), torch.tensor([True])
    )
    assert not any(value.requires_grad for value in sums.values())


def test_num_tokens_is_the_divisor_and_micro_batches_add_up():
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    old = new + 0.3 * torch.randn(6, 5, dtype=torch.float64, generator=generator)
    mask = torch.rand(6, 5, generator=generator) < 0.7
    loss, grad, sums = loss_and_grad(new, old, mask)

    num_tokens = mask.sum()
    parts = [
        loss_and_grad(new[rows], old[rows], mask[rows], num_tokens=num_tokens)
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    # The same terms, added in another order.
    torch.testing.assert_close(sum(part[0] for part in parts), loss, **EXACT)
    assert torch.equal(torch.cat([part[1] for part in parts]), grad)
    for name, value in sums.items():
        values = torch.stack([part[2][name] for part in parts])
        total = values.amax() if name == "ratio_max" else values.sum()
        torch.testing.assert_close(total, value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_tokens", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_num_tokens_may_be_a_number_or_a_tensor(num_tokens):
    loss, grad, _ = loss_and_grad(
        f64([-1.0]), f64([-1.0]), torch.tensor([True]), num_tokens=num_tokens
    )
    assert loss.item() == grad.item() == -1 / 7


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([3], [4], [3]), r"one shape, got \(3,\), \(4,\), \(3,\)"),
        (([3], [3], [1, 3]), r"one shape, got \(3,\), \(3,\), \(1, 3\)"),
        # Would broadcast to [3, 3] without a word.
        (([3], [3, 1], [3]), r"one shape"),
    ],
)
def test_shapes_must_agree(arguments, message):
    new, old, mask = arguments
    with pytest.raises(ValueError, match=message):
        psft_loss(torch.zeros(new), torch.zeros(old), torch.ones(mask).bool())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_mask_must_be_bool(dtype: torch.dtype):
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match=r"be bool, got torch\..*!= -100"):
        psft_loss(zeros, zeros, torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("value", [0, -0.1, NAN, -INF])
def test_epsilon_must_be_positive(value: float):
    zeros = torch.zeros(1)
    with pytest.raises(ValueError, match=f"epsilon must be > 0, got {value}. Use 0.2"):
        psft_loss(zeros, zeros, zeros.bool(), epsilon=value)


@pytest.mark.parametrize("value", [-0.1, NAN, -INF])
def test_epsilon_high_must_not_be_negative(value: float):
    zeros = torch.zeros(1)
    with pytest.raises(ValueError, match=f"epsilon_high must be >= 0, got {value}. Us"):
        psft_loss(zeros, zeros, zeros.bool(), epsilon_high=value)


def test_upper_bound():
    assert upper_bound(0.2, None) == 1.2
    assert upper_bound(0.2, 0.28) == 1.28
    assert upper_bound(0.2, 0.0) == 1.0


logprob = st.floats(-60, 0)


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(
        st.tuples(logprob, st.floats(-30, 30), st.booleans()), min_size=1, max_size=12
    ),
    epsilon_high=st.floats(0, 3),
    num_tokens=st.integers(1, 100),
)
def test_any_input_agrees_with_the_reference(tokens, epsilon_high, num_tokens):
    new = [token[0] for token in tokens]
    old = [token[0] - token[1] for token in tokens]
    # math.exp and torch.exp may fall on two sides of a bound they both touch.
    for n, o in zip(new, old, strict=True):
        assume(abs(abs(n - o) - 20) > 1e-9)
        assume(abs(math.exp(min(n - o, 20)) - 1 - epsilon_high) > 1e-9)
    check(
        new,
        old,
        [token[2] for token in tokens],
        epsilon_high=epsilon_high,
        num_tokens=num_tokens,
    )


# ---- SFT-KL ----


def kl_loss_and_grad(new: Tensor, initial: Tensor, mask: Tensor, **kwargs):
    new = new.clone().requires_grad_()
    loss, sums = sft_kl_loss(new, initial, mask, **kwargs)
    loss.backward()
    return loss.detach(), new.grad, sums


def check_kl(
    new: list[float], initial: list[float], mask: list[bool], **kwargs
) -> None:
    kl_coef = kwargs.get("kl_coef", 0.5)
    divisor = kwargs.get("num_tokens", max(sum(mask), 1))
    loss, kl_sum, nll_sum, expected = 0.0, 0.0, 0.0, []
    for n, p0, active in zip(new, initial, mask, strict=True):
        inside = active and -20.0 <= p0 - n <= 20.0
        d = min(max(p0 - n, -20.0), 20.0) if active else 0.0
        kl_sum += math.expm1(d) - d
        nll_sum -= n if active else 0.0
        # -(1 - kl_coef * (1 - p0 / p)): where the clamp holds, only SFT's part.
        factor = 1 - kl_coef * (1 - math.exp(d)) if inside else 1.0
        expected.append(-factor / divisor if active else 0.0)
    loss = (nll_sum + kl_coef * kl_sum) / divisor
    got, grad, sums = kl_loss_and_grad(
        f64(new), f64(initial), torch.tensor(mask), **kwargs
    )
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(got, f64([loss]).squeeze(), **close)
    torch.testing.assert_close(grad, f64(expected), **close)
    torch.testing.assert_close(
        (sums["approx_kl_sum"], sums["nll_sum"]),
        (f64([kl_sum]).squeeze(), f64([nll_sum]).squeeze()),
        **close,
    )


def test_sft_kl_worked_by_hand():
    # kl_coef = 0.5; N = 3 active tokens; d = log p0 - log p.
    #
    # token  p0/p  k3 = p0/p - d - 1   gradient = -(1 - 0.5 (1 - p0/p)) / N    nll
    #   0     1     0                  -1/3                                     0.5
    #   1     2     1 - log 2          -1.5/3: a stronger pull                  1
    #   2     1/2   -1/2 + log 2       -0.75/3: weaker, at most halved          2
    #   3     -     (masked)            0                                       -
    log2 = math.log(2)
    new, initial = [-0.5, -1.0, -2.0, -9.0], [-0.5, -1.0 + log2, -2.0 - log2, -1.0]
    loss, grad, sums = kl_loss_and_grad(
        f64(new), f64(initial), torch.tensor([True, True, True, False])
    )
    torch.testing.assert_close(loss, f64([(3.5 + 0.25) / 3]).squeeze(), **EXACT)
    torch.testing.assert_close(grad, f64([-1 / 3, -0.5, -0.25, 0]), **EXACT)
    torch.testing.assert_close(sums["approx_kl_sum"], f64([0.5]).squeeze(), **EXACT)


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(
        st.tuples(logprob, st.floats(-30, 30), st.booleans()), min_size=1, max_size=12
    ),
    kl_coef=st.floats(0, 3),
    num_tokens=st.integers(1, 100),
)
def test_sft_kl_agrees_with_the_reference(tokens, kl_coef, num_tokens):
    new = [token[0] for token in tokens]
    initial = [token[0] + token[1] for token in tokens]
    for n, p0 in zip(new, initial, strict=True):
        assume(abs(abs(n - p0) - 20) > 1e-9)
    mask = [token[2] for token in tokens]
    check_kl(new, initial, mask, kl_coef=kl_coef, num_tokens=num_tokens)


def test_sft_kl_has_the_papers_coefficient():
    check_kl([-1.0, -2.0], [-2.0, -1.5], [True, True])


def test_far_above_the_initial_policy_the_gradient_is_sfts_less_the_coefficient():
    _, grad, _ = kl_loss_and_grad(
        f64([-0.1]), f64([-19.0]), torch.tensor([True]), kl_coef=0.3
    )
    torch.testing.assert_close(grad, f64([-0.7]), rtol=1e-7, atol=0)


def test_a_small_distance_is_not_lost_in_rounding():
    new = torch.tensor([-1.0])
    initial = new + 2**-12
    _, _, sums = kl_loss_and_grad(new, initial, torch.tensor([True]))
    # d**2 / 2 = 3e-8, which float32 cannot tell apart from 0 beside 1.
    assert sums["approx_kl_sum"].item() == pytest.approx(2**-25, rel=1e-3)


@pytest.mark.parametrize("num_tokens", [None, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coefficient_zero_is_sft_to_the_last_bit(dtype: torch.dtype, num_tokens):
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(3, 7, dtype=dtype, generator=generator)
    initial = 9 * torch.randn(3, 7, dtype=dtype, generator=generator)
    mask = new < 0.5
    loss, grad, sums = kl_loss_and_grad(
        new, initial, mask, kl_coef=0, num_tokens=num_tokens
    )
    same = new.clone().requires_grad_()
    sft, sft_sums = sft_loss(same, mask, num_tokens=num_tokens)
    sft.backward()
    assert torch.equal(loss, sft.detach())
    assert torch.equal(grad, same.grad)
    assert sums.pop("approx_kl_sum") > 0 and sft_sums.pop("approx_kl_sum") == 0
    assert sums == sft_sums


@pytest.mark.parametrize("junk", [NAN, INF, -INF])
def test_masked_positions_reach_nothing_in_sft_kl(junk: float):
    new, initial = f64([-1.0, -2.0, -3.0, -4.0]), f64([-1.1, -2.0, -2.5, -4.0])
    mask = torch.tensor([True, False, True, False])
    clean = kl_loss_and_grad(new, initial, mask)
    for which in (new, initial):
        which[1] = junk
    initial[3] = junk
    loss, grad, sums = kl_loss_and_grad(new, initial, mask)
    assert loss == clean[0] and sums == clean[2]
    assert torch.equal(grad, clean[1])


def test_nothing_but_the_policy_is_differentiated_in_sft_kl():
    new, initial = f64([-1.0], requires_grad=True), f64([-1.1], requires_grad=True)
    loss, sums = sft_kl_loss(new, initial, torch.tensor([True]))
    loss.backward()
    assert initial.grad is None and new.grad is not None
    assert not any(value.requires_grad for value in sums.values())


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 0)])
def test_everything_masked_in_sft_kl(shape: tuple[int, ...]):
    loss, grad, sums = kl_loss_and_grad(
        torch.full(shape, NAN), torch.full(shape, INF), torch.zeros(shape).bool()
    )
    assert loss == 0 and torch.equal(grad, torch.zeros(shape))
    assert {name: value.item() for name, value in sums.items()} == dict.fromkeys(
        sums, 0
    )


def test_shapes_must_agree_in_sft_kl():
    with pytest.raises(ValueError, match=r"one shape, got \(3,\), \(3, 1\), \(3,\)"):
        sft_kl_loss(torch.zeros(3), torch.zeros(3, 1), torch.ones(3).bool())


def test_sft_kl_micro_batches_add_up():
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    initial = new + torch.randn(6, 5, dtype=torch.float64, generator=generator)
    mask = torch.rand(6, 5, generator=generator) < 0.7
    loss, grad, sums = kl_loss_and_grad(new, initial, mask)
    parts = [
        kl_loss_and_grad(new[rows], initial[rows], mask[rows], num_tokens=mask.sum())
        for rows in (slice(0, 1), slice(1, 6))
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), loss, **EXACT)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad, **EXACT)
    total = sum(part[2]["approx_kl_sum"] for part in parts)
    torch.testing.assert_close(total, sums["approx_kl_sum"], rtol=1e-12, atol=0)


# ---- DFT and ASFT ----


def test_dft_and_asft_worked_by_hand():
    new = f64([math.log(0.5), math.log(0.25), NAN], requires_grad=True)
    initial = f64([math.log(0.25), math.log(0.5), 0.0])
    mask = torch.tensor([True, True, False])
    loss, sums = dft_loss(new, mask, num_tokens=4)
    expected = -(0.5 * math.log(0.5) + 0.25 * math.log(0.25)) / 4
    torch.testing.assert_close(loss, f64([expected])[0], **EXACT)
    (grad,) = torch.autograd.grad(loss, new)
    # -p a token: that of -p itself.
    torch.testing.assert_close(grad, f64([-0.5 / 4, -0.25 / 4, 0.0]), **EXACT)
    torch.testing.assert_close(sums, sft_loss(new, mask)[1])

    loss, sums = asft_loss(new, initial, mask, kl_coef=0.1, num_tokens=4)
    # d = log(p0 / p) is -log 2 and log 2.
    penalty = (0.5 + math.log(2) - 1) + (2 - math.log(2) - 1)
    torch.testing.assert_close(loss, f64([expected + 0.1 * penalty / 4])[0], **EXACT)
    torch.testing.assert_close(sums["approx_kl_sum"], f64([penalty])[0], **EXACT)
    (grad,) = torch.autograd.grad(loss, new)
    pulls = [-0.5 + 0.1 * (1 - 0.5), -0.25 + 0.1 * (1 - 2.0), 0.0]
    torch.testing.assert_close(grad, f64(pulls) / 4, **EXACT)


def test_asft_without_its_penalty_is_dft_to_the_last_bit():
    new, initial = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)) - 3
    mask = torch.arange(50) % 3 > 0
    dft, _ = dft_loss(new, mask)
    assert torch.equal(asft_loss(new, initial, mask, kl_coef=0)[0], dft)


# ---- Objectives as values ----


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_its_function(name: str):
    objective, settings = find(name), PSFTConfig(epsilon_high=0.1, kl_coef=0.3)
    new, old = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)) - 3
    mask = torch.arange(50) % 3 > 0
    expected = {
        "psft": psft_loss(new, old, mask, epsilon_high=0.1, num_tokens=7),
        "sft": sft_loss(new, mask, num_tokens=7),
        "sft_kl": sft_kl_loss(new, old, mask, kl_coef=0.3, num_tokens=7),
        "dft": dft_loss(new, mask, num_tokens=7),
        "asft": asft_loss(new, old, mask, kl_coef=0.3, num_tokens=7),
    }[name]
    torch.testing.assert_close(objective.loss(new, old, mask, 7, settings), expected)
    assert objective.name == name
    # What it says that it reads is what it reads.
    for key in ("epsilon_high", "kl_coef"):
        other = settings.model_copy(update={key: 0.01})
        changed = objective.loss(new, old, mask, 7, other)[0]
        assert torch.equal(changed, expected[0]) == (key not in objective.settings)


def own_loss(new, old, mask, num_tokens, settings):
    return -torch.where(mask, new - old, 0.0).sum() / num_tokens, {
        "nll_sum": f64([9.0])[0]
    }


OWN = Objective("own", "initial policy", own_loss)


def test_an_objective_of_ones_own():
    found = find(f"{__name__}.own_loss")
    assert found.reference == "old policy"
    new, old = f64([-1.0, -2.0]), f64([-1.5, -1.0])
    mask = torch.tensor([True, True])
    loss, sums = found.loss(new, old, mask, 2, PSFTConfig(epsilon_high=0.28))
    assert loss == 0.25
    assert sums["nll_sum"] == 9
    # Sums that it does not know are PSFT's.
    rest = psft_loss(new, old, mask, epsilon_high=0.28)[1]
    assert {**sums, "nll_sum": 0} == {**rest, "nll_sum": 0}
    assert find(f"{__name__}.OWN") is OWN
