"""Packed attention: the lengths of a batch, the kernel for CPUs, and the way between.

flash-attn itself needs a GPU; a stand-in with its interface shows what reaches it.
"""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from axolotl.utils.dict import DictDefault
from transformers import modeling_flash_attention_utils

from axolotl_psft import attention, packing, trainer
from axolotl_psft.attention import varlen_attention
from axolotl_psft.packing import attention_lengths
from tests.host_waits import HostWaits
from tests.tiny import column, config, eval_data, qwen3, run

LENGTHS = (5, 1, 9, 3)
ENDS = torch.tensor([0, 5, 6, 15, 18])
# float32: sums of a few dozen terms near 1.
CLOSE = {"rtol": 0.0, "atol": 1e-6}


def positions(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


# ---- Lengths ----


def test_lengths_of_a_packed_batch() -> None:
    rows = torch.stack([positions((2, 4))[0], positions((3, 3))[0]])
    lengths = attention_lengths(rows)
    assert lengths["cu_seq_lens_q"].tolist() == [0, 2, 6, 9, 12]
    assert lengths["cu_seq_lens_q"].dtype == torch.int32
    assert lengths["cu_seq_lens_k"] is lengths["cu_seq_lens_q"]
    assert (lengths["max_length_q"], lengths["max_length_k"]) == (4, 4)
    assert type(lengths["max_length_q"]) is int


def test_a_row_that_goes_on_from_another_is_a_sample_of_its_own() -> None:
    lengths = attention_lengths(torch.tensor([[3, 4, 0], [1, 2, 3]]))
    assert lengths["cu_seq_lens_q"].tolist() == [0, 2, 3, 6]


# ---- The kernel ----


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """One sequence in float64, by the formula; [T, heads, D]."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    i, j = torch.arange(len(q))[:, None], torch.arange(len(q))[None]
    hidden = j > i
    if window is not None:
        hidden |= i - j >= window
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_each_sequence_attends_to_itself(
    window: int | None, scaling: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(18, 4, 8, generator=generator)
    k, v = (torch.randn(18, 2, 8, generator=generator) for _ in range(2))
    output = varlen_attention(q, k, v, ENDS, scaling=scaling, sliding_window=window)
    parts = zip(q.split(LENGTHS), k.split(LENGTHS), v.split(LENGTHS), strict=True)
    scale = 8**-0.5 if scaling is None else scaling
    expected = torch.cat([reference(*part, scale, window) for part in parts])
    torch.testing.assert_close(output.double(), expected, **CLOSE)


@pytest.mark.parametrize("ends", [[0, 5, 17], [1, 18], [0, 5, 20]])
def test_lengths_that_do_not_cover_the_tokens(ends: list[int]) -> None:
    x = torch.zeros(18, 1, 8)
    with pytest.raises(ValueError, match=r"run from 0 to the 18 tokens, got"):
        varlen_attention(x, x, x, torch.tensor(ends))


@pytest.mark.parametrize("window", [None, 4])
def test_what_a_gpus_kernel_is_told(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of the kernel what a CPU runs, by the kernel's arguments."""
    calls = []

    def kernel(
        q: Any, k: Any, v: Any, ends: Any, ends_k: Any, *lengths: int, **kwargs: Any
    ) -> Any:
        calls.append(tuple(lengths))
        assert ends.dtype == torch.int32
        assert ends_k is ends
        before, after = kwargs["window_size"]
        assert after == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "_fits_kernel", lambda *_: False)
            return varlen_attention(
                q,
                k,
                v,
                ends,
                scaling=kwargs["scale"],
                sliding_window=None if before == -1 else before + 1,
            )

    x = torch.randn(18, 4, 8)
    arguments = (x, x[:, :2], x[:, 1:3], ENDS)
    expected = varlen_attention(*arguments, scaling=0.7, sliding_window=window)
    monkeypatch.setattr(attention, "_fits_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "_kernel", lambda: kernel)
    options: dict[str, Any] = {"scaling": 0.7, "sliding_window": window}
    assert torch.equal(varlen_attention(*arguments, max_length=9, **options), expected)
    assert torch.equal(varlen_attention(*arguments, **options), expected)
    assert calls == [(9, 9), (18, 18)]
    varlen_attention(*arguments, dropout=0.5, **options)  # which it has not
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, attention.NAME),
        ({"attn_implementation": "eager"}, "eager"),
        ({"sample_packing": False}, "sdpa"),
        ({"sdpa_varlen": False}, "sdpa"),
        ({"torch_dtype": torch.float32}, "sdpa"),
    ],
)
def test_packed_sdpa_has_the_kernel_on_a_gpu(
    changed: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    packed = {"attn_implementation": "sdpa", "sample_packing": True}
    cfg = DictDefault(
        {**packed, "torch_dtype": torch.bfloat16, "device": "cuda:0", **changed}
    )
    attention.choose(cfg)
    assert cfg.attn_implementation == expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    cfg.attn_implementation = "sdpa"
    attention.choose(cfg)
    assert cfg.attn_implementation == "sdpa"


# ---- Through a model ----


def packed_and_separate(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 60, (1, 18), generator=torch.Generator().manual_seed(1))
    position_ids = positions(LENGTHS)
    packed = model(
        input_ids=ids,
        position_ids=position_ids,
        use_cache=False,
        **attention_lengths(position_ids),
    ).logits
    parts = [
        model(input_ids=part, use_cache=False).logits for part in ids.split(LENGTHS, 1)
    ]
    return packed, torch.cat(parts, 1)


def test_packed_equals_separate_sequences_forward_and_backward() -> None:
    attention.register()
    model = qwen3(vocab_size=60)
    model.set_attn_implementation(attention.NAME)
    assert attention.takes_lengths(model)
    packed, separate = packed_and_separate(model)
    torch.testing.assert_close(packed, separate, **CLOSE)
    grads = []
    for logits in (packed, separate):
        model.zero_grad()
        logits.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_agree_with_sdpa(side: str) -> None:
    attention.register()
    model = qwen3(vocab_size=60)
    ids = torch.randint(0, 60, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    if side == "right":
        mask = mask.flip(1)
    ours, theirs = (
        (model.set_attn_implementation(name), model(ids, attention_mask=mask).logits)[1]
        for name in ("sdpa", attention.NAME)
    )
    keep = mask.bool()
    torch.testing.assert_close(ours[keep], theirs[keep], **CLOSE)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_it_cannot_do_is_an_error(name: str) -> None:
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match=f"has no {name}, .* attn_implementation: eag"):
        attention._attend(torch.nn.Identity(), x, x, x, None, **{name: torch.ones(2)})
    with pytest.raises(ValueError, match=r"has no a cache, which Identity asks for"):
        attention._attend(torch.nn.Identity(), x, x[:, :, :2], x, None)
    attention._attend(torch.nn.Identity(), x, x, x, None, **{name: None})


def test_under_autocast_it_computes_in_its_dtype() -> None:
    x = torch.randn(1, 2, 5, 8)
    query, key, value = x, x.flip(2), x.bfloat16()
    ours = attention._attend
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = ours(torch.nn.Identity(), query, key, value, None)
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert output.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=0, atol=0)


