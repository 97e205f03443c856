"""Real command lines in fresh processes: what a user types, nothing in between."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import finish, start
from tests.tiny import config

BIN = Path(sys.executable).parent
ACCELERATE = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "1"]
# `axolotl train` looks for accelerate on the path, as in an active environment.
PATH = {"PATH": f"{BIN}:{os.environ['PATH']}"}
MODULE = [*ACCELERATE, "-m", "axolotl.cli.train"]


def losses(folder: Path) -> list[tuple[float, float]]:
    """What each step minimized, and its gradient's norm."""
    state = json.loads(
        (folder / "run" / "checkpoint-4" / "trainer_state.json").read_text()
    )
    return [
        (e.get("psft/surrogate", e["loss"]), e["grad_norm"])
        for e in state["log_history"]
        if "loss" in e
    ]


# As if the package were not installed: its entry point is all that Axolotl sees of it.
HIDDEN = """
from importlib import metadata
original = metadata.entry_points
def entry_points(**kwargs):
    found = original(**kwargs)
    return metadata.EntryPoints(p for p in found if "axolotl_psft" not in p.value)
metadata.entry_points = entry_points
"""


@pytest.fixture(scope="module")
def launched(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four runs, two at a time: start-up is most of each."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "hidden").mkdir()
    (folder / "hidden" / "sitecustomize.py").write_text(HIDDEN)
    hidden = {"PYTHONPATH": str(folder / "hidden")}
    off = {"psft": None, "plugins": None}
    runs: dict[str, tuple[list[str], dict[str, Any], dict[str, str]]] = {
        "accelerate": (MODULE, {"plugins": ["axolotl_psft"]}, {}),
        "axolotl": ([str(BIN / "axolotl"), "train"], {"plugins": None}, {}),
        "without block": (MODULE, off, {}),
        "without package": (MODULE, off, hidden),
    }
    names = list(runs)
    for pair in (names[:2], names[2:]):
        started = []
        for name in pair:
            command, overrides, env = runs[name]
            options = {"max_steps": 4, "save_strategy": None, "save_steps": 4}
            cfg = config(tiny, folder / name, **{**options, **overrides})
            (folder / name).mkdir()
            path = folder / name / "config.yaml"
            path.write_text(yaml.safe_dump(cfg))
            started.append(start([*command, str(path)], PATH | env, folder))
        for process in started:
            finish(process)
    return {name: folder / name for name in names}


def test_both_commands_train_by_the_bare_name_and_by_none(
    launched: dict[str, Path],
) -> None:
    for name in ("accelerate", "axolotl"):
        assert losses(launched[name])[0][0] == -1.0
        assert (launched[name] / "run" / "model.safetensors").is_file()
    assert losses(launched["accelerate"]) == losses(launched["axolotl"])


def test_installed_but_not_configured_changes_nothing(
    launched: dict[str, Path],
) -> None:
    stock = losses(launched["without package"])
    assert losses(launched["without block"]) == stock
    assert stock[0][0] > 1
