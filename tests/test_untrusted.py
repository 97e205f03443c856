"""Nothing in a checkpoint or a data set is executed, and nothing asks the network."""

import ast
import json
import os
import pickle
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

import axolotl_psft
from axolotl_psft.files import FileError
from axolotl_psft.initial_policy import InitialPolicy
from axolotl_psft.resume import Run, load_window, window_path
from tests.tiny import PROMPT, config, run, train_logs

SAVE = {"save_strategy": None, "save_steps": 2, "max_steps": 4}


class Bomb:
    """What a pickle may do when it is loaded: here, leave a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.marker), "w")


def test_the_bomb_goes_off_where_pickles_are_loaded(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker"))).close()
    assert (tmp_path / "marker").exists()


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the middle of a window of four."""
    output = tmp_path_factory.mktemp("trusted")
    run(config(tiny, output, **{**SAVE, "max_steps": 2}))
    return output / "run" / "checkpoint-2"


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        window_path("", 0).name,
        "model.safetensors",
    ],
)
def test_a_pickle_in_a_checkpoint_is_not_executed(
    name: str, checkpoint: Path, tiny: Path, tmp_path: Path
) -> None:
    marker, folder = tmp_path / "marker", tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, folder)
    assert (folder / name).is_file()
    (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    cfg = config(tiny, tmp_path, resume_from_checkpoint=str(folder), **SAVE)
    if name == "training_args.bin":
        # Written, never read.
        assert len(train_logs(run(cfg))) == 4
    else:
        with pytest.raises(Exception) as caught:
            run(cfg)
        if name.startswith("psft_window"):
            assert caught.type is FileError
    assert not marker.exists()


# A safetensors file starts with the length of its header, 8 bytes; the header has each
# tensor's dtype, shape and place.
HUGE = json.dumps(
    {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
).encode()
OUTSIDE = json.dumps(
    {"x": {"dtype": "F32", "shape": [2], "data_offsets": [2**30, 2**30 + 8]}}
).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 4,
        (2**63).to_bytes(8, "little"),
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        (10**8).to_bytes(8, "little") + b"{}" * 9,
        len(HUGE).to_bytes(8, "little") + HUGE,
        len(OUTSIDE).to_bytes(8, "little") + OUTSIDE + b"\x00" * 8,
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
    ],
)
def test_lengths_that_lie_are_an_error_of_ours(content: bytes, tmp_path: Path) -> None:
    window = window_path(tmp_path, 0)
    window.write_bytes(content)
    with pytest.raises(FileError, match=r"rank0\.safetensors: truncated, dam"):
        load_window(tmp_path, Run(0, 1, {}, {}), global_step=1)
    (tmp_path / "part-0.safetensors").write_bytes(content)
    with pytest.raises(FileError, match=r"part-0\.safetensors: truncated,"):
        InitialPolicy(tmp_path, "id")


def test_a_checkpoint_that_is_a_link_is_what_it_links_to(
    checkpoint: Path, tiny: Path, tmp_path: Path
) -> None:
    """Files are found by names of our own; none is written through to the original."""
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    os.symlink(checkpoint, tmp_path / "checkpoint-2")
    link = str(tmp_path / "checkpoint-2")
    trainer = run(config(tiny, tmp_path, resume_from_checkpoint=link, **SAVE))
    assert len(train_logs(trainer)) == 4
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_nothing_of_ours_evaluates_or_unpickles() -> None:
    """Every reading of a pickle says so, and allows tensors only."""
    folder = Path(axolotl_psft.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "compile", "__import__"), path
            assert not name.startswith(("pickle.", "jinja2.", "os.system"))
            assert not name.startswith("yaml.") or name == "yaml.safe_load", path
            if name == "torch.load":
                options = {key.arg: ast.unparse(key.value) for key in node.keywords}
                assert options["weights_only"] == "True", path


def test_code_in_a_data_set_is_text(tiny: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    bomb = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    row = '{"instruction": "{{ %s }} {%% %s %%} !!python/object w1", "output": "w2 w3"}'
    data = tmp_path / "train.jsonl"
    data.write_text((row % (bomb, bomb) + "\n") * 16)
    # Long enough for any path of the marker.
    datasets = [{"path": str(data), "type": PROMPT}]
    run(config(tiny, tmp_path, datasets=datasets, sequence_len=512, max_steps=2))
    assert not marker.exists()


def test_a_run_asks_nothing_of_the_network(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def refuse(self: socket.socket, address: Any, *_: Any) -> None:
        asked.append(address)
        raise OSError(f"the network is off, asked for {address}")

    def look_up(host: Any, *_: Any, **__: Any) -> None:
        asked.append(host)
        raise OSError(f"the network is off, asked for {host}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    run(config(tiny, tmp_path, **SAVE))
    # Processes of this machine talk to one another by files.
    assert [a for a in asked if not isinstance(a, str) or "/" not in a] == []
