"""Faults of one rank of two: all end in time, say which it was, and can go on.

The ranks of a test are ended by it; in a launch, what outlives the first failure is
ended by the launcher, and the soak has such launches.
"""

import errno
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from axolotl_psft import checkpoints
from axolotl_psft.resume import window_path
from tests.commands import start
from tests.distributed.launch import Processes, run_distributed
from tests.faults import (
    PHASES,
    Logs,
    at_step,
    disturbed_config,
    kill_at_random,
    train,
    write_files,
)

pytestmark = pytest.mark.timeout(300)

TIMEOUT = 6
MODES: dict[str, dict[str, Any]] = {
    "data parallel": {"ddp_timeout": TIMEOUT},
    "tensor parallel": {"ddp_timeout": TIMEOUT, "tensor_parallel_size": 2},
}
# A rank that gave up looks for three seconds which others are still there.
SLACK = 3 + 4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


def config_of(mode: str, files: Path, output: Path) -> dict[str, Any]:
    return disturbed_config(files, output, True, **MODES[mode])


@pytest.fixture(scope="module")
def undisturbed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The logs of a mode's run that nothing happened to; made once."""
    output = tmp_path_factory.mktemp("undisturbed")
    made: dict[str, Logs] = {}

    def logs(mode: str) -> Logs:
        if mode not in made:
            made[mode], other = run_distributed(
                train, 2, config_of(mode, files, output / mode), timeout=120
            )
            assert made[mode] == other
            assert max(entry["psft/clip_frac"] for entry in made[mode]) > 0.05
        return made[mode]

    return logs


# ---- Faults, each of one rank in optimizer step 6 ----


