"""How Axolotl finds the plugin: by its entry point, whatever the YAML writes or not.

Real command lines are in test_launch.py; what a diff for Axolotl changes of it is in
test_patches.py.
"""

import logging
import subprocess
import sys
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from axolotl_psft.plugin import PSFTPlugin
from tests.tiny import config, load, run

DOTTED = "axolotl_psft.PSFTPlugin"
LIGER = "axolotl.integrations.liger.LigerPlugin"
HOOKS = [
    *("register", "get_input_args", "load_datasets", "pre_model_load"),
    *("post_model_build", "post_model_load", "get_trainer_cls", "post_trainer_create"),
]


@pytest.mark.parametrize(
    "plugins",
    [["axolotl_psft"], [DOTTED], None, ["axolotl_psft", DOTTED], [LIGER]],
    ids=["bare", "dotted", "none", "both", "another"],
)
def test_one_plugin_whose_hooks_run_once(
    plugins: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    plain = run(config(tiny, tmp_path / "plain", max_steps=2))
    for name in HOOKS:
        original = getattr(PSFTPlugin, name)

        def hook(*args: Any, name: str = name, original: Any = original, **kw: Any):
            calls[name] += 1
            return original(*args, **kw)

        monkeypatch.setattr(PSFTPlugin, name, hook)
    trainer = run(config(tiny, tmp_path / "run", max_steps=2, plugins=plugins))
    assert type(trainer) is type(plain)
    assert trainer.state.log_history[0]["psft/surrogate"] == -1.0
    assert calls == Counter(HOOKS)


def test_no_start_up_hook_and_no_finder() -> None:
    for group in ("torch.backends", "torch.dynamo"):
        assert not [e for e in entry_points(group=group) if "psft" in e.value]
    (point,) = entry_points(group="axolotl.plugins", name="axolotl_psft")
    assert point.load() is PSFTPlugin
    assert not [f for f in sys.meta_path if "psft" in type(f).__module__]


def test_installed_and_not_used_it_says_nothing(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("axolotl_psft")
    logger.addHandler(caplog.handler)
    try:
        loaded = load(config(tiny, tmp_path, plugins=None, psft=None))
        run(config(tiny, tmp_path, plugins=None, psft=None, max_steps=1))
    finally:
        logger.removeHandler(caplog.handler)
    assert not [r for r in caplog.records if r.name.startswith("axolotl_psft")]
    assert not [key for key in loaded if "psft" in key and loaded[key] is not None]


def test_what_axolotl_imports_in_every_run_is_small() -> None:
    """Axolotl goes on without a plugin that cannot be imported: as little as can be."""
    code = (
        "import sys, axolotl.integrations.base; before = set(sys.modules)\n"
        "from axolotl_psft import PSFTPlugin\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["axolotl_psft", "axolotl_psft.plugin"]


@pytest.mark.parametrize("name", ["axolotl_pstf", "axolotl_psft.PSFTPlugn"])
def test_a_misspelt_plugin_stops_the_run(tiny: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises((ValueError, AttributeError)):
        load(config(tiny, tmp_path, plugins=[name]))
