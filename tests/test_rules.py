"""The table of rules: each row can act, and docs/rules.md is what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from axolotl_psft import rules
from tests.test_config import NOT_SPLIT, REFUSED

ZERO_2, ZERO_3 = ({"zero_optimization": {"stage": stage}} for stage in (2, 3))
KL = {"objective": "sft_kl"}

# Of each rule that test_config.py has no list of, a configuration that it is about.
EXAMPLES: list[tuple[str, dict[str, Any]]] = [
    ("is_multimodal", {"is_multimodal": True}),
    ("context_parallel.size", {"context_parallel": {"size": 2}}),
    ("streaming", {"psft": KL, "streaming": True}),
    ("pretraining_dataset", {"psft": KL, "pretraining_dataset": ["text"]}),
    ("attn_implementation", {"sample_packing": True}),
    ("attn_implementation", {"eval_sample_packing": True}),
    ("fp16", {"fp16": True}),
    ("optimizer", {"optimizer": "galore_adafactor_layerwise"}),
    ("optimizer", {"optimizer": "sgd", "relora": True}),
    ("optimizer", {"optimizer": "adafactor", "deepspeed": ZERO_2}),
    ("optimizer", {"optimizer": "ao_adamw_4bit", "deepspeed": ZERO_2}),
    ("optimizer", {"optimizer": "schedule_free_sgd", "deepspeed": ZERO_3}),
    ("peft_use_dora", {"peft_use_dora": True, "deepspeed": ZERO_3}),
    ("psft.sequence_parallel", {"psft": {"sequence_parallel": True}}),
    ("tensor_parallel_size", {"tensor_parallel_size": 2}),
    ("optimizer", {"optimizer": "lion_8bit", "tensor_parallel_size": 2}),
    *((key, {key: "value", "tensor_parallel_size": 2}) for key in NOT_SPLIT),
    *((key, {key: value}) for key, value in REFUSED.items()),
    ("psft.epsilon", {"psft": {**KL, "epsilon": 0.1}}),
    ("psft.epsilon_high", {"psft": {**KL, "epsilon_high": 0.1}}),
    ("psft.kl_coef", {"psft": {"kl_coef": 0.1}}),
    ("psft.refresh_steps", {"psft": {**KL, "refresh_steps": 2}}),
    ("psft.sft_warmup_steps", {"psft": {**KL, "sft_warmup_steps": 0}}),
    ("psft.kl_coef", {"psft": {**KL, "kl_coef": 0.0}}),
    ("psft.epsilon", {"psft": {"epsilon": 0.1, "epsilon_high": 0}}),
    ("psft.refresh_steps", {"psft": {"refresh_steps": 1}}),
    ("learning_rate", {"learning_rate": 1e-6, "bf16": True}),
    *((key, {key: 0.1}) for key in ("lora_dropout", "neftune_noise_alpha")),
    *((key, {"psft": KL, key: 0.1}) for key in ("lora_dropout", "neftune_noise_alpha")),
    ("optimizer", {"optimizer": "sgd", "fsdp_config": {"a": 1}}),
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def told(rule: rules.Rule, cfg: dict[str, Any]) -> set[str]:
    """The keys of a rule's messages about a configuration."""
    messages = rule.messages({"psft": {}, **cfg})
    return {message.split(":")[0] for message in messages}


def test_every_rule_acts(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: None)
    for rule in rules.RULES:
        keys = set(rule.setting.partition(": ")[0].split())
        acted = set().union(*(told(rule, cfg) for key, cfg in EXAMPLES if key in keys))
        assert acted == keys, rule
        assert told(rule, {}) == set() or rule.validated


def test_texts_are_whole() -> None:
    for rule in rules.RULES:
        for text in (rule.why, rule.remedy, rule.conflict):
            assert text and not text.endswith(".") and "  " not in text
        assert rule.remedy[0].isupper() and not rule.conflict[0].isupper()
        assert rule.since in ("0.1", "0.2", "Axolotl 0.21")


def test_the_page_is_written_from_the_table() -> None:
    page = Path(__file__).parents[1] / "docs" / "rules.md"
    command = "python -m axolotl_psft.rules > docs/rules.md"
    assert page.read_text(encoding="utf-8") == rules.page(), f"Run `{command}`."


def test_all_refusals_are_told_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        rules.refuse({"psft": {}, "rl": "dpo", "trainer_cls": "my.Trainer"})
    first, second = str(caught.value).splitlines()
    assert first.startswith("rl: dpo cannot be combined with a psft block: psft is su")
    assert second.endswith("psft brings its own. Remove it.")


@pytest.mark.parametrize(
    "change, refused",
    [
        ({}, True),
        ({"bf16": "auto"}, True),
        ({"fsdp_config": {"a": 1}}, True),
        ({"bf16": True}, False),
        ({"fp16": False}, False),
        ({"adapter": "lora"}, False),
        ({"deepspeed": ZERO_2}, False),
    ],
)
def test_full_fine_tuning_has_no_scaled_fp16_gradients(
    gpu: None, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], refused: bool
) -> None:
    cfg = {"psft": {}, "fp16": True, **change}
    if refused:
        with pytest.raises(ValueError, match=r"^fp16: true cannot .* Use bf16: true, "):
            rules.refuse(cfg)
    else:
        rules.refuse(cfg)
    # A CPU has no loss scaling.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rules.refuse(cfg)


def test_values_are_shown_as_a_yaml_has_them() -> None:
    (message,) = rules.warnings({"psft": {**KL, "kl_coef": 0.0}})
    assert message.startswith("psft.kl_coef: 0 does not hold the model near")
    (message,) = rules.warnings({"lora_dropout": 0.05, "psft": {}})
    assert message.startswith("lora_dropout: 0.05 adds noise")
    zero_1 = {"zero_optimization": {"stage": 1}}
    with pytest.raises(
        ValueError, match=r"^optimizer: adamw_torch_8bit cannot be comb"
    ):
        rules.refuse({"psft": {}, "optimizer": "adamw_torch_8bit", "deepspeed": zero_1})
    cfg = {"optimizer": "schedule_free_sgd", "deepspeed": json.dumps(ZERO_3)}
    rules.refuse({"psft": {}, **cfg})  # a file's name, and there is none
