"""Command lines in processes of their own, none of which outlives its test."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

TIMEOUT_SECONDS = 400


def start(
    command: list[str], env: dict[str, str], cwd: Path
) -> "subprocess.Popen[str]":
    """Start ``command`` with ``env`` added to this process's environment."""
    return subprocess.Popen(
        command,
        env={**os.environ, **env},
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # So that all it leaves can be ended together.
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait for it, end whatever it left, and return its output if it succeeded."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        # The launcher first, by a signal it can pass on: its ranks are sessions of
        # their own.
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-6000:]
    return output
