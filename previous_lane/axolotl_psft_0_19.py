"""Makes `plugins: [axolotl_psft]` work on Axolotl releases that need 'module.Class'.

torch runs :func:`activate` at import, in every rank (entry-point group
`torch.backends`; TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns it off). It imports nothing but
the standard library, never raises, and changes two functions of Axolotl once their
modules are imported. An Axolotl with the patches of patches/ needs neither change: it
is told by a name that each patch brings, and stays as it is.
"""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

_NAME = "axolotl_psft"
_CLASS = "axolotl_psft.PSFTPlugin"
_MARK = "_axolotl_psft_original"


def _patch_load_plugin(module: ModuleType) -> None:
    """Let ``load_plugin`` resolve the bare package name."""
    original = module.load_plugin
    if hasattr(original, _MARK) or hasattr(module, "PLUGIN_ENTRY_POINT_GROUP"):
        return

    @functools.wraps(original)
    def load_plugin(plugin_name: str) -> Any:
        if plugin_name in (_NAME, _CLASS):
            return original(_CLASS)
        try:
            return original(plugin_name)
        except (ValueError, AttributeError) as error:
            if not _is_misspelt(plugin_name):
                raise
            raise ValueError(
                f"plugins: there is no plugin named {plugin_name}. Did you mean "
                f"`plugins: [{_NAME}]`?"
            ) from error

    setattr(load_plugin, _MARK, original)
    module.load_plugin = load_plugin  # type: ignore[attr-defined]


def _is_misspelt(plugin_name: str) -> bool:
    from difflib import get_close_matches

    return bool(get_close_matches(str(plugin_name), (_NAME, _CLASS), cutoff=0.8))


def _patch_validate_config(module: ModuleType) -> None:
    """Refuse a `psft:` block whose plugin is not loaded: Axolotl would drop it."""
    original = module.validate_config
    if hasattr(original, _MARK) or hasattr(module, "refuse_unknown_blocks"):
        return

    @functools.wraps(original)
    def validate_config(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if cfg.get("psft") is not None and not _is_loaded():
            raise ValueError(
                "psft: the block is set but its plugin is not loaded, got plugins: "
                f"{cfg.get('plugins')}. Axolotl would ignore the block and run plain "
                "SFT. Add `plugins: [axolotl_psft]` to the YAML; if it is there, the "
                "import error above says why it did not load."
            )
        return original(cfg, *args, **kwargs)

    setattr(validate_config, _MARK, original)
    module.validate_config = validate_config  # type: ignore[attr-defined]


def _is_loaded() -> bool:
    from axolotl.integrations.base import PluginManager

    plugins = PluginManager.get_instance().plugins.values()
    return any(type(plugin).__module__ == f"{_NAME}.plugin" for plugin in plugins)


_PATCHES: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    "axolotl.integrations.base": ("load_plugin", _patch_load_plugin),
    "axolotl.utils.config": ("validate_config", _patch_validate_config),
}


# No importlib.abc.MetaPathFinder: importing that costs more than all of this file.
class _PatchOnImport:
    """Lets the other finders find a module, and patches it once it has run."""

    def __init__(self) -> None:
        self._pending = dict(_PATCHES)

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> "ModuleSpec | None":
        # A module may have been half imported when activate() ran (it imports torch
        # itself); nobody calls us when it completes, so every import looks.
        self._patch_completed()
        if fullname not in self._pending:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                self._patch_after(spec.loader)
                return spec
        return None

    def _patch_after(self, loader: Any) -> None:
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self._patch_completed()

        loader.exec_module = exec_module

    def _patch_completed(self) -> None:
        for name, (function, patch) in list(self._pending.items()):
            module = sys.modules.get(name)
            if module is not None and hasattr(module, function):
                self._pending.pop(name, None)  # another thread may have been faster
                patch(module)


def activate() -> None:
    """Watch for the two Axolotl modules. Idempotent."""
    if not any(isinstance(finder, _PatchOnImport) for finder in sys.meta_path):
        finder = _PatchOnImport()
        sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
        finder._patch_completed()
