"""Files of log-probs: tensors, a JSON header and a checksum over both; no pickle.

Written atomically, read back whole or not at all. What the tensors and the header mean,
and what to tell a person, is the caller's.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor


class NotIntactError(ValueError):
    """A file that is truncated, damaged or of another format."""


class OtherVersionError(NotIntactError):
    """A file of this kind in another version of its format; carries that format."""


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


def read(path: Path, *, format: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors; the tensors stay on the disk until they are used.

    Raises:
        FileNotFoundError: there is no such file.
        NotIntactError: it is truncated, damaged or of another format.
        OtherVersionError: its format differs in the version only.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        kind, _ = format.rsplit("/", 1)
        if metadata["format"].startswith(f"{kind}/") and metadata["format"] != format:
            raise OtherVersionError(metadata["format"])
        # Over the header too: a flipped bit there would be another step or setting.
        intact = metadata["format"] == format and metadata["sha256"] == digest_tensors(
            tensors, metadata["header"]
        )
        header = json.loads(metadata["header"])
    except OtherVersionError:
        raise
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise NotIntactError(path) from error
    if not intact:
        raise NotIntactError(path)
    return header, tensors


def digest_tensors(tensors: dict[str, Tensor], text: str = "") -> str:
    """SHA-256 over names, dtypes, shapes and values, and over ``text``."""
    sha = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        # Through the buffer, not a copy: a file may be larger than the memory.
        sha.update(tensor.detach().cpu().contiguous().numpy().data)
    return sha.hexdigest()
