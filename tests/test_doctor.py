"""The doctor's page: what it says of a YAML is what the run does, or what is wrong."""

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from axolotl.cli.plugins import ENTRY_POINT_GROUP, _import_command
from axolotl.utils import tee
from axolotl.utils.dict import DictDefault
from setuptools.config.setupcfg import read_configuration

from axolotl_psft.config import PSFTConfig
from axolotl_psft.doctor import memory
from axolotl_psft.doctor.command import doctor
from axolotl_psft.doctor.page import Page, Steps, _clip
from tests.tiny import PROMPT, config, run, write_model, write_rows

ROOT = Path(__file__).parents[1]


def examined(
    capsys: pytest.CaptureFixture[str], folder: Path, cfg: Any, *options: str
) -> tuple[int, str]:
    """Exit status and page of the command, the page without its line breaks."""
    path = folder / "config.yaml"
    path.write_text(cfg if isinstance(cfg, str) else yaml.safe_dump(cfg))
    with pytest.raises(SystemExit) as exit_:
        doctor([str(path), *options])
    return int(exit_.value.code or 0), " ".join(capsys.readouterr().out.split())


def test_it_is_a_command_of_axolotls() -> None:
    lines = read_configuration(ROOT / "setup.cfg")["options"]["entry_points"]
    commands = dict(line.split(" = ") for line in lines[ENTRY_POINT_GROUP])
    assert commands.keys() == {"psft-doctor", "psft-compare"}
    for name, target in commands.items():
        command = EntryPoint(name, target, ENTRY_POINT_GROUP).load()
        assert isinstance(command, click.Command) and _import_command(target) is command
        assert command.get_short_help_str(120)


def test_help_is_about_this_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        doctor(["--help"])
    page = capsys.readouterr().out
    assert "Exit status" in page and "--num-processes" in page
    assert "--learning-rate " in page and "--lora-r" not in page


