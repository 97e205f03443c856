"""The check for a bare GPU machine, as far as a CPU can run it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from benchmarks.gpu import wheels


def write_wheel(folder: Path, value: int = 0) -> Path:
    """A wheel of one module, `brought`, with one constant."""
    info = "brought-1.dist-info"
    contents = {
        "brought.py": f"VALUE = {value}\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: brought\nVersion: 1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    contents[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in contents)
    folder.mkdir(exist_ok=True)
    path = folder / "brought-1-py3-none-any.whl"
    with ZipFile(path, "w") as file:
        for member, text in contents.items():
            file.writestr(member, text)
    return path


def test_wheels_have_one_release_each() -> None:
    stack = wheels.pinned(wheels.STACK + wheels.SOURCES)
    names = [re.sub("[-_.]+", "-", spec.split("==")[0]) for spec in stack]
    assert len(set(names)) == len(names)
    assert not set(names) & {stub.split("/")[0] for stub in wheels.STUBS}
    for spec in stack + wheels.PEERS:
        assert re.fullmatch(r"[\w-]+==\d[\w.]*", spec), spec
    with pytest.raises(KeyError):
        wheels.pinned(["in-no-requirement"])


def test_wheels_put_without_a_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "site"
    for value in (2, 3):
        write_wheel(tmp_path / "wheels", value)
        wheels.put(tmp_path / "wheels", target)
    assert capsys.readouterr().out.endswith(f"export PYTHONPATH={target}\n")
    code = (
        "import brought, wandb, bitsandbytes as bnb; from importlib import metadata\n"
        "from bitsandbytes.nn import Params4bit\n"
        "assert bnb.functional.lib.any is not None and brought.VALUE == 3\n"
        "assert not isinstance(brought, (Params4bit, bnb.nn.Linear4bit))\n"
        "print(*metadata.entry_points(group='axolotl.plugins'))"
    )
    # Without the packages of this environment.
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
    )
    assert "value='axolotl_psft:PSFTPlugin'" in done.stdout


def test_wheels_that_cannot_be_carried_or_put(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no wheel"):
        wheels.put(tmp_path, tmp_path / "site")
    wheel = write_wheel(tmp_path)
    size = wheel.stat().st_size
    wheels.check_size(tmp_path, max_bytes=size)
    with pytest.raises(SystemExit, match="MiB"):
        wheels.check_size(tmp_path, max_bytes=size - 1)
    wheel.write_text("no archive")
    with pytest.raises(SystemExit, match="pip install failed"):
        wheels.put(tmp_path, tmp_path / "site")
