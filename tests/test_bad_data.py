"""Samples that cannot be trained on: refused by file and row, or skipped and counted.

Whole runs: what is left is what the good rows alone would be.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from axolotl_psft import dataset, plugin
from axolotl_psft.doctor.files import DataFileError
from tests.tiny import PROMPT, column, config, eval_data, run, train_logs, write_rows

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


BAD = [
    {"instruction": "", "output": ""},
    {"instruction": "w1", "output": ""},
    {"instruction": "w1", "output": None},
    {"instruction": "w1"},
    {"instruction": LONG, "output": "w2"},
    {"instruction": "w1", "output": LONG},
]


def mixed(good: list[str], bad: list[Any]) -> list[str]:
    """The bad ones at both ends and in between."""
    bad = [json.dumps(row) for row in bad]
    half = len(bad) // 2
    return [*bad[:half], *good[:9], *bad[half:], *good[9:], *bad[:1]]


# In the file's order, or Axolotl would shuffle before it drops.
IN_ORDER = {"shuffle_merged_datasets": False}


@pytest.mark.parametrize("packed", [False, True])
def test_samples_that_are_skipped_are_counted_and_change_no_gradient(
    packed: bool, tiny: Path, tmp_path: Path, warnings: list[str]
) -> None:
    good = (tiny / "train.jsonl").read_text().splitlines()
    options = {
        "sample_packing": packed,
        "micro_batch_size": 1 if packed else 4,
        "num_epochs": 10,
        **IN_ORDER,
    }
    rows = mixed(good, BAD)
    some = data(tmp_path / "some.jsonl", rows)
    alone = data(tmp_path / "alone.jsonl", good)
    got = run(config(tiny, tmp_path / "some", datasets=some, **options))
    assert len(got.train_dataset) == len(good)
    (warning,) = [text for text in warnings if "left out" in text]
    assert warning.startswith(
        f"psft: {len(rows)} rows in the data files, {len(good)} samples: 7 rows were"
    )
    warnings.clear()
    expected = run(config(tiny, tmp_path / "alone", datasets=alone, **options))
    assert not [text for text in warnings if "left out" in text]
    assert samples(got) == samples(expected)
    _check_same_run(got, expected)


def _check_same_run(got: Any, expected: Any) -> None:
    """To the last bit: losses, gradient norms, metrics and the weights at the end."""
    for ours, theirs in zip(train_logs(got), train_logs(expected), strict=True):
        for name in ("loss", "grad_norm", "psft/nll", "psft/clip_frac"):
            assert ours[name] == theirs[name]
    weights = [trainer.model.state_dict() for trainer in (got, expected)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


CHAT = {"type": "chat_template", "chat_template": "chatml"}


def conversations(path: Path, rows: list[Any]) -> list[dict[str, Any]]:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return [{"path": str(path), **CHAT}]


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


TYPO = [turns("w1")[0], {"role": "asistant", "content": "w2 w3"}]


def test_conversations_without_an_answer_are_skipped_where_samples_are_packed(
    tiny: Path, tmp_path: Path, warnings: list[str]
) -> None:
    good = [turns(f"w{i}", f"w{i + 7} w{i}") for i in range(24)]
    bad = [turns("w1"), TYPO, turns(LONG, "w2"), turns("w1", LONG)]
    rows = [*bad[:2], *good[:5], *bad[2:], *good[5:]]
    options = {"sample_packing": True, "micro_batch_size": 1, "num_epochs": 10}
    options |= {"chat_template": "chatml", **IN_ORDER}
    some = conversations(tmp_path / "some.jsonl", rows)
    alone = conversations(tmp_path / "alone.jsonl", good)
    got = run(config(tiny, tmp_path / "some", datasets=some, **options))
    assert [text for text in warnings if "role 'asistant' (1 messages) is none" in text]
    assert [text for text in warnings if "24 samples: 4 rows were left out" in text]
    expected = run(config(tiny, tmp_path / "alone", datasets=alone, **options))
    assert samples(got) == samples(expected)
    _check_same_run(got, expected)


def test_conversations_without_an_answer_change_no_gradient(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in a micro-batch of five is as none in a micro-batch of four."""
    given: list[str] = []
    monkeypatch.setattr(dataset.LOG, "warning", given.append)
    good = [turns(f"w{i}", f"w{i + 7} w{i} w3") for i in range(24)]
    rows = [row for i in range(0, 24, 4) for row in (*good[i : i + 4], TYPO)]
    # curriculum_sampling: in the data's order.
    options = {"chat_template": "chatml", "curriculum_sampling": True, **IN_ORDER}
    options |= {"max_steps": 6, "num_epochs": 1}
    some = conversations(tmp_path / "some.jsonl", rows)
    alone = conversations(tmp_path / "alone.jsonl", good)
    got = run(
        config(
            tiny, tmp_path / "some", datasets=some, **options | {"micro_batch_size": 5}
        )
    )
    (warning,) = [text for text in given if "supervised" in text]
    assert warning.startswith("psft: 6 of 30 samples have no supervised token. They")
    given.clear()
    expected = run(config(tiny, tmp_path / "alone", datasets=alone, **options))
    assert not [text for text in given if "supervised" in text]
    # Not to the last bit: a matrix product of more rows may round otherwise.
    for name in ("loss", "grad_norm", "psft/nll", "psft/clip_frac", "psft/approx_kl"):
        assert column(got, name) == pytest.approx(
            column(expected, name), rel=1e-5, abs=1e-6
        )


