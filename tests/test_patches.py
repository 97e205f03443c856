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


def error_of(call: Any) -> str:
    """Type and text of what ``call`` raises, or an empty string."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


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
    """Runs where patched copies come first, torch having prepared the process."""
    import gc
    from types import SimpleNamespace
    from unittest import mock

    import accelerate
    import numpy as np
    import torch
    from accelerate.data_loader import (
        BatchSamplerShard,
        DataLoaderDispatcher,
        DataLoaderShard,
        SkipBatchSampler,
    )
    from axolotl.core.trainers.base import AxolotlTrainer
    from axolotl.integrations import base
    from axolotl.utils import config as axolotl_config
    from axolotl.utils.samplers import MultipackBatchSampler

    from axolotl_psft import _autoload
    from axolotl_psft.sampling import EpochMultipackBatchSampler
    from tests import tiny as models

    said: dict[str, Any] = {
        "files": [base.__file__, axolotl_config.__file__, accelerate.__file__],
        "changed at run time": [
            hasattr(function, _autoload._MARK)
            for function in (base.load_plugin, axolotl_config.validate_config)
        ],
        "finder": any(
            isinstance(finder, _autoload._PatchOnImport) for finder in sys.meta_path
        ),
    }

    # 0001: names
    for name in ("axolotl_psft", "axolotl.integrations.base.BasePlugin"):
        said[f"load {name}"] = type(base.load_plugin(name)).__name__
    (Path(folder) / "broken_plugin.py").write_text("import no_such_module\n")
    sys.path.append(folder)
    for name in (
        "axolotl-psft",
        "nothing_like_it",
        "axolotl_pstf.PSFTPlugin",
        "axolotl_psft.PSFTPlugn",
        "axolotl.integrations.nothing.Plugin",
        "broken_plugin.Plugin",
    ):
        said[f"load {name}"] = error_of(lambda name=name: base.load_plugin(name))

    # 0002: blocks
    def refusal(**overrides: Any) -> str:
        cfg = models.config(Path(tiny), Path(folder), **overrides)
        return error_of(lambda: models.load(cfg))

    said["no plugin"] = refusal(plugins=None)
    said["misspelt block"] = refusal(psft=None, pfst={}, **{"x-shared": {"a": 1}})
    said["a plugin that does not import"] = refusal(plugins=["broken_plugin.Plugin"])

    # 0004: device
    os.environ.update(WORLD_SIZE="2", LOCAL_RANK="1")
    ours = {"plugins": ["axolotl_psft"], "x-shared": {"a": 1}}
    loaded = models.load(models.config(Path(tiny), Path(folder), **ours))
    said["device map"] = loaded.device_map
    os.environ.update(WORLD_SIZE="1", LOCAL_RANK="0")

    # 0005: a restart's draws, here those of a process whose state is at seed 7
    from axolotl.monkeypatch import relora as axolotl_relora

    from axolotl_psft import relora

    torch.manual_seed(7)
    main_state = torch.get_rng_state()
    main_draw = torch.rand(3).tolist()
    torch.manual_seed(8)
    with (
        mock.patch.multiple(
            axolotl_relora,
            is_distributed=lambda: True,
            is_main_process=lambda: False,
            dist=SimpleNamespace(
                broadcast_object_list=lambda shared, src: shared.__setitem__(
                    src, [main_state]
                )
            ),
        ),
        axolotl_relora.main_process_random_state(torch.device("cpu")),
    ):
        said["draws as the main process"] = torch.rand(3).tolist() == main_draw
    after = torch.rand(3).tolist()
    torch.manual_seed(8)
    said["goes on from its own state"] = torch.rand(3).tolist() == after
    callback = SimpleNamespace(on_step_begin=min, jagged_restart_steps=1)
    relora.share_draws(callback)  # type: ignore[arg-type]
    said["ours leaves restarts alone"] = callback.on_step_begin is min

    # 0003: order. Axolotl collects garbage after every packing, 0.4 s each time.
    gc.collect = lambda *_: 0  # type: ignore[assignment]
    lengths = np.random.default_rng(2).integers(2, 32, size=100)

    def sampler(seed: int | None, num_draws: int) -> MultipackBatchSampler:
        torch.manual_seed(0)
        torch.rand(num_draws)
        trainer = SimpleNamespace(
            args=SimpleNamespace(
                sample_packing=True,
                pretraining=False,
                curriculum_sampling=False,
                data_seed=seed,
                seed=5,
            ),
            train_dataset=lengths,
            _create_multipack_sampler=lambda base_sampler, dataset: base_sampler,
        )
        packed = MultipackBatchSampler(
            AxolotlTrainer._get_train_sampler(trainer),  # type: ignore[arg-type]
            batch_size=2,
            batch_max_len=32,
            lengths=lengths,
            bin_size=100,
            num_processes=1,
        )
        len(packed)
        return packed

    def epochs(packed: MultipackBatchSampler) -> list[Any]:
        orders = []
        for epoch in range(12):
            packed.set_epoch(epoch)
            orders.append(list(packed))
        return orders

    first = epochs(sampler(7, num_draws=0))
    said["packed in turn"] = len({json.dumps(order) for order in first})
    said["packed lengths"] = sorted({len(order) for order in first})
    said["own lengths"] = len({len(order) for order in map(_distinct, first)})
    said["packed the same"] = first == epochs(sampler(7, num_draws=5))
    said["packed by seed"] = first != epochs(sampler(None, num_draws=0))
    stock = sampler(7, num_draws=0)
    kept = EpochMultipackBatchSampler.from_stock(stock, seed=0)
    said["ours keeps it"] = kept.sampler is stock.sampler and epochs(kept) == first

    # Accelerate 0002: a mesh, here one without dimensions
    mesh = SimpleNamespace(mesh_dim_names=())
    stream = DataLoaderDispatcher(list(range(100)), torch_device_mesh=mesh)
    skipped = accelerate.skip_first_batches(stream, 1)
    said["skipping keeps the mesh"] = skipped.torch_device_mesh is mesh

    # Accelerate 0001: nestings
    def shard(inner: Any) -> Any:
        return BatchSamplerShard(inner, num_processes=2, process_index=1)

    for name, nest in {
        "plain": lambda inner: inner,
        "shard": shard,
        "skip": lambda inner: SkipBatchSampler(inner, 1),
        "skip over shard": lambda inner: SkipBatchSampler(shard(inner), 1),
    }.items():
        nested = nest(sampler(7, num_draws=0))
        list(nested)
        loader = DataLoaderShard(list(range(100)), batch_sampler=nested)
        loader.set_epoch(3)
        at_once = list(nested)
        walked = sampler(7, num_draws=3)
        walked.set_epoch(3)
        said[f"epoch through {name}"] = at_once == list(nest(walked))
    return said


def _distinct(batches: list[Any]) -> list[Any]:
    return [batch for i, batch in enumerate(batches) if batch not in batches[:i]]


@pytest.fixture(scope="module")
def axolotl(
    patched: Trees, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    paths = [patched["axolotl"], patched["accelerate"]]
    return probe("probe_axolotl", paths, tiny, tmp_path_factory.mktemp("axolotl"))


def test_the_patched_copies_were_asked(patched: Trees, axolotl: dict[str, Any]):
    trees = [patched["axolotl"], patched["axolotl"], patched["accelerate"]]
    for file, tree in zip(axolotl["files"], trees, strict=True):
        assert Path(file).is_relative_to(tree)


def test_axolotl_is_not_changed_at_run_time(axolotl: dict[str, Any]):
    assert axolotl["finder"], "torch did not prepare the process: nothing is proved"
    assert axolotl["changed at run time"] == [False, False]


def test_plugin_names(axolotl: dict[str, Any]):
    assert axolotl["load axolotl_psft"] == "PSFTPlugin"
    assert axolotl["load axolotl.integrations.base.BasePlugin"] == "BasePlugin"
    for name, like in {
        "axolotl-psft": "axolotl_psft",
        "axolotl_pstf.PSFTPlugin": "axolotl_psft.PSFTPlugin",
        "axolotl_psft.PSFTPlugn": "axolotl_psft.PSFTPlugin",
    }.items():
        said = axolotl[f"load {name}"]
        assert said.startswith(f"ValueError: plugins: there is no plugin named {name}.")
        assert f"Did you mean {like}" in said
    for name in ("nothing_like_it", "axolotl.integrations.nothing.Plugin"):
        assert axolotl[f"load {name}"].endswith(f"{name}. Is it installed?")
    # What a plugin imports may be missing; the plugin is not.
    said = axolotl["load broken_plugin.Plugin"]
    assert said == "ModuleNotFoundError: No module named 'no_such_module'"


def test_a_block_that_nothing_reads(axolotl: dict[str, Any]):
    refusal = "ValueError: {}: no option and no loaded plugin has this name, got"
    assert axolotl["no plugin"].startswith(refusal.format("psft") + " plugins: None.")
    assert axolotl["misspelt block"].startswith(refusal.format("pfst"))
    said = axolotl["a plugin that does not import"]
    assert said.startswith(refusal.format("psft"))
    assert "plugins: ['broken_plugin.Plugin']" in said


def test_several_ranks_load_the_model_on_the_cpu(axolotl: dict[str, Any]):
    assert axolotl["device map"] == {"": "cpu"}


def test_a_relora_restart_draws_the_same_on_every_rank(axolotl: dict[str, Any]):
    assert axolotl["draws as the main process"]
    assert axolotl["goes on from its own state"]
    assert axolotl["ours leaves restarts alone"]


def test_the_packed_order_is_one_of_seed_and_epoch(axolotl: dict[str, Any]):
    assert axolotl["packed in turn"] == 12
    assert axolotl["packed the same"] and axolotl["packed by seed"]
    assert axolotl["ours keeps it"]
    assert len(axolotl["packed lengths"]) == 1
    assert axolotl["own lengths"] > 1, "choose lengths that pack unevenly"


def test_accelerate_keeps_the_mesh(axolotl: dict[str, Any]):
    assert axolotl["skipping keeps the mesh"]


@pytest.mark.parametrize("nesting", ["plain", "shard", "skip", "skip over shard"])
def test_accelerate_passes_the_epoch_on(axolotl: dict[str, Any], nesting: str):
    assert axolotl[f"epoch through {nesting}"]


# ---- Megatron-Core ----


def _megatron_patch() -> str:
    (patch,) = (patch for patch in SERIES if patch.startswith("megatron-core"))
    return patch


def probe_megatron(store: str) -> dict[str, Any]:
    """One rank, two optimizer steps with clipping, beside plain PyTorch."""
    from contextlib import nullcontext
    from importlib import import_module

    import megatron.core.utils
    import torch
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.enums import ModelType
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import TransformerConfig

    from axolotl_psft.megatron.cpu import stand_ins

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=60),
    )
    parallel_state.initialize_model_parallel()

    class Model(torch.nn.Module):
        """A parallel layer and a plain one, allocated where Megatron says."""

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

    def total(outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        loss = outputs.pow(2).sum()
        return loss, torch.tensor(len(outputs), dtype=torch.int), {"loss": loss}

    def forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        return model(next(batches)), total

    torch.manual_seed(0)
    batches = [torch.randn(2, 4) for _ in range(2)]
    said: dict[str, Any] = {
        "file": megatron.core.utils.__file__,
        "device": str(megatron.core.utils.current_device()),
        "stand-ins stay away": isinstance(stand_ins(), nullcontext),
        "modules without it": [
            file
            for file in changed_files(_megatron_patch())
            if not hasattr(
                import_module(file.removesuffix(".py").replace("/", ".")),
                "current_device",
            )
        ],
    }
    for sharded in (False, True):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=4,
            num_attention_heads=1,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
            calculate_per_token_loss=True,
        )
        model = Model(config)
        reference = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
        with torch.no_grad():
            pairs = zip(model.parameters(), reference.parameters(), strict=True)
            for parameter, other in pairs:
                parameter.copy_(other)
        wrapped = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(use_distributed_optimizer=sharded),
            model,
        )
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=0.1,
                weight_decay=0.0,
                clip_grad=0.1,
                log_num_zeros_in_grad=True,
                use_distributed_optimizer=sharded,
            ),
            [wrapped],
        )
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = optimizer.scale_loss
        expected = torch.optim.AdamW(reference.parameters(), lr=0.1, weight_decay=0.0)
        norms = []
        for _ in range(2):
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
            expected.zero_grad()
            rows = torch.cat(batches)
            (reference(rows).pow(2).sum() / len(rows)).backward()
            clipped = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
            norms.append([norm, clipped.item()])
            expected.step()
        said[f"norms, sharded {sharded}"] = norms
        said[f"difference, sharded {sharded}"] = max(
            (parameter - other).abs().max().item()
            for parameter, other in zip(
                model.parameters(), reference.parameters(), strict=True
            )
        )
    torch.distributed.destroy_process_group()
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 1
    said["device of a GPU"] = str(megatron.core.utils.current_device())
    return said


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
