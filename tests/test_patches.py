"""patches/ applies to the installed releases, and replaces what it says it replaces.

The packages are copied, the copies patched, and looked at in one process each.
"""

import email
import importlib.metadata
import importlib.util
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PATCHES = ROOT / "patches"
SERIES = (PATCHES / "series").read_text().splitlines()
# The folder that a release unpacks into.
FOLDERS = {
    "accelerate": "accelerate",
    "axolotl": "axolotl",
    "megatron-core": "megatron",
}


def release(patch: str) -> tuple[str, str]:
    """Name and version of the package that ``patch`` is for."""
    name, _, version = patch.split("/")[0].rpartition("-")
    return name, version


def changed_files(patch: str) -> list[str]:
    return re.findall(r"^\+\+\+ b/(\S+)", (PATCHES / patch).read_text(), re.MULTILINE)


class Trees(dict[str, Path]):
    """Folders with a patched copy each, by the package's name."""

    def __missing__(self, name: str) -> Path:
        return pytest.skip(f"no release of {name} is installed that patches/ is for")


def is_installed(name: str, version: str) -> bool:
    try:
        return importlib.metadata.version(name) == version
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Trees:
    """Copies of the installed packages with the whole series applied, without fuzz."""
    folder = tmp_path_factory.mktemp("site-packages")
    trees = Trees()
    for patch in SERIES:
        name, version = release(patch)
        if not is_installed(name, version):
            continue
        if name not in trees:
            spec = importlib.util.find_spec(FOLDERS[name])
            (source,) = spec.submodule_search_locations
            # With the bytecode: it stays valid for every file that is not patched.
            shutil.copytree(source, folder / name / FOLDERS[name])
            trees[name] = folder / name
        done = subprocess.run(
            ["git", "apply", "-p1", str(PATCHES / patch)],
            cwd=trees[name],
            # Inside a repository git would skip what is not under its root.
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{patch}: {done.stderr}"
    return trees


def probe(function: str, paths: list[Path], *args: Any) -> dict[str, Any]:
    """What ``function`` of this module returns where ``paths`` come before all else."""
    code = (
        "import json, sys; from tests import test_patches as tests\n"
        f"print(json.dumps(tests.{function}(*sys.argv[1:])))"
    )
    search = os.pathsep.join(str(path) for path in [*paths, ROOT])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": search, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def outcome(call: Any) -> Any:
    """What ``call`` returns, or type and text of what it raises."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# ---- The files ----


def test_series_lists_every_patch_once():
    files = [str(path.relative_to(PATCHES)) for path in PATCHES.rglob("*.patch")]
    assert sorted(SERIES) == sorted(files)
    # In order: a later patch may change what an earlier one did.
    for name in {patch.split("/")[0] for patch in SERIES}:
        numbers = [patch.split("/")[1][:4] for patch in SERIES if name in patch]
        assert numbers == [f"{i:04}" for i in range(1, len(numbers) + 1)]


def test_the_readme_names_every_patch():
    readme = (PATCHES / "README.md").read_text()
    named = re.findall(r"^\| `(\S+/\d{4})`", readme, re.MULTILINE)
    assert named == [re.match(r"\S+/\d{4}", patch)[0] for patch in SERIES]


@pytest.mark.parametrize("patch", SERIES)
def test_header(patch: str):
    mail = email.message_from_string((PATCHES / patch).read_text())
    assert mail["Subject"].startswith("[PATCH") and mail["From"] and mail["Date"]
    text, separator, _ = mail.get_payload().partition("\n---\n")
    header = email.message_from_string(text)
    assert separator and header.get_payload() == ""
    assert len(header["Description"].splitlines()) > 3
    assert header["Origin"] == "vendor"
    assert header["Author"] == "the axolotl_psft developers"
    assert header["Forwarded"] == "no"
    assert date.fromisoformat(header["Last-Update"]) >= date(2026, 11, 23)
    assert header["Drop-When"]


@pytest.mark.parametrize("patch", SERIES)
def test_it_applies_and_compiles(patched: Trees, patch: str):
    tree = patched[release(patch)[0]]
    files = changed_files(patch)
    assert files
    for file in files:
        py_compile.compile(str(tree / file), doraise=True)


# ---- Axolotl and Accelerate ----


def probe_axolotl(tiny: str, folder: str) -> dict[str, Any]:
    """Runs where patched copies come first."""
    import gc

    import accelerate
    from axolotl.integrations import base
    from axolotl.utils import environment
    from axolotl.utils.samplers import multipack

    # Axolotl collects garbage after every packing, 0.4 s each time.
    gc.collect = lambda *_: 0  # type: ignore[assignment]
    modules = [base, environment, multipack, accelerate]
    return {
        "files": [module.__file__ for module in modules],
        # The first: what our plugin does when it is loaded is asked for there, too.
        **_probe_peers(),
        **_probe_names(tiny, folder),
        **_probe_device(tiny, folder),
        **_probe_relora(),
        **_probe_order(),
        **_probe_epoch(),
        **_probe_mesh(),
    }


def _probe_peers() -> dict[str, Any]:
    from unittest import mock

    import torch
    from axolotl.utils.environment import check_cuda_p2p_support

    from axolotl_psft.cpu import run

    def answer() -> Any:
        return outcome(check_cuda_p2p_support)

    said: dict[str, Any] = {}
    asked = "torch.cuda.can_device_access_peer"
    with mock.patch.dict(os.environ, WORLD_SIZE="2", LOCAL_RANK="1"):
        for peers in (True, False):
            with mock.patch(asked, return_value=peers):
                said[f"peers {peers}"] = answer()
        for error in (AssertionError, RuntimeError):
            with mock.patch(asked, side_effect=error("no driver")):
                stock = answer()
                run.let_ranks_start()
                said[f"peers {error.__name__}"] = [stock, answer()]
    said["has no accelerator"] = not torch.accelerator.is_available()
    return said


def _probe_names(tiny: str, folder: str) -> dict[str, Any]:
    from unittest import mock

    from axolotl.integrations import base

    from axolotl_psft import PSFTPlugin
    from tests import tiny as models

    def cfg(name: str) -> dict[str, Any]:
        return models.config(Path(tiny), Path(folder), plugins=[name])

    names = ("axolotl_psft", "axolotl_psft.PSFTPlugin")
    others = ("axolotl_psft:PSFTPlugin", "axolotl.integrations.base.BasePlugin")
    loaded = {f"load {name}": _loaded(name) for name in (*names, *others)}
    with_ours = [_registered(cfg(name)) for name in names]
    with mock.patch.object(PSFTPlugin, "__init__", base.BasePlugin.__init__):
        without_ours = [_registered(cfg(name)) for name in names]
    return {
        **loaded,
        "with ours": with_ours,
        "without ours": without_ours,
        "misspelt": outcome(lambda: str(models.load(cfg("axolotl-psft")))),
    }


def _loaded(name: str) -> str:
    """The class of the plugin that Axolotl makes of a name."""
    from axolotl.integrations import base

    return outcome(lambda: type(base.load_plugin(name)).__name__)


def _registered(cfg: dict[str, Any]) -> list[str]:
    """Whose hooks run, and how often, in a configuration."""
    from unittest import mock

    from axolotl.integrations import base

    from axolotl_psft import PSFTPlugin
    from tests import tiny as models

    ran: list[str] = []

    def register(self: Any, cfg: Any) -> None:
        ran.append(type(self).__name__)

    with (
        mock.patch.object(base.BasePlugin, "register", register),
        mock.patch.object(PSFTPlugin, "register", register),
    ):
        outcome(lambda: models.load(cfg))
    return [name for name in ran if name in ("PSFTPlugin", "BasePlugin")]


def _probe_device(tiny: str, folder: str) -> dict[str, Any]:
    from unittest import mock

    from transformers import AutoModelForCausalLM

    from axolotl_psft.cpu import run
    from tests import tiny as models

    with mock.patch.dict(os.environ, WORLD_SIZE="2", LOCAL_RANK="1"):
        cfg = models.load(models.config(Path(tiny), Path(folder)))
    before = cfg.device_map
    run.prepare(cfg)

    def load(device_map: Any) -> str:
        path = Path(tiny) / "model"
        model = AutoModelForCausalLM.from_pretrained(path, device_map=device_map)
        return str(model.device)

    return {
        "device map": [before, cfg.device_map],
        "loads on": outcome(lambda: load(before)),
        "a number loads on": outcome(lambda: load({"": 1})),
    }


def _probe_relora() -> dict[str, Any]:
    """What a restart draws on a rank whose state is not the main process's."""
    import torch

    torch.manual_seed(7)
    main_state = torch.get_rng_state()
    expected = torch.rand(2).tolist()
    torch.manual_seed(8)
    drawn = _drawn_in_a_restart(main_state)
    after = torch.rand(3).tolist()
    torch.manual_seed(8)
    return {
        "draws as the main process": drawn == expected,
        "goes on from its own state": torch.rand(3).tolist() == after,
        "ours leaves restarts alone": _keeps_its_restart(),
    }


def _drawn_in_a_restart(main_state: Any) -> list[float]:
    """The random numbers of Axolotl's restart on a rank that is not the main one."""
    from types import SimpleNamespace
    from unittest import mock

    import torch
    from axolotl.monkeypatch import relora

    drawn: list[float] = []

    def draw(*args: Any, **kwargs: Any) -> None:
        drawn.append(torch.rand(1).item())

    def share(objects: list[Any], src: int) -> None:
        objects[src] = [main_state]

    callback: Any = SimpleNamespace(
        jagged_restart_steps=1,
        last_full_model=None,
        quantized=False,
        cpu_offload=False,
        prune_method="random",
        num_lora_restarts=0,
    )
    args = SimpleNamespace(
        output_dir="",
        optim="adamw",
        relora_prune_ratio=None,
        device=torch.device("cpu"),
    )
    model = SimpleNamespace(named_parameters=list, save_pretrained=lambda folder: None)
    with mock.patch.multiple(
        relora,
        create=True,
        is_distributed=lambda: True,
        is_main_process=lambda: False,
        dist=SimpleNamespace(broadcast_object_list=share),
        merge_and_save=draw,
        reset_optimizer=draw,
    ):
        relora.ReLoRACallback.on_step_begin(
            callback, args, SimpleNamespace(global_step=1), None, model, object()
        )
    return drawn


def _keeps_its_restart() -> bool:
    """Whether our own change of restarts stays away."""
    from types import SimpleNamespace

    from axolotl_psft import relora

    callback: Any = SimpleNamespace(on_step_begin=min, jagged_restart_steps=1)
    relora.share_draws(callback)
    return callback.on_step_begin is min


def _packing_trainer(seed: int | None) -> Any:
    """What Axolotl's trainers ask themselves when they make a packing sampler."""
    from types import SimpleNamespace

    import numpy as np

    lengths = np.random.default_rng(2).integers(2, 32, size=100)

    class Samples:
        column_names = ("length",)

        def __len__(self) -> int:
            return len(lengths)

        def __getitem__(self, name: str) -> np.ndarray:
            return lengths

    return SimpleNamespace(
        args=SimpleNamespace(
            sample_packing=True,
            pretraining=False,
            curriculum_sampling=False,
            multipack_real_batches=True,
            max_seq_length=32,
            per_device_train_batch_size=2,
            sample_packing_efficiency=1.0,
            sample_packing_group_size=100,
            sample_packing_bin_size=100,
            sample_packing_sequentially=False,
            sample_packing_mp_start_method=None,
            dataset_num_proc=1,
            data_seed=seed,
            seed=5,
        ),
        train_dataset=Samples(),
        _train_batch_size=2,
        _data_parallel_size=lambda: 1,
        _batches_per_optimizer_step=lambda: 1,
    )


def _packed(seed: int | None, num_draws: int) -> Any:
    """The sampler that a trainer of Axolotl's makes after so many random numbers."""
    from functools import partial

    import torch
    from axolotl.core.trainers.base import AxolotlTrainer

    trainer = _packing_trainer(seed)
    trainer._create_multipack_sampler = partial(
        AxolotlTrainer._create_multipack_sampler, trainer
    )
    torch.manual_seed(0)
    torch.rand(num_draws)
    return AxolotlTrainer._get_train_sampler(trainer)


def _diffusion_seed(seed: int | None) -> int:
    """That of the sampler of Axolotl's trainer of diffusion models."""
    from unittest import mock

    from axolotl.core.trainers.diffusion_lm import trainer as module
    from torch.utils.data import RandomSampler

    trainer = mock.MagicMock(args=_packing_trainer(seed).args)
    with mock.patch.multiple(
        module,
        get_diffusion_config=mock.MagicMock(),
        resolve_native_packing_budget=lambda cfg: None,
        native_packing_lengths=lambda *args, **kwargs: [2, 3],
    ):
        return module.AxolotlDiffusionTrainer._create_multipack_sampler(
            trainer, RandomSampler([0, 1]), None
        ).seed


def _probe_order() -> dict[str, Any]:
    from axolotl_psft.sampling import EpochMultipackBatchSampler

    first = _orders(_packed(7, num_draws=0))
    alone, num_packings = _packed_alone(7)
    ours = EpochMultipackBatchSampler.from_stock(_packed(7, num_draws=0), seed=7)
    return {
        "packed in turn": len({json.dumps(order) for order in first}),
        "packed lengths": sorted({len(order) for order in first}),
        "own lengths": len({len(order) for order in map(_distinct, first)}),
        "packed the same": first == _orders(_packed(7, num_draws=5)),
        "packed the same alone": first == _orders(alone),
        "replaced alone": type(alone.sampler).__name__,
        "packed by seed": first != _orders(_packed(None, num_draws=0)),
        "packings to count": num_packings,
        "diffusion seeds": [_diffusion_seed(seed) for seed in (7, None)],
        "ours keeps it": first == _orders(ours),
    }


def _orders(packed: Any) -> list[list[Any]]:
    """A sampler's batches in each of twelve epochs."""
    from torch.utils.data import DataLoader

    from axolotl_psft.sampling import set_sampler_epoch

    orders = []
    for epoch in range(12):
        set_sampler_epoch(DataLoader(range(100), batch_sampler=packed), epoch)
        orders.append(list(packed))
    return orders


def _packed_alone(seed: int) -> tuple[Any, int]:
    """A sampler where there is one process, and how often data were packed for it."""
    from unittest import mock

    from accelerate.data_loader import prepare_data_loader
    from axolotl.utils.samplers import multipack
    from torch.utils.data import DataLoader

    pack = mock.Mock(side_effect=multipack.pack_parallel)
    with mock.patch.object(multipack, "pack_parallel", pack):
        alone = _packed(seed, num_draws=0)
    # With one process Accelerate puts a sampler of its own below.
    prepare_data_loader(
        DataLoader(range(100), batch_sampler=alone),
        num_processes=1,
        use_seedable_sampler=True,
        data_seed=3,
    )
    return alone, pack.call_count


def _distinct(batches: list[Any]) -> list[Any]:
    return [batch for i, batch in enumerate(batches) if batch not in batches[:i]]


def _probe_epoch() -> dict[str, Any]:
    """Of each nesting of samplers: whether an epoch arrives at the innermost."""
    from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler

    def shard(inner: Any) -> Any:
        return BatchSamplerShard(inner, num_processes=2, process_index=1)

    nestings = {
        "plain": lambda inner: inner,
        "shard": shard,
        "skip": lambda inner: SkipBatchSampler(inner, 1),
        "skip over shard": lambda inner: SkipBatchSampler(shard(inner), 1),
    }
    return {
        f"epoch through {name}": [
            told
            for make in (_shuffled, lambda: _packed(7, num_draws=0))
            for told in _told_an_epoch(lambda nest=nest, make=make: nest(make()))
        ]
        for name, nest in nestings.items()
    }


def _shuffled() -> Any:
    """Batches in an order of Accelerate's own."""
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import BatchSampler

    return BatchSampler(SeedableRandomSampler(range(100), data_seed=7), 4, True)


def _told_an_epoch(make: Callable[[], Any]) -> list[bool]:
    """Whether epoch 3 has an order of its own, and two loaders pass it on.

    Args:
        make: samplers in their nesting, of epoch 0.
    """
    from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard

    from axolotl_psft.sampling import set_sampler_epoch

    class Samples:
        def __len__(self) -> int:
            return 100

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    walked = make()
    set_sampler_epoch(DataLoaderShard([0], batch_sampler=walked), 3)
    expected = list(walked)
    told = [expected != list(make())]
    for loader in (DataLoaderShard, DataLoaderDispatcher):
        nested, samples = make(), Samples()
        loader(samples, batch_sampler=nested).set_epoch(3)
        told += [list(nested) == expected, vars(samples) == {"epoch": 3}]
    return told


def _probe_mesh() -> dict[str, Any]:
    """Here one without dimensions."""
    from types import SimpleNamespace

    import accelerate
    from accelerate.data_loader import DataLoaderDispatcher
    from transformers import trainer

    from axolotl_psft.sampling import keep_mesh_when_skipping

    mesh = SimpleNamespace(mesh_dim_names=())
    stream = DataLoaderDispatcher(list(range(100)), torch_device_mesh=mesh)
    skipped = accelerate.skip_first_batches(stream, 1)
    keep_mesh_when_skipping()
    ours = trainer.skip_first_batches(stream, 1)
    return {
        "skipping keeps the mesh": skipped.torch_device_mesh is mesh,
        "ours sets the same mesh": ours.torch_device_mesh is mesh,
    }


@pytest.fixture(scope="module")
def axolotl(
    patched: Trees, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    paths = [patched["axolotl"], patched["accelerate"]]
    return probe("probe_axolotl", paths, tiny, tmp_path_factory.mktemp("axolotl"))


def test_the_patched_copies_were_asked(patched: Trees, axolotl: dict[str, Any]):
    trees = [*[patched["axolotl"]] * 3, patched["accelerate"]]
    for file, tree in zip(axolotl["files"], trees, strict=True):
        assert Path(file).is_relative_to(tree)


def test_plugin_names(axolotl: dict[str, Any]):
    for name in ("axolotl_psft", "axolotl_psft:PSFTPlugin", "axolotl_psft.PSFTPlugin"):
        assert axolotl[f"load {name}"] == "PSFTPlugin"
    assert axolotl["load axolotl.integrations.base.BasePlugin"] == "BasePlugin"
    said = axolotl["misspelt"]
    assert said.startswith("ValueError: plugins: axolotl-psft is neither")
    assert re.search(r"Installed: .*\baxolotl_psft\b", said)


def test_a_plugin_runs_once_however_it_is_written(axolotl: dict[str, Any]):
    # Not once more as the stand-in that PSFTPlugin leaves under its bare name.
    assert axolotl["with ours"] == [["PSFTPlugin"]] * 2
    assert axolotl["without ours"] == [["PSFTPlugin"]] * 2


def test_several_ranks_load_the_model_on_the_cpu(axolotl: dict[str, Any]):
    assert axolotl["device map"] == [{"": "cpu"}] * 2
    assert axolotl["loads on"] == "cpu"
    assert "Error: " in axolotl["a number loads on"], "it can: the patch is needless"


def test_several_ranks_start_without_a_driver(axolotl: dict[str, Any]):
    assert axolotl["has no accelerator"], "or ours answers nothing"
    for error in ("AssertionError", "RuntimeError"):
        # Without and with ours.
        assert axolotl[f"peers {error}"] == [True, True]
    assert axolotl["peers True"] is True and axolotl["peers False"] is False


def test_a_relora_restart_draws_the_same_on_every_rank(axolotl: dict[str, Any]):
    assert axolotl["draws as the main process"]
    assert axolotl["goes on from its own state"]
    assert axolotl["ours leaves restarts alone"]


def test_the_packed_order_is_one_of_seed_and_epoch(axolotl: dict[str, Any]):
    assert axolotl["packed in turn"] == 12
    assert axolotl["packed the same"] and axolotl["packed by seed"]
    assert axolotl["packed the same alone"]
    assert axolotl["replaced alone"] == "SeedableRandomSampler"
    assert axolotl["ours keeps it"]
    assert len(axolotl["packed lengths"]) == 1
    assert axolotl["own lengths"] > 1, "choose lengths that pack unevenly"
    assert axolotl["packings to count"] == 1
    # A model of another trainer has its seed, too.
    assert axolotl["diffusion seeds"] == [7, 5]


def test_accelerate_keeps_the_mesh(axolotl: dict[str, Any]):
    assert axolotl["skipping keeps the mesh"]
    assert axolotl["ours sets the same mesh"]


@pytest.mark.parametrize("nesting", ["plain", "shard", "skip", "skip over shard"])
def test_accelerate_passes_the_epoch_on(axolotl: dict[str, Any], nesting: str):
    # To a sampler of Accelerate's own, and to Axolotl's packing, of epoch 0 before; by
    # two loaders, to the sampler and to the data set.
    assert axolotl[f"epoch through {nesting}"] == [True] * 10


# ---- Megatron-Core ----


def _megatron_patch() -> str:
    (patch,) = (patch for patch in SERIES if patch.startswith("megatron-core"))
    return patch


def probe_megatron(store: str) -> dict[str, Any]:
    """One rank, two optimizer steps with clipping, beside plain PyTorch."""
    import torch

    said = _probe_devices()
    with _one_rank(store):
        torch.manual_seed(0)
        batches = [torch.randn(2, 4) for _ in range(2)]
        for sharded in (False, True):
            norms, difference = _train_beside_torch(batches, sharded)
            said[f"norms, sharded {sharded}"] = norms
            said[f"difference, sharded {sharded}"] = difference
    # The last, for it makes this process believe in a GPU.
    return {**said, "device of a GPU": _device_of_a_gpu()}


def _probe_devices() -> dict[str, Any]:
    """What Megatron-Core says of its device, and our stand-ins of Megatron-Core."""
    from contextlib import nullcontext
    from importlib import import_module

    import megatron.core.utils

    from axolotl_psft.megatron.groups import on_this_device

    files = changed_files(_megatron_patch())
    modules = {file: file.removesuffix(".py").replace("/", ".") for file in files}
    return {
        "file": megatron.core.utils.__file__,
        "device": str(megatron.core.utils.current_device()),
        "stand-ins stay away": isinstance(on_this_device(), nullcontext),
        "modules without it": [
            file
            for file, module in modules.items()
            if not hasattr(import_module(module), "current_device")
        ],
    }


def _device_of_a_gpu() -> str:
    import megatron.core.utils
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 1
    return str(megatron.core.utils.current_device())


@contextmanager
def _one_rank(store: str) -> Iterator[None]:
    """A process group of this process alone, and Megatron-Core's groups in it."""
    import torch
    from megatron.core import parallel_state

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=60),
    )
    parallel_state.initialize_model_parallel()
    yield
    torch.distributed.destroy_process_group()