@pytest.mark.parametrize("packed", [False, True])
def test_its_numbers_are_the_runs(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: bool
) -> None:
    cfg = config(
        tiny,
        tmp_path,
        **{"sample_packing": packed, "micro_batch_size": 1 if packed else 4},
        **{"gradient_accumulation_steps": 1 if packed else 5},
        **{"max_steps": None, "num_epochs": 2, "learning_rate": 1e-3},
    )
    status, page = examined(capsys, tmp_path, cfg)
    assert status == 0 and page.endswith("Nothing wrong.")
    trainer = run(cfg)
    samples, num_steps = trainer.train_dataset, trainer.state.global_step
    supervised = sum(label != -100 for row in samples["labels"] for label in row)
    tokens = sum(map(len, samples["input_ids"]))
    assert (
        f"samples {len(samples)} an epoch, {supervised} supervised tokens of {tokens} "
    ) in page
    or_so = " or so" if packed else ""
    assert f"steps {num_steps // 2} an epoch{or_so}, {num_steps} in all;" in page
    num_windows = -(-num_steps // 2 // 4)
    assert f"windows {num_windows} an epoch, of at most 4 steps" in page
    assert "clip can act" in page and "scoring about 25% of a step" in page


def test_nothing_of_the_run_is_touched(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As in a process of its own, which has no log yet.
    monkeypatch.setattr(tee, "_log_path", None)
    log = tmp_path / "run" / "debug.log"
    log.parent.mkdir()
    log.write_text("of the run before")
    examined(capsys, tmp_path, config(tiny, tmp_path))
    assert [*log.parent.iterdir()] == [log] and log.read_text() == "of the run before"


def test_keys_are_overridden_and_ranks_counted(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--num-processes", "3", "--micro-batch-size", "2", "--max-steps", "7")
    _, page = examined(capsys, tmp_path, config(tiny, tmp_path), *options)
    assert "steps 16 an epoch, 7 in all; global batch: 6" in page
    assert "on each of 3 GPU(s)" in page


def test_all_refusals_and_warnings_are_shown(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"use_eaft": True, "trainer_cls": "my.Trainer"}
    status, page = examined(capsys, tmp_path, config(tiny, tmp_path, **bad))
    assert status == 1 and page.endswith("2 wrong.")
    assert "WRONG use_eaft: True cannot be combined with a psft block" in page
    assert "WRONG trainer_cls: my.Trainer cannot be combined with a psft" in page

    # What Axolotl refuses, and pydantic, does not hide psft's rules.
    bad = {"psft": {"refresh_steps": 0}, "datasets": None}
    status, page = examined(capsys, tmp_path, config(tiny, tmp_path, **bad))
    assert status == 1 and "WRONG either datasets or pretraining_dataset" in page
    assert "WRONG psft.refresh_steps must be >= 1, got 0. Use 8" in page
    bad = {"micro_batch_size": "two"}
    _, page = examined(capsys, tmp_path, config(tiny, tmp_path, **bad))
    assert "WRONG micro_batch_size: Input should be a valid integer" in page

    noisy = {"neftune_noise_alpha": 5.0, "psft": {"epsilon": 0.1, "epsilon_high": 0.2}}
    status, page = examined(capsys, tmp_path, config(tiny, tmp_path, **noisy))
    assert status == 0
    assert "warning psft.epsilon: 0.1 has no effect" in page
    assert "warning neftune_noise_alpha: 5.0 adds noise to psft's ratio" in page


@pytest.mark.parametrize(
    "text, message",
    [
        ("base_model: x", "WRONG psft: no such block: plain SFT. Write `psft: {}`."),
        ("[", "WRONG while parsing a flow node"),
        ("", "WRONG psft: no such block"),
    ],
)
def test_a_yaml_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    status, page = examined(capsys, tmp_path, text)
    assert status == 1 and message in page and page.endswith("1 wrong.")


def test_bad_rows_are_named(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = {"instruction": "w1", "output": "w2"}, {"output": 3}
    entries = [
        {"path": str(write_rows(tmp_path / name, [good, bad])), "type": PROMPT}
        for name in ("a.jsonl", "b.jsonl")
    ]
    cfg = config(tiny, tmp_path, datasets=entries)
    status, page = examined(capsys, tmp_path, cfg)
    assert status == 1 and page.endswith("2 wrong.")
    for name in ("a.jsonl", "b.jsonl"):
        assert f"{name}:2: `instruction` is missing or null" in page
    # Nothing is loaded that cannot be.
    assert "samples" not in page and "memory" in page


def test_data_without_supervision_are_wrong(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = [{"messages": [{"role": "user", "content": f"w{i} w2"}]} for i in range(16)]
    path = write_rows(tmp_path / "chat.jsonl", chat)
    entry = {"path": str(path), "type": "chat_template"}
    cfg = config(tiny, tmp_path, datasets=[entry], chat_template="chatml")
    status, page = examined(capsys, tmp_path, cfg)
    assert status == 1 and "no supervised token to train on" in page


def test_what_is_not_here_is_said(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = [{"path": "nobody/no-such-data", "type": "alpaca"}]
    status, page = examined(capsys, tmp_path, config(tiny, tmp_path, datasets=hub))
    assert status == 0 and "samples the data cannot be loaded" in page
    assert "memory an estimate" in page and "scoring about 25% of a step" in page
    cfg = config(tiny, tmp_path, base_model="nobody/no-such-model")
    status, page = examined(capsys, tmp_path, cfg)
    assert status == 0 and "model not here, nor what depends on it" in page
    assert "data 96 rows in local files" in page
    # A file that is here and no data is wrong.
    broken = [{"path": str(tiny / "train.jsonl"), "type": "no_such_type"}]
    status, page = examined(capsys, tmp_path, config(tiny, tmp_path, datasets=broken))
    assert status == 1 and "WRONG the data cannot be loaded" in page


@pytest.mark.parametrize(
    "psft, steps, wrong, messages",
    [
        (
            {},
            (24, 48),
            False,
            ["windows 6 an epoch, of at most 4 steps", "about 25% of"],
        ),
        (
            {"sft_warmup_steps": 46},
            (24, 48),
            False,
            ["all but the first of a window's"],
        ),
        ({"sft_warmup_steps": 47}, (24, 48), True, ["sft_warmup_steps: 47 leaves no"]),
        (
            {},
            (3, 48),
            False,
            ["windows 1 an epoch, of at most 3 steps", "about 22% of"],
        ),
        ({}, (1, 48), True, ["ends with the epoch, which has one step", "about 0% of"]),
        ({}, None, False, ["clip can act in all but the first of a window's 4 steps"]),
        ({"refresh_steps": 1}, None, True, ["psft.refresh_steps: 1 refreshes it each"]),
        (
            {"objective": "dft"},
            (1, 1),
            False,
            ["clip psft.objective: dft has none, and"],
        ),
        (
            {"objective": "asft"},
            (1, 1),
            False,
            ["scoring every sample once: about 1/3"],
        ),
    ],
)
def test_whether_the_clip_can_act(
    capsys: pytest.CaptureFixture[str],
    psft: dict[str, Any],
    steps: tuple[int, int] | None,
    wrong: bool,
    messages: list[str],
) -> None:
    block = PSFTConfig(**{"refresh_steps": 4, **psft}).model_dump()
    sizes = {"gradient_accumulation_steps": 2, "micro_batch_size": 3, "sequence_len": 5}
    page = Page()
    _clip(page, DictDefault({"psft": block, **sizes}), steps and Steps(*steps))
    text = " ".join(capsys.readouterr().out.split())
    assert page.num_wrong == wrong and ("WRONG the clip cannot act" in text) == wrong
    assert all(message in text for message in messages)
    if "refresh_steps" not in psft and steps == (24, 48):
        assert "old log-probs take at most 480 bytes" in text


# ---- Memory ----

WEIGHTS = 2 * 2**28  # an embedding and an untied head of as many weights
ADAMW = {"optimizer": "adamw_torch", "micro_batch_size": 1, "sequence_len": 64}


@pytest.mark.parametrize(
    "overrides, num_gpus, expected",
    [
        # GiB of optimizer, gradients, weights; half a gibi of weights.
        ({}, 1, (4, 2, 2)),
        ({"bf16": True}, 4, (2, 1, 1)),
        ({"bf16": True, "optimizer": "adamw_torch_8bit"}, 1, (1, 1, 1)),
        ({"optimizer": "sgd"}, 1, (0, 2, 2)),
        ({"fsdp_config": {"a": 1}}, 4, (1, 0.5, 0.5)),
        ({"bf16": True, "deepspeed": 1}, 4, (1.5, 1, 1)),
        ({"bf16": True, "deepspeed": 2}, 4, (1.5, 0.25, 1)),
        ({"bf16": True, "deepspeed": 3}, 4, (1.5, 0.25, 0.25)),
        ({"bf16": True, "psft_tensor_parallel_size": 2}, 4, (1.5, 1, 0.5)),
        ({"adapter": "lora", "bf16": True}, 1, (0, 0, 1)),
        ({"adapter": "qlora", "load_in_4bit": True, "bf16": True}, 1, (0, 0, 0.25)),
    ],
)
def test_memory_is_counted(
    overrides: dict[str, Any], num_gpus: int, expected: tuple[float, ...]
) -> None:
    if stage := overrides.get("deepspeed"):
        overrides = {**overrides, "deepspeed": {"zero_optimization": {"stage": stage}}}
    cfg = DictDefault({**ADAMW, **overrides})
    trained = 0 if cfg.adapter else WEIGHTS
    parts = memory._bytes(cfg, WEIGHTS, trained, num_gpus)
    assert tuple(size / 2**30 for size in parts.values()) == expected


@pytest.mark.parametrize(
    "chosen",
    [
        {"lora_target_linear": True},
        {"lora_target_modules": ["q_proj", "down_proj"]},
        {"lora_target_modules": r".*\.(q|down)_proj"},
    ],
)
def test_adapters_are_counted_as_peft_makes_them(
    tmp_path: Path, chosen: dict[str, Any]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = write_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapter = {"adapter": "lora", "lora_r": 4, "bf16": True}
    cfg = DictDefault({**ADAMW, **adapter, **chosen, "base_model": str(folder)})
    counted = memory._num_adapter_weights(cfg, model)
    modules = chosen.get("lora_target_modules", "all-linear")
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=modules))
    assert counted == sum(p.numel() for p in peft.parameters() if p.requires_grad)
    text = memory.in_words(cfg, 1)
    assert "an estimate: 0.00 GiB and activations on each of 1 GPU(s)" in text
    assert " loss head 0.00. 0.0M of 0.0M weights are trained" in text
