"""The window's file in a checkpoint: whole, damaged, another run's.

What a resumed run does with it is in test_resume.py.
"""

import json
import pickletools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import torch

from axolotl_psft.files import FileError
from axolotl_psft.old_policy import Window, attach, attached, collect
from axolotl_psft.packing import Batch
from axolotl_psft.resume import (
    Run,
    SavedWindow,
    digest,
    load_window,
    save_window,
    window_path,
)

SETTINGS = {"psft.epsilon": None, "psft.epsilon_high": 0.28, "psft.refresh_steps": 4}
BATCHING = {"micro_batch_size": 2, "gradient_accumulation_steps": 1}
RUN = Run(rank=1, world_size=2, settings=SETTINGS, batching=BATCHING)


def save(folder: Path, window: Window, run: Run = RUN, step: int = 6, **o: Any) -> None:
    save_window(folder, window, run, global_step=step, **o)


def load(folder: Path, step: int = 6, **changes: Any) -> SavedWindow:
    return load_window(folder, replace(RUN, **changes), global_step=step)


def empty(start_step: int = 0) -> Window:
    scorer: Any = SimpleNamespace(count_tokens=lambda steps: None)
    return Window(1, lambda step: 1, scorer, start_step=start_step)


def restored(saved: SavedWindow, source: Iterator[Batch]) -> Window:
    window = empty()
    saved.restore(window, source)
    return window


def batches(num: int, seed: int = 0) -> list[Batch]:
    """Micro-batches as a data loader gives them, of different widths."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(num):
        input_ids = torch.randint(0, 99, (2, 5 + i), generator=generator)
        made.append({"input_ids": input_ids, "labels": input_ids.clone()})
    return made


def scored(num_steps: int, num_batches: int) -> Window:
    """A window in its middle: every step left carries old log-probs."""
    steps = collect(iter(batches(num_steps * num_batches)), num_steps, num_batches)
    for step in steps:
        for batch in step.batches:
            attach(batch, -batch["input_ids"].float() / 7)
    window = empty(5)
    window.steps.extend(steps)
    return window


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint folder with the window of :func:`scored`, 2 steps of 2."""
    save(tmp_path, scored(2, 2))
    return tmp_path


def error_of(checkpoint: Path, **changes: Any) -> str:
    """The message of the refusal; it names the file and says what to do."""
    with pytest.raises(FileError) as caught:
        load(checkpoint, **changes)
    message = str(caught.value)
    assert str(window_path(checkpoint, changes.get("rank", 1))) in message
    assert "esume" in message or "Restore" in message
    return message


def attach_error(saved: SavedWindow, given: Iterator[Batch]) -> str:
    with pytest.raises(FileError) as caught:
        restored(saved, given)
    message = str(caught.value)
    assert str(saved.path) in message
    assert "Resume with the same datasets" in message
    return message


# ---- The round trip ----


def test_round_trip(saved: Path):
    window = restored(load(saved), iter(batches(4)))
    original = scored(2, 2)
    assert window.start_step == 5
    assert [len(step.batches) for step in window.steps] == [2, 2]
    for step, expected in zip(window.steps, original.steps, strict=True):
        for batch, other in zip(step.batches, expected.batches, strict=True):
            assert batch.keys() == other.keys()
            # Bits, which no wrapper of a model casts.
            assert batch["old_logprobs"].dtype == torch.int32
            for name in batch:
                assert torch.equal(batch[name], other[name])


def test_attach_takes_no_more_than_its_micro_batches(saved: Path):
    source = iter(batches(6))
    restored(load(saved), source)
    assert len(list(source)) == 2


def test_more_than_ten_micro_batches_keep_their_order(tmp_path: Path):
    # As names, old_logprobs.10 comes before old_logprobs.2.
    save(tmp_path, scored(12, 1))
    window = restored(load(tmp_path), iter(batches(12)))
    for step in window.steps:
        (batch,) = step.batches
        old = attached(batch)
        assert torch.equal(old, -batch["input_ids"].float() / 7)


def test_uneven_steps_at_the_end_of_an_epoch(tmp_path: Path):
    window = scored(2, 2)
    window.steps[-1].batches.pop()
    save(tmp_path, window)
    again = restored(load(tmp_path), iter(batches(4)))
    assert [len(step.batches) for step in again.steps] == [2, 1]


def test_at_the_end_of_a_window_nothing_is_left_and_ranks_may_change(tmp_path: Path):
    save(tmp_path, empty(2))
    source = iter(batches(1))
    window = restored(load(tmp_path, world_size=3), source)
    assert not window.steps and window.start_step == 2
    assert len(list(source)) == 1


