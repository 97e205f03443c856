"""Bad input: an error with key, value and remedy, through Axolotl's own validation."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from axolotl_psft import config as psft_config
from axolotl_psft import rules
from axolotl_psft.config import PSFTConfig
from tests.tiny import config, load

NAN, INF = float("nan"), float("inf")
PAPER = "Use 8 (the paper's setting); 1 is plain SFT."
PPO = "Use 0.2 (PPO's usual setting)."
HIGH = "Use 0.28 (the paper's setting), or leave it out to use epsilon."
NONE = "Use 0 for none."
OBJECTIVE = "Use psft, sft, sft_kl, dft, asft, or the import path of your own."
WHICH = "psft.objective must be an objective, got"
COEF = "Use 0.5 (the paper's setting)."

BAD_VALUES = [
    # Out of range.
    ("epsilon", 0, f"psft.epsilon must be > 0, got 0. {PPO}"),
    ("epsilon", -0.2, f"psft.epsilon must be > 0, got -0.2. {PPO}"),
    ("epsilon", -INF, f"psft.epsilon must be > 0, got -inf. {PPO}"),
    ("epsilon_high", -0.1, f"psft.epsilon_high must be >= 0, got -0.1. {HIGH}"),
    ("refresh_steps", 0, f"psft.refresh_steps must be >= 1, got 0. {PAPER}"),
    ("refresh_steps", -8, f"psft.refresh_steps must be >= 1, got -8. {PAPER}"),
    ("sft_warmup_steps", -1, f"psft.sft_warmup_steps must be >= 0, got -1. {NONE}"),
    ("kl_coef", -0.5, f"psft.kl_coef must be >= 0 and finite, got -0.5. {COEF}"),
    ("kl_coef", INF, f"psft.kl_coef must be >= 0 and finite, got inf. {COEF}"),
    # Not a number, or not a whole one.
    ("kl_coef", NAN, f"psft.kl_coef must be a number, got nan. {COEF}"),
    ("kl_coef", "much", f"psft.kl_coef must be a number, got 'much'. {COEF}"),
    ("kl_coef", None, f"psft.kl_coef must be a number, got None. {COEF}"),
    ("kl_coef", True, f"psft.kl_coef must be a number, got True. {COEF}"),
    ("epsilon", NAN, f"psft.epsilon must be a number, got nan. {PPO}"),
    ("epsilon", "nan", f"psft.epsilon must be a number, got 'nan'. {PPO}"),
    ("epsilon", "wide", f"psft.epsilon must be a number, got 'wide'. {PPO}"),
    ("epsilon", None, f"psft.epsilon must be a number, got None. {PPO}"),
    ("epsilon", True, f"psft.epsilon must be a number, got True. {PPO}"),
    ("epsilon", [0.2], f"psft.epsilon must be a number, got [0.2]. {PPO}"),
    ("epsilon_high", NAN, f"psft.epsilon_high must be a number, got nan. {HIGH}"),
    ("epsilon_high", "x", f"psft.epsilon_high must be a number, got 'x'. {HIGH}"),
    ("epsilon_high", True, f"psft.epsilon_high must be a number, got True. {HIGH}"),
    *(
        (key, value, f"psft.{key} must be a whole number, got {value!r}. {remedy}")
        for key, remedy in (("refresh_steps", PAPER), ("sft_warmup_steps", NONE))
        for value in ("abc", "1.5", 1.5, True, False, None, NAN, INF, [1], {"a": 1})
    ),
    # Not a choice.
    ("objective", "dpo", f"{WHICH} 'dpo'. {OBJECTIVE}"),
    ("objective", "pssft", f"{WHICH} 'pssft'. Did you mean psft? {OBJECTIVE}"),
    ("objective", "no.such", f"{WHICH} 'no.such'. It cannot be imported (No module na"),
    ("objective", "math.no", f"{WHICH} 'math.no'. It cannot be imported (module 'mat"),
    ("objective", "math.pi", f"{WHICH} 'math.pi'. It is neither a function nor an ax"),
    ("objective", None, f"{WHICH} None. {OBJECTIVE}"),
    ("objective", [], f"{WHICH} []. {OBJECTIVE}"),
]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the configuration warns of; nothing was warned of before."""
    given: list[str] = []
    monkeypatch.setattr(psft_config.LOG, "warning", given.append)
    monkeypatch.setattr(psft_config, "_warned", set())
    return given


