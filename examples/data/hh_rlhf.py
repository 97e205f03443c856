"""HH-RLHF files -> chat messages: a chosen dialogue a line, `{"messages": [...]}`.

Input is the data set's own format, `.jsonl` or `.jsonl.gz`, in which a dialogue is one
string with 'Human:' and 'Assistant:' before the turns. Nothing is tokenized here.
"""

import argparse
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

SPEAKER = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}

Message = dict[str, str]


def messages(dialogue: str) -> list[Message]:
    """The turns of a dialogue, without the space around their text.

    Raises:
        ValueError: the string is not a dialogue of this format.
    """
    before, *parts = SPEAKER.split(dialogue)
    if before.strip() or not parts:
        raise ValueError(
            "a dialogue must start with '\\n\\nHuman:' or '\\n\\nAssistant:'"
        )
    return [
        {"role": ROLES[speaker], "content": text.strip()}
        for speaker, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def is_well_formed(turns: list[Message]) -> bool:
    """User and assistant take turns, the assistant has the last, and all say something.

    A few published dialogues do not: an empty answer would teach the model to end its
    turn at once, and two turns of one speaker are an artefact of the split.
    """
    expected = ["user", "assistant"] * (len(turns) // 2)
    return [turn["role"] for turn in turns] == expected and all(
        turn["content"] for turn in turns
    )


def rows(path: Path) -> Iterator[tuple[str, list[Message]]]:
    """Where a row stands (`file:line`) and its chosen dialogue.

    Raises:
        ValueError: names the file, the line and what is wrong with it.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            lines = file.readlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not a line of JSON: {error}") from error
        chosen = row.get("chosen") if isinstance(row, dict) else None
        if not isinstance(chosen, str):
            raise ValueError(f"{where}: no text under `chosen`, got {chosen!r}.")
        try:
            yield where, messages(chosen)
        except ValueError as error:
            raise ValueError(f"{where}: {error}, got {chosen[:40]!r}.") from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Turn the chosen dialogues of HH-RLHF into chat messages.",
        epilog="Example: hh_rlhf.py harmless-base/train.jsonl.gz --output train.jsonl",
    )
    parser.add_argument("files", nargs="+", type=Path, help=".jsonl or .jsonl.gz files")
    parser.add_argument("--output", required=True, type=Path, help="file to write")
    options = parser.parse_args(arguments)

    kept, left_out = [], []
    try:
        for path in options.files:
            for where, turns in rows(path):
                if is_well_formed(turns):
                    kept.append(json.dumps({"messages": turns}) + "\n")
                else:
                    left_out.append(where)
    except ValueError as error:
        # Nothing is written: half a data set would train without a word.
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("".join(kept), encoding="utf-8")
    print(f"{len(kept)} dialogues written to {options.output}")
    if left_out:
        print(
            f"{len(left_out)} left out, with an empty turn or turns out of order, "
            f"the first at {left_out[0]}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
