"""After fine-tuning, RL: a short GRPO stage (TRL's) with the target domain's checker.

The same prompts, budget and settings from every checkpoint; only where it starts
differs.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.forgetting import tasks
from benchmarks.forgetting.measure import Measure, skills_probe

NUM_PROMPTS, NUM_GENERATIONS = 16, 8
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Stage:
    """One GRPO stage.

    Attributes:
        start: name of the fine-tuning run whose last model it starts from.
        seed: of prompts and sampling; the run's.
        steps: optimizer updates, each on 16 prompts x 8 answers.
        every: updates between two measurements.
        num_train: demonstrations of the run: their prompts are asked here.
    """

    start: str
    seed: int
    steps: int
    every: int
    num_train: int = tasks.NUM_TRAIN

    @property
    def name(self) -> str:
        return f"grpo-after-{self.start}"


def run_stage(model: Path, output: Path, stage: Stage) -> dict[str, Any]:
    """Train from ``model``; returns rewards along the way and the measured points."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    samples = tasks.train_samples(stage.seed, stage.num_train)
    rows = [{"prompt": s.instruction, "items": list(s.letters)} for s in samples]
    trainer = GRPOTrainer(
        model=policy,
        processing_class=tokenizer,
        reward_funcs=right_answer,
        train_dataset=Dataset.from_list(rows),
        args=GRPOConfig(
            output_dir=str(output / "run"),
            per_device_train_batch_size=NUM_PROMPTS * NUM_GENERATIONS,
            num_generations=NUM_GENERATIONS,
            max_completion_length=tasks.MAX_NEW_TOKENS,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_steps=stage.steps,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            seed=stage.seed,
            disable_tqdm=True,
        ),
    )
    os.makedirs(output, exist_ok=True)
    settings = {"seed": stage.seed, "num_train": stage.num_train}
    probe = skills_probe(policy, settings)
    points = output / "points.json"
    trainer.add_callback(Measure(probe, stage.every, points))
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "points": json.loads(points.read_text()),
        "log": {
            "step": [entry["step"] for entry in history],
            "reward": [entry["reward"] for entry in history],
        },
    }


def right_answer(
    completions: list[str], items: list[list[str]], **_: Any
) -> list[float]:
    """1 for an answer that the domain's checker accepts, else 0."""
    return [
        float(tasks.check_chain(digits, text.split()))
        for text, digits in zip(completions, items, strict=True)
    ]
