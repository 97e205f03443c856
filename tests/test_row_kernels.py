"""The kernels of a GPU in Triton's interpreter, on a CPU. On a GPU: test_gpu.py."""

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from axolotl_psft import linear_logprobs, logprobs, vocab_parallel_logprobs
from tests.reference import grads, head_inputs, naive_logprobs, naive_logprobs_of

pytest.importorskip("triton", reason="Triton is installed on Linux only")
# numpy says so wherever 0 meets -inf; the kernels select afterwards.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

# Logits reach 16, and float32 keeps 24 bits: of them, and of sums of 123 products or of
# 5,000 probabilities. An error of a hundredth in any term is far beyond it.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Every head of a test has them."""
    from axolotl_psft import row_kernels

    monkeypatch.setattr(logprobs, "_row_kernels", lambda device: row_kernels)
    return row_kernels


def float32(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().float().requires_grad_() for x in tensors]


# Below, at and beyond a block of the kernels; targets at the borders of 4 shards, which
# the last tile shape makes borders of tiles.
@pytest.mark.parametrize("vocab_size", [8, 507, 2048, 2049, 5_000])
@pytest.mark.parametrize("num_tokens", [1, 13])
def test_agrees_with_float64(num_tokens: int, vocab_size: int) -> None:
    hidden, weight, targets, grad = head_inputs(num_tokens, vocab_size)
    exact = [x.requires_grad_() for x in (hidden, weight)]
    leaves = float32(*exact)
    expected = naive_logprobs(*exact, targets)
    d_expected = grads(expected[0], grad, *exact)
    for columns in (vocab_size, 2_999, -(-vocab_size // 4)):
        actual = linear_logprobs(*leaves, targets, tile_shape=(8, columns))
        assert_close(actual, expected, **CLOSE)
        assert_close(grads(actual[0], grad, *leaves), d_expected, **CLOSE)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("logits_scale", [1.0, 0.25])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_scale_and_softcap(
    softcap: float | None, logits_scale: float, with_bias: bool
) -> None:
    hidden, weight, targets, grad = head_inputs(13, 507)
    bias = torch.linspace(-2, 2, 507, dtype=torch.float64) if with_bias else None
    exact = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    leaves = float32(*exact)
    options: dict[str, Any] = {"softcap": softcap, "logits_scale": logits_scale}
    expected = naive_logprobs(hidden, weight, targets, bias, softcap, logits_scale)
    if with_bias:
        options["bias"] = leaves[2]
    actual = linear_logprobs(*leaves[:2], targets, tile_shape=(8, 100), **options)
    assert_close(actual, expected, **CLOSE)
    assert_close(
        grads(actual[0], grad, *leaves), grads(expected[0], grad, *exact), **CLOSE
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_operands(dtype: torch.dtype) -> None:
    hidden, weight, targets, grad = head_inputs(13, 4_500, dtype=dtype)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    expected = naive_logprobs(*exact, targets)
    actual = linear_logprobs(*leaves, targets)
    # A CPU that multiplies bfloat16 rounds logits to its 8 bits: 2^-4 beyond 16.
    atol = 1e-5 if dtype == torch.float16 else 2**-4
    assert_close(actual, expected, rtol=0, atol=atol, check_dtype=False)
    for got, want in zip(
        grads(actual[0], grad, *leaves), grads(expected[0], grad, *exact), strict=True
    ):
        assert got.dtype == dtype
        assert (got.double() - want).norm() < 2 * torch.finfo(dtype).eps * want.norm()


def test_given_logits() -> None:
    hidden, weight, targets, grad = head_inputs(13, 4_500)
    exact = (hidden @ weight.t()).requires_grad_()
    expected = naive_logprobs_of(exact, targets)
    (d_expected,) = grads(expected[0], grad, exact)
    for inplace in (False, True):
        (logits,) = float32(torch.nn.functional.pad(exact, (0, 3), value=9.0))
        actual = vocab_parallel_logprobs(
            logits, targets, vocab_size=4_500, inplace_backward=inplace
        )
        (d_logits,) = grads(actual[0], grad, logits)
        assert_close(actual, expected, **CLOSE)
        assert_close(d_logits[:, :4_500], d_expected, **CLOSE)
        assert not d_logits[:, 4_500:].any()


def test_padding_takes_no_part() -> None:
    hidden, weight, targets, grad = head_inputs(13, 507)
    expected = naive_logprobs(hidden, weight, targets)
    leaves = float32(hidden, torch.nn.functional.pad(weight, (0, 0, 0, 5), value=9.0))
    actual = linear_logprobs(*leaves, targets, vocab_size=507, tile_shape=(8, 64))
    assert_close(actual, expected, **CLOSE)
    assert not grads(actual[0], grad, *leaves)[1][507:].any()


def test_masked_logits_keep_entropy_finite() -> None:
    hidden, weight, targets, grad = head_inputs(13, 507)
    mask = torch.zeros(507)
    mask[5:130] = float("-inf")  # a whole tile, and a part of the next
    targets[(targets >= 5) & (targets < 130)] = 0
    kept = torch.cat((weight[:5], weight[130:]))
    shifted = torch.where(targets > 4, targets - 125, targets)
    expected = naive_logprobs(hidden, kept, shifted)
    leaves = float32(hidden, weight)
    actual = linear_logprobs(*leaves, targets, bias=mask, tile_shape=(8, 64))
    assert_close(actual, expected, **CLOSE)
    assert all(x.isfinite().all() for x in grads(actual[0], grad, *leaves))


def test_nan_and_infinite_logits_are_not_hidden() -> None:
    hidden, weight, targets, _ = head_inputs(13, 507, 0.0)
    leaves = float32(hidden, weight)
    with torch.no_grad():
        leaves[0][3] = float("nan")
        leaves[0][4] = float("inf")
    logp, entropy = linear_logprobs(*leaves, targets)
    bad = torch.zeros(13, dtype=torch.bool).index_fill_(0, torch.tensor([3, 4]), True)
    assert torch.equal(logp.isnan(), bad)
    assert torch.equal(entropy.isnan(), bad)


def test_no_active_row() -> None:
    hidden, weight, targets, grad = head_inputs(7, 507, 1.0)
    leaves = float32(hidden, weight)
    out = linear_logprobs(*leaves, targets)
    assert not any(x.any() for x in (*out, *grads(out[0], grad, *leaves)))


def test_bits_of_a_row_depend_on_that_row_alone(kernels: ModuleType) -> None:
    torch.manual_seed(0)
    x, local = torch.randn(9, 5_000) * 3, torch.arange(9) * 700

    def results(rows: slice) -> tuple[Tensor, Tensor]:
        stats = torch.zeros(4, len(x[rows]))
        stats[0] = torch.finfo(torch.float32).min
        kernels.add_statistics(stats, x[rows], local[rows], None, 1.0, None)
        lse, out = stats[0] + stats[1].log(), torch.empty(len(x[rows]), 5_000)
        kernels.gradient(out, x[rows], local[rows], lse, lse, None, 1.0, None)
        return stats, out

    stats, gradient = results(slice(None))
    for i in range(9):
        alone = results(slice(i, i + 1))
        assert torch.equal(alone[0][:, 0], stats[:, i])
        assert torch.equal(alone[1][0], gradient[i])


def test_entropy_and_grad_mode_leave_the_bits() -> None:
    hidden, weight, targets, _ = head_inputs(13, 5_000, dtype=torch.float32)
    with torch.no_grad():
        old, _ = linear_logprobs(hidden, weight, targets, with_entropy=False)
    new, entropy = linear_logprobs(hidden.requires_grad_(), weight, targets)
    assert torch.equal(old, new)
    assert entropy.any()
