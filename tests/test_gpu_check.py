"""The check for a bare GPU machine, as far as a CPU can run it."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from benchmarks.gpu import __main__ as check
from benchmarks.gpu import report, wheels
from benchmarks.gpu.measure import Bench, Figure


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


# ---- The steps ----


@pytest.mark.parametrize("step", [*check.STEPS, *check.EXTRA])
def test_every_step_rehearses(step: str) -> None:
    if step == "tests":
        pytest.skip("test_gpu.py is run anyway")
    module, _ = (check.STEPS | check.EXTRA)[step]
    figures = list(getattr(importlib.import_module(module), step)(Bench("cpu")))
    assert figures
    # Targets are for the card; what must hold at all must hold here.
    assert not [figure for figure in figures if figure.value is False]


def test_all_steps_fit_ten_minutes() -> None:
    assert sum(limit for _, limit in check.STEPS.values()) <= 600


def test_a_step_that_fails_or_hangs_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = {
        "fails": "raise RuntimeError('on purpose')",
        "hangs": "import time; time.sleep(600)",
        "works": "",
    }

    def command(step: str, rehearse: bool) -> list[str]:
        line = check._line(step, Figure(f"seen by {step}", 2.0, "ms", at_most=1.0))
        program = f"print({json.dumps(line)!r}, flush=True)\n{programs[step]}"
        return [sys.executable, "-c", program]

    monkeypatch.setattr(check, "_command", command)
    monkeypatch.setattr(check, "STEPS", dict.fromkeys(programs, ("no.module", 5)))
    assert check.run(tmp_path, list(programs), rehearse=False) == 1
    out = capsys.readouterr().out
    lines = (tmp_path / "figures.jsonl").read_text().splitlines()
    figures = [json.loads(line) for line in lines[1:]]
    assert [f["step"] for f in figures if "what" in f] == list(programs)
    assert [f["step"] for f in figures if "failed" in f] == ["fails", "hangs"]
    assert "on purpose" in (tmp_path / "fails.log").read_text()
    assert "stopped after 5 s" in out
    assert "3 missed, 2 steps failed" in out


def test_a_page_is_made_of_a_cards_figures_only(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"command": "python -m benchmarks.gpu", "date": "D"}]
    lines.append({"step": "machine", "what": "card", "value": "A card"})
    lines.append({"step": "speed", "what": "x", "value": 2.0, "at_most": 1.5})
    lines[-1]["verdict"] = "MISS"
    figures = tmp_path / "figures.jsonl"
    figures.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = tmp_path / "gpu.md"
    page.write_text("# Old\n\n## Notes\n\nBy hand.\n")
    report.write(tmp_path, page)
    text = page.read_text()
    assert "A card, D" in text
    assert "| x | 2 | <= 1.5 | MISS |" in text
    assert text.endswith("## Notes\n\nBy hand.\n")
    assert "Old" not in text
    lines[0]["command"] += " --rehearse"
    figures.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit, match="rehearsal"):
        report.write(tmp_path, page)
