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


def _know_megatron_0_16(layers: Any) -> None:
    """Megatron-Core 0.16 marks shards, and reduces gradients, only in some cases.

    Shards: where it initializes them; without the mark one would count as a replica in
    the gradient norm. Gradients of a block's input: where they are contiguous; of
    others nothing is summed over the ranks, and nothing says so.
    """
    import torch
    from megatron.core.tensor_parallel.layers import (
        set_tensor_model_parallel_attributes as mark,
    )

    def marking(name: str, dims: dict[str, int]) -> None:
        make = getattr(layers._Factory, name)

        def make_marked(*args: Any) -> Any:
            layer = make(*args)
            for parameter in (getattr(layer, key, None) for key in dims):
                if parameter is not None and not hasattr(parameter, "partition_dim"):
                    mark(parameter, True, dims["weight"], 1)
            return layer

        setattr(layers._Factory, name, make_marked)

    for name in ("column", "head"):
        marking(name, {"weight": 0, "bias": 0})
    marking("row", {"weight": 1})
    marking("embedding", {"weight": 0})

    class Contiguous(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad.contiguous()

    copy = layers.copy_to_tensor_model_parallel_region
    layers.copy_to_tensor_model_parallel_region = lambda *args, **kwargs: (
        Contiguous.apply(copy(*args, **kwargs))
    )


def _know_one_bucket(step: Any) -> None:
    """Megatron-Core 0.16 lays out the parts of the distributed optimizer by itself."""
    kinds = step.DistributedDataParallel, step.DistributedOptimizer
    kinds[1].compute_full_param_layout = staticmethod(lambda *args: None)

    def without_layout(*args: Any, full_param_layout: None = None) -> Any:
        return kinds[0](*args)

    step.DistributedDataParallel = without_layout


def _count_tokens(base: Any) -> None:
    """`include_tkps`: Axolotl 0.19 counts within its own loss, which is not called."""
    import torch
    from torch import distributed as dist

    def accumulate(trainer: Any, inputs: Any) -> None:
        labels = inputs["labels"]
        counts = torch.tensor([int((labels != -100).sum()), labels.numel()])
        if dist.is_initialized():
            counts = counts.to(labels.device)
            dist.all_reduce(counts)
        before = getattr(trainer.state, "tokens", None)
        if not before:
            before = {"trainable": torch.zeros(1), "total": torch.zeros(1)}
        pairs = zip(before.items(), counts.cpu(), strict=True)
        trainer.state.tokens = {name: old + new for (name, old), new in pairs}

    base.AxolotlTrainer._accumulate_token_counts = accumulate


# Of each module: a name that it has once it is complete, and what mends it.
_ENTRIES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "axolotl.integrations.base": ("PluginManager", _load_bare_name),
    "axolotl.utils.config": ("validate_config", _refuse_block_without_plugin),
    "axolotl.core.trainers.base": ("AxolotlTrainer", _count_tokens),
    "axolotl_psft.trainer": ("PSFTTrainer", _load_to_numbered_cpus),
    "axolotl_psft.megatron.layers": ("_split_dropout", _know_megatron_0_16),
    "axolotl_psft.megatron.step": ("_no_decay", _know_one_bucket),
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