@pytest.fixture(autouse=True)
def _quiet():
    # load_cfg prints a configuration of 200 lines each time.
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


# ---- The block ----


@pytest.mark.parametrize("key, value, message", BAD_VALUES)
def test_bad_value(key: str, value: Any, message: str):
    with pytest.raises(ValueError) as caught:
        PSFTConfig(**{key: value})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "key, value, message",
    [
        BAD_VALUES[0],
        ("refresh_steps", "abc", f"psft.refresh_steps must be a whole number, {PAPER}"),
        ("refresh_steps", 1.5, f"psft.refresh_steps must be a whole number, {PAPER}"),
        ("refresh_steps", True, f"psft.refresh_steps must be a whole number, {PAPER}"),
        ("epsilon", NAN, f"psft.epsilon must be a number, got nan. {PPO}"),
        ("refresh_step", 4, "psft.refresh_step is not a setting, got 4. Did you mean"),
    ],
)
def test_the_message_survives_axolotls_validation(
    tiny: Path, tmp_path: Path, key: str, value: Any, message: str
):
    with pytest.raises(ValueError) as caught:
        load(config(tiny, tmp_path, psft={key: value}))
    # Pydantic puts the message, whole, on one line of its own.
    (line,) = (line for line in str(caught.value).splitlines() if "psft." in line)
    got = f"got {value!r}. "
    expected = message if "got" in message else message.replace("Use 8", f"{got}Use 8")
    assert line.strip().startswith(f"Value error, {expected}")


@pytest.mark.parametrize("block", ["abc", [1], True, False, 0, ""])
def test_not_a_block(tiny: Path, tmp_path: Path, block: Any):
    with pytest.raises(ValueError, match="psft must be a block of settings") as caught:
        load(config(tiny, tmp_path, psft=block))
    assert f"got {block!r}. Write `psft: {{}}` to use the defaults" in str(caught.value)


@pytest.mark.parametrize(
    "key, hint",
    [
        ("refresh_step", "Did you mean `refresh_steps`? "),
        ("eps_high", "Did you mean `epsilon_high`? "),
        ("warmup_steps", "Did you mean `sft_warmup_steps`? "),
        ("zzz", ""),
        (3, ""),
    ],
)
def test_unknown_key(key: Any, hint: str):
    with pytest.raises(ValueError) as caught:
        PSFTConfig.model_validate({key: 4})
    expected = (
        f"psft.{key} is not a setting, got 4. {hint}Known settings: epsilon, "
        "epsilon_high, refresh_steps, sft_warmup_steps, sequence_parallel, objective, "
        "kl_coef, check_data_files."
    )
    assert expected in str(caught.value)


def test_defaults():
    assert PSFTConfig().model_dump() == {
        "epsilon": 0.2,
        "epsilon_high": None,
        "refresh_steps": 8,
        "sft_warmup_steps": 0,
        "sequence_parallel": False,
        "objective": "psft",
        "kl_coef": 0.5,
        "check_data_files": True,
    }


def test_values_at_the_edge_are_good():
    settings = PSFTConfig(
        epsilon=1e-9, epsilon_high=0, refresh_steps=1, sft_warmup_steps=0, kl_coef=0
    )
    assert settings.epsilon_high == 0 and settings.refresh_steps == 1
    assert settings.kl_coef == 0
    assert PSFTConfig(epsilon_high=None).epsilon_high is None


def test_numbers_that_yaml_takes_for_text():
    block = yaml.safe_load(
        "{epsilon: 2e-1, epsilon_high: '0.3', refresh_steps: 1e1, kl_coef: 1e-1}"
    )
    assert block["epsilon"] == "2e-1" and block["refresh_steps"] == "1e1"
    settings = PSFTConfig(**block, sft_warmup_steps=2.0)
    numbers = {"objective", "sequence_parallel", "check_data_files"}
    assert settings.model_dump(exclude=numbers) == {
        "epsilon": 0.2,
        "epsilon_high": 0.3,
        "refresh_steps": 10,
        "sft_warmup_steps": 2,
        "kl_coef": 0.1,
    }
    assert isinstance(settings.refresh_steps, int)
    assert isinstance(settings.sft_warmup_steps, int)


