"""Which runs there are, in which order, and how learning rates are chosen.

Nothing is trained here: jobs.py does that, and __main__.py puts both together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import mean, stdev
from typing import Any

from benchmarks.forgetting.grpo import Stage
from benchmarks.forgetting.runs import Run

METHODS = ("sft", "sft_kl", "psft", "psft_warmup", "psft_noclip")
# Both have their learning rate tuned; the others take over one of the two.
TUNED = ("sft", "psft")

Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Scale:
    """How much is run. ``FULL`` is what docs/evidence.md reports."""

    seeds: tuple[int, ...]
    lrs: tuple[float, ...]
    base_steps: int
    steps: int
    every: int
    epsilons: tuple[float, ...]
    refreshes: tuple[int, ...]
    grpo_steps: int
    text_lrs: tuple[float, ...]
    text_base_steps: int
    text_steps: int


FULL = Scale(
    seeds=(0, 1, 2),
    lrs=(1e-4, 3e-4, 1e-3, 3e-3),
    base_steps=1500,
    steps=768,
    every=96,
    epsilons=(0.1, 0.2, 0.4),
    refreshes=(1, 4, 16),
    grpo_steps=120,
    text_lrs=(3e-4, 1e-3, 3e-3),
    text_base_steps=800,
    text_steps=240,
)
QUICK = Scale(
    seeds=(0,),
    lrs=(3e-4,),
    base_steps=1000,
    steps=320,
    every=80,
    epsilons=(),
    refreshes=(),
    grpo_steps=40,
    text_lrs=(1e-3,),
    text_base_steps=150,
    text_steps=80,
)


def grid(scale: Scale, *, text: bool = False) -> list[Run]:
    """SFT and PSFT at every learning rate and seed; ``text``: on real text."""
    if text:
        from benchmarks.forgetting.text import NUM_TRAIN

        lrs, steps, every = scale.text_lrs, scale.text_steps, scale.text_steps // 8
        first = Run("sft", lrs[0], 0, steps, every, num_train=NUM_TRAIN)
    else:
        lrs = scale.lrs
        first = Run("sft", lrs[0], 0, scale.steps, scale.every)
    return [
        replace(first, method=method, lr=lr, seed=seed)
        for lr in lrs
        for method in TUNED
        for seed in scale.seeds
    ]


def others(scale: Scale, lr: Mapping[str, float]) -> list[Run]:
    """What takes over a tuned learning rate: baselines, variants, ablations.

    PSFT and its variants are run at both tuned learning rates: at its own, and at
    SFT's. Ablations are at the smaller one, where more is left to lose.
    """
    runs = []
    for seed in scale.seeds:
        own = Run("psft", lr["psft"], seed, scale.steps, scale.every)
        runs += [replace(own, method="sft_kl", lr=lr["sft"])]
        for rate in sorted({*lr.values()}):
            at = replace(own, lr=rate)
            runs += [
                # Part of the grid, or this is it.
                replace(at, method="sft"),
                at,
                replace(at, method="psft_warmup"),
                replace(at, method="psft_noclip"),
            ]
        small = replace(own, lr=min(lr.values()))
        runs += [replace(small, epsilon_high=epsilon) for epsilon in scale.epsilons]
        runs += [replace(small, refresh_steps=steps) for steps in scale.refreshes]
    return runs


def text_others(scale: Scale, lr: Mapping[str, float]) -> list[Run]:
    """The second experiment's baselines and variants."""
    runs = []
    for run in grid(scale, text=True):
        if run.method == "psft" and run.lr == lr["psft"]:
            runs += [
                replace(run, method="sft_kl", lr=lr["sft"]),
                replace(run, method="psft_warmup"),
                replace(run, method="psft_noclip"),
            ]
    return runs


def stages(scale: Scale, lr: Mapping[str, float]) -> list[Stage]:
    """GRPO after SFT and after PSFT, each at both tuned learning rates."""
    starts = [(m, rate) for rate in sorted({*lr.values()}) for m in TUNED]
    return [
        Stage(
            Run(method, rate, seed, scale.steps, scale.every).name,
            seed,
            scale.grpo_steps,
            scale.grpo_steps // 6,
        )
        for seed in scale.seeds
        for method, rate in starts
    ]


def choose_lr(
    runs: Sequence[Run], results: Results, score: str, sign: int = 1
) -> dict[str, float]:
    """A learning rate for SFT and one for PSFT, by the same rule.

    Of each run the best measured point on validation data; over the seeds its mean. The
    smallest learning rate whose mean is within one standard error of the best mean is
    chosen: what does as well with less movement is preferred, for both methods alike.

    Args:
        runs: the grid.
        results: of every run, by name.
        score: the validation metric.
        sign: -1 where less is better.
    """
    chosen = {}
    for method in TUNED:
        by_lr: dict[float, list[float]] = {}
        for run in runs:
            if run.method == method:
                # Not the start: the base's own style may score, too.
                points = results[run.name]["points"][1:]
                best = max(sign * point[score] for point in points)
                by_lr.setdefault(run.lr, []).append(best)
        top = max(by_lr, key=lambda lr: mean(by_lr[lr]))
        scores = by_lr[top]
        error = stdev(scores) / sqrt(len(scores)) if len(scores) > 1 else 0.0
        good = [lr for lr in by_lr if mean(by_lr[lr]) >= mean(scores) - error]
        chosen[method] = min(good)
    return chosen
