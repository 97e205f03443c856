"""Skills on short lists of letters, with answers that a program can check.

The skills, their samples and their tokenizer live here, and nothing that trains,
generates or knows Axolotl: larger experiments import the same definitions.
"""

import random
import string
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = string.ascii_lowercase[:16]
MIN_LETTERS, MAX_LETTERS = 3, 5
ARROW = "->"
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
# One list of letters in this many is kept for tests, for every skill alike.
HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class Skill:
    """A task on a list of distinct letters, or of other items.

    Attributes:
        name: the words that a prompt opens with.
        family: the operation, whatever the answer is written like.
        solve: (letters, rng) -> one valid answer; the rng has a say only where several
            answers are valid.
        check: (letters, answer) -> whether the answer is valid.
        items: what a list is drawn from.
        sizes: fewest and most items of a list.
    """

    name: str
    family: str
    solve: Callable[[Sequence[str], random.Random], list[str]]
    check: Callable[[Sequence[str], Sequence[str]], bool]
    items: Sequence[str] = LETTERS
    sizes: tuple[int, int] = (MIN_LETTERS, MAX_LETTERS)


@dataclass(frozen=True)
class Sample:
    """One prompt with one of its valid answers."""

    skill: Skill
    letters: tuple[str, ...]
    answer: tuple[str, ...]

    @property
    def instruction(self) -> str:
        return " ".join((self.skill.name, *self.letters, ARROW))

    @property
    def output(self) -> str:
        return " ".join(self.answer)


def _swap_ends(letters: Sequence[str]) -> list[str]:
    return [letters[-1], *letters[1:-1], letters[0]]


def _successors(letters: Sequence[str]) -> list[str]:
    return [LETTERS[(LETTERS.index(x) + 1) % len(LETTERS)] for x in letters]


Operation = Callable[[Sequence[str]], list[str]]
OPERATIONS: dict[str, Operation] = {
    "copy": list,
    "reverse": lambda letters: list(letters[::-1]),
    "sort": sorted,
    "swap": _swap_ends,
    "next": _successors,
}
SEPARATORS = {"dash": "-", "plus": "+", "slash": "/", "star": "*"}


def exact(name: str, family: str, solve: Operation, **options: Any) -> Skill:
    """One valid answer, the operation's result: `sort c a b -> a b c`."""
    return Skill(
        name=name,
        family=family,
        solve=lambda letters, rng: solve(letters),
        check=lambda letters, answer: list(answer) == solve(letters),
        **options,
    )


def _separated(style: str, operation: str, marks: Sequence[str]) -> Skill:
    """The result with a mark, any of `marks`, between two letters.

    One mark makes one valid answer: `dash sort c a b -> a - b - c`.
    """
    solve = OPERATIONS[operation]

    def answer_with(letters: Sequence[str], rng: random.Random) -> list[str]:
        first, *rest = solve(letters)
        return [first, *(x for letter in rest for x in (rng.choice(marks), letter))]

    def check(letters: Sequence[str], answer: Sequence[str]) -> bool:
        return (
            list(answer[::2]) == solve(letters)
            and len(answer) == 2 * len(letters) - 1
            and all(mark in marks for mark in answer[1::2])
        )

    return Skill(f"{style} {operation}", operation, answer_with, check)


BASE_SKILLS = (
    *(exact(name, name, operation) for name, operation in OPERATIONS.items()),
    *(
        _separated(style, operation, (mark,))
        for style, mark in SEPARATORS.items()
        for operation in OPERATIONS
    ),
)

# What fine-tuning adds: `mix sort c a b -> a + b - c`, with marks chosen freely. Each
# mark is a choice among four equally good ones, so a model that is sure of it has
# memorized its samples. "mix" is a word that the base never saw.
NEW_SKILL = _separated("mix", "sort", tuple(SEPARATORS.values()))


def is_held_out(letters: Sequence[str]) -> bool:
    """Whether this list of letters is for tests only."""
    return zlib.crc32("".join(letters).encode()) % HELD_OUT_EVERY == 0


def make_sample(skill: Skill, rng: random.Random, *, held_out: bool) -> Sample:
    """Draws letters from the asked side of the train/test split, and an answer."""
    while True:
        letters = rng.sample(skill.items, rng.randint(*skill.sizes))
        if is_held_out(letters) == held_out:
            answer = skill.solve(letters, rng)
            return Sample(skill, tuple(letters), tuple(answer))


def make_samples(
    skill: Skill, num_samples: int, seed: int, *, held_out: bool
) -> list[Sample]:
    """Samples with pairwise different prompts, the same for the same seed."""
    rng = random.Random(f"{skill.name}/{seed}/{held_out}")
    samples: dict[tuple[str, ...], Sample] = {}
    while len(samples) < num_samples:
        sample = make_sample(skill, rng, held_out=held_out)
        samples.setdefault(sample.letters, sample)
    return list(samples.values())


def vocabulary() -> list[str]:
    """Every word of every prompt and answer; a word's place is its token id."""
    names = {word for s in (*BASE_SKILLS, NEW_SKILL) for word in s.name.split()}
    return [PAD, EOS, UNK, ARROW, *SEPARATORS.values(), *LETTERS, *sorted(names)]


def make_tokenizer(words: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """One token a word; words are separated by spaces; nothing is added by itself."""
    vocab = {word: i for i, word in enumerate(words or vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK
    )
