"""Bad rows: an error that names file and row, before Axolotl reads the file."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_psft.data_files import DataFileError, check, check_file
from tests.tiny import PROMPT

GOOD = b'{"instruction": "w1", "output": "w2"}'


def write(path: Path, *rows: bytes) -> Path:
    path.write_bytes(b"\n".join(rows) + b"\n")
    return path


@pytest.mark.parametrize(
    "row, message",
    [
        (b'{"output": "w', r"not JSON: Unterminated string .* at line 1, column 12"),
        (b"w1 w2", r"not JSON: Expecting value at line 1, column 1, got 'w1 w2"),
        (b'{"output": "\xff"}', r"not UTF-8, byte 0xff at position 13\. Save"),
        (b"[1, 2]", r"a row must be an object of columns, got \[1, 2\]\. Mend"),
        (b"null", r"a row must be an object of columns, got None"),
        (b'{"output": 3}', r"`output` must be text, got 3\. Write it in quotes"),
        (b'{"output": ["w1"]}', r"`output` must be text, got \['w1'\]"),
        (b"[" * 100_000, r"nested too deeply|not JSON"),
    ],
)
def test_the_row_is_named(row: bytes, message: str, tmp_path: Path) -> None:
    # A blank line is no row, but counts as a line: editors count so.
    path = write(tmp_path / "train.jsonl", GOOD, b"", row, GOOD)
    with pytest.raises(DataFileError, match=message) as caught:
        check_file(path, ["instruction", "output"])
    assert str(caught.value).startswith(f"{path}:3: ")


def test_an_array_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"output": "w1"}, {"output": "w2"}], indent=1))
    assert check_file(path, ["output"]) == 2
    path.write_text(json.dumps([{"output": "w1"}, {"output": 2}]))
    with pytest.raises(DataFileError, match=r"train\.json, row 2: `output` must be"):
        check_file(path, ["output"])


def test_what_is_fine(tmp_path: Path) -> None:
    rows = [
        "\N{BYTE ORDER MARK}".encode() + GOOD,
        b'{"instruction": null}',
        b'{"other": 3}',
        b"   ",
    ]
    path = write(tmp_path / "train.jsonl", *rows)
    assert check_file(path, ["instruction", "output"]) == 3


def test_an_empty_file(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", b"", b" ")
    with pytest.raises(DataFileError, match=r"train\.jsonl: no rows\. Remove it"):
        check_file(path)


def test_every_local_file_of_a_configuration(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", GOOD, GOOD)
    more = write(tmp_path / "more.jsonl", GOOD)
    test = write(tmp_path / "test.jsonl", b'{"output": 1}')
    entry = {"path": str(train), "type": PROMPT}
    files = {"path": "json", "data_files": [str(more), str(train)], "type": PROMPT}
    assert check({"datasets": [entry]}) == 2
    assert check({"datasets": [entry, files]}) == 5
    assert check({}) == 0
    # Rows on a hub cannot be counted; what is local is checked all the same.
    assert check({"datasets": [entry, {"path": "org/data", "type": "alpaca"}]}) == 0
    with pytest.raises(DataFileError, match=r"test\.jsonl:1: `output` must be text"):
        check(
            {
                "datasets": [entry],
                "test_datasets": [{"path": str(test), "type": PROMPT}],
            }
        )


@settings(max_examples=1500, deadline=None)
@given(st.binary(max_size=60).filter(lambda row: b"\n" not in row and b"\r" not in row))
def test_thousands_of_random_rows(
    tmp_path_factory: pytest.TempPathFactory, row: bytes
) -> None:
    """A row is accepted as an object with text, or refused by file and line."""
    path = write(tmp_path_factory.getbasetemp() / "random.jsonl", GOOD, row)
    _accepted_or_named(path, row)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["instruction", "output"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=1000, deadline=None)
@given(_VALUES)
def test_thousands_of_rows_of_random_types(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.jsonl"
    row = json.dumps(value).encode()
    _accepted_or_named(write(path, GOOD, row), row)


def _accepted_or_named(path: Path, row: bytes) -> None:
    try:
        num_rows = check_file(path, ["instruction", "output"])
    except DataFileError as error:
        assert str(error).startswith(f"{path}:2: ")
        return
    if not row.strip():
        assert num_rows == 1
        return
    value = json.loads(row)
    assert num_rows == 2
    assert isinstance(value, dict)
    for field in ("instruction", "output"):
        assert value.get(field) is None or isinstance(value[field], str)
