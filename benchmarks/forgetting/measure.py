"""Measures a model while it is trained: a callback, and what it asks of the model.

What is measured is a function model -> numbers, made by skills_probe here or by
text.py. How Axolotl comes to call it is plugin.py's business.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from skills import answer_logprobs, entropy_and_nll, generate
from transformers import TrainerCallback

from benchmarks.forgetting import tasks

Point = dict[str, float]
Probe = Callable[[Any], Point]

_SAMPLING_SEED = 1234


class Measure(TrainerCallback):
    """Calls the probe at the start, every so many updates, and at the end."""

    def __init__(self, probe: Probe, every: int, output: Path) -> None:
        self.probe, self.every, self.output = probe, every, output
        self.points: list[Point] = []
        self.seconds = 0.0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        self._measure(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._measure(kwargs["model"], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.points[-1]["step"] != state.global_step:
            self._measure(kwargs["model"], state.global_step)
        self.output.write_text(json.dumps(self.points))

    def _measure(self, model: Any, step: int) -> None:
        started = time.perf_counter()
        was_training = model.training
        model.eval()
        with torch.no_grad():
            self.points.append({"step": step, **self.probe(model)})
        model.train(was_training)
        self.seconds += time.perf_counter() - started


# ---- The first experiment ----


def accuracies(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Any],
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Share of right answers of each family; greedy without a generator."""
    answers = generate(model, tokenizer, samples, generator, tasks.MAX_NEW_TOKENS)
    right = defaultdict(list)
    for sample, answer in zip(samples, answers, strict=True):
        is_right = sample.skill.check(sample.letters, answer)
        right[sample.skill.family].append(float(is_right))
    return {family: mean(values) for family, values in right.items()}


def skills_probe(start: Any, settings: dict[str, Any]) -> Probe:
    """Accuracies, entropy, NLL and the KL from the model as it is now.

    KL is mean(sum_v p_v (log p_v - log p0_v)) over the answers' tokens, p0 the start.
    """
    tokenizer = tasks.tokenizer()
    test, validation = tasks.test_samples(), tasks.validation_samples()
    earlier = tasks.earlier_samples()
    train = tasks.train_samples(settings["seed"], settings["num_train"])
    tasks.check_no_leak(train, test, validation, earlier)
    seen = train[: len(validation)]
    start.eval()
    with torch.no_grad():
        p0 = {
            "": answer_logprobs(start, tokenizer, test)[0],
            "earlier_": answer_logprobs(start, tokenizer, earlier)[0],
        }

    def sampled(model: Any, samples: Sequence[Any]) -> float:
        # The same draws at every call: what changes is the model.
        rng = torch.Generator().manual_seed(_SAMPLING_SEED)
        return accuracies(model, tokenizer, samples, rng)["target"]

    def probe(model: Any) -> Point:
        by_family = accuracies(model, tokenizer, earlier)
        point = {f"earlier/{family}": value for family, value in by_family.items()}
        point["earlier"] = mean(by_family.values())
        point["in_domain"] = sampled(model, test)
        point["in_domain_greedy"] = accuracies(model, tokenizer, test)["target"]
        point["validation"] = sampled(model, validation)
        for prefix, samples in (("", test), ("earlier_", earlier)):
            logprobs, tokens = answer_logprobs(model, tokenizer, samples)
            entropy, nll = entropy_and_nll(logprobs, tokens)
            point |= {f"{prefix}entropy": entropy, f"{prefix}nll": nll}
            kl = (logprobs.exp() * (logprobs - p0[prefix])).sum(-1).mean()
            point[f"{prefix}kl"] = kl.item()
        _, nll = entropy_and_nll(*answer_logprobs(model, tokenizer, seen))
        point["train_nll"] = nll
        return point

    return probe
