"""Fixtures shared by all tests: no network, no telemetry, a tiny model and data."""

import os
import sys

# Before torch or Axolotl is imported anywhere.
os.environ.update(
    AXOLOTL_DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    AXOLOTL_TEE_STDOUT="0",
)
# Tests of a GPU have a run of their own: the others compare bits on a CPU.
if "--gpu" not in sys.argv:
    os.environ.update(ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    # A kernel then runs in Triton's interpreter (test_row_kernels.py).
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import colorama
import pytest

from tests.tiny import run, write_dataset, write_model

# Axolotl has it wrap the process's streams for good; here they are a test's, and closed
# with it.
colorama.init = lambda *args, **kwargs: None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="the long forms, too")
    parser.addoption(
        "--gpu", action="store_true", help="those marked gpu, on this machine's GPU"
    )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    for item in items:
        if _is_whole_run(item):
            item.add_marker("whole_run")
    on_gpu = config.getoption("--gpu")
    left_out = [] if config.getoption("--soak") else _marked(items, "soak")
    if on_gpu:
        left_out = [item for item in items if item not in _marked(items, "gpu")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    for item in _marked(items, "gpu"):
        reason = "needs a GPU: `python -m pytest --gpu` on a machine with one"
        item.add_marker(pytest.mark.skipif(not (on_gpu and _has_gpu()), reason=reason))


# Modules whose functions start processes, or have Axolotl prepare data.
_STARTING = {
    *("subprocess", "tests.commands", "tests.distributed.launch"),
    *("benchmarks.forgetting.jobs", "axolotl.common.datasets"),
}
_OURS = ("tests.", "benchmarks.")


def _is_whole_run(item: Any) -> bool:
    """Whether a test prepares data or trains with Axolotl, or starts processes."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    used = [each.func for definitions in fixtures for each in definitions]
    return item.path.parent.name == "distributed" or _starts_one(item.obj, *used)


@functools.cache
def _starts_one(*functions: Any) -> bool:
    """Whether functions, or the helpers that their code names, start a whole run."""
    seen: set[Any] = set()
    left = list(functions)
    while left:
        function = inspect.unwrap(left.pop())
        codes = list(_codes(function.__code__))
        # What is imported inside of it may not be loaded yet.
        if any(_STARTING & set(code.co_names) for code in codes):
            return True
        for used in {each for code in codes for each in _named(code, function)} - seen:
            is_module = isinstance(used, ModuleType)
            home = used.__name__ if is_module else used.__module__
            if used is run or home in _STARTING:
                return True
            seen.add(used)
            if inspect.isfunction(used) and home.startswith(_OURS):
                left.append(used)
    return False


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of the functions inside of it."""
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


def _named(code: CodeType, function: Any) -> Iterator[Any]:
    """The functions, classes and modules that a piece of a function's code names."""
    found = [function.__globals__.get(name) for name in code.co_names]
    # `faults.inject`: of a module, what is named beside it.
    for module in filter(inspect.ismodule, list(found)):
        if module.__name__.startswith(_OURS):
            found += [vars(module).get(name) for name in code.co_names]
    kinds = (inspect.isfunction, inspect.isclass, inspect.ismodule)
    yield from (each for each in found if any(kind(each) for kind in kinds))


def _marked(items: list[pytest.Item], name: str) -> list[pytest.Item]:
    return [item for item in items if item.get_closest_marker(name)]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/` (random Qwen3), `train.jsonl` and `test.jsonl`."""
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder / "model")
    write_dataset(folder / "train.jsonl", num_samples=96, seed=0)
    write_dataset(folder / "test.jsonl", num_samples=13, seed=1)
    return folder
