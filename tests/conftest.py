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

from pathlib import Path

import colorama
import pytest

from tests.tiny import write_dataset, write_model

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
    on_gpu = config.getoption("--gpu")
    left_out = [] if config.getoption("--soak") else _marked(items, "soak")
    if on_gpu:
        left_out = [item for item in items if item not in _marked(items, "gpu")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    for item in _marked(items, "gpu"):
        reason = "needs a GPU: `python -m pytest --gpu` on a machine with one"
        item.add_marker(pytest.mark.skipif(not (on_gpu and _has_gpu()), reason=reason))


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
