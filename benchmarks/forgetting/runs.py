"""The fine-tuning runs of the first experiment, each one Axolotl configuration.

A run is fine-tuned through the axolotl_psft plugin, measured by measure.py and leaves
its points and its log. Which runs there are is plan.py's business.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prepare
import torch

from benchmarks.forgetting import tasks

INFINITY = float("inf")
BATCH_SIZE = 16
LR_WARMUP_STEPS = 10
PROMPT = {
    "field_instruction": "instruction",
    "field_output": "output",
    "format": "{instruction}",
    "no_input_format": "{instruction}",
}


@dataclass(frozen=True)
class Run:
    """One fine-tuning run.

    Attributes:
        method: sft, sft_kl, psft, psft_warmup or psft_noclip.
        lr: peak learning rate; constant after a short warm-up.
        seed: of the base, of the demonstrations and of their order.
        steps: optimizer updates.
        every: updates between two measurements.
        epsilon_high: PSFT's clip.
        refresh_steps: PSFT's window.
        num_train: demonstrations.
    """

    method: str
    lr: float
    seed: int
    steps: int
    every: int
    epsilon_high: float = 0.28
    refresh_steps: int = 8
    num_train: int = tasks.NUM_TRAIN

    @property
    def name(self) -> str:
        parts = [self.method, f"lr{self.lr:g}"]
        if self.epsilon_high != 0.28:
            parts.append(f"eps{self.epsilon_high:g}")
        if self.refresh_steps != 8:
            parts.append(f"refresh{self.refresh_steps}")
        return "-".join([*parts, f"seed{self.seed}"])

    def psft(self) -> dict[str, Any]:
        """The `psft` block."""
        if self.method == "sft":
            return {"objective": "sft"}
        if self.method == "sft_kl":
            return {"objective": "sft_kl", "kl_coef": 0.5}
        block: dict[str, Any] = {
            "epsilon_high": self.epsilon_high,
            "refresh_steps": self.refresh_steps,
        }
        if self.method == "psft_noclip":
            block["epsilon_high"] = INFINITY
        if self.method == "psft_warmup":
            # The paper's short warm-up is 100 of some 1700 batches.
            block["sft_warmup_steps"] = max(self.steps // 16, 1)
        return block


def train_base(folder: Path, seed: int, steps: int) -> None:
    """The model that fine-tuning starts from, and the demonstrations for it."""
    tokenizer = tasks.tokenizer()
    model = prepare.make_model(seed, tasks.vocabulary())
    prepare.train_base(
        model, tasks.BASE_SKILLS, tokenizer, seed, learned_loss=0.0, max_steps=steps
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def axolotl_config(
    base: Path, data: Path, output: Path, run: Any, measure: dict[str, Any]
) -> dict[str, Any]:
    """What every run of either experiment has in common."""
    return {
        "base_model": str(base),
        "plugins": ["axolotl_psft", "benchmarks.forgetting.plugin.MeasurePlugin"],
        "psft": run.psft(),
        "measure": {
            "every": run.every,
            "output": str(output / "points.json"),
            **measure,
        },
        "datasets": [{"path": str(data), "ds_type": "json", "type": PROMPT}],
        "train_on_inputs": False,
        "dataset_prepared_path": str(data.parent / "prepared"),
        "output_dir": str(output / "run"),
        "val_set_size": 0,
        "attn_implementation": "sdpa",
        "gradient_accumulation_steps": 1,
        "max_steps": run.steps,
        # Enough epochs for any max_steps.
        "num_epochs": 10_000,
        "optimizer": "adamw_torch",
        "learning_rate": run.lr,
        "lr_scheduler": "constant_with_warmup",
        "warmup_steps": LR_WARMUP_STEPS,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        # A whole window: a clip fraction without the first step's zeros in between.
        "logging_steps": 8,
        "save_strategy": "no",
        "seed": run.seed,
        "include_tkps": False,
    }


def fine_tune(base: Path, output: Path, run: Run) -> dict[str, Any]:
    """Train and measure; the model stays in ``output/run``."""
    output.mkdir(parents=True, exist_ok=True)
    data = base / f"train-{run.num_train}.jsonl"
    if not data.is_file():
        prepare.write_jsonl(data, tasks.train_samples(run.seed, run.num_train))
    measure = {"probe": "skills", "seed": run.seed, "num_train": run.num_train}
    cfg = axolotl_config(base, data, output, run, measure)
    cfg |= {
        "micro_batch_size": BATCH_SIZE,
        "sequence_len": tasks.SEQUENCE_LEN,
        # Not packed, so that an update is 16 samples; padded to the longest possible.
        "pad_to_sequence_len": True,
    }
    return train(cfg, output)


def train(cfg: dict[str, Any], output: Path) -> dict[str, Any]:
    """Run Axolotl; returns what was measured and logged."""
    from benchmarks.run_axolotl import run as run_axolotl

    torch.set_num_threads(1)
    trainer = run_axolotl(cfg)
    history = [entry for entry in trainer.state.log_history if "psft/nll" in entry]
    names = ("step", "psft/nll", "psft/entropy", "psft/clip_frac", "grad_norm")
    return {
        "points": json.loads((output / "points.json").read_text()),
        "log": {name: [entry[name] for entry in history] for name in names},
    }
