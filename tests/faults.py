"""Runs that are disturbed, and the run that is not. Judged by the tests beside it.

Everything with a state takes part: Adam, dropout, clipping, warm-up, two windows, two
epochs. A run is a process of its own (distributed/launch.py), killed by a signal.
"""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import Processes
from tests.tiny import config, run, stateful, train_logs, write_dataset, write_model

NUM_STEPS = 14
PHASES = {
    "training": "training_step",
    "scoring": "score",
    "saving": "_save_checkpoint",
}
Logs = list[dict[str, float]]


def write_files(folder: Path) -> Path:
    """A model with dropout, and its data."""
    # 64: two ranks can share the vocabulary.
    write_model(folder / "model", attention_dropout=0.1, vocab_size=64)
    write_dataset(folder / "train.jsonl", num_samples=60, seed=0)
    return folder


def disturbed_config(
    files: Path, output: Path, packed: bool, **overrides: Any
) -> dict[str, Any]:
    """14 steps that save after each, and go on where the last one was saved."""
    options = stateful(packed)
    options["psft"]["epsilon_high"] = 0.05
    options |= {
        "max_steps": NUM_STEPS,
        "save_total_limit": 3,
        "auto_resume_from_checkpoints": True,
    }
    return config(files, output, **{**options, **overrides})


def train(cfg: dict[str, Any], phases: Path | None = None) -> Logs:
    """Train; a line in ``phases`` says what begins. Every metric of every step."""
    if phases is not None:
        _report_phases(phases)
    # What was logged before the checkpoint is in its state.
    return metrics(run(cfg))


def metrics(trainer: Any) -> Logs:
    """All that was logged of each step, but for the time it took."""
    names = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    return [
        {
            key: value
            for key, value in entry.items()
            if key in names or (key.startswith("psft/") and "seconds" not in key)
        }
        for entry in train_logs(trainer)
    ]


def _report_phases(path: Path) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    for phase, name in PHASES.items():

        def report(trainer: Any, line: str = f"{phase}\n") -> None:
            with path.open("a") as file:
                file.write(line)

        _before(name, report)


def at_step(number: int, method: str, do: Callable[[Any], None]) -> None:
    """In this process, ``do(trainer)`` before ``method`` in optimizer step ``number``.

    ``method`` is one of the trainer's, or "score".

    A checkpoint is saved in the step after the one it holds.
    """
    done = []

    def once(trainer: Any) -> None:
        if trainer.state.global_step + 1 >= number and not done:
            done.append(True)
            do(trainer)

    _before(method, once)


def _before(name: str, do: Callable[[Any], None]) -> None:
    """Have every trainer class ``do(trainer)`` before its method of this name."""
    from axolotl_psft.trainer import PSFTTrainer

    if name == "score":
        from axolotl_psft.old_policy import Scorer

        of_trainer = lambda scorer: do(scorer._trainer)  # noqa: E731
        Scorer.attach = _preceded(Scorer.attach, of_trainer)  # type: ignore[method-assign]
        return
    classes: list[type] = [PSFTTrainer]
    with contextlib.suppress(ImportError):
        from axolotl_psft.megatron.trainer import MegatronPSFTTrainer

        if name in vars(MegatronPSFTTrainer):
            classes = [MegatronPSFTTrainer, PSFTTrainer]
    for cls in classes:
        setattr(cls, name, _preceded(getattr(cls, name), do))


def _preceded(original: Callable[..., Any], do: Callable[[Any], None]) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        do(self)
        return original(self, *args, **kwargs)

    return method


def kill_at_random(
    rng: random.Random,
    phase: str,
    phases: Path,
    cfg: dict[str, Any],
    world_size: int | None = None,
) -> None:
    """Run `train` and kill -9 it within ``phase``, or soon after.

    Of several ranks one of them: the others must end by themselves.
    """
    phases.write_text("")
    occurrence = rng.randint(1, {"scoring": 3, "training": 14, "saving": 7}[phase])
    delay = rng.uniform(0, 0.1)
    with Processes(train, world_size, cfg, phases, collective_timeout=10) as processes:
        victim = rng.choice(processes.all)
        deadline = time.monotonic() + 60
        while phases.read_text().split().count(phase) < occurrence:
            assert time.monotonic() < deadline, f"{phase} {occurrence} never came"
            assert victim.is_alive(), f"{processes.errors()} before {phase}"
            time.sleep(0.001)
        # The moment may be any.
        time.sleep(delay)
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        processes.wait(60, for_all=True)
        assert victim.exitcode == -signal.SIGKILL, "it ended before it was killed"
        assert all(process.exitcode for process in processes.all)


@contextlib.contextmanager
def mounted(folder: Path, megabytes: float) -> Iterator[Path]:
    """A disk of that size at ``folder``; skips the test where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={int(megabytes * 1024)}k"
    if mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder)):
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*args: str) -> int:
    """The exit status of `mount`."""
    try:
        return subprocess.run(["mount", *args], capture_output=True).returncode
    except FileNotFoundError:
        return 1


def fill(folder: Path, leave: int) -> None:
    """Write until ``leave`` bytes are free."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    with (folder / "filler").open("wb") as file:
        file.write(b"\0" * max(0, free - leave))
