"""Lets axolotl_psft train on Axolotl 0.19, which Python 3.11 gets, with what it pins.

torch runs :func:`activate` at import, in every rank (entry-point group
`torch.backends`; TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns it off). It imports nothing but
the standard library, never raises, and lets each entry below mend one module once that
has been imported. Nothing that newer releases need is here.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_NAME = "axolotl_psft"
_CLASS = f"{_NAME}.PSFTPlugin"
_MARK = "_is_mended_by_axolotl_psft_0_19"


# ---- What is mended ----


def _load_bare_name(base: Any) -> None:
    """`plugins: [axolotl_psft]`: Axolotl 0.19 knows 'module.Class' only.

    The plugin stands under its dotted name and a stand-in under the bare one, as on
    newer releases: the hooks run once, also where both are listed.
    """
    load = base.load_plugin

    @functools.wraps(load)
    def load_plugin(plugin_name: str) -> Any:
        if plugin_name != _NAME:
            return load(plugin_name)
        plugins = base.PluginManager.get_instance().plugins
        if _CLASS not in plugins:
            plugins[_CLASS] = load(_CLASS)
        return base.BasePlugin()

    base.load_plugin = load_plugin


def _refuse_block_without_plugin(config: Any) -> None:
    """A `psft:` block whose plugin is not loaded: Axolotl 0.19 drops it in silence."""
    validate = config.validate_config

    @functools.wraps(validate)
    def validate_config(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if cfg.get("psft") is not None and not _is_loaded():
            raise ValueError(
                "psft: the block is set but its plugin is not loaded, got plugins: "
                f"{cfg.get('plugins')}. Axolotl would ignore the block and run plain "
                "SFT. Add `plugins: [axolotl_psft]` to the YAML; if it is there, the "
                "import error above says why it did not load."
            )
        return validate(cfg, *args, **kwargs)

    config.validate_config = validate_config


def _is_loaded() -> bool:
    from axolotl.integrations.base import PluginManager

    plugins = PluginManager.get_instance().plugins.values()
    return any(type(plugin).__module__ == f"{_NAME}.plugin" for plugin in plugins)


def _load_to_numbered_cpus(_: Any) -> None:
    """Resume on several CPU ranks: transformers 5.16 asks torch.load for "cpu:0".

    torch knows "cpu" only, and without this their Adam cannot be resumed.
    """
    import torch

    def deserialize(storage: Any, location: str) -> Any:
        return storage if location.startswith("cpu:") else None

    # A number that nobody has: torch compares the functions of two with the same.
    torch.serialization.register_package(119, lambda storage: None, deserialize)


# Of each module: a name that it has once it is complete, and what mends it.
_ENTRIES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "axolotl.integrations.base": ("PluginManager", _load_bare_name),
    "axolotl.utils.config": ("validate_config", _refuse_block_without_plugin),
    "axolotl_psft.trainer": ("PSFTTrainer", _load_to_numbered_cpus),
}


# ---- When ----


# No importlib.abc.MetaPathFinder: importing that costs more than all of this file.
class _MendOnImport:
    """Lets the other finders find a module, and mends it once it has run."""

    def __init__(self) -> None:
        self._pending = dict(_ENTRIES)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        # A module may have been half imported when activate() ran (it imports torch
        # itself); nobody calls us when it completes, so every import looks.
        self._mend_completed()
        if fullname not in self._pending:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                self._mend_after(spec.loader)
                return spec
        return None

    def _mend_after(self, loader: Any) -> None:
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self._mend_completed()

        loader.exec_module = exec_module

    def _mend_completed(self) -> None:
        for name, (last, mend) in list(self._pending.items()):
            module = sys.modules.get(name)
            if not hasattr(module, last):
                continue
            self._pending.pop(name, None)  # another thread may have been faster
            if not hasattr(module, _MARK):
                setattr(module, _MARK, True)
                mend(module)


def activate() -> None:
    """Watch for the modules above. Idempotent."""
    if not any(isinstance(finder, _MendOnImport) for finder in sys.meta_path):
        finder = _MendOnImport()
        sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
        finder._mend_completed()