def test_which_attention_wants_lengths() -> None:
    model = qwen3(vocab_size=60)
    names = {attention.NAME, "flash_attention_2", "flash_attention_4"}
    # xformers, given lengths, leaves out its mask of the samples.
    for name in {*names, "sdpa", "eager", "flex_attention", "xformers", "sage"}:
        model.config._attn_implementation = name
        assert attention.takes_lengths(model) == (name in names)


def stand_in_for_flash_attn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """flash-attn's varlen function on a CPU; returns what it was called with."""
    calls: list[dict[str, Any]] = []

    def varlen(q: Any, k: Any, v: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs)
        # The kernel is told the longest length by an int: a tensor would make it wait.
        int(kwargs["max_seqlen_q"])
        # What is counted is what surrounds the kernel.
        no_modes = torch.utils._python_dispatch._disable_current_modes()
        with torch._C.DisableTorchFunction(), no_modes:
            return varlen_attention(q, k, v, kwargs["cu_seqlens_q"])

    def dense(q: Any, k: Any, v: Any, **kwargs: Any) -> torch.Tensor:
        ends = torch.arange(len(q) + 1) * q.shape[1]
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return varlen_attention(*flat, ends).view(q.shape)

    utils = modeling_flash_attention_utils
    supported = dict.fromkeys(
        ("dropout_p", "window_size", "deterministic", "softcap", "s_aux"), False
    )
    supported |= {"max_seqlen_q": True, "max_seqlen_k": True}
    # What else a kernel may take, it has not.
    supported = defaultdict(bool, supported)

    def process(**kwargs: Any) -> Any:
        return utils._process_flash_attention_kwargs(
            supports_mapping=supported, **kwargs
        )

    functions = (dense, varlen, None, None, None)
    monkeypatch.setattr(
        utils,
        "lazy_import_flash_attention",
        lambda *_: (functions, (process, None)),
    )
    return calls


