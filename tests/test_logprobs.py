"""The loss head on one rank, against the textbook form. Several ranks: distributed/."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from axolotl_psft import linear_logprobs, vocab_parallel_logprobs
from tests.reference import (
    Watch,
    grads,
    head_inputs,
    naive_logprobs,
    naive_logprobs_of,
)

# float64 on both sides: sums over H = 123 and V = 151,936 in another order differ by
# some 1e-13 of the largest term, and logits reach 15.
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}
SIZES = [(t, v) for t in (1, 7, 252) for v in (507, 32_000, 151_936)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small operations on a shared machine: threads would wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("num_tokens", "vocab_size"), SIZES)
def test_agrees_with_naive_in_float64(num_tokens: int, vocab_size: int) -> None:
    hidden, weight, targets, grad = head_inputs(num_tokens, vocab_size)
    hidden.requires_grad_(), weight.requires_grad_()
    expected = naive_logprobs(hidden, weight, targets)
    # Tiles that divide nothing here, so that every loop has a ragged last turn.
    actual = linear_logprobs(hidden, weight, targets, tile_shape=(100, 3001))
    assert_close(actual, expected, **EXACT)
    assert_close(
        grads(actual[0], grad, hidden, weight),
        grads(expected[0], grad, hidden, weight),
        **EXACT,
    )
    assert not actual[1].requires_grad


@pytest.mark.parametrize(("num_tokens", "vocab_size"), SIZES[:-1])
def test_logits_agree_with_naive_in_float64(num_tokens: int, vocab_size: int) -> None:
    hidden, weight, targets, grad = head_inputs(num_tokens, vocab_size)
    logits = (hidden @ weight.t()).requires_grad_()
    expected = naive_logprobs_of(logits, targets)
    actual = vocab_parallel_logprobs(logits, targets)
    assert_close(actual, expected, **EXACT)
    assert_close(
        grads(actual[0], grad, logits), grads(expected[0], grad, logits), **EXACT
    )


@pytest.mark.parametrize(("num_tokens", "vocab_size"), SIZES)
def test_no_active_row(num_tokens: int, vocab_size: int) -> None:
    hidden, weight, targets, grad = head_inputs(num_tokens, vocab_size, 1.0)
    logits = torch.randn(num_tokens, 507, requires_grad=True)
    hidden.requires_grad_(), weight.requires_grad_()
    head = linear_logprobs(hidden, weight, targets)
    of_logits = vocab_parallel_logprobs(logits, targets)
    for x in (*head, *of_logits):
        assert x.shape == (num_tokens,)
        assert not x.any()
    assert not any(x.any() for x in grads(head[0], grad, hidden, weight))
    assert not any(x.any() for x in grads(of_logits[0], grad, logits))


def test_gradcheck() -> None:
    hidden, weight, targets, _ = head_inputs(9, 21, hidden_size=5)
    bias = torch.linspace(-1, 1, 21, dtype=torch.float64)

    def head(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            softcap=4.0,
            logits_scale=0.7,
            tile_shape=(4, 8),
        )[0]

    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(head, leaves)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_logprobs(x, targets)[0], (logits,)
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("logits_scale", [1.0, 0.25])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_scale_and_softcap(
    softcap: float | None, logits_scale: float, with_bias: bool
) -> None:
    hidden, weight, targets, grad = head_inputs(252, 507)
    bias = torch.linspace(-2, 2, 507, dtype=torch.float64) if with_bias else None
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    expected = naive_logprobs(hidden, weight, targets, bias, softcap, logits_scale)
    actual = linear_logprobs(
        hidden,
        weight,
        targets,
        bias=bias,
        softcap=softcap,
        logits_scale=logits_scale,
        tile_shape=(100, 100),
    )
    assert_close(actual, expected, **EXACT)
    assert_close(
        grads(actual[0], grad, *leaves), grads(expected[0], grad, *leaves), **EXACT
    )


def test_padded_vocabulary_takes_no_part() -> None:
    hidden, weight, targets, grad = head_inputs(252, 507)
    padding = torch.full((5, 123), 9.0, dtype=torch.float64)
    padded = torch.cat((weight, padding)).requires_grad_()
    weight.requires_grad_()
    expected = linear_logprobs(hidden, weight, targets)
    actual = linear_logprobs(hidden, padded, targets, vocab_size=507)
    assert_close(actual, expected, rtol=0, atol=0)
    (d_weight,) = grads(expected[0], grad, weight)
    (d_padded,) = grads(actual[0], grad, padded)
    assert_close(d_padded, torch.cat((d_weight, torch.zeros_like(padding))), **EXACT)

    logits = (hidden @ padded.t()).detach().requires_grad_()
    actual = vocab_parallel_logprobs(logits, targets, vocab_size=507)
    assert_close(actual, expected, **EXACT)
    (d_logits,) = grads(actual[0], grad, logits)
    assert not d_logits[:, 507:].any()
    with pytest.raises(ValueError, match=r"vocab_size must be from 1 to 512.*got 513"):
        vocab_parallel_logprobs(logits, targets, vocab_size=513)


def test_masked_logits_keep_entropy_finite() -> None:
    hidden, weight, targets, grad = head_inputs(252, 507)
    logits = hidden @ weight.t()
    mask = torch.zeros(507, dtype=torch.float64)
    mask[5:130] = float("-inf")  # a whole tile, and a part of the next
    targets[(targets >= 5) & (targets < 130)] = 0
    kept = torch.cat((logits[:, :5], logits[:, 130:]), 1)
    expected = naive_logprobs_of(kept, torch.where(targets > 4, targets - 125, targets))
    assert_close(vocab_parallel_logprobs(logits + mask, targets), expected, **EXACT)
    actual = linear_logprobs(
        hidden, weight.requires_grad_(), targets, bias=mask, tile_shape=(99, 64)
    )
    assert_close(actual, expected, **EXACT)
    assert grads(actual[0], grad, weight)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    hidden, weight, targets, grad = head_inputs(252, 8_000, dtype=dtype)
    # The reference sees the rounded inputs: what is left is this function's error.
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    hidden.requires_grad_(), weight.requires_grad_()
    expected = naive_logprobs(*exact, targets)
    actual = linear_logprobs(hidden, weight, targets)
    logits = (exact[0] @ exact[1].t()).to(dtype)
    from_logits = vocab_parallel_logprobs(logits, targets)
    expected_of = naive_logprobs_of(logits.double(), targets)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    # Logits reach 16.3. float32 rounds a sum of 123 products there to 1e-6 or so; a CPU
    # with a bfloat16 matmul rounds them to 8 bits, beyond 16 by up to 2^-4: the error
    # of a row that such a logit dominates.
    atol = 1e-5 if dtype != torch.bfloat16 else 2**-4
    assert_close(actual, expected, rtol=0, atol=atol, check_dtype=False)
    # Given logits are exact, so only float32 sums over the vocabulary err.
    assert_close(from_logits, expected_of, rtol=0, atol=1e-5, check_dtype=False)
    for got, want in zip(
        grads(actual[0], grad, hidden, weight),
        grads(expected[0], grad, *exact),
        strict=True,
    ):
        assert got.dtype == dtype
        # One rounding of the result to its dtype, at most half an eps; for bfloat16
        # hardware also that of p and of the logits, 4 times as much in all.
        relative = (got.double() - want).norm() / want.norm()
        assert relative < (
            1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        )


def test_float32_error_is_below_1e_5() -> None:
    hidden, weight, targets, grad = head_inputs(252, 32_000, dtype=torch.float32)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    hidden.requires_grad_(), weight.requires_grad_()
    expected = naive_logprobs(*exact, targets)
    actual = linear_logprobs(hidden, weight, targets)
    # The target of the loss head's table (row 9); measured 3e-6.
    assert_close(actual, expected, rtol=0, atol=1e-5, check_dtype=False)
    got, want = grads(actual[0], grad, hidden, weight), grads(expected[0], grad, *exact)
    for x, y in zip(got, want, strict=True):
        assert (x - y).norm() < 1e-5 * y.norm()


@pytest.mark.parametrize("which", ["hidden", "weight", "targets", "logits", "grad"])
def test_non_contiguous(which: str) -> None:
    hidden, weight, targets, grad = head_inputs(252, 507)
    tensors = {"hidden": hidden, "weight": weight, "targets": targets, "grad": grad}
    tensors["logits"] = hidden @ weight.t()
    results = []
    for strided in (False, True):
        x = {name: tensor.clone() for name, tensor in tensors.items()}
        if strided:  # every other column of a tensor that is twice as wide, transposed
            wide = x[which].t().contiguous().repeat_interleave(2, -1)
            x[which] = wide[..., ::2].t()
            assert not x[which].is_contiguous()
        leaves = [x[n].requires_grad_() for n in ("hidden", "weight", "logits")]
        head = linear_logprobs(x["hidden"], x["weight"], x["targets"])
        out = vocab_parallel_logprobs(x["logits"], x["targets"])
        both = torch.autograd.grad((head[0], out[0]), leaves, (x["grad"], x["grad"]))
        results.append((*head, *out, *both))
    assert_close(results[1], results[0], **EXACT)


def test_frozen_inputs_and_skipped_rows_cost_nothing() -> None:
    num_tokens, vocab_size, hidden_size = 252, 507, 123
    hidden, weight, targets, grad = head_inputs(num_tokens, vocab_size, 0.4)
    active = targets != -100
    num_active, num_moving = int(active.sum()), int((active & (grad != 0)).sum())
    assert num_moving < num_active < num_tokens
    for train_hidden, train_weight in ((True, True), (True, False), (False, True)):
        hidden.requires_grad_(train_hidden), weight.requires_grad_(train_weight)
        with Watch() as forward:
            loss, _ = linear_logprobs(hidden, weight, targets, tile_shape=(100, 64))
        with Watch() as backward:
            loss.backward(grad)
        a_matmul = 2 * hidden_size * vocab_size
        assert forward.flops == num_active * a_matmul
        num_matmuls = 1 + train_hidden + train_weight  # 1: the logits again
        assert backward.flops == num_moving * a_matmul * num_matmuls
        assert (hidden.grad is not None) == train_hidden
        assert (weight.grad is not None) == train_weight
        hidden.grad = weight.grad = None
    with torch.no_grad():
        assert not linear_logprobs(hidden, weight, targets)[0].requires_grad


def test_without_gradient_nothing_moves() -> None:
    hidden, weight, targets, grad = head_inputs(252, 507)
    hidden.requires_grad_(), weight.requires_grad_()
    loss, _ = linear_logprobs(hidden, weight, targets)
    with Watch() as watch:
        d_hidden, d_weight = grads(loss, torch.zeros_like(grad), hidden, weight)
    assert watch.flops == 0
    assert not d_hidden.any()
    assert not d_weight.any()


def test_ignored_rows_may_hold_anything() -> None:
    hidden, weight, targets, grad = head_inputs(252, 507)
    hidden[targets == -100] = float("nan")
    hidden.requires_grad_(), weight.requires_grad_()
    out = linear_logprobs(hidden, weight, targets)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    of_logits = vocab_parallel_logprobs(logits, targets)
    everything = (
        *out,
        *of_logits,
        *grads(out[0], grad, hidden, weight),
        *grads(of_logits[0], grad, logits),
    )
    assert all(x.isfinite().all() for x in everything)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_and_new_logprobs_are_bit_identical(dtype: torch.dtype) -> None:
    hidden, weight, targets, grad = head_inputs(252, 8_000, dtype=dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.no_grad():
        old, _ = linear_logprobs(hidden, weight, targets, with_entropy=False)
    runs = []
    for _ in range(2):
        new, entropy = linear_logprobs(hidden, weight, targets)
        runs.append((new, entropy, *grads(new, grad, hidden, weight)))
    assert torch.equal(old, runs[0][0])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_nothing_has_the_size_of_the_logits() -> None:
    num_tokens, vocab_size = 512, 8_000
    hidden, weight, targets, grad = head_inputs(num_tokens, vocab_size, 0.0)
    hidden.requires_grad_(), weight.requires_grad_()
    saved: list[int] = []

    def note(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    with Watch() as watch, torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss, _ = linear_logprobs(hidden, weight, targets, tile_shape=(100, 512))
        loss.backward(grad)
    assert weight.grad is not None
    # The gradient of the weight is the largest tensor there is, or may be.
    assert max(watch.largest.values()) == weight.numel() < num_tokens * vocab_size
    assert max(saved) == weight.numel()
    saved.remove(weight.numel())
    assert max(saved) == hidden.numel()


def test_logits_are_overwritten_on_request_only() -> None:
    hidden, weight, targets, grad = head_inputs(252, 507)
    logits = (hidden @ weight.t()).requires_grad_()
    before = logits.detach().clone()
    loss, _ = vocab_parallel_logprobs(logits, targets)
    (expected,) = grads(loss, grad, logits)
    assert torch.equal(logits, before)

    loss, _ = vocab_parallel_logprobs(logits, targets, inplace_backward=True)
    assert torch.equal(logits, before)
    (actual,) = grads(loss, grad, logits)
    assert actual.data_ptr() == logits.data_ptr()
    assert torch.equal(actual, expected)

    # Another function needs the logits after that: an error, not a wrong gradient.
    logits = before.clone().requires_grad_()
    square = logits.square().sum()
    loss, _ = vocab_parallel_logprobs(logits, targets, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss.sum() + square).backward()


def test_autocast_casts_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, grad = head_inputs(252, 507, dtype=torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    expected = linear_logprobs(hidden, weight, targets)
    d_expected = grads(expected[0], grad, hidden, weight)
    # Only some CPUs multiply bfloat16 natively, and the others are given float32.
    monkeypatch.setattr(
        torch.backends.cpu, "get_cpu_capability", lambda: "AVX512", raising=True
    )
    with torch.autocast("cpu", torch.bfloat16), Watch() as watch:
        actual = linear_logprobs(hidden, weight, targets, tile_shape=(100, 64))
        d_actual = grads(actual[0], grad, hidden, weight)
    assert 0 < watch.largest[torch.bfloat16] <= 100 * 123  # a tile, not the weight
    assert actual[0].dtype == torch.float32
    # bfloat16 keeps 8 bits: logits up to 15 move by 15 * 2^-9 = 3e-2 (the sum) and a
    # third of that for each operand; gradients by some eps of their norm.
    assert_close(actual, expected, rtol=0, atol=8e-2)
    for got, want in zip(d_actual, d_expected, strict=True):
        assert got.dtype == torch.float32
        assert 0 < (got - want).norm() / want.norm() < 2e-2


def test_compile_around_it() -> None:
    hidden, weight, targets, grad = head_inputs(252, 507, dtype=torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()

    def model(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logp, entropy = linear_logprobs(hidden * 2, weight, targets)
        return logp * 3 + entropy

    compiled = torch.compile(model, backend="aot_eager")
    for shift in (0, 9):  # other rows are active: no recompilation of the head
        shifted = torch.where(torch.arange(252) < shift, -100, targets)
        expected = model(hidden, weight, shifted)
        actual = compiled(hidden, weight, shifted)
        assert torch.equal(actual, expected)
        d_actual = grads(actual, grad, hidden, weight)
        d_expected = grads(expected, grad, hidden, weight)
        assert_close(d_actual, d_expected, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [-1, 507, 2**40])
def test_target_outside_the_vocabulary(bad: int) -> None:
    hidden, weight, targets, _ = head_inputs(252, 507)
    targets[100] = bad
    message = rf"targets\[100\] is {bad}, outside the vocabulary \[0, 507\)"
    with pytest.raises(ValueError, match=message):
        linear_logprobs(hidden, weight, targets)
    with pytest.raises(ValueError, match=message):
        vocab_parallel_logprobs(hidden @ weight.t(), targets)
    targets[100] = -7
    targets[targets == -100] = -7
    linear_logprobs(hidden, weight, targets, ignore_index=-7)


def test_shapes_that_do_not_fit() -> None:
    hidden, weight, targets, _ = head_inputs(252, 507)
    with pytest.raises(ValueError, match=r"\[252, 123\] and \[123, 507\]"):
        linear_logprobs(hidden, weight.t(), targets)
    with pytest.raises(ValueError, match=r"hidden and weight must be"):
        linear_logprobs(hidden[None], weight, targets)
    with pytest.raises(ValueError, match=r"bias must be \[V/tp\] = \[507\], got \[5\]"):
        linear_logprobs(hidden, weight, targets, bias=torch.zeros(5))
    with pytest.raises(ValueError, match=r"targets must be integers .* \[252\], got"):
        linear_logprobs(hidden, weight, targets[1:])
    with pytest.raises(
        ValueError, match=r"targets must be integers .*got torch.float64"
    ):
        vocab_parallel_logprobs(hidden @ weight.t(), targets.double())
    with pytest.raises(ValueError, match=r"logits must be \[T, V/tp\], got \[507\]"):
        vocab_parallel_logprobs(hidden[0] @ weight.t(), targets[:1])


def test_the_file_imports_torch_only() -> None:
    code = """
import sys
import torch, torch._dynamo
before = set(sys.modules)
import axolotl_psft.logprobs
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert new <= {"torch", "axolotl_psft"}, new
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
