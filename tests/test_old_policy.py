"""The window: collecting micro-batches, handing out steps.

Its file is in test_window_file.py, what scoring gives in test_trainer.py.
"""

from typing import Any

import pytest

from axolotl_psft.old_policy import Step, Window, collect


def shape(steps: list[Step]) -> list[list[int]]:
    return [[batch["i"] for batch in step.batches] for step in steps]


@pytest.mark.parametrize(
    "available, expected",
    [
        (9, [[0, 1, 2], [3, 4, 5]]),
        (6, [[0, 1, 2], [3, 4, 5]]),
        (5, [[0, 1, 2], [3, 4]]),
        (3, [[0, 1, 2]]),
        (0, []),
    ],
)
def test_collect_takes_steps_of_micro_batches(available, expected):
    source = iter([{"i": i} for i in range(available)])
    assert shape(collect(source, num_steps=2, num_batches=3)) == expected
    # Not one more than it returns: what is left is the next window's.
    taken = sum(map(len, expected))
    assert [batch["i"] for batch in source] == list(range(taken, available))


def test_collect_nothing():
    source = iter([{"i": 0}])
    assert collect(source, 0, 3) == []
    assert next(source) == {"i": 0}


class Counting:
    """A scorer that does nothing but say what it was given."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.scored: list[Any] = []

    def count_tokens(self, steps: list[Step]) -> None:
        self.begun.append(shape(steps))

    def check_once(self, input_ids: Any) -> None:
        pass

    def attach(self, batches: list[Any]) -> None:
        self.scored.append([batch["i"] for batch in batches])


def test_a_window_hands_out_its_steps_and_collects_the_next() -> None:
    scorer: Any = Counting()
    source = iter([{"i": i, "input_ids": None} for i in range(7)])
    window = Window(2, lambda step: 1 if step < 10 else 2, scorer)
    handed, starts = [], []
    for global_step in range(9, 14):
        step = window.next_step(source, global_step)
        handed.append([batch["i"] for batch in step.batches])
        starts.append(window.start_step)
    # A warm-up window of one, one of two, one that the data cut short, and then none.
    assert scorer.begun == [[[0, 1]], [[2, 3], [4, 5]], [[6]]]
    # Of the first step of a window the old policy is the training pass's own.
    assert scorer.scored == [[], [4, 5], []]
    assert handed == [[0, 1], [2, 3], [4, 5], [6], []]
    assert starts == [9, 10, 10, 12, 13]


def test_of_a_stream_what_does_not_fill_a_step_is_left_out() -> None:
    scorer: Any = Counting()
    source = iter([{"i": i, "input_ids": None} for i in range(5)])
    window = Window(2, lambda step: 4, scorer, is_stream=True)
    assert shape([window.next_step(source, 0), window.next_step(source, 1)]) == [
        [0, 1],
        [2, 3],
    ]
    assert window.next_step(source, 2).batches == []
