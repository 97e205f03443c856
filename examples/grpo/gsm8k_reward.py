"""GRPO on GSM8K: the prompts and a reward that checks the final answer.

Axolotl finds `gsm8k_reward.prompts` and `gsm8k_reward.right_answer` by these names,
with this folder on PYTHONPATH. Needs nothing but the standard library.
"""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

# The last line of every GSM8K answer, and of what a model trained on them writes.
_FINAL_LINE = re.compile(r"####[ \t]*\$?(-?)\$?(\d[\d,]*(?:\.\d+)?|\.\d+)\.?")

Completion = str | Sequence[dict[str, str]]


def final_answer(text: str) -> Decimal | None:
    """The number after '####' in the last line; None if that line is anything else.

    One place only, and the last: a text that lists many numbers must not be paid for
    the one that happens to be right.
    """
    lines = text.strip().splitlines()
    found = _FINAL_LINE.fullmatch(lines[-1].strip()) if lines else None
    if found is None or text.count("####") > 1:
        return None
    sign, digits = found.groups()
    return Decimal(sign + digits.replace(",", ""))


def right_answer(
    completions: Sequence[Completion], answer: Sequence[str], **_: Any
) -> list[float]:
    """1.0 where a completion ends in the right number, else 0.0.

    Args:
        completions: texts, or chats whose last message is the completion.
        answer: the data set's answers to the same prompts, solution and all.

    Raises:
        ValueError: an answer of the data set has no final number.
    """
    rewards = []
    for completion, solution in zip(completions, answer, strict=True):
        expected = final_answer(solution)
        if expected is None:
            raise ValueError(
                "gsm8k_reward.right_answer: an `answer` must end in a line "
                f"'#### number', got {solution[-80:]!r}."
            )
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        rewards.append(float(final_answer(text) == expected))
    return rewards


def prompts(cfg: Any, **_: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What Axolotl maps over the rows: `question` to a chat of one turn."""

    def prompt(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": [{"role": "user", "content": row["question"]}]}

    return prompt, {"remove_columns": ["question"]}
