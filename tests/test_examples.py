"""Every recipe in examples/yaml passes Axolotl's own validation and is a psft run.

Of the tensor-parallel ones also what their comments claim: launch line and memory.
Nothing is trained here; `make quickstart` and `make quickstart-tp2` do.
"""

import json
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import WORDS, load, write_model

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "examples" / "yaml").glob("*.yaml"))
LARGE = ("llama-8b-tp2", "llama-70b-tp8")

# What a recipe for GPUs needs that this machine lacks; the rest of it is validated.
GPU_ONLY = {"bf16": False, "tf32": False}


def recipe(name: str) -> tuple[str, dict[str, Any]]:
    text = (ROOT / "examples" / "yaml" / f"{name}.yaml").read_text()
    return text, yaml.safe_load(text)


def launch_command(text: str) -> str:
    """The command that the comment at the top of a recipe opens with, in one line."""
    lines = [line.removeprefix("#").strip() for line in text.splitlines()]
    continued = list(takewhile(lambda line: line.endswith("\\"), lines))
    return " ".join(line.rstrip("\\").strip() for line in lines[: len(continued) + 1])


def num_processes(text: str) -> int:
    found = re.search(r"--num_processes (\d+)", launch_command(text))
    return int(found[1]) if found else 1


def test_there_are_recipes() -> None:
    names = {path.stem for path in RECIPES}
    assert {"quickstart", "quickstart-tp2", "gsm8k-7b", "gsm8k-7b-lora"} <= names
    assert set(LARGE) <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path: Path, tiny: Path, tmp_path: Path) -> None:
    text, cfg = recipe(path.stem)
    command = launch_command(text)
    assert "accelerate launch" in command
    assert command.endswith(f"-m axolotl.cli.train examples/yaml/{path.name}")
    assert None not in cfg.values(), "a recipe has no empty keys"
    assert cfg["plugins"] == ["axolotl_psft"]
    # Axolotl reads the model's config: a local model stands for one on a hub.
    local = {"base_model": str(tiny / "model"), "output_dir": str(tmp_path)}
    validated = load({**cfg, **GPU_ONLY, **local})
    assert validated.psft.refresh_steps == cfg["psft"]["refresh_steps"]
    assert validated.psft.epsilon_high == cfg["psft"]["epsilon_high"]
    assert set(cfg) <= set(validated), "Axolotl drops keys it does not know"


@pytest.mark.parametrize(
    "name, tp_size",
    [
        ("quickstart", 1),
        ("quickstart-tp2", 2),
        ("llama-8b-tp2", 2),
        ("llama-70b-tp8", 8),
    ],
)
def test_tensor_parallel_reaches_the_engine(
    name: str, tp_size: int, tiny: Path, tmp_path: Path
) -> None:
    text, cfg = recipe(name)
    local = {"base_model": str(tiny / "model"), "output_dir": str(tmp_path)}
    validated = load({**cfg, **GPU_ONLY, **local})
    assert (validated.psft_tensor_parallel_size or 1) == tp_size
    assert validated.tensor_parallel_size in (None, 1), "Axolotl's own must stay off"
    assert num_processes(text) % tp_size == 0


def test_quickstart_tp2_is_the_quickstart() -> None:
    (_, dense), (text, split) = recipe("quickstart"), recipe("quickstart-tp2")
    own = {"tensor_parallel_size": 2, "output_dir": "outputs/quickstart/psft-tp2"}
    assert split == {**dense, **own}
    makefile = (ROOT / "Makefile").read_text().partition("\nquickstart-tp2:")[2]
    assert f"--num_processes {num_processes(text)} " in makefile


# ---- Memory, as the comments of the large recipes have it ----

AVAILABLE = 85 - 3  # GB of an "80 GB" card, less CUDA, NCCL and fragments
ACTIVATIONS = {"llama-8b-tp2": (32, 4096), "llama-70b-tp8": (80, 8192)}
INSIDE = 2.0  # GB, an estimate: one recomputed layer, or the loss head


def state(parameters: float, tp_size: int, dp_size: int) -> float:
    """GB a rank: bf16 weights, float32 gradients, its part of Adam's 12 bytes."""
    return parameters / tp_size * (2 + 4 + 12 / dp_size) / 1e9


def updating(parameters: float, tp_size: int, dp_size: int) -> float:
    """GB a rank with the float32 temporary of torch's AdamW, sqrt of a moment."""
    return state(parameters, tp_size, dp_size) + parameters / tp_size * 4e-9 / dp_size


def numbers(text: str, label: str) -> list[float]:
    """Of the comment's lines that open with `label`: the number after `=`."""
    found = re.findall(rf"^#   {re.escape(label)} .*= +([\d.]+)$", text, re.MULTILINE)
    return [float(number) for number in found]


