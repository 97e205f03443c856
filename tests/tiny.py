"""A tiny random model, a data set, and Axolotl configurations that use them.

Runs go through Axolotl's own functions in this process (benchmarks/run_axolotl.py).
Real launches are in test_launch.py.
"""

import json
import random
from pathlib import Path
from typing import Any

from benchmarks.run_axolotl import load, run

__all__ = ["load", "run"]

WORDS = [f"w{i}" for i in range(60)]
PROMPT = {
    "field_instruction": "instruction",
    "field_output": "output",
    "format": "{instruction}",
    "no_input_format": "{instruction}",
}


def write_tokenizer(folder: Path) -> Any:
    """A word-level tokenizer over WORDS with pad, eos and unk tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<eos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(specials + WORDS)}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def qwen3(**overrides: Any) -> Any:
    """A random two-layer Qwen3, the same at every call."""
    return causal_lm("qwen3", **overrides)


def causal_lm(model_type: str, **overrides: Any) -> Any:
    """A random two-layer model of a Hugging Face family, the same at every call."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "bos_token_id": None,
    }
    config = AutoConfig.for_model(model_type, **{**options, **overrides})
    return AutoModelForCausalLM.from_config(config)


def write_model(
    folder: Path, tokenizer: Any = None, model_type: str = "qwen3", **overrides: Any
) -> Path:
    """A random model with its tokenizer, saved as users' models are."""
    tokenizer = write_tokenizer(folder) if tokenizer is None else tokenizer
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = causal_lm(model_type, **{**ids, **overrides})
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    return folder


def write_dataset(path: Path, num_samples: int, seed: int) -> Path:
    """Prompts of 2-5 words, answers of 1-9 that depend on the prompt's first word."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num_samples):
        prompt = [rng.choice(WORDS) for _ in range(rng.randint(2, 5))]
        first = WORDS.index(prompt[0])
        answer = [
            WORDS[(first + i * rng.choice((1, 2))) % len(WORDS)]
            for i in range(rng.randint(1, 9))
        ]
        rows.append({"instruction": " ".join(prompt), "output": " ".join(answer)})
    return write_rows(path, rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A data file with an object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def eval_data(folder: Path) -> dict[str, Any]:
    """The configuration's part that evaluates on `test.jsonl`."""
    path = str(folder / "test.jsonl")
    return {"test_datasets": [{"path": path, "type": PROMPT, "split": "train"}]}


def config(tiny: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    """A complete Axolotl configuration for a short fp32 run; None drops a key."""
    cfg = {
        "base_model": str(tiny / "model"),
        "plugins": ["axolotl_psft"],
        "psft": {"epsilon_high": 0.28, "refresh_steps": 4},
        "datasets": [{"path": str(tiny / "train.jsonl"), "type": PROMPT}],
        # One cache for all runs: Axolotl keys it by data set, tokenizer and length.
        "dataset_prepared_path": str(tiny / "prepared"),
        "output_dir": str(output / "run"),
        "val_set_size": 0,
        "sequence_len": 64,
        "sample_packing": False,
        "attn_implementation": "sdpa",
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 8,
        # Not Adam: it turns the rounding of a gradient near zero into a full step, and
        # two runs that differ in nothing but rounding part ways.
        "optimizer": "sgd",
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "learning_rate": 0.5,
        "weight_decay": 0.0,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        # Seconds until a collective that a rank does not join is given up.
        "ddp_timeout": 120,
        "include_tkps": False,
        "dataset_num_proc": 1,
        "seed": 7,
        **overrides,
    }
    return {key: value for key, value in cfg.items() if value is not None}


def stateful(packed: bool) -> dict[str, Any]:
    """The configuration's part of a run in which all takes part that has a state.

    Adam, warm-up, accumulation, windows of four steps, several epochs; saved each step.
    """
    return {
        "psft": {"epsilon_high": 0.28, "refresh_steps": 4, "sft_warmup_steps": 1},
        "optimizer": "adamw_torch",
        "learning_rate": 0.01,
        "sample_packing": packed,
        "micro_batch_size": 1 if packed else 4,
        "gradient_accumulation_steps": 2,
        "num_epochs": 10,
        "save_strategy": None,
        "save_steps": 1,
    }


def train_logs(trainer: Any) -> list[dict[str, float]]:
    """The log entries of training steps."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def column(trainer: Any, key: str) -> list[float]:
    """One metric over the training steps."""
    return [entry[key] for entry in train_logs(trainer)]


def steps_after(trainer: Any, step: int, keys: list[str]) -> list[list[float]]:
    """Some metrics of each training step after ``step``, a list for each."""
    return [
        [entry[key] for key in keys]
        for entry in train_logs(trainer)
        if entry["step"] > step
    ]
