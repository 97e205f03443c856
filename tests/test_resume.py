"""Stop anywhere, resume, and see the losses of the run that never stopped, bit for bit.

Adam, dropout and clipping are on: everything that has a state takes part.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from axolotl_psft.files import FileError
from axolotl_psft.resume import window_path
from tests.tiny import (
    config,
    run,
    stateful,
    steps_after,
    train_logs,
    write_dataset,
    write_model,
)

BITWISE = ["loss", "grad_norm"]
BITWISE += [f"psft/{n}" for n in ("nll", "clip_frac", "approx_kl", "old_policy_age")]


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, so that a wrong generator state shows."""
    folder = tmp_path_factory.mktemp("noisy")
    write_model(folder / "model", attention_dropout=0.1)
    write_dataset(folder / "train.jsonl", num_samples=60, seed=0)
    return folder


def options(packed: bool, **overrides: Any) -> dict[str, Any]:
    lengths = {"max_steps": 18, "save_total_limit": 100}
    return {**stateful(packed), **lengths, **overrides}


def bits(trainer: Any, first_step: int) -> list[list[float]]:
    return steps_after(trainer, first_step, BITWISE)


@pytest.fixture(scope="module", params=[False, True], ids=["unpacked", "packed"])
def undisturbed(
    request: pytest.FixtureRequest,
    noisy: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[bool, Path, Any]:
    output = tmp_path_factory.mktemp("undisturbed")
    return request.param, output, run(config(noisy, output, **options(request.param)))


def steps_to_stop_at(trainer: Any) -> dict[str, int]:
    """One step of each kind: inside warm-up and windows, at their ends, at epochs'."""
    entries = train_logs(trainer)
    ages = [int(entry["psft/old_policy_age"]) for entry in entries]
    epochs = [entry["epoch"] for entry in entries]
    second_epoch = next(i for i, epoch in enumerate(epochs) if epoch > 1)
    return {
        "after warm-up": 1,
        "mid-window": ages.index(2) + 1,
        "end of a window": ages.index(3) + 1,
        "end of an epoch": second_epoch,
        "mid-window of the second epoch": second_epoch + ages[second_epoch:].index(1),
    }


@pytest.mark.parametrize(
    ("short", "long"),
    [({"max_steps": 6}, {"max_steps": 14}), ({"num_epochs": 1}, {"num_epochs": 2})],
    ids=["steps", "epochs"],
)
def test_a_longer_run_goes_on_where_a_shorter_one_ended(
    noisy: Path, tmp_path: Path, short: dict[str, Any], long: dict[str, Any]
) -> None:
    given = options(False, max_steps=None)
    whole = run(config(noisy, tmp_path / "whole", **{**given, **long}))
    cut = run(config(noisy, tmp_path / "cut", **{**given, **short}))
    step = cut.state.global_step
    # In the middle of a window, or at its and the epoch's end.
    assert train_logs(whole)[step]["psft/old_policy_age"] == (1 if step == 6 else 0)
    resume = {"resume_from_checkpoint": f"{tmp_path}/cut/run/checkpoint-{step}"}
    resumed = run(config(noisy, tmp_path / "resumed", **{**given, **long}, **resume))
    assert bits(resumed, step) == bits(whole, step)


def test_resume_is_exact_to_the_last_bit(
    noisy: Path, undisturbed: tuple[bool, Path, Any], tmp_path: Path
) -> None:
    packed, output, whole = undisturbed
    assert max(entry["psft/clip_frac"] for entry in train_logs(whole)) > 0.05
    for where, step in steps_to_stop_at(whole).items():
        checkpoint = output / "run" / f"checkpoint-{step}"
        resumed = run(
            config(
                noisy,
                tmp_path / str(step),
                resume_from_checkpoint=str(checkpoint),
                **options(packed, save_steps=1000),
            )
        )
        assert resumed.state.global_step == 18
        assert bits(resumed, step) == bits(whole, step), where


def test_resume_needs_the_window_file(
    noisy: Path, undisturbed: tuple[bool, Path, Any], tmp_path: Path
) -> None:
    packed, output, whole = undisturbed
    step = steps_to_stop_at(whole)["mid-window"]
    checkpoint = tmp_path / f"checkpoint-{step}"
    shutil.copytree(output / "run" / f"checkpoint-{step}", checkpoint)
    window = window_path(checkpoint, 0)
    intact = window.read_bytes()

    def resume(**overrides: Any) -> None:
        run(
            config(
                noisy,
                tmp_path / "resumed",
                resume_from_checkpoint=str(checkpoint),
                **options(packed, save_steps=1000, **overrides),
            )
        )

    window.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(FileError, match=r"psft_window_rank0.*truncated"):
        resume()
    other = window_path(output / "run" / f"checkpoint-{step - 1}", 0)
    window.write_bytes(other.read_bytes())
    with pytest.raises(FileError, match=rf"its global step is {step - 1}, not"):
        resume()
    window.unlink()
    with pytest.raises(FileError, match=r"psft_window_rank0.*not found"):
        resume()
    window.write_bytes(intact)
    with pytest.raises(FileError, match=r"psft\.refresh_steps was 4 .* is 5"):
        resume(psft={"epsilon_high": 0.28, "refresh_steps": 5, "sft_warmup_steps": 1})
    with pytest.raises(FileError, match=r"seed was 7 .* is 8"):
        resume(seed=8)


def test_a_checkpoint_of_plain_sft_is_not_resumed_as_psft(
    noisy: Path, tmp_path: Path
) -> None:
    stock = options(False, max_steps=2, save_steps=2)
    run(config(noisy, tmp_path / "sft", **{**stock, "psft": None, "plugins": None}))
    checkpoint = tmp_path / "sft" / "run" / "checkpoint-2"
    with pytest.raises(FileError, match="that a psft run has completed"):
        run(
            config(
                noisy,
                tmp_path / "psft",
                resume_from_checkpoint=str(checkpoint),
                **options(False),
            )
        )