def test_axolotl_keeps_the_block(tiny: Path, tmp_path: Path):
    loaded = load(config(tiny, tmp_path, psft={"refresh_steps": "3"}))
    assert PSFTConfig(**loaded.psft) == PSFTConfig(refresh_steps=3)
    assert dict(loaded.psft)["objective"] == "psft"


@pytest.mark.parametrize("block", [None, "null"])
def test_without_a_block_the_key_is_absent(tiny: Path, tmp_path: Path, block: Any):
    cfg = config(tiny, tmp_path, psft=None)
    if block:
        cfg["psft"] = None
    # A combination that a block would refuse.
    assert load({**cfg, "use_eaft": True}).psft is None


# ---- The rest of the YAML ----

LIGER = "axolotl.integrations.liger.LigerPlugin"
REFUSED = {
    "rl": "dpo",
    "reward_model": True,
    "process_reward_model": True,
    "use_eaft": True,
    "use_dft": True,
    "chunked_cross_entropy": True,
    "cut_cross_entropy": True,
    "liger_cross_entropy": True,
    "liger_fused_linear_cross_entropy": True,
    "liger_use_token_scaling": True,
    "kd_trainer": True,
    "orpo_alpha": 0.1,
    "label_smoothing_factor": 0.1,
    "diffusion": {"noise_schedule": "linear"},
    "diffusion_lm": {"from_causal_lm": True},
    "diffusion_decision": {"decision": {}},
    "context_parallel": {"size": 2},
    "context_parallel_size": 2,
    "sequence_parallel_degree": 2,
    "expert_parallel_size": 2,
    "trainer_cls": "my.Trainer",
    "processor_type": "AutoProcessor",
}
REMEDIES = ("Remove", "Set it to 1", "Use ")


@pytest.mark.parametrize("key", REFUSED)
def test_refused_combination(tiny: Path, tmp_path: Path, key: str):
    value = REFUSED[key]
    cfg = config(tiny, tmp_path, **{key: value})
    if key.startswith("liger"):
        cfg["plugins"] = ["axolotl_psft", LIGER]
    with pytest.raises(ValueError) as caught:
        load(cfg)
    message = str(caught.value)
    if "parallel" in key and "expert" not in key:
        key, value = "context_parallel_size", 2  # which Axolotl makes of the others
    start = f"Value error, {key}: {value} cannot be combined with a psft block: "
    assert start in message
    assert any(remedy in message.split(start)[1] for remedy in REMEDIES)


@pytest.mark.parametrize("key", REFUSED)
def test_the_same_option_turned_off_is_fine(key: str):
    for off in (None, False, 0, ""):
        rules.refuse({"psft": {}, key: off})
    if isinstance(REFUSED[key], int) and REFUSED[key] == 2:
        for one in (1, "1"):
            rules.refuse({"psft": {}, key: one})
        with pytest.raises(ValueError, match=f"{key}: 4 cannot be combined"):
            rules.refuse({"psft": {}, key: "4"})


def test_packed_samples_that_would_see_each_other_are_refused(
    tiny: Path, tmp_path: Path
):
    packed = {"sample_packing": True, "micro_batch_size": 1}
    cfg = config(tiny, tmp_path, **packed, attn_implementation=None)
    with pytest.raises(ValueError) as caught:
        load(cfg)
    assert (
        "attn_implementation: not set cannot be combined with sample_packing: True and "
        "a psft block: the samples of a packed row would see each other. Use flash_"
    ) in str(caught.value)
    for key in ("sample_packing", "eval_sample_packing"):
        with pytest.raises(ValueError, match=f"fp8 cannot be combined with {key}: Tru"):
            rules.refuse({key: True, "attn_implementation": "fp8"}, validated=True)
    # By older keys, too; without packing, or without the block, all is well.
    load({**cfg, "sdp_attention": True})
    load({**cfg, "sample_packing": False})
    load(config(tiny, tmp_path, **packed, attn_implementation=None, psft=None))


def test_multimodal_is_refused_however_it_was_found():
    with pytest.raises(ValueError, match="multimodal models are not supported yet"):
        rules.refuse({"psft": {}, "is_multimodal": True})


# ---- Tensor parallelism ----