def _train_beside_torch(
    batches: list[Any], sharded: bool
) -> tuple[list[list[float]], float]:
    """Two steps of Megatron-Core's and two of torch's, from the same weights.

    Returns:
        The gradient norm of each step, Megatron-Core's and torch's; the largest
        difference of a weight at the end.
    """
    import torch

    model = _parallel_model()
    reference = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    pairs = list(zip(model.parameters(), reference.parameters(), strict=True))
    with torch.no_grad():
        for parameter, other in pairs:
            parameter.copy_(other)
    ours = _megatron_step(model, batches, sharded)
    theirs = _torch_step(reference, batches)
    norms = [[ours(), theirs()] for _ in range(2)]
    return norms, max((ours - its).abs().max().item() for ours, its in pairs)


def _parallel_model() -> Any:
    """A parallel layer and a plain one, allocated where Megatron-Core says."""
    import torch
    from megatron.core.enums import ModelType
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig

    class Model(torch.nn.Module):
        def __init__(self, config: TransformerConfig) -> None:
            super().__init__()
            self.config = config
            self.model_type = ModelType.encoder_or_decoder
            self.first = ColumnParallelLinear(
                4, 6, config=config, init_method=lambda weight: weight, bias=True
            )
            self.second = torch.nn.Linear(6, 3)

        def set_input_tensor(self, _: Any) -> None:
            pass

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(inputs)[0])

    return Model(
        TransformerConfig(
            num_layers=1,
            hidden_size=4,
            num_attention_heads=1,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
            calculate_per_token_loss=True,
        )
    )


