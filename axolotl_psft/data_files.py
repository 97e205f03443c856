"""Reads local JSON data files before Axolotl does, to name the row at fault.

Axolotl's own error for it names neither file nor row. Checked: UTF-8, JSON, one object
a row, text where the prompt format wants text. Nothing is tokenized and nothing
changed; imports the standard library only.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

_SUFFIXES = (".jsonl", ".json")
# Axolotl's keys for the columns of a prompt, which must hold text.
_TEXT_FIELDS = ("field_system", "field_instruction", "field_input", "field_output")


class DataFileError(ValueError):
    """A row of a data file that cannot be trained on; names file, row and remedy."""


def check(cfg: Mapping[str, Any]) -> int:
    """Check every row of the local files under ``datasets`` and ``test_datasets``.

    Args:
        cfg: Axolotl's configuration.

    Returns:
        Rows of the training files; 0 where not all training data are local files.

    Raises:
        DataFileError: the first row at fault.
    """
    num_rows, all_local = 0, True
    for dataset in cfg.get("datasets") or ():
        files = list(local_files(dataset))
        all_local &= bool(files)
        num_rows += sum(check_file(path, text_fields(dataset)) for path in files)
    for dataset in cfg.get("test_datasets") or ():
        for path in local_files(dataset):
            check_file(path, text_fields(dataset))
    return num_rows if all_local else 0


def local_files(dataset: Mapping[str, Any]) -> Iterator[Path]:
    """The JSON files that a data set's entry names, as far as they are on this disk."""
    given = dataset.get("data_files") or dataset.get("path") or ()
    for name in [given] if isinstance(given, str) else given:
        path = Path(name)
        if path.suffix in _SUFFIXES and path.is_file():
            yield path


def text_fields(dataset: Mapping[str, Any]) -> tuple[str, ...]:
    """Columns that must hold text (or nothing), by the entry's prompt format."""
    kind = dataset.get("type")
    if not isinstance(kind, Mapping):
        return ()
    return tuple(kind[key] for key in _TEXT_FIELDS if kind.get(key))


def check_file(path: Path, fields: Iterable[str] = ()) -> int:
    """Check a file; returns its number of rows.

    Args:
        path: a row a line, or one JSON array of rows.
        fields: columns that must hold text.

    Raises:
        DataFileError: the first row at fault.
    """
    num_rows = 0
    for where, row in _rows(path):
        num_rows += 1
        if not isinstance(row, dict):
            raise DataFileError(
                f"{where}: a row must be an object of columns, got {_short(row)}. "
                "Mend or remove it."
            )
        for field in fields:
            value = row.get(field)
            if value is not None and not isinstance(value, str):
                raise DataFileError(
                    f"{where}: `{field}` must be text, got {_short(value)}. "
                    "Write it in quotes."
                )
    if num_rows == 0:
        raise DataFileError(f"{path}: no rows. Remove it from the YAML, or fill it.")
    return num_rows


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if head.startswith(b"[") and path.suffix == ".json":
            rows = _parse(file.read(), str(path))
            yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows, 1))
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _parse(line.rstrip(b"\r\n"), where)


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataFileError(
            f"{where}: not UTF-8, byte 0x{text[error.start]:02x} at position "
            f"{error.start + 1}. Save the file as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        raise DataFileError(
            f"{where}: not JSON: {error.msg} at line {error.lineno}, column "
            f"{error.colno}, got {_short(error.doc)}. Mend or remove the row."
        ) from error
    except RecursionError as error:
        raise DataFileError(
            f"{where}: nested too deeply to be a row. Mend or remove it."
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