def dies(trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(trainer: Any) -> None:
    time.sleep(600)


def sees_a_nan(trainer: Any) -> None:
    trainer._loss.of_step += math.nan


def raises(trainer: Any) -> None:
    raise RuntimeError("a bad sample")


def cannot_write(trainer: Any) -> None:
    """The disk is full. Not by a limit on files: the ranks' store is one, too."""
    import torch

    def save(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    torch.save = save


def train_disturbed(
    cfg: dict[str, Any],
    fault: Callable[[Any], None],
    rank: int,
    method: str,
    mark: Path,
) -> None:
    if int(os.environ["RANK"]) == rank:

        def disturb(trainer: Any) -> None:
            mark.touch()
            fault(trainer)

        at_step(6, method, disturb)
    train(cfg)


def errors_of(
    cfg: dict[str, Any], fault: Any, rank: int, method: str, mark: Path
) -> tuple[list[str], float]:
    """The ranks' tracebacks, and the seconds from the fault to the last of them."""
    args = (cfg, fault, rank, method, mark)
    with Processes(train_disturbed, 2, *args, collective_timeout=TIMEOUT) as processes:
        if fault is hangs:
            processes.wait(90)
        else:
            processes.wait(90, for_all=True)
        reports = list(processes.path.glob("*.failed"))
        last = max(report.stat().st_mtime for report in reports)
        errors = {report.stem: report.read_text() for report in reports}
        silent = {str(rank)} if fault in (dies, hangs) else set()
        assert errors.keys() == {"0", "1"} - silent
    return [errors[name] for name in sorted(errors)], last - mark.stat().st_mtime


CASES = [
    ("data parallel", dies, 1, "training_step"),
    ("data parallel", hangs, 1, "_save_rng_state"),
    ("data parallel", cannot_write, 1, "_save_checkpoint"),
    ("tensor parallel", hangs, 1, "training_step"),
    ("tensor parallel", sees_a_nan, 1, "compute_loss"),
    ("tensor parallel", cannot_write, 0, "_save_checkpoint"),
]
MORE = [
    case
    for mode in MODES
    for rank in (0, 1)
    for case in [
        *(
            (mode, fault, rank, method)
            for fault in (dies, hangs)
            for method in [*PHASES.values(), "_save_rng_state"]
        ),
        (mode, raises, rank, "training_step"),
        (mode, raises, rank, "_save_checkpoint"),
        (mode, raises, rank, "score"),
        (mode, sees_a_nan, rank, "compute_loss"),
        (mode, cannot_write, rank, "_save_checkpoint"),
    ]
    if case not in CASES
]


@pytest.mark.parametrize(
    "mode, fault, rank, method",
    [*CASES, *(pytest.param(*case, marks=pytest.mark.soak) for case in MORE)],
)
def test_all_ranks_end_in_time_and_go_on(
    mode: str,
    fault: Callable[[Any], None],
    rank: int,
    method: str,
    files: Path,
    undisturbed: Any,
    tmp_path: Path,
) -> None:
    cfg = config_of(mode, files, tmp_path)
    errors, seconds = errors_of(cfg, fault, rank, method, tmp_path / "mark")
    assert seconds < (TIMEOUT if fault is hangs else 0) + SLACK
    newest, _ = checkpoints.newest_complete(tmp_path / "run")
    assert newest is not None
    for error in errors:
        expect(error, fault, rank, newest)
    if fault is cannot_write:
        assert f"PeerFailedError: rank {rank} of 2 failed first: " in errors[1 - rank]
    if method == "_save_rng_state":
        assert newest.name == "checkpoint-4", "complete without this rank's file"
    assert not list(tmp_path.rglob("*.partial"))
    assert run_distributed(train, 2, cfg, timeout=120)[0] == undisturbed(mode)


def expect(error: str, fault: Any, rank: int, newest: Path) -> None:
    """The last words of each rank that could speak."""
    if fault in (dies, hangs):
        assert f"PeerFailedError: rank {rank} of 2 is lost" in error
        assert f"the newest complete one is {newest}" in error
    elif fault is sees_a_nan:
        assert f"NonFiniteLossError: psft: the loss of rank {rank} is not" in error
    elif fault is raises:
        assert "RuntimeError: a bad sample" in error
    else:
        assert "CheckpointError: checkpoint-5 could not be written" in error
        assert newest.name == "checkpoint-4"
        assert f"the newest complete one is {newest}" in error


# ---- Resume ----


def test_a_spoilt_window_of_one_rank_stops_all(files: Path, tmp_path: Path) -> None:
    cfg = config_of("data parallel", files, tmp_path)
    run_distributed(train, 2, {**cfg, "max_steps": 3}, timeout=120)
    window = window_path(tmp_path / "run" / "checkpoint-3", 1)
    window.write_bytes(window.read_bytes()[:-1])
    with Processes(train, 2, cfg, collective_timeout=TIMEOUT) as processes:
        processes.wait(60, for_all=True)
        first, second = sorted(processes.errors())
    for error in (first, second):
        assert f"{window}: truncated, damaged" in error
    assert "PeerFailedError: rank 1: FileError" in first
    # Nor where one of them sees another folder.
    with Processes(train_apart, 2, cfg, collective_timeout=TIMEOUT) as processes:
        processes.wait(60, for_all=True)
        errors = processes.errors()
    assert len(errors) == 2
    for error in errors:
        assert "resume_from_checkpoint: the ranks found [" in error
        assert "output_dir must be on a disk that all nodes see" in error


def train_apart(cfg: dict[str, Any]) -> None:
    rank = os.environ["RANK"]
    train({**cfg, "output_dir": cfg["output_dir"] + (rank if rank == "1" else "")})


def test_more_processes_with_the_same_samples_a_step(
    files: Path, tmp_path: Path
) -> None:
    """One process with accumulation 2 is two with 1, at the end of a window."""
    alone = disturbed_config(files, tmp_path, False, save_total_limit=100)
    alone |= {
        "overrides_of_model_config": {"attention_dropout": 0.0},
        "ddp_timeout": TIMEOUT,
    }
    # Short of the epoch's last step, which accelerate fills up with samples again.
    alone["max_steps"] = 7
    whole = train(alone)
    checkpoints = tmp_path / "run"
    two = {**alone, "output_dir": str(tmp_path / "two")}
    two |= {"gradient_accumulation_steps": 1}
    two["resume_from_checkpoint"] = str(checkpoints / "checkpoint-5")
    (logs, warnings), (_, others) = run_distributed(train_warned, 2, two, timeout=120)
    assert warnings == others == []
    assert len(logs) == len(whole)
    for entry, expected in zip(logs, whole, strict=True):
        assert entry.pop("epoch") == pytest.approx(expected.pop("epoch"), rel=0.1)
        # Another order of summation, and Adam.
        assert entry == pytest.approx(expected, rel=1e-3, abs=1e-5)
    twice = {**two, "gradient_accumulation_steps": 2}
    (_, warnings), (_, others) = run_distributed(train_warned, 2, twice, timeout=120)
    assert others == []
    (warning,) = warnings
    assert "with world size 1 and {'micro_" in warning
    assert "now it is 2, with {'micro_" in warning
    two["resume_from_checkpoint"] = str(checkpoints / "checkpoint-6")
    with pytest.raises(RuntimeError, match=r"gradient_accumulation_steps was 2"):
        run_distributed(train, 2, two, timeout=120)


def train_warned(cfg: dict[str, Any]) -> tuple[Logs, list[str]]:
    """What `train` gives, and the warnings of a step with other samples."""
    from axolotl_psft import resume

    warnings: list[str] = []
    resume.LOG.warning = warnings.append  # type: ignore[method-assign]
    logs = train(cfg)
    return logs, [text for text in warnings if "with world size" in text]


# ---- Time-outs ----


@pytest.mark.parametrize("mode", MODES)
def test_every_process_group_has_the_configured_time_out(
    mode: str, files: Path, tmp_path: Path
) -> None:
    cfg = config_of(mode, files, tmp_path) | {"max_steps": 1, "save_strategy": "no"}
    cfg = {key: x for key, x in cfg.items() if key != "save_steps"}
    for found in run_distributed(timeouts, 2, cfg, timeout=2 * TIMEOUT):
        # The launcher of these tests has made the first one.
        assert len(found) >= (2 if mode == "tensor parallel" else 1)
        assert set(found) == {float(TIMEOUT)}


def timeouts(cfg: dict[str, Any]) -> list[float]:
    """Seconds until a collective of each process group is given up."""
    import axolotl.train
    import torch
    from torch import distributed as dist

    found: list[float] = []

    def look() -> None:
        for group in dist.distributed_c10d._world.pg_map:
            options = group._get_backend(torch.device("cpu")).options
            found.append(options._timeout.total_seconds())

    # Before Axolotl ends the groups.
    axolotl.train.cleanup_distributed = look
    train(cfg)
    return found


# ---- The soak ----


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(8))
def test_one_rank_killed_anywhere(
    seed: int, mode: str, files: Path, undisturbed: Any, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    cfg = config_of(mode, files, tmp_path)
    for phase in rng.sample(list(PHASES), 1 + seed % 2):
        kill_at_random(rng, phase, tmp_path / "phases", cfg, world_size=2)
    assert run_distributed(train, 2, cfg, timeout=120)[0] == undisturbed(mode)


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_launch_ends_with_its_rank(
    fault: signal.Signals, mode: str, files: Path, undisturbed: Any, tmp_path: Path
) -> None:
    """As users run it: groups, store and time-outs are Axolotl's and the launcher's."""
    cfg = config_of(mode, files, tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg))
    accelerate = str(Path(sys.executable).parent / "accelerate")
    options = "launch --multi_gpu --num_processes 2 --num_machines 1"
    options += " --mixed_precision no --main_process_port 0 -m"
    module = "tests.distributed.launched"
    args = [str(tmp_path / "config.yaml"), str(int(fault)), str(tmp_path / "mark")]
    env = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = start([accelerate, *options.split(), module, *args], env, Path.cwd())
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    seconds = time.time() - (tmp_path / "mark").stat().st_mtime
    assert process.returncode != 0
    # The launcher asks a rank to end, and after 30 seconds does not ask.
    assert seconds < (TIMEOUT + 30 if fault == signal.SIGSTOP else 0) + SLACK + 5
    if fault == signal.SIGSTOP:
        assert "rank 1 of 2 is lost" in output
    assert run_distributed(train, 2, cfg, timeout=120)[0] == undisturbed(mode)
