"""Runs that must not depend on how the model is split, and who runs them in ranks.

`accelerate launch ... -m tests.distributed.tensor_parallel MODELS OUTPUT TP NAME...`;
every rank writes OUTPUT/rank{r}.json. Judged by test_tensor_parallel.py, which runs
the same configurations dense.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.tiny import config, eval_data, run, train_logs, write_dataset, write_model

METRICS = ["loss", "grad_norm", "psft/nll", "psft/clip_frac", "psft/entropy"]
PACKED = {"sample_packing": True, "micro_batch_size": 1}
SAVE = {"save_strategy": None, "save_steps": 1, "save_total_limit": 100}
# Every model divides by 4: kv heads, and a vocabulary that the tokenizer does not fill.
SIZES = {"vocab_size": 64, "num_key_value_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False, "attention_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {"tie_word_embeddings": False},
}
RUNS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"base_model": "llama", **PACKED},
    "qwen2": {"base_model": "qwen2", **PACKED},
    "mistral": {"base_model": "mistral"},
    "accumulated": {
        **PACKED,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "base_model": "llama",
    },
    "sequence": {"psft": {"sequence_parallel": True}, **PACKED},
    "sequence, llama": {
        "psft": {"sequence_parallel": True},
        "base_model": "llama",
        "gradient_checkpointing": True,
    },
}
ADAM = {"optimizer": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1}
# Two data-parallel ranks: a dense run's step has both their samples.
DATA_PARALLEL: dict[str, dict[str, Any]] = {
    "two copies": {"micro_batch_size": 4},
    "two copies, adam": {
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "psft": {"sequence_parallel": True},
        **ADAM,
    },
}
RUNS["adam"] = {"base_model": "llama", **ADAM}


def dense(options: dict[str, Any]) -> dict[str, Any]:
    """A data-parallel run's options for one process."""
    return {**options, "micro_batch_size": 2 * options["micro_batch_size"]}


def write_models(folder: Path) -> Path:
    for name, options in FAMILIES.items():
        write_model(folder / name, model_type=name, **SIZES, **options)
    write_dataset(folder / "train.jsonl", num_samples=96, seed=0)
    write_dataset(folder / "test.jsonl", num_samples=13, seed=1)
    return folder


def tp_config(models: Path, output: Path, tp_size: int, **overrides: Any) -> Any:
    """20 steps with SFT warm-up, two refreshes and an active clip."""
    psft = {"epsilon_high": 0.05, "refresh_steps": 8, "sft_warmup_steps": 4}
    psft |= overrides.pop("psft", {})
    if tp_size == 1:
        psft.pop("sequence_parallel", None)
    family = overrides.pop("base_model", "qwen3")
    options = {
        "base_model": str(models / family),
        # transformers makes a Llama's tokenizer out of any file beside a Llama.
        "tokenizer_config": str(models / "qwen3"),
        "psft": psft,
        "max_steps": 20,
        "num_epochs": 10,
        # Half of the other tests': in 20 steps a larger one multiplies the rounding of
        # a sum of shards by a hundred, as it does for any other order of summation.
        "learning_rate": 0.1,
        "tensor_parallel_size": tp_size,
    }
    return config(models, output, **{**options, **overrides})


def logs(trainer: Any, first_step: int = 0) -> list[list[float]]:
    return [
        [entry[key] for key in METRICS]
        for entry in train_logs(trainer)
        if entry["step"] > first_step
    ]


def main(models: Path, output: Path, tp_size: int, names: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in names:
        folder = output / name
        runs = RUNS | DATA_PARALLEL
        if name in runs:
            trainer = run(tp_config(models, folder, tp_size, **runs[name]))
            results[name] = logs(trainer)
            results[f"{name}: replicas"] = replicas(trainer)
        else:
            results[name] = globals()[name](models, folder, tp_size)
    return results


def replicas(trainer: Any) -> list[str]:
    """Digests of the parameters that every rank holds whole."""
    import hashlib

    return [
        hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
        for p in trainer.model.parameters()
        if not getattr(p, "tensor_model_parallel", False)
    ]


def evaluated(models: Path, output: Path, tp_size: int) -> list[float]:
    options = {"eval_batch_size": 4, "eval_steps": 2, "save_steps": 2}
    cfg = tp_config(
        models,
        output,
        tp_size,
        max_steps=4,
        save_strategy=None,
        **options,
        **eval_data(models),
    )
    history = run(cfg).state.log_history
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry]


if __name__ == "__main__":
    import axolotl.train

    # Axolotl ends its process group after a run; a second one over the launcher's
    # store meets the keys of the first and waits for ever.
    axolotl.train.cleanup_distributed = lambda: None

    target = Path(sys.argv[2])
    outcome = main(Path(sys.argv[1]), target, int(sys.argv[3]), sys.argv[4:])
    rank = os.environ.get("RANK", "0")
    (target / f"rank{rank}.json").write_text(json.dumps(outcome))