def test_a_conversation_at_fault_is_named_before_a_model_is_loaded(
    tiny: Path, tmp_path: Path
) -> None:
    rows = [turns("w1", "w2"), [{"role": "user", "content": None}]]
    datasets = conversations(tmp_path / "chat.jsonl", rows)
    cfg = config(tiny, tmp_path, datasets=datasets, chat_template="chatml")
    with pytest.raises(DataFileError, match=r"chat\.jsonl:2: `content` of message 1"):
        run(cfg)


@pytest.mark.parametrize("row", [{"instruction": None, "output": "w1"}, {"output": 3}])
def test_rows_of_evaluation_are_checked_too(
    row: Any, tiny: Path, tmp_path: Path
) -> None:
    lines = [*(tiny / "test.jsonl").read_text().splitlines(), json.dumps(row)]
    data(tmp_path / "test.jsonl", lines)
    cfg = config(tiny, tmp_path, **eval_data(tmp_path), eval_steps=2)
    with pytest.raises(DataFileError, match=r"test\.jsonl:14: "):
        run(cfg)


def test_rows_of_evaluation_that_are_skipped_change_no_loss(
    tiny: Path, tmp_path: Path
) -> None:
    good = (tiny / "test.jsonl").read_text().splitlines()
    data(tmp_path / "test.jsonl", mixed(good, BAD))
    losses = []
    for folder in (tiny, tmp_path):
        options = {**eval_data(folder), "eval_steps": 2, "max_steps": 2, **IN_ORDER}
        history = run(config(tiny, tmp_path / "run", **options)).state.log_history
        losses.append([entry["eval_loss"] for entry in history if "eval_loss" in entry])
    assert losses[0] == losses[1] and losses[0]


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


def test_data_files_may_go_unread(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from axolotl_psft.doctor import files

    read: list[Any] = []
    original = files.check_file
    monkeypatch.setattr(
        files, "check_file", lambda *args: read.append(args) or original(*args)
    )
    for check, times in ((False, 0), (True, 1)):
        options = {"dataset_prepared_path": str(tmp_path / str(check)), "max_steps": 1}
        psft = {"check_data_files": check}
        run(config(tiny, tmp_path / "run", psft=psft, **options))
        assert len(read) == times


def test_nothing_to_train_on_is_an_error(tiny: Path, tmp_path: Path) -> None:
    chat = [
        {"messages": [{"role": "user", "content": "w1 w2"}]},
        {"messages": [{"role": "user", "content": "w3"}]},
    ]
    path = write_rows(tmp_path / "chat.jsonl", chat * 16)
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


def test_masked_samples_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(dataset.LOG, "warning", given.append)
    masked, supervised = {"labels": [-100, -100]}, {"labels": [-100, 5]}
    empty: dict[str, list[int]] = {"labels": []}

    def check(*rows: dict[str, list[int]], order: Any = None) -> None:
        samples = Dataset.from_list(list(rows))
        samples = samples if order is None else samples.select(order)
        dataset.check_supervised(samples)

    check(supervised, supervised)
    # Rows that the indices leave out are none of the data.
    check(supervised, masked, order=[0])
    assert given == []
    check(masked, empty, supervised, empty, *[masked, supervised] * 1200)
    check(masked, supervised, masked, order=[2, 1])
    assert [text[:30] for text in given] == [
        "psft: 1,203 of 2,404 samples h",
        "psft: 1 of 2 samples have no s",
    ]
    with pytest.raises(ValueError, match=r"no supervised token in the 3 samples"):
        check(masked, masked, empty)
