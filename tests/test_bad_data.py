"""Samples that cannot be trained on: refused by file and row, or skipped and counted.

Whole runs: what is left is what the good rows alone would be.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from axolotl_psft import plugin
from axolotl_psft.data_files import DataFileError
from tests.tiny import PROMPT, config, run

LONG = "w1 " * 90


def data(path: Path, rows: list[str]) -> list[dict[str, Any]]:
    path.write_text("".join(f"{row}\n" for row in rows))
    return [{"path": str(path), "type": PROMPT}]


def samples(trainer: Any) -> list[tuple[list[int], list[int]]]:
    """What is trained on: tokens and labels of every sample, sorted."""
    return sorted((row["input_ids"], row["labels"]) for row in trainer.train_dataset)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    given: list[str] = []
    monkeypatch.setattr(plugin.LOG, "warning", given.append)
    return given


@pytest.mark.parametrize("packed", [False, True])
def test_samples_that_are_skipped_are_counted_and_nothing_else_is(
    packed: bool, tiny: Path, tmp_path: Path, warnings: list[str]
) -> None:
    good = (tiny / "train.jsonl").read_text().splitlines()
    bad = [
        {"instruction": "", "output": ""},
        {"instruction": "w1", "output": ""},
        {"instruction": "w1", "output": None},
        {"instruction": "w1"},
        {"instruction": LONG, "output": "w2"},
        {"instruction": "w1", "output": LONG},
    ]
    options = {
        "sample_packing": packed,
        "micro_batch_size": 1 if packed else 4,
        "max_steps": 2,
    }
    rows = [json.dumps(row) for row in bad] + good
    mixed = data(tmp_path / "mixed.jsonl", rows)
    alone = data(tmp_path / "alone.jsonl", good)
    got = run(config(tiny, tmp_path / "mixed", datasets=mixed, **options))
    assert len(got.train_dataset) == len(good)
    (warning,) = [text for text in warnings if "left out" in text]
    assert warning.startswith(
        f"psft: {len(rows)} rows in the data files, {len(good)} samples: 6 rows were"
    )
    warnings.clear()
    expected = run(config(tiny, tmp_path / "alone", datasets=alone, **options))
    assert not [text for text in warnings if "left out" in text]
    # In another order: Axolotl shuffles before it drops.
    assert samples(got) == samples(expected)


@pytest.mark.parametrize(
    "row", ['{"instruction": "w1", "output": ', '{"output": 3}', "[1]"]
)
def test_a_row_that_cannot_be_read_is_named_before_a_model_is_loaded(
    row: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import axolotl.train

    loaded: list[Any] = []
    monkeypatch.setattr(axolotl.train, "load_model", loaded.append, raising=False)
    good = (tiny / "train.jsonl").read_text().splitlines()
    datasets = data(tmp_path / "bad.jsonl", [*good[:3], row, *good[3:]])
    with pytest.raises(DataFileError, match=r"bad\.jsonl:4: "):
        run(config(tiny, tmp_path, datasets=datasets))
    assert not loaded


def test_nothing_to_train_on_is_an_error(tiny: Path, tmp_path: Path) -> None:
    chat = [
        {"messages": [{"role": "user", "content": "w1 w2"}]},
        {"messages": [{"role": "user", "content": "w3"}]},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat * 16))
    entry = {
        "path": str(path),
        "type": "chat_template",
        "field_messages": "messages",
        "roles_to_train": ["assistant"],
    }
    with pytest.raises(ValueError, match=r"no supervised token|no samples left"):
        run(
            config(
                tiny,
                tmp_path,
                datasets=[entry],
                chat_template="chatml",
                max_steps=4,
            )
        )


def test_a_masked_sample_that_comes_first_is_no_reason_to_stop() -> None:
    from axolotl_psft.trainer import PSFTTrainer

    masked, supervised = {"labels": [-100, -100]}, {"labels": [-100, 5]}
    check: Any = PSFTTrainer._check_supervised
    check(SimpleNamespace(train_dataset=[masked, masked, supervised]))
    with pytest.raises(ValueError, match=r"no supervised token in the 2 samples"):
        check(SimpleNamespace(train_dataset=[masked, masked]))
