"""Nothing in a checkpoint of several ranks is executed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from axolotl_psft.megatron.weights import _files
from tests.distributed.launch import run_distributed
from tests.distributed.tensor_parallel import write_models
from tests.distributed.untrusted import PATTERNS, bombed

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=[2, 1], ids=["tensor parallel", "data parallel"])
def ranks(
    request: Any, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("bombs")
    return run_distributed(bombed, 2, models, output, request.param, timeout=300)


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pickle_is_not_executed(ranks: list[dict[str, Any]], name: str) -> None:
    for result in ranks:
        number, error, exploded = result[name]
        assert number >= 1
        assert not exploded
        if name == "arguments":
            assert error == "none in 3 steps"
        else:
            assert not error.startswith("none")
        if name in ("windows", "initial policy"):
            assert "truncated, damaged or not" in error


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "sub/x.safetensors", "{folder}.safetensors"]
)
def test_weights_are_read_beside_their_index_only(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    name = name.format(folder=folder)
    save_file({"x": torch.zeros(2)}, folder / name)
    index = folder / "model.safetensors.index.json"

    def write(name: str) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"x": name}}))

    write(name)
    with pytest.raises(ValueError, match=r"which is not a file beside it\. Do not use"):
        _files(folder)
    # A link is how the hub's cache stores every file.
    os.symlink(folder / name, folder / "linked.safetensors")
    write("linked.safetensors")
    assert _files(folder) == [folder / "linked.safetensors"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 3}}']
)
def test_an_index_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json: no index of safetensors files"):
        _files(tmp_path)
