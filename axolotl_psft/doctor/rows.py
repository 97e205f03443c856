"""What a row of a data file must hold, by the prompt format that reads it.

Only what Axolotl would answer with an error that names no row, or train on as something
else than it is. Where rows come from is files.py; standard library only.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

# A row and where it is, for the error; raises DataFileError.
Rule = Callable[[str, Mapping[str, Any]], None]

# Axolotl's keys for the columns of a custom prompt; also the columns' names where a key
# is not set.
_CUSTOM = ("field_system", "field_instruction", "field_input", "field_output")
# Named formats that would say "None" without an instruction.
_ALPACA = ("alpaca", "alpaca_chat.load", "alpaca_instruct.load", "alpaca_w_system.load")
_ROLES = ("human", "user", "assistant", "gpt", "system", "tool")
_FLAGS = (True, False, 0, 1)
_MEND = "Mend or remove the row"


class DataFileError(ValueError):
    """A row of a data file that cannot be trained on; names file, row and remedy."""

    def __init__(self, where: object, what: str, remedy: str) -> None:
        super().__init__(f"{where}: {what}. {remedy}.")


class Text:
    """A prompt made of columns of text.

    Args:
        required: columns that must hold text.
        optional: columns that hold text or nothing.
    """

    def __init__(
        self, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()
    ) -> None:
        self.required, self.optional = required, optional

    def __call__(self, where: str, row: Mapping[str, Any]) -> None:
        for column in (*self.required, *self.optional):
            value = row.get(column)
            if value is not None:
                _check_text(where, f"`{column}`", value)
            elif column in self.required:
                why = f"the prompt would say None; the row has {short(list(row))}"
                what = f"`{column}` is missing or null, and {why}"
                raise DataFileError(where, what, "Write a text, or remove the row")


class Chat:
    """A conversation: a list of messages, each with a role and a content.

    Args:
        dataset: the data set's entry in the YAML.

    Attributes:
        unknown_roles: of each role that nothing is known of, the number of messages and
            where the first is.
    """

    def __init__(self, dataset: Mapping[str, Any]) -> None:
        mappings = dataset.get("message_property_mappings") or {}
        self._messages = dataset.get("field_messages") or "messages"
        self._role = mappings.get("role") or "role"
        self._content = mappings.get("content") or "content"
        self._tool_calls = mappings.get("tool_calls") or "tool_calls"
        self._training = dataset.get("message_field_training")
        self._detail = dataset.get("message_field_training_detail")
        roles = dataset.get("roles") or {}
        self._target = {s: target for target, names in roles.items() for s in names}
        self.known_roles = {*_ROLES, *roles, *self._target}
        self.known_roles |= set(dataset.get("roles_to_train") or ())
        self.unknown_roles: dict[str, tuple[int, str]] = {}
        # Of rows with and without a system prompt, where the first is.
        self._system: dict[bool, str] = {}

    def __call__(self, where: str, row: Mapping[str, Any]) -> None:
        messages = self._list_of_messages(where, row)
        for number, message in enumerate(messages, 1):
            self._check_message(where, f"message {number}", message)
        first = messages[0][self._role]
        if self._target.get(first, first) != "system":
            self._check_system(where, row.get("system"))
        tools = _parsed(where, "`tools`", row.get("tools"))
        if tools is not None and not isinstance(tools, list):
            what = f"`tools` must be a list, got {short(tools)}"
            raise DataFileError(where, what, "Write one, or remove it")

    def _list_of_messages(self, where: str, row: Mapping[str, Any]) -> list[Any]:
        name = f"`{self._messages}`"
        messages = _parsed(where, name, row.get(self._messages))
        if messages is None:
            raise DataFileError(
                where,
                f"{name} is missing or null; the row has {short(list(row))}",
                "Set field_messages to the column of the conversation, or remove the "
                "row",
            )
        if not isinstance(messages, list) or not messages:
            what = f"a list of at least one message, got {short(messages)}"
            raise DataFileError(where, f"{name} must be {what}", _MEND)
        return messages

    def _check_message(self, where: str, which: str, message: Any) -> None:
        if not isinstance(message, Mapping):
            keys = f"`{self._role}` and `{self._content}`"
            what = f"must be an object with {keys}, got {short(message)}"
            raise DataFileError(where, f"{which} {what}", _MEND)
        role = message.get(self._role)
        if not isinstance(role, str) or not role:
            raise DataFileError(
                where,
                f"{which} has no `{self._role}`, got {short(role)}; it has "
                f"{short(list(message))}",
                "Write user, assistant or system, or name the key of the role in "
                "message_property_mappings",
            )
        if role not in self.known_roles:
            number, first = self.unknown_roles.get(role, (0, f"{where}, {which}"))
            self.unknown_roles[role] = (number + 1, first)
        self._check_content(where, which, message)
        self._check_flags(where, which, message)

    def _check_content(self, where: str, which: str, message: Mapping) -> None:
        content, name = message.get(self._content), f"`{self._content}` of {which}"
        if content is None and message.get(self._tool_calls):
            return
        if content is None:
            raise DataFileError(
                where,
                f"{name} is missing or null; it has {short(list(message))}",
                "Write a text, or name the key of the text in "
                "message_property_mappings",
            )
        if not isinstance(content, list):
            _check_text(where, name, content)
            return
        for part in content:
            # Axolotl leaves out what is not an object, without a word.
            if not isinstance(part, Mapping):
                what = f"each part must be an object with `text`, got {short(part)}"
                remedy = "Write the text without a list"
                raise DataFileError(where, f"{name} is a list, of which {what}", remedy)
            text = part.get("text") or part.get("content") or part.get("value") or ""
            _check_text(where, f"`text` in {name}", text)

    def _check_flags(self, where: str, which: str, message: Mapping) -> None:
        flag = message.get(self._training) if self._training else None
        if flag is not None and flag not in _FLAGS:
            # "false" would be true.
            what = f"`{self._training}` of {which} must be true or false"
            remedy = "Write it without quotes"
            raise DataFileError(where, f"{what}, got {short(flag)}", remedy)
        details = message.get(self._detail) if self._detail else None
        is_list = isinstance(details, list) and all(map(_is_detail, details))
        if details is not None and not is_list:
            raise DataFileError(
                where,
                f"`{self._detail}` of {which} must be a list of objects with "
                f"begin_offset, end_offset and train, got {short(details)}",
                "Mend it",
            )

    def _check_system(self, where: str, system: Any) -> None:
        if system is not None:
            _check_text(where, "`system`", system)
        # A column that some rows have is null in the others, and null is no text.
        self._system.setdefault(system is not None, where)
        if len(self._system) == 2:
            raise DataFileError(
                self._system[False],
                f"`system` is missing or null and {self._system[True]} has one: the "
                "prompt would say None",
                "Write it in every row (an empty text for none), or as a first message",
            )


def rule_of(dataset: Mapping[str, Any]) -> Rule:
    """What the rows of a data set must hold.

    Args:
        dataset: its entry in the YAML, as Axolotl has validated it.
    """
    kind = dataset.get("type")
    if isinstance(kind, Mapping):
        return _custom(kind)
    kind = str(kind or "").partition(":")[0]
    if kind == "chat_template":
        return Chat(dataset)
    if kind == "completion":
        return Text(optional=(dataset.get("field") or "text",))
    if kind in _ALPACA:
        system = ("system",) if kind == "alpaca_w_system.load" else ()
        return Text(("instruction",), ("input", "output", *system))
    return Text()


def _custom(prompt: Mapping[str, Any]) -> Text:
    columns = {key: prompt.get(key) or key.removeprefix("field_") for key in _CUSTOM}
    required: tuple[str, ...] = ()
    for key in ("format", "no_input_format"):
        # What Axolotl formats with where the entry has no format, too.
        if "{instruction" in (prompt.get(key) or "{instruction}"):
            required = (columns["field_instruction"],)
    return Text(required, tuple(c for c in columns.values() if c not in required))


def _check_text(where: str, name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise DataFileError(
            where,
            f"{name} must be text, got {short(value)}",
            "Write it in quotes (a CSV file's numbers are numbers even so: convert it "
            "to .jsonl)",
        )
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        half = f"{value[error.start]!r}, at position {error.start + 1}"
        what = f"{name} has half of a surrogate pair, {half}, which UTF-8 cannot write"
        raise DataFileError(where, what, _MEND) from error


def _parsed(where: str, name: str, value: Any) -> Any:
    """A list that a table's cell may hold as text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (json.JSONDecodeError, RecursionError) as error:
        what = f"{name} is a text that is not JSON, got {short(value)}"
        raise DataFileError(where, what, "Write a list") from error


def _is_detail(detail: Any) -> bool:
    return (
        isinstance(detail, Mapping)
        and type(detail.get("begin_offset")) is int
        and type(detail.get("end_offset")) is int
        and detail.get("train") in _FLAGS
    )


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
