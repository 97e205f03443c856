"""What two data-parallel ranks run in turn. Judged by test_two_ranks.py."""

import math
from pathlib import Path
from typing import Any

from tests.distributed.launch import keep_process_group
from tests.tiny import config, eval_data, run, steps_after, train_logs

METRICS = [
    *("psft/surrogate", "grad_norm", "psft/nll", "psft/clip_frac"),
    "psft/ratio_max",
]
SAVE = {"save_strategy": None, "save_steps": 1, "save_total_limit": 100}
PARTS = "psft_initial_logprobs"
PACKED = {
    "sample_packing": True,
    "micro_batch_size": 1,
    "num_epochs": 10,
    "gradient_accumulation_steps": 2,
    "max_steps": 10,
}


def logs(trainer: Any, first_step: int = 0) -> list[list[float]]:
    return steps_after(trainer, first_step, METRICS)


def main(tiny: Path, output: Path) -> dict[str, Any]:
    """Every scenario's results on this rank, by name."""
    keep_process_group()
    results: dict[str, Any] = {}

    trainer = run(config(tiny, output / "plain", micro_batch_size=4))
    results["plain"] = logs(trainer)

    trainer = run(
        config(
            tiny,
            output / "eval",
            eval_batch_size=4,
            eval_steps=2,
            save_steps=2,
            save_strategy=None,
            max_steps=2,
            **eval_data(tiny),
        )
    )
    history = trainer.state.log_history
    results["eval"] = [e["eval_loss"] for e in history if "eval_loss" in e]

    whole = run(config(tiny, output / "packed", **PACKED, **SAVE))
    results["packed"] = logs(whole)
    results["epochs"] = [entry["epoch"] for entry in train_logs(whole)]
    for step in (2, 9):
        checkpoint = output / "packed" / "run" / f"checkpoint-{step}"
        resumed = run(
            config(
                tiny,
                output / f"resumed-{step}",
                resume_from_checkpoint=str(checkpoint),
                **PACKED,
            )
        )
        results[f"resumed-{step}"] = logs(resumed, step)

    kl = {"psft": {"objective": "sft_kl"}}
    results["sft_kl"] = logs(run(config(tiny, output / "kl", **kl)))
    results["sft_kl parts"] = sorted(
        path.name for path in (output / "kl" / "run" / PARTS).iterdir()
    )
    whole = run(config(tiny, output / "packed-kl", **kl, **PACKED, **SAVE))
    results["sft_kl, packed"] = logs(whole)
    checkpoint = output / "packed-kl" / "run" / "checkpoint-9"
    cfg = config(
        tiny,
        output / "resumed-kl",
        resume_from_checkpoint=str(checkpoint),
        **kl,
        **PACKED,
    )
    results["sft_kl, resumed"] = logs(run(cfg), 9)

    results["tokens averaged"] = tokens_averaged(tiny, output / "averaged")
    results["files read"] = files_read(tiny, output / "read")
    results["error"] = nan_on_one_rank(tiny, output / "nan")
    return results


def tokens_averaged(tiny: Path, output: Path) -> list[list[float]]:
    """A run whose arguments want losses multiplied by the number of ranks."""
    from axolotl_psft.trainer import PSFTTrainer

    original = PSFTTrainer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs["args"].average_tokens_across_devices = True
        original(self, *args, **kwargs)

    PSFTTrainer.__init__ = init
    try:
        return logs(run(config(tiny, output, micro_batch_size=4)))
    finally:
        PSFTTrainer.__init__ = original


def files_read(tiny: Path, output: Path) -> list[int]:
    """How many data files this rank reads in each of two starts of a run."""
    from axolotl_psft.doctor import files

    original, read = files.check_file, [0]

    def count(*args: Any, **kwargs: Any) -> int:
        read[-1] += 1
        return original(*args, **kwargs)

    files.check_file = count
    cfg = config(tiny, output, max_steps=1, **eval_data(tiny))
    cfg["dataset_prepared_path"] = str(output / "prepared")
    try:
        run(dict(cfg))
        read.append(0)
        run(dict(cfg))
        return read
    finally:
        files.check_file = original


def nan_on_one_rank(tiny: Path, output: Path) -> str:
    from axolotl_psft.failures import NonFiniteLossError
    from axolotl_psft.trainer import PSFTTrainer

    original = PSFTTrainer.compute_loss

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        if self.state.global_step == 2 and self.args.process_index == 1:
            self._loss.of_step += math.nan
        return loss

    PSFTTrainer.compute_loss = poisoned
    try:
        run(config(tiny, output))
    except NonFiniteLossError as error:
        return str(error)
    finally:
        PSFTTrainer.compute_loss = original
    return "no error"
