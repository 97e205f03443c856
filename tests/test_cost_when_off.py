"""Installed but unused, the package costs next to nothing at import and in training."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What the entry point that torch runs does to a process, in milliseconds: once, and for
# each of the imports that follow (`import torch` makes some 1500, Axolotl 9000).
MEASURE = """
import functools, sys, time, typing, typing_extensions  # torch has them by then
before = set(sys.modules)
started = time.process_time()
from axolotl_psft._autoload import activate
activate()
once = time.process_time() - started
finder = sys.meta_path[0]
started = time.process_time()
for i in range(1500):
    finder.find_spec(f"module_{i}", None)
print(once * 1e3, (time.process_time() - started) * 1e3)
print(*sorted(set(sys.modules) - before))
"""
LIMIT_MS = 5.0


def measure() -> tuple[float, float, set[str]]:
    output = subprocess.run(
        [sys.executable, "-c", MEASURE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    times, modules = output.splitlines()
    once, imports = map(float, times.split())
    return once, imports, set(modules.split())


def test_import_torch_takes_at_most_five_milliseconds_more() -> None:
    # CPU time, the least of several: what the code costs, not its neighbours.
    measured = [measure() for _ in range(20)]
    assert min(once + imports for once, imports, _ in measured) < LIMIT_MS


def test_nothing_heavy_is_imported() -> None:
    _, _, modules = measure()
    heavy = {"torch", "axolotl", "megatron", "pydantic", "numpy", "transformers"}
    # In the standard library, too: importlib.abc alone takes 5 ms.
    heavy |= {"importlib.abc", "importlib.metadata", "inspect", "tempfile", "logging"}
    assert not heavy & modules
    assert {m for m in modules if m.startswith("axolotl_psft")} == {
        "axolotl_psft",
        "axolotl_psft._autoload",
    }


def test_a_training_step_without_a_block_is_axolotls_own() -> None:
    from axolotl.utils.dict import DictDefault

    from axolotl_psft.plugin import PSFTPlugin

    cfg = DictDefault({"base_model": "x", "device": "cpu", "device_map": "auto"})
    before = dict(cfg)
    plugin = PSFTPlugin()
    assert plugin.get_trainer_cls(cfg) is None
    assert plugin.get_training_args(cfg) is None
    assert plugin.get_collator_cls_and_kwargs(cfg) is None
    assert not plugin.add_callbacks_pre_trainer(cfg, None)
    assert not plugin.add_callbacks_post_trainer(cfg, None)
    assert plugin.create_optimizer(cfg, None) is None
    for hook in (
        lambda: plugin.load_datasets(cfg),
        lambda: plugin.post_model_build(cfg, None),
        lambda: plugin.post_model_load(cfg, None),
        lambda: plugin.post_trainer_create(cfg, None),
        lambda: plugin.post_train(cfg, None),
    ):
        hook()
    assert dict(cfg) == before
