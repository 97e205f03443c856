"""Fixtures shared by all tests: no network, no telemetry, a tiny model and data."""

import os

# Before torch or Axolotl is imported anywhere.
os.environ.update(
    AXOLOTL_DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    ACCELERATE_USE_CPU="true",
    AXOLOTL_TEE_STDOUT="0",
    CUDA_VISIBLE_DEVICES="",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import colorama
import pytest

# Axolotl lets it wrap the process's streams for good; here they are a test's, and closed
# with it.
colorama.init = lambda *args, **kwargs: None

from tests.tiny import write_dataset, write_model


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="the long forms, too")


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if config.getoption("--soak"):
        return
    long = [item for item in items if item.get_closest_marker("soak")]
    items[:] = [item for item in items if item not in long]
    config.hook.pytest_deselected(items=long)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/` (random Qwen3), `train.jsonl` and `test.jsonl`."""
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder / "model")
    write_dataset(folder / "train.jsonl", num_samples=96, seed=0)
    write_dataset(folder / "test.jsonl", num_samples=13, seed=1)
    return folder
