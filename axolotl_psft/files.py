"""Files of log-probs: tensors, a JSON header and a checksum over both; no pickle.

Written atomically, read back whole or not at all. What the tensors and the header mean
is the caller's.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor


class FileError(RuntimeError):
    """A file of a run that cannot be used; names it, what is wrong and the remedy."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when the block ends.

    Whoever reads ``path`` sees all of what was written or none. Where the block fails,
    nothing is left of it.
    """
    partial = path.with_suffix(".partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write(
    path: Path, tensors: dict[str, Tensor], header: dict[str, Any], *, format: str
) -> None:
    """Write ``path`` and the folders above it; whoever reads sees all of it or none.

    Args:
        path: its suffix is replaced while it is being written.
        tensors: contiguous, each with memory of its own; of dtypes that numpy has.
        header: anything JSON can hold.
        format: name and version of what the file means.
    """
    text = json.dumps(header)
    path.parent.mkdir(parents=True, exist_ok=True)
    sha256 = digest_tensors(tensors, text)
    metadata = {"format": format, "header": text, "sha256": sha256}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata=metadata)


def read(
    path: Path, *, format: str, remedy: str, belongs: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors; the tensors stay on the disk until they are used.

    Args:
        path: of the file.
        format: name and version that it must have.
        remedy: what to do where it cannot be used, as sentences.
        belongs: what its header must say; else it is another run's.

    Raises:
        FileError: it is missing, damaged, of another format or another run's.
    """
    if not path.is_file():
        raise FileError(f"{path}: not found. {remedy}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_format(path, metadata["format"], format)
        # Over the header too: a flipped bit there would be another step or setting.
        if metadata["sha256"] != digest_tensors(tensors, metadata["header"]):
            raise ValueError("its checksum is another")
        header = dict(json.loads(metadata["header"]))
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise FileError(
            f"{path}: truncated, damaged or not a file of {format}. {remedy}"
        ) from error
    for key, value in (belongs or {}).items():
        if header.get(key) != value:
            raise FileError(
                f"{path}: its {key.replace('_', ' ')} is {header.get(key)}, not "
                f"{value}: another run wrote it, or it was copied. {remedy}"
            )
    return header, tensors


def check_format(path: Path, found: str, format: str) -> None:
    """Refuse a file of another format, or of another version of this one.

    Raises:
        FileError: it is of another version.
        ValueError: it is of another kind.
    """
    if found == format:
        return
    if str(found).partition("/")[0] != format.partition("/")[0]:
        raise ValueError(f"{path}: its format is {found}, not {format}")
    raise FileError(
        f"{path}: its format is {found}, this version of axolotl_psft reads {format}. "
        "Resume with the version that wrote it, or start a new run with base_model set "
        "to the checkpoint."
    )


def digest_tensors(tensors: dict[str, Tensor], text: str = "") -> str:
    """SHA-256 over names, dtypes, shapes and values, and over ``text``."""
    sha = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        # Through the buffer, not a copy: a file may be larger than the memory.
        sha.update(tensor.detach().cpu().contiguous().numpy().data)
    return sha.hexdigest()


def short_digest(num: int, parts: Iterable[bytes]) -> str:
    """How many things there are, and a digest of them: what an error can show."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return f"{num:,} with digest {sha.hexdigest()[:16]}"