def _megatron_step(model: Any, batches: list[Any], sharded: bool) -> Any:
    """A function that makes an optimizer step of Megatron-Core's; its gradient norm."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    wrapped, optimizer = _megatron_optimizer(model, sharded)

    def total(outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        loss = outputs.pow(2).sum()
        return loss, torch.tensor(len(outputs), dtype=torch.int), {"loss": loss}

    def forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        return model(next(batches)), total

    def step() -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[wrapped],
            num_microbatches=len(batches),
            seq_length=1,
            micro_batch_size=2,
        )
        succeeded, norm, _ = optimizer.step()
        assert succeeded
        return norm

    return step


def _megatron_optimizer(model: Any, sharded: bool) -> tuple[Any, Any]:
    """The model in Megatron-Core's data parallelism, and its Adam, which clips."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(use_distributed_optimizer=sharded),
        model,
    )
    settings = OptimizerConfig(
        optimizer="adam",
        lr=0.1,
        weight_decay=0.0,
        clip_grad=0.1,
        log_num_zeros_in_grad=True,
        use_distributed_optimizer=sharded,
    )
    optimizer = get_megatron_optimizer(settings, [wrapped])
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.grad_scale_func = optimizer.scale_loss
    return wrapped, optimizer


def _torch_step(model: Any, batches: list[Any]) -> Any:
    """The same step in plain PyTorch."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    rows = torch.cat(batches)

    def step() -> float:
        optimizer.zero_grad()
        (model(rows).pow(2).sum() / len(rows)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return norm.item()

    return step


@pytest.fixture(scope="module")
def megatron(
    patched: Trees, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    store = tmp_path_factory.mktemp("megatron") / "store"
    return probe("probe_megatron", [patched["megatron-core"]], store)


def test_megatron_knows_its_device(patched: Trees, megatron: dict[str, Any]):
    assert Path(megatron["file"]).is_relative_to(patched["megatron-core"])
    assert megatron["device"] == "cpu"
    assert megatron["device of a GPU"] == "cuda:1"
    assert megatron["modules without it"] == []
    assert megatron["stand-ins stay away"]


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_a_megatron_step_on_a_cpu(megatron: dict[str, Any], sharded: bool):
    for norm, expected in megatron[f"norms, sharded {sharded}"]:
        assert norm > 0.1, "clip, or the test proves less"
        assert norm == pytest.approx(expected, rel=1e-5)
    assert megatron[f"difference, sharded {sharded}"] < 1e-6


def test_no_device_is_named_on_the_way_of_a_step(patched: Trees):
    # One rank does not pass through everything that two do.
    tree = patched["megatron-core"]
    named = re.compile(r"""device=(?:["']cuda|torch\.cuda\.)|["']torch\.cuda\.\w+T""")
    # Pipelines, symmetric memory and the like have more of them.
    elsewhere = ("core/utils.py", "pipeline_parallel/schedules.py")
    left = [
        line.strip()
        for file in changed_files(_megatron_patch())
        if not file.endswith(elsewhere)
        for line in (tree / file).read_text().splitlines()
        if named.search(line)
    ]
    # The warm-up of NCCL's own buffers.
    assert left == ['tmp_warmup_tensor = torch.zeros([1], device="cuda")']
