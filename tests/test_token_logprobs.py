"""Token log-probs out of a model's own forward equal those of its logits."""

import inspect
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from axolotl_psft.packing import IGNORE_INDEX
from axolotl_psft.token_logprobs import (
    LogitsTransform,
    TokenLogprobs,
    check_against_logits,
    install_logprobs_forward,
    token_logprobs,
    unwrap_peft,
)
from tests.host_waits import HostWaits

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    # Ten times the usual: logits of several nats, so that a scale or a cap shows.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3": {"tie_word_embeddings": True},
    "Qwen3 untied": {"tie_word_embeddings": False},
    "Qwen2": {},
    "Llama": {},
    "Mistral": {},
    "Gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Granite": {"logits_scaling": 2.0},
    "Cohere": {"logit_scale": 0.5},
    "Phi": {"num_key_value_heads": 4},  # its head has a bias
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
# float32: log-probs of a few nats through two summation orders.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def make(family: str = "Qwen3", cls: type | None = None, **overrides) -> Any:
    name = family.split()[0]
    config = getattr(transformers, f"{name}Config")(
        **{**COMMON, **FAMILIES[family], **overrides}
    )
    torch.manual_seed(0)
    model = (cls or transformers.AutoModelForCausalLM.from_config)(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases start at 0, which would hide them
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return model


def example(rows: int = 2, length: int = 9) -> tuple[Tensor, Tensor]:
    """Tokens, and targets with unsupervised positions."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    targets = tokens.clone()
    targets[:, :3] = IGNORE_INDEX
    targets[-1, 5] = IGNORE_INDEX
    return tokens, targets


def from_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Plain log-probs and entropies, at the tokens' own positions."""
    log_p = logits[:, :-1].float().log_softmax(-1)
    mask = targets[:, 1:] != IGNORE_INDEX
    index = targets[:, 1:].clamp(min=0)[..., None]
    logprobs = log_p.gather(-1, index).squeeze(-1) * mask
    entropy = -(log_p.exp() * log_p).sum(-1) * mask
    pad = nn.functional.pad
    return pad(logprobs, (1, 0)), pad(entropy, (1, 0))


def check(model: nn.Module, causal_lm: PreTrainedModel) -> TokenLogprobs:
    """Values and every gradient agree with the plain path through the logits."""
    tokens, targets = example()
    weights = torch.linspace(0.5, 2, tokens.numel()).view_as(tokens)

    model.zero_grad()
    expected, entropy = from_logits(model(input_ids=tokens).logits, targets)
    (expected * weights).sum().backward()
    plain = {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }

    install_logprobs_forward(causal_lm)
    model.zero_grad()
    output = model(input_ids=tokens, logprob_targets=targets)
    (output.logprobs * weights).sum().backward()
    ours = {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }

    assert isinstance(output, TokenLogprobs)
    assert output.logprobs.dtype == output.entropy.dtype == torch.float32
    torch.testing.assert_close(output.logprobs, expected, **CLOSE)
    torch.testing.assert_close(output.entropy, entropy, **CLOSE)
    assert torch.equal(output.mask, targets != IGNORE_INDEX)
    assert not output.entropy.requires_grad
    # Peaked on purpose: something is learnt from each, at different strength.
    assert expected[targets != IGNORE_INDEX].std() > 0.3
    assert ours.keys() == plain.keys() and ours
    for name, gradient in plain.items():
        # Sums of some hundred float32 terms of either sign.
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item()
        )
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_models_own_logits(family: str):
    model = make(family)
    check(model, model)
    tokens, _ = example()
    check_against_logits(model, tokens, low_precision=False)


def test_the_transform_is_read_from_the_config():
    def transform(family: str) -> LogitsTransform:
        return LogitsTransform.from_config(make(family).config)

    assert transform("Qwen3") == LogitsTransform(1.0, None)
    assert transform("Gemma2") == LogitsTransform(1.0, 3.0)
    assert transform("Granite") == LogitsTransform(0.5, None)
    assert transform("Cohere") == LogitsTransform(0.5, None)


def test_scale_comes_before_the_cap():
    logits = torch.tensor([8.0])
    capped = LogitsTransform(0.5, 2.0)(logits)
    torch.testing.assert_close(capped, 2 * torch.tanh(torch.tensor([2.0])))
    assert logits == 8.0


# ---- PEFT ----


def lora(family: str, **options: Any) -> Any:
    model = peft.get_peft_model(
        make(family),
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.0, **options),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at 0: the adapter would do nothing
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    "family, options",
    [
        ("Qwen3", {"target_modules": ["q_proj", "v_proj"]}),
        ("Qwen3 untied", {"target_modules": ["q_proj", "lm_head"]}),
        ("Gemma2", {"target_modules": ["q_proj", "lm_head"]}),
        ("Granite", {"target_modules": ["q_proj", "lm_head"]}),
        ("Cohere", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (
            "Qwen3 untied",
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        ),
    ],
)
def test_under_peft(family: str, options: dict[str, Any]):
    model = lora(family, **options)
    causal_lm = unwrap_peft(model)
    assert type(causal_lm).__name__ == f"{family.split()[0]}ForCausalLM"
    check(model, causal_lm)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    head = any("lm_head" in modules for modules in options.values())
    assert any("lm_head" in name for name in trained) == head


