"""Runs Axolotl inside this process: importing it costs more than a small run.

Benchmarks and tests train through here as `axolotl.cli.train` does. What is trained is
the caller's configuration.
"""

import functools
import gc
from typing import Any


def load(cfg: dict[str, Any]) -> Any:
    """Axolotl's validated configuration, as its command line makes it."""
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault

    # A process of Axolotl's own sees one configuration; this one sees many.
    PluginManager.get_instance().plugins.clear()
    return load_cfg(DictDefault(cfg))


@functools.cache
def _freeze_imports() -> None:
    # Axolotl collects garbage some twenty times a run, a second each over everything
    # it imports, unless that is taken out of the collector's sight.
    import axolotl.core.builders.causal
    import axolotl.core.training_args
    import axolotl.train  # noqa: F401

    gc.collect()
    gc.freeze()


def run(cfg: dict[str, Any]) -> Any:
    """Train; returns the trainer."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_datasets
    from axolotl.integrations.base import PluginManager
    from axolotl.train import train

    loaded = load(cfg)
    _freeze_imports()
    PluginManager.get_instance().load_datasets(loaded, preprocess=False)
    meta = load_datasets(cfg=loaded, cli_args=TrainerCliArgs())
    _, _, trainer = train(cfg=loaded, dataset_meta=meta)
    return trainer