def test_tensor_parallel_size_is_moved_out_of_axolotls_sight(
    tiny: Path, tmp_path: Path
):
    psft = {"sequence_parallel": True}
    cfg = load(config(tiny, tmp_path, tensor_parallel_size=2, psft=psft))
    assert cfg.psft_tensor_parallel_size == 2
    # Axolotl would start its own where it sees more than 1.
    assert cfg.tensor_parallel_size == 1
    assert cfg.psft["sequence_parallel"] is True
    dense = load(config(tiny, tmp_path, tensor_parallel_size=1))
    assert not dense.psft_tensor_parallel_size


NOT_SPLIT = [
    *("adapter", "load_in_4bit", "load_in_8bit", "gptq", "qat", "fsdp", "fsdp_config"),
    *("deepspeed", "fp16", "float16", "activation_offloading", "layer_offloading"),
    *("torch_compile", "fp32_norms", "fix_untrained_tokens", "reinit_weights"),
    *("embedding_lr", "embedding_lr_scale", "lr_groups", "auto_find_batch_size"),
    *("gpu_memory_limit", "max_memory"),
]


@pytest.mark.parametrize("key", NOT_SPLIT)
def test_what_tensor_parallelism_excludes(key: str):
    block = {"psft": {}, key: "value", "optimizer": "adamw_torch"}
    rules.refuse(block)
    message = f"{key}: value cannot be combined with tensor_parallel_size: 2: "
    with pytest.raises(ValueError, match=message) as caught:
        rules.refuse({**block, "tensor_parallel_size": 2})
    assert any(word in str(caught.value) for word in ("Remove", "Set it", "Use "))
    # Also where an earlier validation has moved it.
    with pytest.raises(ValueError, match=message):
        rules.refuse({**block, "psft_tensor_parallel_size": 2})


def test_optimizers_of_tensor_parallelism():
    block = {"psft": {}, "tensor_parallel_size": 2}
    for name in (None, "adamw_torch", "adamw_torch_fused", "sgd"):
        rules.refuse({**block, "optimizer": name})
    with pytest.raises(ValueError, match=r"optimizer: lion cannot .* adamw_torch, "):
        rules.refuse({**block, "optimizer": "lion"})


@pytest.mark.parametrize("value", [-2, 1.5, "two", [2]])
def test_bad_tensor_parallel_size(value: Any):
    with pytest.raises(ValueError, match="tensor_parallel_size must be a whole number"):
        rules.refuse({"psft": {}, "tensor_parallel_size": value})


def test_sequence_parallel_needs_tensor_parallel():
    with pytest.raises(ValueError, match=r"psft.sequence_parallel: true splits work"):
        rules.refuse({"psft": {"sequence_parallel": True}})
    with pytest.raises(ValueError, match="must be true or false, got 'yes'"):
        PSFTConfig(sequence_parallel="yes")


SPLITTABLE = {
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "base_model_tp_plan": {"layers.*.mlp.up_proj": "colwise"},
}


@pytest.mark.parametrize(
    "change, tp_size, message",
    [
        ({}, 8, "does not divide num_key_value_heads: 4; use a tensor_parallel_size"),
        ({"num_attention_heads": 6}, 4, "does not divide num_attention_heads: 6"),
        ({"intermediate_size": 66}, 4, "does not divide intermediate_size: 66"),
        ({"vocab_size": 101}, 4, "does not divide vocab_size: 101; pad the checkpoint"),
        ({"base_model_tp_plan": None}, 2, "no base_model_tp_plan"),
        (
            {"base_model_tp_plan": {"layers.*.mlp.experts": "moe_tp_experts"}},
            2,
            "splits layers.*.mlp.experts as 'moe_tp_experts' (mixture of experts",
        ),
        ({"text_config": {"a": 1}}, 2, "multimodal models are not supported"),
    ],
)
def test_models_that_cannot_be_split(
    change: dict[str, Any], tp_size: int, message: str
):
    from axolotl_psft.megatron.plan import check_model

    check_model(SimpleNamespace(**SPLITTABLE), 4)
    with pytest.raises(ValueError) as caught:
        check_model(SimpleNamespace(**{**SPLITTABLE, **change}), tp_size)
    start = f"tensor_parallel_size: {tp_size} with a llama model"
    assert str(caught.value).startswith(start)
    assert message in str(caught.value)