def test_a_model_without_peft_is_its_own_causal_lm():
    model = make()
    assert unwrap_peft(model) is model


# ---- What installing changes, and what not ----


def test_without_targets_the_model_is_unchanged():
    model = make()
    tokens, _ = example()
    before = model(input_ids=tokens, labels=tokens)
    signature = inspect.signature(model.forward)
    install_logprobs_forward(model)
    after = model(input_ids=tokens, labels=tokens)
    assert type(after) is type(before)
    assert torch.equal(after.logits, before.logits)
    assert after.loss == before.loss
    assert after.past_key_values is not None
    # The Trainer drops data columns that forward does not name.
    assert inspect.signature(model.forward) == signature
    assert isinstance(model.lm_head, nn.Linear)


def test_other_instances_are_unchanged():
    model, other = make(), make()
    install_logprobs_forward(model)
    tokens, targets = example()
    assert "forward" not in vars(other)
    # Qwen3 takes any keyword and ignores this one.
    assert hasattr(other(input_ids=tokens, logprob_targets=targets), "logits")


def test_installing_twice_is_installing_once():
    model = make()
    install_logprobs_forward(model)
    forward, head = model.forward, type(model.lm_head)
    install_logprobs_forward(model)
    assert model.forward is forward and type(model.lm_head) is head


