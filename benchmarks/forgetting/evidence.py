"""Both experiments from bases to results: which job needs which, and where files go.

What a job does is runs.py's, grpo.py's and text.py's business; what it leaves is read
by report.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.forgetting import grpo, plan, runs, text
from benchmarks.forgetting.grpo import Stage
from benchmarks.forgetting.jobs import Job, Jobs
from benchmarks.forgetting.plan import Scale
from benchmarks.forgetting.runs import Run


class Evidence:
    """Both experiments at one scale, below one folder."""

    def __init__(self, scale: Scale, folder: Path, jobs: Jobs, with_text: bool) -> None:
        self.scale, self.folder, self.jobs = scale, folder, jobs
        self.with_text = with_text

    def run(self) -> dict[str, Any]:
        """Everything that report.py needs."""
        scale = self.scale
        bases = [
            Job(
                f"base-seed{seed}",
                runs.train_base,
                (self._base(seed), seed, scale.base_steps),
            )
            for seed in scale.seeds
        ]
        grid, text_grid = plan.grid(scale), plan.grid(scale, text=True)
        # Until the learning rates are chosen: as if both methods had one.
        lr = dict.fromkeys(plan.TUNED, scale.lrs[0])
        text_lr = dict.fromkeys(plan.TUNED, scale.text_lrs[0])
        self.jobs.num_expected = self._count(lr, text_lr)
        if self.with_text:
            folder = self.folder / "text-base"
            # The longest first.
            bases.insert(
                0, Job("text-base", text.train_base, (folder, 0, scale.text_base_steps))
            )
        results = self.jobs.run(bases)

        jobs = [self._job(run) for run in grid]
        if self.with_text:
            jobs += [self._text_job(run) for run in text_grid]
        results |= self.jobs.run(jobs)
        lr = plan.choose_lr(grid, results, "validation")
        jobs = [self._job(run) for run in plan.others(scale, lr)]
        jobs += [self._grpo_job(stage) for stage in plan.stages(scale, lr)]
        if self.with_text:
            scores = {r.name: results[f"text-{r.name}"] for r in text_grid}
            text_lr = plan.choose_lr(text_grid, scores, "validation/nll", sign=-1)
            jobs += [self._text_job(run) for run in plan.text_others(scale, text_lr)]
        self.jobs.num_expected = self._count(lr, text_lr)
        results |= self.jobs.run(jobs)
        chosen = {"lr": lr, "text_lr": text_lr if self.with_text else None}
        return {**chosen, "results": results}

    def _count(self, lr: Mapping[str, float], text_lr: Mapping[str, float]) -> int:
        """Jobs in all."""
        scale = self.scale
        runs = {run.name for run in (*plan.grid(scale), *plan.others(scale, lr))}
        total = len(scale.seeds) + len(runs) + len(plan.stages(scale, lr))
        if self.with_text:
            texts = (*plan.grid(scale, text=True), *plan.text_others(scale, text_lr))
            total += 1 + len({run.name for run in texts})
        return total

    def _base(self, seed: int) -> Path:
        return self.folder / f"base-seed{seed}"

    def _output(self, name: str) -> Path:
        return self.folder / "runs" / name

    def _job(self, run: Run) -> Job:
        arguments = (self._base(run.seed), self._output(run.name), run)
        return Job(run.name, runs.fine_tune, arguments)

    def _text_job(self, run: Run) -> Job:
        name = f"text-{run.name}"
        arguments = (self.folder / "text-base", self._output(name), run)
        return Job(name, text.fine_tune, arguments)

    def _grpo_job(self, stage: Stage) -> Job:
        model = self._output(stage.start) / "run"
        return Job(stage.name, grpo.run_stage, (model, self._output(stage.name), stage))