@pytest.mark.parametrize("tp_size, world_size, more", [(4, 2, 4), (2, 3, 4), (8, 1, 8)])
def test_processes_that_do_not_fit(tp_size: int, world_size: int, more: int):
    from axolotl_psft.megatron.groups import check_world_size

    check_world_size(tp_size, 2 * tp_size)
    with pytest.raises(ValueError, match=f"Launch {more}: `accelerate launch"):
        check_world_size(tp_size, world_size)


# ---- Settings without effect ----

WARNED = [
    (
        {"psft": {"epsilon": 0.1, "epsilon_high": 0.28}},
        ["psft.epsilon: 0.1 has no effect: psft.epsilon_high: 0.28 sets the upper"],
    ),
    (
        {"psft": {"refresh_steps": 1}},
        ["psft.refresh_steps: 1 is plain SFT: the ratio is always 1"],
    ),
    (
        {"psft": {"objective": "sft", "refresh_steps": 1, "epsilon": 0.1}},
        [
            "psft.epsilon: 0.1 has no effect with psft.objective: sft",
            "psft.refresh_steps: 1 has no effect with psft.objective: sft",
        ],
    ),
    (
        {"psft": {"kl_coef": 0.1}},
        ["psft.kl_coef: 0.1 has no effect with psft.objective: psft"],
    ),
    (
        {"psft": {"objective": "sft", "kl_coef": 0.5}},
        ["psft.kl_coef: 0.5 has no effect with psft.objective: sft"],
    ),
    (
        {
            "psft": {
                "objective": "sft_kl",
                "epsilon": 0.1,
                "epsilon_high": 0.28,
                "refresh_steps": 1,
                "sft_warmup_steps": 4,
            }
        },
        [
            f"psft.{setting} has no effect with psft.objective: sft_kl"
            for setting in (
                *("epsilon: 0.1", "epsilon_high: 0.28"),
                *("refresh_steps: 1", "sft_warmup_steps: 4"),
            )
        ],
    ),
    (
        {"psft": {"objective": "sft_kl", "kl_coef": 0}},
        ["psft.kl_coef: 0 does not hold the model near the initial policy: the dis"],
    ),
    (
        {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.05}
        | {"lora_target_linear": True},
        ["lora_dropout: 0.05 adds noise to psft's ratio"],
    ),
    (
        {"neftune_noise_alpha": 5.0},
        ["neftune_noise_alpha: 5.0 adds noise to psft's ratio"],
    ),
]


@pytest.mark.parametrize("overrides, expected", WARNED)
def test_warned_once_a_process(
    tiny: Path, tmp_path: Path, warnings: list[str], overrides, expected
):
    for _ in range(2):
        load(config(tiny, tmp_path, **overrides))
    assert len(warnings) == len(expected)
    for given, start in zip(warnings, expected, strict=True):
        assert given.startswith(start)


def test_another_value_is_another_warning(warnings: list[str]):
    for value in (0.1, 0.3, 0.1):
        psft_config.PSFTArgs(psft={"epsilon": value, "epsilon_high": 0.2})
    assert [text[:17] for text in warnings] == [
        "psft.epsilon: 0.1",
        "psft.epsilon: 0.3",
    ]


@pytest.mark.parametrize(
    "psft",
    [
        {},
        {"epsilon": 0.1},
        {"epsilon_high": 0.28},
        {"refresh_steps": 2},
        {"objective": "sft"},
        {"objective": "psft", "sft_warmup_steps": 3},
        {"objective": "sft_kl"},
        {"objective": "sft_kl", "kl_coef": 0.1},
    ],
)
def test_no_warning_for_nothing(tiny, tmp_path, warnings: list[str], psft):
    load(config(tiny, tmp_path, psft=psft))
    assert warnings == []


def test_no_warning_without_a_block(warnings: list[str]):
    psft_config.PSFTArgs.model_validate({"psft": None})
    assert warnings == []


NOISY = {"lora_dropout": 0.05, "neftune_noise_alpha": 5.0}