@pytest.mark.parametrize(
    "name, parameters, gpus, unit",
    [("llama-8b-tp2", 8.03e9, 2, "GPUs"), ("llama-70b-tp8", 70.55e9, 8, "nodes")],
)
def test_memory_arithmetic(name: str, parameters: float, gpus: int, unit: str) -> None:
    """`gpus` share one copy of the model; the comment counts a unit of them or each."""
    text, cfg = recipe(name)
    tp_size, prose = cfg["tensor_parallel_size"], text.replace("\n# ", " ")
    dp_size = num_processes(text) // tp_size
    assert re.search(
        rf"ensor parallel {tp_size}\b.* x data parallel {dp_size}\b", prose
    )
    share = parameters / tp_size / 1e9
    assert f"{parameters / 1e9}e9 / {tp_size} = {share:.4g}e9" in prose

    layers, hidden = ACTIVATIONS[name]
    inputs = layers * cfg["sequence_len"] * hidden * 2 / tp_size / 1e9
    product = f"{layers} x {cfg['sequence_len']} x {hidden} x 2 bytes / {tp_size}"
    assert f"{product} = {inputs:.1f}" in prose
    total = state(parameters, tp_size, dp_size)
    expected = {
        "weights, bf16": 2 * share,
        "gradients, float32": 4 * share,
        "Adam, float32 weights and moments": 12 * share / dp_size,
        "state  ": total,
        "state and the update's temporary": updating(parameters, tp_size, dp_size),
        "state and activations of 8192 tokens": total + inputs + INSIDE,
    }
    for label, value in expected.items():
        # One decimal, whichever way a half was rounded.
        assert numbers(text, label) == [pytest.approx(value, abs=0.0501)], label
    assert max(expected.values()) < AVAILABLE

    sizes = range(1, dp_size + 1)
    fewest = next(n for n in sizes if updating(parameters, tp_size, n) < AVAILABLE)
    scale = 1 if unit == "nodes" else gpus
    for n, words in ((fewest - 1, "too much"), (fewest, "fit")):
        needed = updating(parameters, tp_size, n)
        claim = rf"\b{n * scale} {unit} need {needed:.1f}\b[^.]*\b{words}"
        assert re.search(claim, prose), claim
    stored = f"{2 * parameters / 1e9:.0f} GB of weights and {12 * parameters / 1e9:.0f}"
    assert stored in prose


# ---- Data ----


def write_llama_like(folder: Path) -> Any:
    """A tiny model whose tokenizer has words and the special tokens of Llama 3."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"]
    specials += ["<|start_header_id|>", "<|end_header_id|>", "<unk>"]
    vocabulary = [*specials, "system", "user", "assistant", *WORDS]
    ids = {word: i for i, word in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=specials[0],
        eos_token=specials[1],
        pad_token=specials[2],
        unk_token="<unk>",
        extra_special_tokens=specials[3:5],
    )
    tokenizer.save_pretrained(folder)
    write_model(folder, tokenizer)
    return tokenizer


@pytest.mark.parametrize("name", LARGE)
def test_answers_and_their_end_of_turn_are_supervised(
    name: str, tmp_path: Path
) -> None:
    """Two dialogues, the second longer than a row, through Axolotl's data set code."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_datasets

    _, cfg = recipe(name)
    tokenizer = write_llama_like(tmp_path / "model")
    long = " ".join(WORDS) + " "
    rows = [
        [
            ("user", "w1 w2"),
            ("assistant", "w3"),
            ("user", "w4"),
            ("assistant", "w5 w6"),
        ],
        [("user", "w1"), ("assistant", long * 4)],
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) + "\n"
            for row in rows
        )
    )
    (data,) = cfg["datasets"]
    loaded = load(
        {
            **cfg,
            **GPU_ONLY,
            "base_model": str(tmp_path / "model"),
            "output_dir": str(tmp_path / "run"),
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "datasets": [
                {**data, "path": str(path), "ds_type": "json", "split": "train"}
            ],
            "val_set_size": 0,
            "eval_strategy": "no",
            "eval_steps": None,
            "eval_sample_packing": None,
            "sequence_len": 64,
            "dataset_num_proc": 1,
        }
    )
    meta = load_datasets(cfg=loaded, cli_args=TrainerCliArgs())
    (row,) = list(meta.train_dataset)
    supervised = [label for label in row["labels"] if label != -100]
    words = tokenizer.convert_ids_to_tokens(supervised)
    assert words == ["w3", "<|eot_id|>", "w5", "w6", "<|eot_id|>"]