def test_saving_and_loading_knows_nothing_of_it(tmp_path):
    model = make()
    install_logprobs_forward(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens, _ = example()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_under_accelerates_hooks():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    plain, hooked = make(), make()
    moved = []

    class Hook(AlignDevicesHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            moved.append(type(module).__name__)
            return super().pre_forward(module, *args, **kwargs)

    # As `device_map` over several devices puts them.
    add_hook_to_module(hooked, Hook(execution_device="cpu", io_same_device=True))
    add_hook_to_module(hooked.lm_head, Hook(execution_device="cpu"))
    tokens, targets = example()
    outputs = []
    for model in (plain, hooked):
        install_logprobs_forward(model)
        outputs.append(model(input_ids=tokens, logprob_targets=targets))
    assert torch.equal(outputs[0].logprobs, outputs[1].logprobs)
    assert moved == ["Qwen3ForCausalLM", "DenseHead"]
    assert torch.equal(plain(tokens).logits, hooked(tokens).logits)


def test_the_forward_step_gives_the_model_what_is_its():
    model = make()
    install_logprobs_forward(model)
    tokens, _ = example()
    labels = tokens.clone()
    labels[:, :3] = IGNORE_INDEX
    batch = {"input_ids": tokens, "labels": labels}
    output = token_logprobs(model, batch)
    again = token_logprobs(model, {**batch, "old_logprobs": output.logprobs})
    assert torch.equal(output.logprobs, again.logprobs)
    assert torch.equal(output.mask, labels != IGNORE_INDEX)


def test_log_probs_of_16_bits_are_refused():
    model = make()
    install_logprobs_forward(model)
    tokens, _ = example()

    def cast(module: Any, args: Any, output: TokenLogprobs) -> TokenLogprobs:
        return TokenLogprobs(output.logprobs.bfloat16(), output.entropy, output.mask)

    model.register_forward_hook(cast)
    with pytest.raises(TypeError, match=r"as torch\.bfloat16, not float32: Qwen3"):
        token_logprobs(model, {"input_ids": tokens, "labels": tokens})


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "lm_head"]}])
def test_the_host_does_not_wait_where_the_number_of_targets_is_known(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    from axolotl_psft import logprobs

    model = make("Qwen3 untied")
    if options:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
    install_logprobs_forward(unwrap_peft(model))
    # Rows without a gradient are left out on a CPU only, which waits for nobody.
    keep_all = lambda rows, grad, lse: (rows, grad[rows].to(lse.dtype), lse)  # noqa: E731
    monkeypatch.setattr(logprobs, "_moving_rows", keep_all)
    tokens, targets = example()
    num_active = int((targets[:, 1:] != IGNORE_INDEX).sum())

    def waits(**given: Any) -> int:
        with HostWaits() as mode:
            output = model(input_ids=tokens, **given)
            output[0].sum().backward()
        return mode.total

    # transformers looks once whether the row is packed.
    backbone = waits(use_cache=False)
    assert waits(logprob_targets=targets, num_active=num_active) == backbone
    assert waits(logprob_targets=targets) > backbone


@pytest.mark.parametrize("target_modules", [[], ["lm_head"]])
def test_without_entropy_the_logprobs_keep_their_bits(target_modules: list[str]):
    model = make("Qwen3 untied")
    if target_modules:  # a head that is more than a matrix
        model = lora("Qwen3 untied", target_modules=target_modules)
    install_logprobs_forward(unwrap_peft(model))
    tokens, targets = example()
    with torch.no_grad():
        whole = model(input_ids=tokens, logprob_targets=targets)
        bare = model(input_ids=tokens, logprob_targets=targets, with_entropy=False)
    assert torch.equal(bare.logprobs, whole.logprobs)
    assert whole.entropy.any()
    assert not bare.entropy.any()


def test_labels_are_ignored_and_nothing_is_cached():
    model = make()
    install_logprobs_forward(model)
    tokens, targets = example()
    output = token_logprobs(model, {"input_ids": tokens, "labels": targets})
    assert "loss" not in output and "past_key_values" not in output


@pytest.mark.parametrize("family", ["Qwen3", "Qwen3 untied"])
def test_nothing_supervised(family: str):
    model = make(family)
    if family == "Qwen3 untied":  # the generic path
        model = lora(family, target_modules=["lm_head"])
    install_logprobs_forward(unwrap_peft(model))
    tokens, targets = example()
    output = model(
        input_ids=tokens, logprob_targets=torch.full_like(targets, IGNORE_INDEX)
    )
    assert not output.mask.any()
    assert torch.equal(output.logprobs, torch.zeros(tokens.shape))
    output.logprobs.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_logits_of_unsupervised_rows_are_never_made():
    model = lora("Qwen3 untied", target_modules=["lm_head"])
    causal_lm = unwrap_peft(model)
    install_logprobs_forward(causal_lm)
    rows = []
    causal_lm.lm_head.register_forward_hook(
        lambda _, args, __: rows.append(len(args[0]))
    )
    tokens, targets = example()
    model(input_ids=tokens, logprob_targets=targets)
    assert rows == [int((targets != IGNORE_INDEX).sum())]


# ---- Packing ----


def test_a_packed_row_equals_its_samples():
    model = make()
    install_logprobs_forward(model)
    tokens, _ = example(rows=3, length=9)
    lengths = (9, 4, 6)
    samples = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    packed = torch.cat(samples)[None]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    targets = packed.masked_fill(position_ids == 0, IGNORE_INDEX)
    with torch.no_grad():
        output = model(
            input_ids=packed, position_ids=position_ids, logprob_targets=targets
        )
        separate = []
        for sample in samples:
            own = sample[None].clone()
            own[:, 0] = IGNORE_INDEX
            separate.append(model(input_ids=sample[None], logprob_targets=own))
    # float32 attention over another number of (masked) keys.
    close = {"rtol": 1e-5, "atol": 2e-6}
    for name in ("logprobs", "entropy"):
        expected = torch.cat([output[name] for output in separate], dim=1)
        torch.testing.assert_close(output[name], expected, **close)
    assert output.logprobs[0, 9] == 0 == output.logprobs[0, 13]


# ---- Refusals ----


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match=r"Qwen3Model has no output head.*ForCausalLM"):
        install_logprobs_forward(make(cls=transformers.Qwen3Model))


def moe(**overrides: Any) -> Any:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, **overrides}
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**{**COMMON, **experts})
    ).eval()


def test_a_load_balancing_loss_is_refused():
    with pytest.raises(ValueError, match="output_router_logits: false") as caught:
        install_logprobs_forward(moe(output_router_logits=True))
    assert "MixtralForCausalLM" in str(caught.value)


def test_experts_without_that_loss_are_fine():
    model = moe()
    check(model, model)


class Doubled(transformers.Qwen3ForCausalLM):
    """Does to its logits what no config says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


@pytest.mark.parametrize("low_precision", [False, True])
def test_an_unknown_transform_is_found(low_precision: bool):
    model = make(cls=Doubled)
    install_logprobs_forward(model)
    tokens, _ = example()
    with pytest.raises(ValueError, match="Doubled differ from its own logits by"):
        check_against_logits(model, tokens, low_precision=low_precision)


@pytest.mark.parametrize("family", ["Gemma2", "Granite", "Cohere"])
def test_half_precision_passes_the_check(family: str):
    model = make(family).bfloat16()
    install_logprobs_forward(model)
    tokens, _ = example()
    check_against_logits(model, tokens, low_precision=True)


def test_not_a_number_does_not_pass_the_check():
    model = make()
    install_logprobs_forward(model)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    tokens, _ = example()
    with pytest.raises(ValueError, match="nan nats"):
        check_against_logits(model, tokens, low_precision=False)


def test_a_row_of_one_token_has_nothing_to_check():
    model = make()
    install_logprobs_forward(model)
    check_against_logits(model, torch.tensor([[5]]), low_precision=False)