@pytest.mark.parametrize(
    "objective, starts",
    [
        (
            "psft",
            [
                "lora_dropout: 0.05 adds noise to psft's ratio: old log-probs",
                "neftune_noise_alpha: 5.0 adds noise to psft's ratio: old log-probs",
            ],
        ),
        # Nothing is scored.
        ("sft", []),
        ("dft", []),
        (
            "asft",
            [
                "lora_dropout: 0.05 adds noise to asft's penalty: the initial policy",
                "neftune_noise_alpha: 5.0 adds noise to asft's penalty: the initial",
            ],
        ),
        (
            "sft_kl",
            [
                "lora_dropout: 0.05 adds noise to sft_kl's penalty: the initial policy",
                "neftune_noise_alpha: 5.0 adds noise to sft_kl's penalty: the initial",
            ],
        ),
    ],
)
def test_warnings_are_of_what_the_objective_computes(objective: str, starts: list[str]):
    cfg = {"psft": {"objective": objective}, **NOISY}
    given = rules.warnings(cfg)
    for text, start in zip(given, starts, strict=True):
        assert text.startswith(start)


@pytest.mark.parametrize("optimizer", ["sgd", "schedule_free_adamw"])
def test_fsdp_does_not_resume_every_optimizer(optimizer: str):
    cfg = {"fsdp_config": {"a": 1}, "fsdp_version": 2, "optimizer": optimizer}
    (warning,) = rules.warnings(cfg)
    assert warning.startswith(f"optimizer: {optimizer} in FSDP: this run cannot be res")
    assert rules.warnings({**cfg, "optimizer": "adamw_torch"}) == []
    assert rules.warnings({**cfg, "fsdp_config": None}) == []


# ---- Optimizers, adapters and data; tests/matrix.py has the rest ----


def zero(stage: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


@pytest.mark.parametrize("written", [dict, json.dumps])
def test_zero_stage_of_a_block_or_a_file(tmp_path: Path, written: Any):
    deepspeed = written(zero(3))
    if isinstance(deepspeed, str):
        (tmp_path / "zero3.json").write_text(deepspeed)
        deepspeed = str(tmp_path / "zero3.json")
    cfg = {"psft": {}, "deepspeed": deepspeed, "optimizer": "schedule_free_sgd"}
    with pytest.raises(ValueError, match=r"with DeepSpeed's ZeRO-3: .* Use ZeRO-2"):
        rules.refuse(cfg)


@pytest.mark.parametrize(
    "deepspeed", [None, {}, zero(2), zero(None), {"zero_optimization": None}, "no.json"]
)
def test_without_zero_3_schedule_free_is_fine(deepspeed: Any):
    cfg = {"psft": {}, "deepspeed": deepspeed, "optimizer": "schedule_free_adamw"}
    rules.refuse({**cfg, "peft_use_dora": True})


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}])
def test_zero_3_may_recompute_frozen_weights(kwargs: Any):
    cfg = {"psft": {}, "deepspeed": zero(3), "adapter": "lora"}
    cfg |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    rules.refuse(cfg)


@pytest.mark.parametrize("stage, refused", [(1, True), (2, True), (3, False)])
def test_zero_cuts_a_state_in_blocks(stage: int, refused: bool):
    cfg = {"psft": {}, "deepspeed": zero(stage), "optimizer": "ao_adamw_fp8"}
    match = f"with DeepSpeed's ZeRO-{stage}: .* Use adamw_bnb_8bit"
    with pytest.raises(ValueError, match=match) if refused else nullcontext():
        rules.refuse(cfg)


@pytest.mark.parametrize("key", ["streaming", "pretraining_dataset"])
def test_a_stream_has_no_initial_policy(key: str):
    cfg = {"psft": {"objective": "sft_kl"}, key: ["text"]}
    with pytest.raises(ValueError, match=rf"{key}: .* with psft.objective: sft_kl"):
        rules.refuse(cfg)
    rules.refuse({**cfg, "psft": {}})


@pytest.mark.parametrize(
    "overrides, warned",
    [
        ({}, True),
        ({"learning_rate": "1e-6"}, True),
        ({"bf16": False, "tf32": True}, False),
        ({"learning_rate": 2e-5}, False),
        ({"learning_rate": None}, False),
        ({"adapter": "lora"}, False),
        ({"tensor_parallel_size": 2}, False),
        ({"psft_tensor_parallel_size": 2}, False),
    ],
)
def test_updates_that_bf16_weights_round_away(overrides: Any, warned: bool):
    cfg = {"bf16": True, "learning_rate": 1e-6, **overrides}
    given = rules.warnings(cfg)
    assert bool(given) == warned
    if warned:
        lr = cfg["learning_rate"]
        assert given[0].startswith(f"learning_rate: {lr} with bf16: True: Axolotl")
