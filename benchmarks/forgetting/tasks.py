"""The skills of the first experiment: what the base knows, and the target domain.

Lists of letters or digits with answers that a program can check. Definitions, splits
and tokenizer live here; the quickstart's skill_data.py has the words they are made of.
Nothing is trained here.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate

from skill_data import (
    ARROW,
    EOS,
    LETTERS,
    OPERATIONS,
    PAD,
    SEPARATORS,
    UNK,
    Sample,
    Skill,
    exact,
    is_held_out,
    make_samples,
    make_tokenizer,
)
from transformers import PreTrainedTokenizerFast

DIGITS = tuple(str(digit) for digit in range(10))
MARKS = tuple(SEPARATORS.values())
EQUALS = "="
MAX_TERMS = 5
# The longest answer: five additions with marks between them, and the end.
MAX_NEW_TOKENS = 4 * MAX_TERMS
# The longest prompt, the longest answer.
SEQUENCE_LEN = 32

NUM_TRAIN = 1024
NUM_VALIDATION = 256
NUM_TEST = 512
NUM_FAMILY_PROMPTS = 120
MIN_SKILL_PROMPTS = 6


def _joined(mark: str) -> Callable[[list[str]], list[str]]:
    return lambda words: [words[0], *(x for word in words[1:] for x in (mark, word))]


def _numbered(words: list[str]) -> list[str]:
    return [x for i, word in enumerate(words) for x in (str(i + 1), word)]


# How an answer is to be written: the words that a prompt may open with.
FORMATS: dict[str, Callable[[list[str]], list[str]]] = {
    **{name: _joined(mark) for name, mark in SEPARATORS.items()},
    "bracket": lambda words: ["[", *words, "]"],
    "number": _numbered,
    "twice": lambda words: [x for word in words for x in (word, word)],
}


def _formatted(format_name: str, operation: str) -> Skill:
    write, solve = FORMATS[format_name], OPERATIONS[operation]
    return exact(f"{format_name} {operation}", "format", lambda x: write(solve(x)))


def _total(digits: Sequence[str]) -> list[str]:
    return [str(sum(map(int, digits)))]


def _gap(digits: Sequence[str]) -> list[str]:
    return [str(abs(int(digits[0]) - int(digits[-1])))]


def _number_skill(
    name: str, solve: Callable[[Sequence[str]], list[str]], sizes: tuple[int, int]
) -> Skill:
    return exact(name, "arithmetic", solve, items=DIGITS, sizes=sizes)


EARLIER_SKILLS = (
    *(exact(name, "list", solve) for name, solve in OPERATIONS.items()),
    *(_formatted(name, operation) for name in FORMATS for operation in OPERATIONS),
    _number_skill("sum", _total, (2, 4)),
    _number_skill("gap", _gap, (2, 4)),
    _number_skill("max", lambda x: [max(x)], (2, 5)),
    _number_skill("min", lambda x: [min(x)], (2, 5)),
    # Several right answers: here the base itself has entropy to lose.
    Skill(
        "pick",
        "choice",
        lambda x, rng: [rng.choice(x)],
        lambda x, answer: len(answer) == 1 and answer[0] in x,
    ),
    Skill(
        "shuffle",
        "choice",
        lambda x, rng: rng.sample(x, len(x)),
        lambda x, answer: sorted(answer) == sorted(x),
    ),
)
FAMILIES = tuple(dict.fromkeys(skill.family for skill in EARLIER_SKILLS))


def _chain(
    digits: Sequence[str], rng: random.Random, between: Sequence[str]
) -> list[str]:
    """Adds the digits up one by one, in any order, with any mark after a step."""
    total, words = 0, []
    for i, digit in enumerate(rng.sample(digits, len(digits))):
        total += int(digit)
        words += [rng.choice(MARKS)] * (i > 0) + [digit, *between, str(total)]
    return words


def check_chain(digits: Sequence[str], answer: Sequence[str]) -> bool:
    """Whether every digit is added once and every running total is right."""
    words = [word for word in answer if word != EQUALS]
    added, totals, marks = words[::3], words[1::3], words[2::3]
    running = accumulate(int(digit) for digit in added if digit in DIGITS)
    return (
        sorted(added) == sorted(digits)
        and totals == [str(total) for total in running]
        and len(marks) == len(added) - 1
        and all(mark in MARKS for mark in marks)
    )


def _chain_skill(between: Sequence[str]) -> Skill:
    return Skill(
        "show",
        "target",
        lambda x, rng: _chain(x, rng, between),
        check_chain,
        items=DIGITS,
        sizes=(3, MAX_TERMS),
    )


# The target domain: `show 3 5 4 -> 5 = 5 + 3 = 8 - 4 = 12`. The order of the digits and
# the marks are free, so answers have real spread; the totals are not.
TARGET = _chain_skill((EQUALS,))
# The base knows the domain a little, as a pretrained model does, and writes it another
# way: without the equals sign, which it never saw. Three shares of its mixture.
TARGET_OF_BASE = _chain_skill(())
BASE_SKILLS = (*EARLIER_SKILLS, *(3 * [TARGET_OF_BASE]))


def vocabulary() -> list[str]:
    """Every word of every prompt and answer; a word's place is its token id."""
    names = {word for skill in BASE_SKILLS for word in skill.name.split()}
    numbers = [str(n) for n in range(sum(sorted(map(int, DIGITS))[-MAX_TERMS:]) + 1)]
    specials = [PAD, EOS, UNK, ARROW, EQUALS, *MARKS, "[", "]"]
    return [*specials, *LETTERS, *numbers, *sorted(names)]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    return make_tokenizer(vocabulary())


def train_samples(seed: int, num_samples: int = NUM_TRAIN) -> list[Sample]:
    """Demonstrations of the target domain for fine-tuning."""
    return make_samples(TARGET, num_samples, seed, held_out=False)


def validation_samples() -> list[Sample]:
    """For choosing learning rates and checkpoints; in no training, in no test."""
    return _held_out()[NUM_TEST:]


def test_samples() -> list[Sample]:
    """What is reported; in no training, in no choice."""
    return _held_out()[:NUM_TEST]


def _held_out() -> list[Sample]:
    return make_samples(TARGET, NUM_TEST + NUM_VALIDATION, 0, held_out=True)


def earlier_samples() -> list[Sample]:
    """Held-out prompts of every earlier skill, about as many of each family."""
    num_skills = Counter(skill.family for skill in EARLIER_SKILLS)
    return [
        sample
        for skill in EARLIER_SKILLS
        for sample in make_samples(
            skill,
            max(NUM_FAMILY_PROMPTS // num_skills[skill.family], MIN_SKILL_PROMPTS),
            0,
            held_out=True,
        )
    ]


def check_no_leak(train: Sequence[Sample], *held_out: Sequence[Sample]) -> None:
    """Training and held-out prompts have no list in common, whatever the skill.

    Raises:
        ValueError: names the first list that is in both.
    """
    seen = {sample.letters for sample in train}
    for sample in (sample for part in held_out for sample in part):
        if sample.letters in seen or not is_held_out(sample.letters):
            raise ValueError(
                f"the held-out prompt {sample.instruction!r} may be in training."
            )
    for sample in train:
        if is_held_out(sample.letters):
            raise ValueError(f"the training prompt {sample.instruction!r} is held out.")
