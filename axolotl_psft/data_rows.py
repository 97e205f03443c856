"""What a row of a data file must hold, by the prompt format that reads it.

Only what Axolotl would answer with an error that names no row, or train on as something
else than it is. Where rows come from is data_files.py; standard library only.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

# A row and where it is, for the error; raises DataFileError.
Rule = Callable[[str, Mapping[str, Any]], None]

# Axolotl's keys for the columns of a custom prompt; also the columns' names where a key
# is not set.
_CUSTOM = ("field_system", "field_instruction", "field_input", "field_output")
# Of named formats: the columns without which the prompt would say "None", and others.
_NAMED = {
    "alpaca": (("instruction",), ("input", "output")),
    "alpaca_chat.load": (("instruction",), ("input", "output")),
    "alpaca_instruct.load": (("instruction",), ("input", "output")),
    "alpaca_w_system.load": (("instruction",), ("input", "output", "system")),
}
_ROLES = ("human", "user", "assistant", "gpt", "system", "tool")
_FLAGS = (True, False, 0, 1)


class DataFileError(ValueError):
    """A row of a data file that cannot be trained on; names file, row and remedy."""


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
        for column in self.required:
            if row.get(column) is None:
                raise DataFileError(
                    f"{where}: `{column}` is missing or null, and the prompt would say "
                    f"None; the row has {short(list(row))}. Write a text, or remove "
                    "the row."
                )
        for column in (*self.required, *self.optional):
            value = row.get(column)
            if value is not None:
                _check_text(where, f"`{column}`", value)


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
        self._first_with_system: str | None = None
        self._first_without_system: str | None = None

    def __call__(self, where: str, row: Mapping[str, Any]) -> None:
        messages = self._list_of_messages(where, row)
        for number, message in enumerate(messages, 1):
            self._check_message(where, f"message {number}", message)
        first = messages[0][self._role]
        if self._target.get(first, first) != "system":
            self._check_system(where, row.get("system"))
        tools = row.get("tools")
        if isinstance(tools, str):
            tools = _parsed(where, "`tools`", tools)
        if tools is not None and not isinstance(tools, list):
            raise DataFileError(
                f"{where}: `tools` must be a list, got {short(tools)}. Write one, or "
                "remove it."
            )

    def _list_of_messages(self, where: str, row: Mapping[str, Any]) -> list[Any]:
        messages, name = row.get(self._messages), f"`{self._messages}`"
        if messages is None:
            raise DataFileError(
                f"{where}: {name} is missing or null; the row has {short(list(row))}. "
                "Set field_messages to the column of the conversation, or remove the "
                "row."
            )
        if isinstance(messages, str):
            messages = _parsed(where, name, messages)
        if not isinstance(messages, list) or not messages:
            raise DataFileError(
                f"{where}: {name} must be a list of at least one message, got "
                f"{short(messages)}. Mend or remove the row."
            )
        return messages

    def _check_message(self, where: str, which: str, message: Any) -> None:
        if not isinstance(message, Mapping):
            raise DataFileError(
                f"{where}: {which} must be an object with `{self._role}` and "
                f"`{self._content}`, got {short(message)}. Mend or remove the row."
            )
        role = message.get(self._role)
        if not isinstance(role, str) or not role:
            raise DataFileError(
                f"{where}: {which} has no `{self._role}`, got {short(role)}; it has "
                f"{short(list(message))}. Write user, assistant or system, or name the"
                " key of the role in message_property_mappings."
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
                f"{where}: {name} is missing or null; the message has "
                f"{short(list(message))}. Write a text, or name the key of the text in"
                " message_property_mappings."
            )
        if not isinstance(content, list):
            _check_text(where, name, content)
            return
        for part in content:
            # Axolotl leaves out what is not an object, without a word.
            if not isinstance(part, Mapping):
                raise DataFileError(
                    f"{where}: {name} is a list, of which each part must be an object "
                    f"with `text`, got {short(part)}. Write the text without a list."
                )
            text = part.get("text") or part.get("content") or part.get("value") or ""
            _check_text(where, f"`text` in {name}", text)

    def _check_flags(self, where: str, which: str, message: Mapping) -> None:
        flag = message.get(self._training) if self._training else None
        if flag is not None and flag not in _FLAGS:
            # "false" would be true.
            raise DataFileError(
                f"{where}: `{self._training}` of {which} must be true or false, got "
                f"{short(flag)}. Write it without quotes."
            )
        details = message.get(self._detail) if self._detail else None
        if details is not None and not (
            isinstance(details, list) and all(map(_is_detail, details))
        ):
            raise DataFileError(
                f"{where}: `{self._detail}` of {which} must be a list of objects with "
                f"begin_offset, end_offset and train, got {short(details)}. Mend it."
            )

    def _check_system(self, where: str, system: Any) -> None:
        # A column that some rows have is null in the others, and null is no text.
        if system is None:
            self._first_without_system = self._first_without_system or where
        else:
            _check_text(where, "`system`", system)
            self._first_with_system = self._first_with_system or where
        if self._first_with_system and self._first_without_system:
            raise DataFileError(
                f"{self._first_without_system}: `system` is missing or null and "
                f"{self._first_with_system} has one: the prompt would say None. Write "
                "it in every row (an empty text for none), or as a first message."
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
    return Text(*_NAMED.get(kind, ()))


def _custom(prompt: Mapping[str, Any]) -> Text:
    columns = {key: prompt.get(key) or key.removeprefix("field_") for key in _CUSTOM}
    # What Axolotl formats with where the entry has no format, too.
    formats = [
        prompt.get(key) or "{instruction}" for key in ("format", "no_input_format")
    ]
    required: tuple[str, ...] = ()
    if any("{instruction" in text for text in formats):
        required = (columns.pop("field_instruction"),)
    return Text(required, tuple(columns.values()))


def _check_text(where: str, name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise DataFileError(
            f"{where}: {name} must be text, got {short(value)}. Write it in quotes (a "
            "CSV file's numbers are numbers even so: convert it to .jsonl)."
        )
    if value.isascii():
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataFileError(
            f"{where}: {name} has half of a surrogate pair, "
            f"{value[error.start]!r}, at position {error.start + 1}, which UTF-8 "
            "cannot write. Mend or remove the row."
        ) from error


def _parsed(where: str, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataFileError(
            f"{where}: {name} is a text that is not JSON, got {short(text)}. Write a "
            "list."
        ) from error


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
