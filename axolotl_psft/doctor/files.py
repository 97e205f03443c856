"""Reads local data files before Axolotl does, to name the row at fault.

Axolotl's own error for it names neither file nor row. Checked: UTF-8, the file's
syntax, one object a row, and what the prompt format wants (rows.py). Nothing is
tokenized and nothing changed. Read are only files that Axolotl is about to read, by one
rank for all.
"""

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from axolotl_psft import failures
from axolotl_psft.doctor.rows import Chat, DataFileError, Rule, Text, rule_of, short

# As Axolotl tells the kind of a file from its name; all others are JSON.
_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".txt": "text"}
# Not read through.
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")


@dataclass
class Report:
    """What was read."""

    num_rows: int = 0
    """Of the training files; 0 where not all training data are whole local files."""
    notes: list[str] = field(default_factory=list)
    """What is no error, but a person should know; a sentence or two each."""


def check_once(cfg: Any) -> Report:
    """:func:`check` on the first rank, while the others wait for what comes of it.

    Args:
        cfg: Axolotl's validated configuration.

    Returns:
        What was read; nothing on the other ranks.

    Raises:
        DataFileError: the first row at fault.
        PeerFailedError: on the other ranks, with that message.
    """
    from axolotl.utils.distributed import init_distributed_state, is_main_process

    if not cfg.psft["check_data_files"]:
        return Report()
    init_distributed_state()
    report, error = Report(), None
    if is_main_process():
        keys = ("datasets", "test_datasets")
        try:
            report = check({key: _to_be_read(cfg, key) for key in keys})
        except DataFileError as found:
            error = found
    failures.raise_together(error)
    return report


def _to_be_read(cfg: Any, key: str) -> list[Any]:
    """The entries under ``key``; none where Axolotl has them prepared on the disk."""
    from axolotl.utils.data import shared

    entries = cfg.get(key) or []
    if not entries or cfg.is_preprocess or cfg.skip_prepare_dataset or cfg.streaming:
        return entries
    # A tokenizer's name is what it was loaded by; where it is not, files are read.
    name = shared.generate_dataset_hash_from_config(cfg, entries, cfg.tokenizer_config)
    is_prepared = any(shared.get_prepared_dataset_path(cfg, name).glob("*"))
    return [] if is_prepared else entries


def check(cfg: Mapping[str, Any]) -> Report:
    """Check every row of the local files under ``datasets`` and ``test_datasets``.

    Raises:
        DataFileError: the first row at fault.
    """
    report, all_whole = Report(), True
    for key in ("datasets", "test_datasets"):
        for dataset in cfg.get(key) or ():
            num_rows = _check_dataset(dataset, report)
            if key == "datasets":
                # Axolotl takes only some of the rows of these.
                is_part = dataset.get("shards") or "[" in str(dataset.get("split"))
                all_whole &= num_rows > 0 and not is_part
                report.num_rows += num_rows
    if not all_whole:
        report.num_rows = 0
    return report


def _check_dataset(dataset: Mapping[str, Any], report: Report) -> int:
    """Rows of its files."""
    rule, kind = rule_of(dataset), dataset.get("ds_type")
    num_rows = sum(check_file(path, rule, kind) for path in local_files(dataset))
    if isinstance(rule, Chat):
        known = ", ".join(sorted(rule.known_roles))
        report.notes += [
            f"{first}: role {role!r} ({number:,} messages) is none of {known}: the "
            "chat template gets it as it is, and it is not trained on. If it is meant "
            "to be one of them, map it by `roles` in the data set's entry."
            for role, (number, first) in rule.unknown_roles.items()
        ]
    return num_rows


def local_files(dataset: Mapping[str, Any]) -> Iterator[Path]:
    """The files that a data set's entry names, as far as they are on this disk."""
    given = dataset.get("data_files") or dataset.get("path") or ()
    for name in [given] if isinstance(given, str) else given:
        names = [name] if Path(name).exists() else sorted(glob.glob(name))
        for path in map(Path, names):
            if path.is_file() and path.suffix not in _COMPRESSED:
                yield path


def check_file(path: Path, rule: Rule | None = None, kind: str | None = None) -> int:
    """Check a file; returns its number of rows.

    Args:
        path: of a kind that Axolotl reads. JSON: a row a line, or one array of rows.
        rule: what a row must hold; None: anything.
        kind: json, csv, parquet, arrow or text; None: as the name says.

    Raises:
        DataFileError: the first row at fault.
    """
    kind = kind or _KINDS.get(path.suffix, "json")
    rows = _json_rows(path) if kind == "json" else _table_rows(path, kind)
    rule, num_rows = rule or Text(), 0
    for where, row in rows:
        num_rows += 1
        if not isinstance(row, dict):
            what = f"a row must be an object of columns, got {short(row)}"
            raise DataFileError(where, what, "Mend or remove it")
        rule(where, row)
    if num_rows == 0:
        raise DataFileError(path, "no rows", "Remove it from the YAML, or fill it")
    return num_rows


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        file.seek(0)
        if head.startswith(b"["):
            rows = _parse(file.read(), str(path))
            yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows, 1))
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _parse(line.rstrip(b"\r\n"), where)


def _table_rows(path: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """As Axolotl will see them: by the same reader, which is streaming here."""
    from datasets import load_dataset

    if kind in ("csv", "text"):
        _check_utf8(path)
    done, files = 0, [str(path)]
    try:
        if kind == "csv":
            _check_header(path)
        table = load_dataset(kind, data_files=files, split="train", streaming=True)
        # Some rows at a time become Python objects.
        for batch in table.iter(1000):
            for row in zip(*batch.values(), strict=True):
                done += 1
                yield f"{path}, row {done}", dict(zip(batch, row, strict=True))
    except DataFileError:
        raise
    except Exception as error:
        # Each kind of file has errors of its own, and a reader's of theirs.
        reason = str(error.__cause__ or error).strip().splitlines() or [repr(error)]
        what = f"not readable as {kind} after row {done}: {reason[0]}"
        remedy = "Mend the file, or set ds_type to what it is"
        raise DataFileError(path, what, remedy) from error


def _check_header(path: Path) -> None:
    import pandas

    # Where the first row has more fields than the header, its first ones would become
    # the table's index, and each column get its neighbour's texts. In a later row that
    # is an error of the reader's own.
    if not isinstance(pandas.read_csv(path, nrows=1).index, pandas.RangeIndex):
        remedy = "Put texts that have commas in quotes, and no comma at the end"
        what = "more fields than the first line names"
        raise DataFileError(f"{path}, row 1", what, remedy)


def _check_utf8(path: Path) -> None:
    """Line by line: the readers of text files decode large blocks."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isascii():
                _decode(line, f"{path}:{number}")


def _decode(text: bytes, where: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{text[error.start]:02x} at position {error.start + 1}"
        raise DataFileError(
            where, f"not UTF-8, {byte}", "Save the file as UTF-8"
        ) from error


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(_decode(text, where))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}, got {short(error.doc)}"
        what = f"not JSON: {error.msg} at {place}"
        raise DataFileError(where, what, "Mend or remove the row") from error
    except RecursionError as error:
        what = "nested too deeply to be a row"
        raise DataFileError(where, what, "Mend or remove it") from error
