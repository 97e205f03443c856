"""Faults of one process, each of them real: what the run says, and that it goes on.

Several ranks are in distributed/test_faults.py. `pytest --soak` has the long form.
"""

import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from axolotl_psft import checkpoints
from axolotl_psft.old_policy import WindowFileError, window_path
from tests.distributed.launch import Processes, run_alone
from tests.faults import (
    NUM_STEPS,
    PHASES,
    Logs,
    at_step,
    disturbed_config,
    fill,
    kill_at_random,
    metrics,
    mount,
    mounted,
    train,
    write_files,
)
from tests.tiny import load, run

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


class Undisturbed:
    """The runs that nothing happened to, each made once."""

    def __init__(self, files: Path, output: Path) -> None:
        self.files = files
        self.output = output
        self._logs: dict[bool, Logs] = {}

    def __getitem__(self, packed: bool) -> Logs:
        if packed not in self._logs:
            cfg = disturbed_config(self.files, self.folder(packed), packed)
            cfg["save_total_limit"] = 100
            self._logs[packed] = train(cfg)
            assert [entry["step"] for entry in self._logs[packed]] == [
                *range(1, NUM_STEPS + 1)
            ]
            assert max(entry["psft/clip_frac"] for entry in self._logs[packed]) > 0.05
        return self._logs[packed]

    def folder(self, packed: bool) -> Path:
        return self.output / ("packed" if packed else "unpacked")

    def copy(self, packed: bool, step: int, folder: Path) -> Path:
        """Its checkpoint of that step, to be spoilt."""
        assert self[packed]
        source = self.folder(packed) / "run" / f"checkpoint-{step}"
        return Path(shutil.copytree(source, folder / source.name))


@pytest.fixture(scope="module")
def undisturbed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(files, tmp_path_factory.mktemp("undisturbed"))


def error_of(cfg: dict[str, Any], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        run(cfg)
    return str(caught.value)


# ---- kill -9 ----


def seeds(short: int, long: int) -> list[Any]:
    """Numbers below ``long``; from ``short`` on for the soak only."""
    return [
        pytest.param(i, marks=[pytest.mark.soak] if i >= short else [])
        for i in range(long)
    ]


@pytest.mark.parametrize("seed", seeds(3, 20))
def test_killed_anywhere_and_resumed(
    seed: int, files: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    packed = seed % 2 == 1
    cfg = disturbed_config(files, tmp_path, packed)
    # The run that resumes may be killed, too.
    for phase in [list(PHASES)[seed % 3], rng.choice(list(PHASES))][: 1 + seed % 2]:
        kill_at_random(rng, phase, tmp_path / "phases", cfg)
    assert run_alone(train, cfg) == undisturbed[packed]
    assert not list(tmp_path.rglob("*.partial"))


def test_killed_while_old_checkpoints_are_deleted(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    folder = undisturbed.copy(True, 6, tmp_path)
    (folder / "optimizer.pt").unlink()
    cfg = disturbed_config(undisturbed.files, tmp_path, True)
    cfg["resume_from_checkpoint"] = str(folder)
    message = error_of(cfg, ValueError)
    assert "checkpoint-6 lacks optimizer.pt: a part of it was deleted" in message
