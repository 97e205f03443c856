"""Bad rows: an error that names file and row, before Axolotl reads the file."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axolotl_psft.doctor.files import DataFileError, check, check_file
from axolotl_psft.doctor.rows import Chat, Text, rule_of
from tests.tiny import PROMPT, WORDS, write_tokenizer

GOOD = b'{"instruction": "w1", "output": "w2"}'
TEXT = Text(optional=("instruction", "output"))
CHAT = {"type": "chat_template"}
COMPLETION = {"type": "completion"}
FLAGS = {"message_field_training": "train", "message_field_training_detail": "detail"}
USER, ANSWER = ({"role": r, "content": "w1"} for r in ("user", "assistant"))
GOOD_CHAT = json.dumps({"messages": [USER, ANSWER]}).encode()


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
        (b'{"output": "a\\ud800"}', r"`output` has half of a surrogate pair, '.ud800'"),
    ],
)
def test_the_row_is_named(row: bytes, message: str, tmp_path: Path) -> None:
    # A blank line is no row, but counts as a line: editors count so.
    path = write(tmp_path / "train.jsonl", GOOD, b"", row, GOOD)
    with pytest.raises(DataFileError, match=message) as caught:
        check_file(path, TEXT)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_an_array_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"output": "w1"}, {"output": "w2"}], indent=1))
    assert check_file(path, TEXT) == 2
    path.write_text(json.dumps([{"output": "w1"}, {"output": 2}]))
    with pytest.raises(DataFileError, match=r"train\.json, row 2: `output` must be"):
        check_file(path, TEXT)


def test_what_is_fine(tmp_path: Path) -> None:
    rows = [
        "\N{BYTE ORDER MARK}".encode() + GOOD,
        b'{"instruction": null}',
        b'{"other": 3}',
        b"   ",
    ]
    path = write(tmp_path / "train.jsonl", *rows)
    assert check_file(path, TEXT) == 3


def test_an_empty_file(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", b"", b" ")
    with pytest.raises(DataFileError, match=r"train\.jsonl: no rows\. Remove it"):
        check_file(path)


def test_every_local_file_of_a_configuration(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", GOOD, GOOD)
    more = write(tmp_path / "more.jsonl", GOOD)
    test = write(tmp_path / "test.jsonl", b'{"instruction": "w1", "output": 1}')
    entry = {"path": str(train), "type": PROMPT}
    files = {"path": "json", "data_files": [str(more), str(train)], "type": PROMPT}
    assert check({"datasets": [entry]}).num_rows == 2
    assert check({"datasets": [entry, files]}).num_rows == 5
    assert (
        check({"datasets": [{**files, "data_files": f"{tmp_path}/m*"}]}).num_rows == 1
    )
    assert check({}).num_rows == 0
    # Rows on a hub, or those of a part, are not counted; local ones are all checked.
    for other in (
        {"path": "org/data", "type": "alpaca"},
        {**entry, "shards": 2},
        {**entry, "split": "train[:1]"},
    ):
        assert check({"datasets": [entry, other]}).num_rows == 0
    with pytest.raises(DataFileError, match=r"test\.jsonl:1: `output` must be text"):
        check(
            {
                "datasets": [entry],
                "test_datasets": [{"path": str(test), "type": PROMPT}],
            }
        )


# ---- Columns of text ----


@pytest.mark.parametrize(
    "entry, row",
    [
        ({"type": "alpaca"}, {"output": "w1"}),
        ({"type": "alpaca:chat"}, {"instruction": None, "output": "w1"}),
        ({"type": "alpaca_w_system.load_open_orca"}, None),
        ({"type": PROMPT}, {"output": "w1"}),
        ({"type": {"field_output": "answer"}}, {"answer": "w1"}),
        ({"type": {"field_instruction": "q", "format": "{instruction}"}}, {"q": None}),
        ({"type": {"format": "{input}", "no_input_format": "w1"}}, None),
    ],
)
def test_a_prompt_never_says_none(entry: Any, row: Any) -> None:
    rule = rule_of(entry)
    if row is None:
        rule("here", {"output": "w1"})  # not known, or not part of the prompt
        return
    with pytest.raises(DataFileError, match=r"here: `\w+` is missing or null, and the"):
        rule("here", row)


@pytest.mark.parametrize(
    "entry, column",
    [
        ({"type": "alpaca"}, "output"),
        ({"type": "alpaca"}, "input"),
        ({"type": "alpaca_w_system.load"}, "system"),
        ({"type": {"field_output": "answer"}}, "answer"),
        ({"type": {}}, "system"),
        (COMPLETION, "text"),
        ({**COMPLETION, "field": "body"}, "body"),
    ],
)
def test_columns_hold_text_or_nothing(entry: Any, column: str) -> None:
    rule = rule_of(entry)
    for value in ("w1", "", None):
        rule("here", {"instruction": "w1", column: value})
    for bad in (3, 0.5, False, ["w1"], {"a": "w1"}):
        with pytest.raises(DataFileError, match=f"here: `{column}` must be text, got"):
            rule("here", {"instruction": "w1", column: bad})


# ---- Conversations ----


def chat_row(*messages: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"conversations": []}, r"`messages` is missing or null; the row has \['conv"),
        ({"messages": None}, r"`messages` is missing or null; .* Set field_messages"),
        ({"messages": "w1"}, r"`messages` is a text that is not JSON, got 'w1'"),
        ({"messages": "{}"}, r"`messages` must be a list of at least one message, got"),
        ({"messages": {"role": "user"}}, r"must be a list of at least one message"),
        ({"messages": 3}, r"must be a list of at least one message, got 3"),
        ({"messages": []}, r"must be a list of at least one message, got \[\]"),
        (chat_row("w1"), r"message 1 must be an object with `role` and `content`"),
        (chat_row(USER, None), r"message 2 must be an object with `role` and"),
        (chat_row(USER, {"content": "w1"}), r"message 2 has no `role`, got None; it"),
        (chat_row(USER, {**ANSWER, "role": 1}), r"message 2 has no `role`, got 1; it"),
        (chat_row(USER, {**ANSWER, "role": ""}), r"message 2 has no `role`, got ''"),
        (chat_row(USER, {"role": "user"}), r"`content` of message 2 is missing or nul"),
        (chat_row({**USER, "content": None}), r"`content` of message 1 is missing or"),
        (chat_row({**USER, "tool_calls": [], "content": None}), r"`content` of messag"),
        (chat_row({**USER, "content": 5}), r"`content` of message 1 must be text, got"),
        (chat_row({**USER, "content": {}}), r"`content` of message 1 must be text, go"),
        (chat_row({**USER, "content": ["w1"]}), r"is a list, of which each part must"),
        (chat_row({**USER, "content": [{"text": 5}]}), r"`text` in .* must be text"),
        (chat_row({**USER, "content": "\ud83d"}), r"half of a surrogate pair"),
        (chat_row(USER, system=5), r"`system` must be text, got 5"),
        (chat_row(USER, tools={}), r"`tools` must be a list, got \{\}"),
        (chat_row(USER, tools="w1"), r"`tools` is a text that is not JSON"),
        (chat_row({**USER, "train": "false"}), r"`train` of message 1 must be true or"),
        (
            chat_row({**USER, "detail": [{"train": 1}]}),
            r"`detail` of message 1 must",
        ),
    ],
)
def test_a_conversation_at_fault_is_named(
    row: Any, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "chat.jsonl", GOOD_CHAT, json.dumps(row).encode())
    with pytest.raises(DataFileError, match=message) as caught:
        check_file(path, rule_of({**CHAT, **FLAGS}))
    assert str(caught.value).startswith(f"{path}:2: ")


def test_what_is_fine_in_a_conversation() -> None:
    rule = rule_of({**CHAT, **FLAGS})
    detail = [{"begin_offset": 0, "end_offset": 1, "train": True}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}
    parts = [{"type": "text", "text": "w1"}, {"value": "w2"}, {"type": "text"}]
    for row in (
        chat_row(USER, ANSWER, system="", tools=[]),
        chat_row(USER, call, {"role": "tool", "content": ""}, tools="[]", system="w1"),
        chat_row({**USER, "content": parts}, {**ANSWER, "train": False}, system="w1"),
        chat_row(USER, {**ANSWER, "detail": detail}, system="w1"),
        {"messages": json.dumps([USER, ANSWER]), "system": "w1"},
        # One of its own: `system` is not looked at.
        chat_row({"role": "system", "content": "w1"}, USER, system=None),
    ):
        rule("here", row)


def test_names_of_fields_are_the_configurations() -> None:
    entry = {
        **CHAT,
        "field_messages": "conversations",
        "message_property_mappings": {"role": "from", "content": "value"},
    }
    rule = rule_of(entry)
    rule("here", {"conversations": [{"from": "human", "value": "w1"}]})
    with pytest.raises(DataFileError, match=r"`conversations` is missing or null"):
        rule("here", chat_row(USER))
    with pytest.raises(DataFileError, match=r"message 1 has no `from`, got None; it h"):
        rule("here", {"conversations": [USER]})
    with pytest.raises(DataFileError, match=r"`value` of message 1 is missing or null"):
        rule("here", {"conversations": [{"from": "human", "content": "w1"}]})


@pytest.mark.parametrize("first_has_it", [True, False])
def test_a_system_prompt_in_some_rows_only(first_has_it: bool) -> None:
    rows = [chat_row(USER, system="w1"), chat_row(USER, system=None)]
    rule = rule_of(CHAT)
    rule("row 1", rows[not first_has_it])
    without = "row 2" if first_has_it else "row 1"
    with pytest.raises(DataFileError, match=f"^{without}: `system` is missing or null"):
        rule("row 2", rows[first_has_it])


def test_unknown_roles_are_counted(tmp_path: Path) -> None:
    typo = json.dumps(chat_row(USER, {**ANSWER, "role": "asistant"})).encode()
    path = write(tmp_path / "chat.jsonl", GOOD_CHAT, typo, typo)
    entry = {**CHAT, "path": str(path), "roles_to_train": ["assistant", "critic"]}
    (note,) = check({"datasets": [entry]}).notes
    assert note.startswith(
        f"{path}:2, message 2: role 'asistant' (2 messages) is none of assistant, criti"
    )
    mapped = {**entry, "roles": {"assistant": ["asistant", "assistant"]}}
    assert check({"datasets": [mapped]}).notes == []
    # A mapping to system counts as one.
    rule = rule_of({**CHAT, "roles": {"system": ["sys"]}})
    rule("here", chat_row({"role": "sys", "content": "w1"}, system=3))


# ---- Other kinds of files ----


def parquet(path: Path, **columns: Any) -> None:
    pa.parquet.write_table(pa.table(columns), path)


def arrow(path: Path, **columns: Any) -> None:
    table = pa.table(columns)
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)


def not_utf8() -> Any:
    """A column of two texts, the second of which is the bytes FF FE."""
    offsets = pa.array([0, 2, 4], pa.int32()).buffers()[1]
    return pa.Array.from_buffers(
        pa.string(), 2, [None, offsets, pa.py_buffer(b"w1\xff\xfe")]
    )


TEXTS = ["w1", "w2"]
TABLES: list[tuple[str, Any, Any, str]] = [
    ("csv", PROMPT, b"instruction,output\nw1,\n,w2\n", r", row 2: `instruction` is"),
    ("csv", PROMPT, b"instruction,output\nw1,5\n", r", row 1: `output` must be text"),
    ("csv", PROMPT, b"instruction,output\nw1,w2\nw1,\xff\n", r":3: not UTF-8, byte 0x"),
    ("csv", PROMPT, b"instruction,output\nw1,w2,\n", r", row 1: more fields than the"),
    ("csv", PROMPT, b"instruction,output\nw1,w2\nw1,w2,w3\n", r"fields in line 3, saw"),
    ("csv", PROMPT, b"", r": not readable as csv after row 0: No columns to parse"),
    ("txt", "completion", b"w1\n\nw2\xff\n", r":3: not UTF-8, byte 0xff at position 3"),
    ("txt", "completion", b"", r": no rows"),
    ("parquet", PROMPT, {"instruction": ["w1", None]}, r", row 2: `instruction` is"),
    ("parquet", PROMPT, {"instruction": TEXTS, "output": [1, 2]}, r", row 1: `output`"),
    ("parquet", PROMPT, b"PAR1 and so on", r": not readable as parquet after row 0: P"),
    ("parquet", PROMPT, {"instruction": not_utf8()}, r": not readable .*'utf-8' codec"),
    ("arrow", PROMPT, {"instruction": ["w1", None]}, r", row 2: `instruction` is miss"),
    (
        "arrow",
        PROMPT,
        {"instruction": not_utf8()},
        r": not readable .*Invalid UTF8",
    ),
    ("arrow", PROMPT, b"ARROW1 and so on", r": not readable as arrow after row 0: "),
    ("arrow", "chat_template", {"messages": [[USER], []]}, r", row 2: `messages` mus"),
]


@pytest.mark.parametrize("suffix, kind, content, message", TABLES)
def test_rows_of_other_files_are_named(
    suffix: str, kind: Any, content: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / f"train.{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        {"parquet": parquet, "arrow": arrow}[suffix](path, **content)
    with pytest.raises(DataFileError, match=message) as caught:
        check({"datasets": [{"path": str(path), "type": kind}]})
    assert str(caught.value).startswith(f"{path}")


def test_good_rows_of_other_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction,output\nw1,w2\nw3,\n")
    # What Axolotl reads by its name alone.
    (tmp_path / "b.data").write_bytes(GOOD + b"\n")
    (tmp_path / "c.txt").write_text("w1,w2\n" * 2500)
    parquet(tmp_path / "d.parquet", instruction=TEXTS * 600, output=TEXTS * 600)
    arrow(tmp_path / "e.arrow", instruction=TEXTS, output=TEXTS)
    (tmp_path / "f.jsonl.gz").write_bytes(b"\x1f\x8b is not read")
    numbers = {"a.csv": 2, "b.data": 1, "c.txt": 2500, "d.parquet": 1200, "e.arrow": 2}
    for name, number in (numbers | {"f.jsonl.gz": 0}).items():
        kind = "completion" if name == "c.txt" else PROMPT
        entry = {"path": str(tmp_path / name), "type": kind}
        assert check({"datasets": [entry]}).num_rows == number, name
    as_csv = {"path": str(tmp_path / "c.txt"), "type": COMPLETION["type"]}
    # The first line names the columns.
    assert check({"datasets": [{**as_csv, "ds_type": "csv"}]}).num_rows == 2499


# ---- Random rows ----


@settings(max_examples=1000, deadline=None)
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


@settings(max_examples=700, deadline=None)
@given(_VALUES)
def test_thousands_of_rows_of_random_types(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.jsonl"
    row = json.dumps(value).encode()
    _accepted_or_named(write(path, GOOD, row), row)


def _accepted_or_named(path: Path, row: bytes) -> None:
    try:
        num_rows = check_file(path, TEXT)
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


def _some(*values: Any) -> Any:
    """Mostly what is right, else any of random types."""
    return st.one_of(*map(st.just, values), *map(st.just, values), _VALUES)


_CONTENTS = _some("w1 w2", "", None) | st.lists(
    st.fixed_dictionaries({}, optional={"text": _some("w3"), "value": _some("w4")})
    | _VALUES,
    max_size=2,
)
_MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": _some("user", "assistant", "system", "human", "asistant"),
        "content": _CONTENTS,
        "tool_calls": st.just([]),
        "train": _some(True, False),
    },
)
_ROWS = st.fixed_dictionaries(
    {}, optional={"messages": st.lists(_MESSAGES | _VALUES, max_size=3) | _VALUES}
)


@pytest.fixture(scope="module")
def strategy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Axolotl's own reading of a conversation, by a template that any role suits."""
    from axolotl.prompt_strategies import chat_template

    template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }} {{ eos_token }} "
        "{% endfor %}"
    )
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    prompter = chat_template.ChatTemplatePrompter(
        tokenizer, template, message_field_training="train"
    )
    return chat_template.ChatTemplateStrategy(
        prompter, tokenizer, False, 64, ["assistant"], "turn"
    )