def test_flash_attn_gets_the_lengths_and_no_layer_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = stand_in_for_flash_attn(monkeypatch)
    model = qwen3(vocab_size=60, num_hidden_layers=3)
    model.config._attn_implementation = "flash_attention_2"
    assert attention.takes_lengths(model)
    packed, separate = packed_and_separate(model)
    torch.testing.assert_close(packed, separate, **CLOSE)
    assert len(calls) == 3
    assert all(call["cu_seqlens_q"].tolist() == ENDS.tolist() for call in calls)
    assert all(call["max_seqlen_q"] == 9 for call in calls)

    ids = torch.zeros(1, 18, dtype=torch.long)
    position_ids = positions(LENGTHS)
    lengths = attention_lengths(position_ids)

    def waits(num_layers: int, given: dict[str, Any]) -> int:
        model = qwen3(vocab_size=60, num_hidden_layers=num_layers)
        model.config._attn_implementation = "flash_attention_2"
        with HostWaits() as mode:
            model(input_ids=ids, position_ids=position_ids, use_cache=False, **given)
        return mode.total

    # One in a whole forward: transformers looks once whether the row is packed.
    assert waits(2, lengths) == waits(5, lengths) == 1
    # Without them each layer looks at the position ids anew.
    assert waits(5, {}) - waits(2, {}) >= 3