def test_views_and_tensors_that_share_memory_are_saved(tmp_path: Path):
    window = scored(1, 2)
    first, second = window.steps[0].batches
    attach(first, torch.arange(20.0).view(5, 4).t()[:2])
    second["old_logprobs"] = first["old_logprobs"]
    save(tmp_path, window)
    loaded = load(tmp_path)
    for tensor in loaded.old_logprobs:
        assert torch.equal(tensor, attached(first))


def test_saving_leaves_the_window_as_it_was(tmp_path: Path):
    window, same = scored(2, 2), scored(2, 2)
    save(tmp_path, window)
    for step, other in zip(window.steps, same.steps, strict=True):
        for batch, expected in zip(step.batches, other.batches, strict=True):
            assert batch.keys() == expected.keys()
            assert torch.equal(batch["old_logprobs"], expected["old_logprobs"])


def test_the_file_is_plain_safetensors(saved: Path):
    (path,) = saved.iterdir()
    assert path.name == "psft_window_rank1.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    names = set(json.loads(content[8 : 8 + length])) - {"__metadata__"}
    assert names == {f"old_logprobs.{i}" for i in range(4)}
    with pytest.raises(Exception, match="opcode"):
        list(pickletools.genops(content))
    # Token ids are data: the file must not carry them.
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.get_tensor("old_logprobs.0").dtype == torch.float32


def test_a_crash_while_saving_leaves_the_file_before_intact(saved: Path, monkeypatch):
    before = window_path(saved, 1).read_bytes()

    def crash(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("axolotl_psft.files.save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        save(saved, scored(1, 1))
    assert window_path(saved, 1).read_bytes() == before


def test_saving_again_replaces_the_file(saved: Path):
    save(saved, scored(1, 1), step=7)
    loaded = load(saved, step=7)
    assert loaded.batches_per_step == [1]
    assert [path.name for path in saved.iterdir()] == ["psft_window_rank1.safetensors"]


# ---- Files that must not be used ----


def test_missing(tmp_path: Path):
    assert "not found" in error_of(tmp_path)


def test_truncated_at_any_length(saved: Path):
    path = window_path(saved, 1)
    whole = path.read_bytes()
    lengths = {0, 1, 7, 8, 9, len(whole) - 1, *range(0, len(whole), 97)}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        assert "truncated, damaged" in error_of(saved), length


def test_longer_than_it_was(saved: Path):
    path = window_path(saved, 1)
    path.write_bytes(path.read_bytes() + b"\0")
    assert "truncated, damaged" in error_of(saved)


def test_any_flipped_bit(saved: Path):
    # Header and data alike: a header's bit could be another step or setting.
    path = window_path(saved, 1)
    whole = path.read_bytes()
    for position in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        try:
            loaded = load(saved)
        except FileError as error:
            assert str(path) in str(error)
        else:
            # safetensors pads its header with spaces, which mean nothing.
            assert whole[position] == 32, position
            assert loaded.start_step == 5


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04N.", b"PK\x03\x04" + b"\0" * 60, b"{}", b"\0" * 4096, b"\xff" * 64],
    ids=["empty", "pickle", "zip", "json", "zeros", "ones"],
)
def test_foreign_bytes(tmp_path: Path, content: bytes):
    window_path(tmp_path, 1).write_bytes(content)
    assert "truncated, damaged" in error_of(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        {"format": "axolotl_psft.window/2"},
        {"format": "axolotl_psft.window/2", "header": "[]", "sha256": "0"},
        {"format": "axolotl_psft.window/2", "header": "{", "sha256": "0"},
    ],
)
def test_foreign_safetensors(tmp_path: Path, metadata: dict[str, str] | None):
    safetensors.torch.save_file(
        {"model.weight": torch.ones(2)}, window_path(tmp_path, 1), metadata=metadata
    )
    assert "truncated, damaged" in error_of(tmp_path)


def test_the_version_before(saved: Path):
    tensors = {"old_logprobs.0": torch.ones(2)}
    metadata = {"format": "axolotl_psft.window/1", "header": "{}", "sha256": "0"}
    safetensors.torch.save_file(tensors, window_path(saved, 1), metadata=metadata)
    message = error_of(saved)
    assert "its format is axolotl_psft.window/1" in message
    assert "Resume with the version that wrote it" in message


def test_a_folder_of_that_name(tmp_path: Path):
    window_path(tmp_path, 1).mkdir()
    assert "not found" in error_of(tmp_path)


def test_another_step(saved: Path):
    message = error_of(saved, step=7)
    assert "its global step is 6, not 7" in message


def test_another_rank(saved: Path):
    window_path(saved, 1).rename(window_path(saved, 0))
    message = error_of(saved, rank=0)
    assert "its rank is 1, not 0" in message