@settings(max_examples=1000, deadline=None)
@given(_ROWS)
def test_thousands_of_random_conversations(strategy: Any, row: Any) -> None:
    """A conversation is refused, or Axolotl reads it and no prompt says None."""
    rule = rule_of({**CHAT, "message_field_training": "train"})
    assert isinstance(rule, Chat)
    try:
        rule("here", row)
    except DataFileError as error:
        assert str(error).startswith("here: ")
        return
    sample = strategy.tokenize_prompt({"messages": [row["messages"]]})
    (ids,), (labels,) = sample["input_ids"], sample["labels"]
    text = strategy.prompter.build_prompt_text(
        strategy.get_conversation_thread({"messages": row["messages"]})
    )
    assert len(ids) == len(labels)
    assert "None" not in text and "[" not in text
    # Trained on: words of an assistant's turn and its end, and nothing else.
    expected = {i for i, x in enumerate(labels) if x != -100}
    assert all(labels[i] == ids[i] for i in expected)
    trained = [
        m["role"] == "assistant" if m.get("train") is None else m["train"] in (True, 1)
        for m in row["messages"]
    ]
    assert bool(expected) <= any(trained)
    words = strategy.tokenizer.convert_ids_to_tokens([ids[i] for i in expected])
    assert {*words} <= {*WORDS, "<eos>", "<unk>"}