# ---- flex_attention ----


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch's own flex_attention, neither compiled (half a minute) nor refused on CPUs.

    Uncompiled it is a formula over all scores, with a gradient everywhere. Returns the
    block masks that were made.
    """
    from torch.nn.attention import flex_attention as room
    from transformers import masking_utils
    from transformers.integrations import flex_attention as integration

    made: list[Any] = []

    def create(*args: Any, **kwargs: Any) -> Any:
        made.append(room.create_block_mask(*args, **{**kwargs, "_compile": False}))
        return made[-1]

    def attend(*args: Any, training: bool, **kwargs: Any) -> Any:
        # What is counted is what surrounds the kernel.
        with torch.utils._python_dispatch._disable_current_modes():
            return room.flex_attention(*args, **kwargs)

    monkeypatch.setattr(room, "_validate_device", lambda *_: None)
    monkeypatch.setattr(masking_utils, "create_block_mask", create)
    monkeypatch.setattr(integration, "compile_friendly_flex_attention", attend)
    return made


def test_flex_attention_gets_the_samples_once_a_forward(flex: list[Any]) -> None:
    from torch.nn.attention.flex_attention import create_mask

    model = qwen3(vocab_size=60, num_hidden_layers=3)
    ids = torch.randint(0, 60, (1, 18), generator=torch.Generator().manual_seed(1))
    results = []
    for name in ("sdpa", "flex_attention"):
        model.set_attn_implementation(name)
        model.zero_grad()
        logits = model(ids, position_ids=positions(LENGTHS), use_cache=False).logits
        logits.square().sum().backward()
        results.append((logits, [p.grad.clone() for p in model.parameters()]))
    (mask,) = flex
    blocks = [torch.ones(n, n, dtype=torch.bool).tril() for n in LENGTHS]
    seen = create_mask(mask.mask_mod, 1, 1, 18, 18, "cpu")[0, 0]
    assert torch.equal(seen, torch.block_diag(*blocks))
    (sdpa, sdpa_grads), (ours, our_grads) = results
    torch.testing.assert_close(ours, sdpa, **CLOSE)
    # Sums over the row's tokens of terms near 1.
    torch.testing.assert_close(our_grads, sdpa_grads, rtol=1e-5, atol=1e-6)


def test_no_layer_of_flex_attention_waits(flex: list[Any]) -> None:
    def waits(num_layers: int) -> int:
        model = qwen3(vocab_size=60, num_hidden_layers=num_layers)
        model.set_attn_implementation("flex_attention")
        ids = torch.zeros(1, 18, dtype=torch.long)
        with HostWaits() as mode, torch.no_grad():
            model(ids, position_ids=positions(LENGTHS), use_cache=False)
        return mode.total

    # transformers looks once whether the row is packed.
    assert waits(2) == waits(5) == 1
    assert len(flex) == 2


# ---- Through a run ----

PACKED = {
    "sample_packing": True,
    "eval_sample_packing": True,
    # Axolotl makes one row of several for flash-attn, and packs them otherwise.
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "eval_steps": 4,
    "num_epochs": 10,
    "save_strategy": "no",
}


def test_a_gpu_recipe_runs_on_a_cpu_and_agrees_with_sdpa(
    sdpa_packed: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []

    def count(position_ids: torch.Tensor) -> dict[str, Any]:
        computed.append(position_ids.shape)
        return attention_lengths(position_ids)

    monkeypatch.setattr(packing, "attention_lengths", count)
    batches = []
    for name in ("training_step", "prediction_step"):
        original = getattr(trainer.PSFTTrainer, name)

        def step(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            batches.append(1)
            return original(*args, **kwargs)

        monkeypatch.setattr(trainer.PSFTTrainer, name, step)
    flash = {"attn_implementation": "flash_attention_2"}
    varlen = run(config(tiny, tmp_path, **PACKED, **eval_data(tiny), **flash))
    model_config = varlen.model.config
    assert model_config._attn_implementation == attention.NAME
    _check_runs_agree(varlen, sdpa_packed)
    # Once for each micro-batch, though most are scored before they are trained on.
    assert len(computed) == len(batches) > 8


def test_packed_training_with_unpacked_evaluation(tiny: Path, tmp_path: Path) -> None:
    options = {**PACKED, "eval_sample_packing": False, "eval_batch_size": 4}
    options |= eval_data(tiny)
    flash = {"attn_implementation": "flash_attention_2"}
    varlen = run(config(tiny, tmp_path, **options, **flash))
    _check_runs_agree(varlen, run(config(tiny, tmp_path, **options)))


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "eager"])
def test_padded_runs_agree_with_sdpa(
    name: str, sdpa_unpacked: Any, tiny: Path, tmp_path: Path
) -> None:
    cfg = config(tiny, tmp_path, attn_implementation=name)
    _check_runs_agree(run(cfg), sdpa_unpacked)


@pytest.fixture(scope="module")
def sdpa_unpacked(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(config(tiny, tmp_path_factory.mktemp("sdpa")))


@pytest.mark.parametrize("name", ["flex_attention", "eager"])
def test_packed_runs_agree_with_sdpa(
    name: str, sdpa_packed: Any, tiny: Path, tmp_path: Path
) -> None:
    cfg = config(tiny, tmp_path, **PACKED, **eval_data(tiny), attn_implementation=name)
    _check_runs_agree(run(cfg), sdpa_packed)


@pytest.fixture(scope="module")
def sdpa_packed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("sdpa")
    return run(config(tiny, output, **PACKED, **eval_data(tiny)))


def _check_runs_agree(run: Any, expected: Any) -> None:
    # Eight steps in float32: sums in another order, multiplied by later steps.
    for name in ("psft/nll", "psft/entropy", "grad_norm", "psft/approx_kl"):
        assert column(run, name) == pytest.approx(
            column(expected, name), rel=1e-5, abs=1e-6
        )
    evals = [
        [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
        for trainer in (run, expected)
    ]
    assert evals[0] == pytest.approx(evals[1], rel=1e-6)


def test_attention_that_is_more_than_attention_is_refused_on_a_cpu(
    tiny: Path, tmp_path: Path
) -> None:
    options = {"attn_implementation": "flex_attention", "scaling_softmax": True}
    with pytest.raises(ValueError, match=r"scaling_softmax: True is part of flex_att"):
        run(config(tiny, tmp_path, **options))
