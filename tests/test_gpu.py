"""What only a GPU can show; each on a CPU too, so that the test itself is known to run.

`python -m pytest --gpu` on a machine with one; elsewhere those marked gpu are skipped.
Speed, memory and larger sizes: `python -m benchmarks.gpu`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from axolotl_psft import attention, linear_logprobs, logprobs
from axolotl_psft.objective import psft_loss
from axolotl_psft.packing import attention_lengths, count_on_host, targets_of
from axolotl_psft.token_logprobs import install_logprobs_forward
from axolotl_psft.trainer import PSFTTrainer
from benchmarks.gpu import training
from benchmarks.gpu.measure import Bench
from tests.reference import head_inputs, naive_logprobs
from tests.tiny import column, config, qwen3, run, stateful, steps_after

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of operands that are exact in the dtype: sums of 123 products in float32, logits to
# 15; the gradients of half precision are rounded once to its 8 or 11 bits.
CLOSE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


# ---- The head ----


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_agrees_with_float64(
    device: str, dtype: torch.dtype, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels and device == "cpu":
        pytest.skip("interpreted in test_row_kernels.py")
    if kernels:
        assert logprobs._row_kernels(torch.device(device)) is not None
    else:
        monkeypatch.setattr(logprobs, "_row_kernels", lambda device: None)
    torch.backends.cuda.matmul.allow_tf32 = False
    hidden, weight, targets, grad = head_inputs(252, 32_000, dtype=dtype)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    expected = naive_logprobs(*exact, targets)
    expected_grads = torch.autograd.grad(expected[0], exact, grad)
    ours = [x.to(device).requires_grad_() for x in (hidden, weight)]
    # A GPU's matmul leaves its sums in float32; a CPU's rounds them.
    close = CLOSE[dtype if device == "cpu" else torch.float32]
    for tile_shape in (None, (60, 5_000)):  # one strip of rows, and several
        logp, entropy = linear_logprobs(
            *ours, targets.to(device), tile_shape=tile_shape
        )
        grads = torch.autograd.grad(logp, ours, grad.to(device, torch.float32))
        for actual, wanted in ((logp, expected[0]), (entropy, expected[1])):
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


# ---- Attention, packing, objective ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 4])
def test_packed_attention_agrees_with_one_sample_at_a_time(
    device: str, window: int | None
) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(140, n, 64, generator=rng).to(dtype) for n in (4, 2, 2)]
    ends = torch.tensor([0, 5, 6, 140], dtype=torch.int32)
    exact = [x.double().requires_grad_() for x in inputs]
    leaves = [x.to(device).requires_grad_() for x in inputs]
    grad = torch.randn(140, 4, 64, generator=rng)
    results = []
    for on, x in (("cpu", exact), (device, leaves)):
        out = attention.varlen_attention(
            *x, ends.to(on), max_length=134, sliding_window=window
        )
        results.append((out, *torch.autograd.grad(out, x, grad.to(out))))
    for expected, actual in zip(*results, strict=True):
        assert_close(actual.double().cpu(), expected, **CLOSE[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_packing_of_tensors_on_the_device(device: str) -> None:
    batch = {
        "input_ids": torch.arange(8)[None],
        "labels": torch.tensor([[-100, 1, 2, 3, -100, 5, 6, 7]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1]]),
    }
    there = {key: value.to(device) for key, value in batch.items()}
    count_on_host(batch, 8), count_on_host(there, 8)
    assert there["num_active"] == batch["num_active"] == 4
    assert torch.equal(targets_of(there).cpu(), targets_of(batch))
    lengths = attention_lengths(there["position_ids"])
    assert lengths["cu_seq_lens_q"].tolist() == [0, 3, 6, 8]


@pytest.mark.parametrize("device", DEVICES)
def test_objective_agrees_with_a_cpu(device: str) -> None:
    rng = torch.Generator().manual_seed(0)
    new, old = (torch.randn(2, 50, generator=rng).double() for _ in range(2))
    mask = torch.rand(2, 50, generator=rng) < 0.7
    old[0, :5] = new[0, :5]  # on the bound, where epsilon_high is 0
    for high in (0.0, 0.28):
        results = []
        for on in ("cpu", device):
            leaf = new.to(on).detach().requires_grad_()
            options: dict[str, Any] = {"epsilon_high": high, "num_tokens": 70}
            loss, sums = psft_loss(leaf, old.to(on), mask.to(on), **options)
            loss.backward()
            assert leaf.grad is not None
            results.append(
                [x.detach().cpu() for x in (loss, leaf.grad, *sums.values())]
            )
        for expected, actual in zip(*results, strict=True):
            assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# ---- A model ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa", attention.NAME])
def test_ratio_is_one_on_unmoved_weights(
    device: str, dtype: torch.dtype, implementation: str
) -> None:
    attention.register()
    model = qwen3(vocab_size=512).to(device, dtype)
    model.set_attn_implementation(implementation)
    install_logprobs_forward(model)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (1, 96), generator=rng).to(device)
    batch: dict[str, Any] = {"input_ids": ids, "logprob_targets": ids.clone()}
    batch["logprob_targets"][:, :8] = -100
    if implementation == attention.NAME:
        positions = torch.cat([torch.arange(60), torch.arange(36)])[None]
        batch["position_ids"] = positions.to(device)
        batch |= attention_lengths(positions)
    with torch.no_grad():
        old = model(**batch).logprobs
    new = model(**batch).logprobs
    assert new.requires_grad
    assert torch.equal(new, old)


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
        out = model(**given, attention_mask=mask)
        old = out.logprobs.detach()
        psft_loss(out.logprobs, old, out.mask, num_tokens=112)[0].backward()

    step()  # kernels are loaded at their first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- Runs ----


@pytest.mark.gpu
def test_no_micro_batch_of_a_run_waits(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = PSFTTrainer.training_step, []

    def training_step(*args: Any, **kwargs: Any) -> Any:
        with Bench("cuda").waits() as waits:
            result = original(*args, **kwargs)
        seen.append([where for where in waits if "axolotl_psft" in where])
        return result

    monkeypatch.setattr(PSFTTrainer, "training_step", training_step)
    options = {**stateful(packed=True), "bf16": True, "save_strategy": "no"}
    trainer = run(config(tiny, tmp_path, **{**options, "save_steps": None}))
    assert trainer.model.config._attn_implementation == attention.NAME
    assert len(seen) > 8
    assert not any(seen[1:])  # the first loads kernels


PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"bf16": True},
    # torch's scaler wants float32 weights, and Axolotl makes all of them float16.
    "fp16, LoRA": {"fp16": True, "adapter": "lora", **training.LORA},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_has_ratio_one_first_and_resumes(
    device: str, precision: str, tiny: Path, tmp_path: Path
) -> None:
    if device == "cpu" and precision != "float32":
        pytest.skip("Axolotl trains in 16 bits on a GPU only")
    options = {**stateful(packed=True), **PRECISIONS[precision], "max_steps": 7}
    trainer = run(config(tiny, tmp_path, **options))
    assert trainer.args.device.type == device
    firsts = [age == 0 for age in column(trainer, "psft/old_policy_age")]
    for name in ("psft/ratio_mean", "psft/ratio_max"):
        ratios = column(trainer, name)
        assert [r == 1 for r in ratios] == firsts, ratios
    halfway = tmp_path / "run" / "checkpoint-4"
    resumed = run(
        config(tiny, tmp_path, **options, resume_from_checkpoint=str(halfway))
    )
    keys = ["loss", "grad_norm", "psft/nll", "psft/ratio_max"]
    assert steps_after(resumed, 4, keys) == steps_after(trainer, 4, keys)


@pytest.mark.parametrize("device", DEVICES)
def test_megatrons_step_on_one_rank_agrees_with_a_dense_one(device: str) -> None:
    pytest.importorskip("megatron.core", reason="needs the megatron extra")
    figures = list(training.megatron(Bench(device)))
    assert len(figures) == 10
    assert not [figure for figure in figures if figure.verdict == "MISS"]
