"""The scripts of the recipes: HH-RLHF to messages, and the reward of GSM8K.

On real samples from ../shared/data, where a test says so; on hand-made ones otherwise.
"""

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"needs the samples in {DATA}"
)


def script(path: str) -> Any:
    """A module from examples/, which is no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hh_rlhf = script("examples/data/hh_rlhf.py")
reward = script("examples/grpo/gsm8k_reward.py")


# ---- HH-RLHF ----

DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nBye?\n\nHuman: Yes\n\nAssistant: Bye"
MESSAGES = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello.\n\nBye?"},
    {"role": "user", "content": "Yes"},
    {"role": "assistant", "content": "Bye"},
]


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@needs_data
def test_real_dialogues_become_messages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = DATA / "hh-rlhf" / "harmless-base-test.jsonl"
    output = tmp_path / "made" / "chosen.jsonl"
    assert hh_rlhf.main([str(published), "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "2300 dialogues written" in out and "12 left out" in out
    assert f"{published}:87" in out

    published_rows = [row["chosen"] for row in lines(published)]
    written = iter(lines(output))
    kept = 0
    for chosen in published_rows:
        if not hh_rlhf.is_well_formed(hh_rlhf.messages(chosen)):
            continue
        turns = next(written)["messages"]
        kept += 1
        # Put together again, it is the published text but for space around turns.
        speakers = {"user": "Human", "assistant": "Assistant"}
        text = "".join(f"{speakers[t['role']]}:{t['content']}" for t in turns)
        assert "".join(text.split()) == "".join(chosen.split())
        assert turns[-1]["role"] == "assistant"
    assert kept == 2300


def test_files_plain_and_compressed_in_their_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    first.write_text(json.dumps({"chosen": DIALOGUE, "rejected": ""}) + "\n")
    with gzip.open(second, "wt") as file:
        file.write(json.dumps({"chosen": "\n\nHuman: 1\n\nAssistant: 2"}) + "\n")
    output = tmp_path / "out.jsonl"
    assert hh_rlhf.main([str(first), str(second), "--output", str(output)]) == 0
    made = [row["messages"] for row in lines(output)]
    assert made[0] == MESSAGES
    assert [message["content"] for message in made[1]] == ["1", "2"]


@pytest.mark.parametrize(
    "dialogue",
    [
        "\n\nHuman: Hi\n\nAssistant: ",
        "\n\nHuman: Hi\n\nHuman: Hello?\n\nAssistant: Hi",
        "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye",
        "\n\nAssistant: Hello",
    ],
    ids=["empty answer", "two turns in a row", "no last answer", "no question"],
)
def test_other_dialogues_are_left_out_and_counted(
    dialogue: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    texts = [DIALOGUE, dialogue]
    rows.write_text("".join(json.dumps({"chosen": text}) + "\n" for text in texts))
    assert hh_rlhf.main([str(rows), "--output", str(output)]) == 0
    assert [row["messages"] for row in lines(output)] == [MESSAGES]
    assert f"the first at {rows}:2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "rows.jsonl:2: not a line of JSON"),
        ("", "rows.jsonl:2: not a line of JSON"),
        ("[]", "rows.jsonl:2: no text under `chosen`, got None"),
        ('{"rejected": "x"}', "rows.jsonl:2: no text under `chosen`, got None"),
        ('{"chosen": 7}', "rows.jsonl:2: no text under `chosen`, got 7"),
        ('{"chosen": "Hi"}', "rows.jsonl:2: a dialogue must start with"),
        ('{"chosen": "Hi\\n\\nHuman: a"}', "rows.jsonl:2: a dialogue must start with"),
    ],
)
def test_a_bad_row_is_named_and_nothing_written(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text(json.dumps({"chosen": DIALOGUE}) + f"\n{line}\n")
    assert hh_rlhf.main([str(rows), "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not output.exists()


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.jsonl.gz", "plain.jsonl.gz"])
def test_a_file_that_cannot_be_read_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain.jsonl.gz").write_text(json.dumps({"chosen": DIALOGUE}))
    output = tmp_path / "out.jsonl"
    assert hh_rlhf.main([str(tmp_path / name), "--output", str(output)]) == 1
    assert f"error: {tmp_path / name}: cannot be read" in capsys.readouterr().err
    assert not output.exists()


def test_help_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        hh_rlhf.main(["--help"])
    assert ended.value.code == 0
    assert "--output" in capsys.readouterr().out


# ---- GSM8K's reward ----


@needs_data
def test_reward_on_real_answers() -> None:
    rows = lines(DATA / "gsm8k" / "train.jsonl") + lines(DATA / "gsm8k" / "test.jsonl")
    answers = [row["answer"] for row in rows]
    assert reward.right_answer(answers, answers) == [1.0] * 8792
    # Another question's answer is wrong, unless it happens to be the same number.
    shifted = answers[1:] + answers[:1]
    numbers = [a.rpartition("#### ")[2].replace(",", "") for a in answers]
    others = numbers[1:] + numbers[:1]
    same = [float(a == b) for a, b in zip(numbers, others, strict=True)]
    assert 0 < sum(same) < 200
    assert reward.right_answer(shifted, answers) == same
    unfinished = [answer.partition("####")[0] for answer in answers]
    assert reward.right_answer(unfinished, answers) == [0.0] * 8792


GOLD = "So 2 * 617.25 = <<2*617.25=1234.5>>1,234.5 apples.\n#### 1,234.5"


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("#### 1234.5", 1.0),
        ("Some steps.\n#### $1,234.50\n", 1.0),
        ("Some steps.\n####1234.5.", 1.0),
        ("#### 1234", 0.0),
        ("#### -1234.5", 0.0),
        ("1234.5", 0.0),
        ("", 0.0),
        ("####", 0.0),
        ("#### twelve", 0.0),
        ("#### 1234.5 apples", 0.0),
        # The answer is the last line, once: not one of several, nor followed by more.
        ("#### 7\n#### 1234.5", 0.0),
        ("#### 1234.5\nOr 7.", 0.0),
        ("#### 7 #### 1234.5", 0.0),
    ],
)
def test_reward_of_a_completion(completion: str, expected: float) -> None:
    chat = [{"role": "assistant", "content": completion}]
    assert reward.right_answer([completion, chat], [GOLD, GOLD]) == [expected] * 2


def test_reward_needs_an_answer_to_compare_with() -> None:
    with pytest.raises(ValueError, match="must end in a line '#### number', got '12'"):
        reward.right_answer(["#### 12"], ["12"])