def test_ranks_that_the_saving_run_did_not_have(tmp_path: Path):
    first = replace(RUN, rank=0, world_size=1)
    save(tmp_path, empty(4), first)
    for rank in range(3):
        window = restored(load(tmp_path, rank=rank, world_size=3), iter([]))
        assert (window.start_step, list(window.steps)) == (4, [])
    # A rank that it had, whose file is gone.
    save(tmp_path, empty(4), replace(first, world_size=2))
    assert "not found" in error_of(tmp_path)
    # In the middle of a window there is nothing to go on from.
    save(tmp_path, scored(2, 2), first)
    with pytest.raises(FileError, match=r"in the middle of a window by 1 "):
        load(tmp_path, world_size=3)


def test_another_world_size_mid_window(saved: Path):
    message = error_of(saved, world_size=4)
    assert "by 2 processes, this run has 4. Resume with 2" in message


@pytest.mark.parametrize(
    "key, value, was, now",
    [
        ("psft.refresh_steps", 8, "4", "8"),
        ("psft.epsilon_high", None, "0.28", "None"),
        ("seed", 1, "None", "1"),
    ],
)
def test_other_settings(saved: Path, key: str, value: Any, was: str, now: str):
    message = error_of(saved, settings={**SETTINGS, key: value})
    assert f"{key} was {was} when the checkpoint was written and is {now}" in (message)


def test_another_objective_is_named_before_what_follows_from_it(saved: Path):
    message = error_of(saved, settings={"psft.objective": "sft_kl"})
    was = "psft.objective was None when the checkpoint was written and is sft_kl"
    assert was in message
    assert message.index(was) < message.index("psft.epsilon_high was 0.28")


def test_many_settings_are_named_in_part(saved: Path):
    message = error_of(saved, settings={**SETTINGS, **{f"key{i}": i for i in range(9)}})
    assert "key5 was None" in message and "key6" not in message
    assert "3 more differ" in message


def test_other_batching(saved: Path, tmp_path: Path):
    other = {"micro_batch_size": 1, "gradient_accumulation_steps": 2}
    message = error_of(saved, batching=other)
    assert "micro_batch_size was 2 when the checkpoint was written and is 1" in message
    assert "gradient_accumulation_steps was 1" in message
    # In the middle of a window, with other ranks, too.
    message = error_of(saved, batching=other, world_size=4)
    assert "micro_batch_size was 2" in message
    # At its end, other ranks may share the same samples out.
    ended = tmp_path / "ended"
    save(ended, empty(4))
    assert "micro_batch_size was 2" in error_of(ended, batching=other)
    load(ended, batching=other, world_size=4)


def test_the_initial_policy_is_named(tmp_path: Path):
    save(tmp_path, empty(6), initial_policy="abc")
    assert load(tmp_path).initial_policy == "abc"


def test_a_setting_that_is_gone(saved: Path):
    settings = {key: SETTINGS[key] for key in ("psft.epsilon", "psft.epsilon_high")}
    message = error_of(saved, settings=settings)
    assert "psft.refresh_steps was 4" in message


@pytest.mark.parametrize("name", ["input_ids", "labels"])
@pytest.mark.parametrize("which", [0, 3])
def test_other_data(saved: Path, name: str, which: int):
    given = batches(4)
    given[which][name][1, 2] += 1
    message = attach_error(load(saved), iter(given))
    assert "other tokens" in message


def test_other_order(saved: Path):
    given = batches(4)
    attach_error(load(saved), iter([given[1], given[0], *given[2:]]))


@pytest.mark.parametrize("available", [0, 1, 2, 3])
def test_less_data(saved: Path, available: int):
    given = iter(batches(4)[:available])
    assert "ends earlier" in attach_error(load(saved), given)


def test_digest_tells_shapes_and_names_apart():
    tokens = torch.arange(6)
    one = {"input_ids": tokens.view(2, 3), "labels": tokens.view(2, 3)}
    other = {"input_ids": tokens.view(3, 2), "labels": tokens.view(3, 2)}
    assert digest(one) != digest(other)
    a, b = tokens, tokens + 1
    assert digest({"input_ids": a, "labels": b}) != digest(
        {"input_ids": b, "labels": a}
    )
    # The same bytes.
    zeros = torch.zeros(6, dtype=torch.int32)
    assert digest({"input_ids": zeros, "labels": a}) != digest(
        {"input_ids": zeros.float(), "labels": a}
    )
    # Log-probs that were attached later do not change whose they are.
    # Other boundaries, other log-probs: the same tokens cut into other samples.
    assert digest({**one, "position_ids": a}) != digest({**one, "position_ids": b})
    assert digest({**one, "old_logprobs": torch.ones(2, 3)}) == digest(one)
