"""What only a GPU can show; each on a CPU too, so that the test itself is known to run.

`python -m pytest --gpu` on a machine with one; elsewhere those marked gpu are skipped.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from axolotl_psft import linear_logprobs
from axolotl_psft.causal_lm import install_logprobs_forward
from tests.reference import head_inputs, naive_logprobs
from tests.tiny import column, config, qwen3, run

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of operands that are exact in the dtype: sums of 123 products in float32, logits to
# 15; the gradients of half precision are rounded once to its 8 or 11 bits.
CLOSE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_agrees_with_float64(device: str, dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    hidden, weight, targets, grad = head_inputs(252, 32_000, dtype=dtype)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    expected = naive_logprobs(*exact, targets)
    expected_grads = torch.autograd.grad(expected[0], exact, grad)
    ours = [x.to(device).requires_grad_() for x in (hidden, weight)]
    logprobs, entropy = linear_logprobs(*ours, targets.to(device))
    grads = torch.autograd.grad(logprobs, ours, grad.to(device, torch.float32))
    # A GPU's matmul leaves its sums in float32; a CPU's rounds them.
    close = CLOSE[dtype if device == "cpu" else torch.float32]
    for actual, wanted in ((logprobs, expected[0]), (entropy, expected[1])):
        assert_close(actual.double().cpu(), wanted, **close)
    for actual, wanted in zip(grads, expected_grads, strict=True):
        assert_close(actual.double().cpu(), wanted, **CLOSE[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_repeats_are_equal_to_the_bit(device: str) -> None:
    hidden, weight, targets, _ = head_inputs(252, 32_000, dtype=torch.bfloat16)
    inputs = [x.to(device) for x in (hidden, weight, targets)]
    first, _ = linear_logprobs(*inputs)
    again, _ = linear_logprobs(*inputs, with_entropy=False)
    # What makes the ratio exactly 1 on weights that have not moved.
    assert torch.equal(first, again)


@pytest.mark.gpu
def test_the_host_never_waits_in_a_micro_batch() -> None:
    model = qwen3(vocab_size=512).cuda()
    install_logprobs_forward(model)
    ids = torch.randint(0, 512, (2, 64), device="cuda")
    targets = ids.clone()
    targets[:, :8] = -100
    # transformers looks whether rows are packed, unless it is told what to attend to.
    mask = torch.zeros(2, 1, 64, 64, device="cuda")
    mask = mask.masked_fill(torch.ones_like(mask).triu(1).bool(), -torch.inf)
    given = {"input_ids": ids, "logprob_targets": targets, "num_active": 2 * 56}

    def step() -> None:
        model(**given, attention_mask=mask).logprobs.sum().backward()

    step()  # kernels are loaded at their first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_a_run_has_ratio_one_first(
    device: str, precision: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    if device == "cpu" and precision:
        pytest.skip("Axolotl trains in bf16 on a GPU only")
    trainer = run(config(tiny, tmp_path, **precision, learning_rate=0.05))
    assert trainer.args.device.type == device
    firsts = [age == 0 for age in column(trainer, "psft/old_policy_age")]
    for name in ("psft/ratio_mean", "psft/ratio_max"):
        ratios = column(trainer, name)
        assert [r == 1 for r in ratios] == firsts, ratios
