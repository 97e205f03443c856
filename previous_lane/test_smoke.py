"""What must keep training on Axolotl 0.19: `python -m pytest previous_lane`.

The start-up hook is tried on a stand-in for Axolotl too, whose import takes no time.
Everything finer is in tests/, which is for newer releases, and so are the helpers.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close

from tests import conftest
from tests.commands import finish, start
from tests.distributed.launch import keep_process_group, run_distributed
from tests.distributed.scenarios import PACKED, SAVE, logs
from tests.distributed.tensor_parallel import ADAM, DROPOUT, SIZES
from tests.test_launch import MODULE
from tests.tiny import (
    column,
    config,
    load,
    run,
    stateful,
    steps_after,
    train_logs,
    write_dataset,
    write_model,
)

tiny = conftest.tiny

ROOT = Path(__file__).parent.parent
BARE, DOTTED = "axolotl_psft", "axolotl_psft.PSFTPlugin"
ADD = "Add `plugins: [axolotl_psft]` to the YAML"
# Float32 sums in another order.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
METRICS = [
    *("loss", "grad_norm"),
    *("psft/surrogate", "psft/clip_frac", "psft/old_policy_age"),
]


def test_this_is_the_lane() -> None:
    assert version("axolotl") == "0.19.0"
    assert sys.version_info[:2] == (3, 11)


# ---- Training ----


@pytest.fixture(scope="module")
def launched(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Logged steps of the bare name from the command line, as users type it."""
    folder = tmp_path_factory.mktemp("launched")
    cfg = config(tiny, folder, plugins=[BARE], save_strategy=None, save_steps=8)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(cfg))
    finish(start([*MODULE, str(path)], {}, folder))
    assert (folder / "run" / "model.safetensors").is_file()
    state = folder / "run" / "checkpoint-8" / "trainer_state.json"
    return [e for e in json.loads(state.read_text())["log_history"] if "loss" in e]


def test_metrics_of_a_real_launch(launched: list[Any]) -> None:
    assert [e["psft/old_policy_age"] for e in launched] == [0, 1, 2, 3, 0, 1, 2, 3]
    for entry in launched:
        if entry["psft/old_policy_age"] == 0:
            assert entry["psft/surrogate"] == -1.0
            assert entry["psft/ratio_mean"] == entry["psft/ratio_max"] == 1.0
        else:
            assert entry["psft/ratio_max"] > 1.0
    assert max(entry["psft/clip_frac"] for entry in launched) > 0.05


def test_the_dotted_name_trains_the_same(
    launched: list[Any], tiny: Path, tmp_path: Path
) -> None:
    dotted = run(config(tiny, tmp_path, plugins=[DOTTED]))
    for metric in METRICS:
        assert column(dotted, metric) == [entry[metric] for entry in launched]


@pytest.mark.parametrize("plugins", [[BARE], [DOTTED], [BARE, DOTTED], [DOTTED, BARE]])
def test_its_hooks_run_once(tiny: Path, tmp_path: Path, plugins: list[str]) -> None:
    from axolotl.integrations.base import PluginManager

    assert load(config(tiny, tmp_path, plugins=plugins)).psft.refresh_steps == 4
    loaded = PluginManager.get_instance().plugins.values()
    assert [type(plugin).__name__ for plugin in loaded].count("PSFTPlugin") == 1


def test_refresh_every_step_trains_like_stock(tiny: Path, tmp_path: Path) -> None:
    psft = run(config(tiny, tmp_path / "psft", psft={"refresh_steps": 1}))
    stock = run(config(tiny, tmp_path / "stock", psft=None, plugins=None))
    for ours, theirs in (("loss", "loss"), ("grad_norm", "grad_norm")):
        expected = torch.tensor(column(stock, theirs))
        assert_close(torch.tensor(column(psft, ours)), expected, **CLOSE)


def resume(cfg: dict[str, Any], whole: Any, step: int, output: Path) -> Any:
    """The run that ``whole`` would be, had it been stopped after ``step``."""
    checkpoint = Path(whole.args.output_dir) / f"checkpoint-{step}"
    changed = {"output_dir": str(output), "save_steps": 1000}
    return run({**cfg, **changed, "resume_from_checkpoint": str(checkpoint)})


def test_a_packed_run_resumes_to_the_last_bit(tiny: Path, tmp_path: Path) -> None:
    lengths = {"max_steps": 14, "save_total_limit": 100}
    cfg = config(tiny, tmp_path, **{**DROPOUT, **stateful(packed=True), **lengths})
    whole = run(cfg)
    # Mid-window, in the second epoch.
    done = [e for e in train_logs(whole)[:-2] if e["psft/old_policy_age"] == 1][-1]
    assert done["epoch"] > 1
    resumed = resume(cfg, whole, done["step"], tmp_path / "resumed")
    expected = steps_after(whole, done["step"], METRICS)
    assert steps_after(resumed, done["step"], METRICS) == expected != []


def two_copies(tiny: Path, output: Path) -> dict[str, Any]:
    """What each of two data-parallel ranks does."""
    keep_process_group()
    results = {"plain": logs(run(config(tiny, output / "plain", micro_batch_size=4)))}
    adam = {"optimizer": "adamw_torch", "learning_rate": 0.01}
    cfg = config(tiny, output / "adam", **PACKED, **SAVE, **adam)
    whole = run(cfg)
    results["adam"] = logs(whole, 9)
    results["resumed"] = logs(resume(cfg, whole, 9, output / "resumed"), 9)
    results["epochs"] = [entry["epoch"] for entry in train_logs(whole)]
    return results


def test_two_data_parallel_ranks(tiny: Path, tmp_path: Path) -> None:
    result, other = run_distributed(two_copies, 2, tiny, tmp_path, timeout=240)
    assert result["plain"] == other["plain"]
    alone = logs(run(config(tiny, tmp_path / "alone", micro_batch_size=8)))
    # Twice as far from one another after eight steps of gradient descent.
    limits = {**CLOSE, "rtol": 2e-6}
    assert_close(torch.tensor(result["plain"]), torch.tensor(alone), **limits)
    # In the second epoch, which accelerate forgets to tell the samplers.
    assert result["epochs"][8] > 1
    assert result["resumed"] == result["adam"] != []


def split(folder: Path, output: Path, size: int) -> dict[str, Any]:
    """Runs whose results must not depend on the number of tensor-parallel ranks."""
    keep_process_group()
    # Steps as small as the other tests' of tensor parallelism.
    options = {"tensor_parallel_size": size, "learning_rate": 0.1}
    cfg = config(folder, output / "plain", **options)
    results = {"plain": logs(run(cfg))}
    options |= {"sample_packing": True, "micro_batch_size": 1}
    options["psft"] = {"refresh_steps": 4, "sequence_parallel": size > 1}
    results["packed, in sequence"] = logs(run(config(folder, output / "p", **options)))
    if size > 1:
        cfg = config(folder, output / "adam", **{**options, **SAVE, **ADAM})
        whole = run(cfg)
        results["adam"] = logs(whole, 6)
        results["resumed"] = logs(resume(cfg, whole, 6, output / "resumed"), 6)
    return results


def test_tensor_parallel_equals_dense(tmp_path: Path) -> None:
    write_model(tmp_path / "model", **SIZES)
    write_dataset(tmp_path / "train.jsonl", num_samples=96, seed=0)
    result, _ = run_distributed(split, 2, tmp_path, tmp_path / "two", 2, timeout=240)
    assert result.pop("resumed") == result.pop("adam") != []
    dense = split(tmp_path, tmp_path / "one", 1)
    assert result.keys() == dense.keys()
    for name, steps in result.items():
        assert_close(torch.tensor(steps), torch.tensor(dense[name]), **CLOSE)
        assert len(steps) == 8


# ---- The start-up hook ----


@pytest.mark.parametrize(
    "plugins",
    [None, [], ["axolotl.integrations.liger.LigerPlugin"], ["axolotl_pstf.PSFTPlugin"]],
    ids=["absent", "empty", "another", "misspelt"],
)
def test_a_block_without_its_plugin_is_an_error(
    tiny: Path, tmp_path: Path, plugins: list[str] | None
) -> None:
    with pytest.raises(ValueError, match=r"psft: .* not loaded") as caught:
        load(config(tiny, tmp_path, plugins=plugins))
    assert f"got plugins: {plugins}. " in str(caught.value)
    assert ADD in str(caught.value)


def test_without_block_and_plugin_nothing_is_asked(tiny: Path, tmp_path: Path) -> None:
    assert load(config(tiny, tmp_path, plugins=None, psft=None)).psft is None


def python(code: str, path: Path | None = None, **env: str) -> str:
    """Standard output of a fresh interpreter that sees ``path`` before all else."""
    search = [str(part) for part in (path, ROOT / "previous_lane", ROOT) if part]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search), **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def standin(tmp_path: Path) -> Path:
    """A folder with an `axolotl` that has the two modules and nothing else."""
    for package in ("axolotl", "axolotl/integrations", "axolotl/utils"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "axolotl/integrations/base.py").write_text(
        "import early\n"
        "def load_plugin(plugin_name):\n"
        "    'Loads.'\n"
        "    module, name = plugin_name.rsplit('.', 1)\n"
        "    return name\n"
        "class BasePlugin:\n"
        "    pass\n"
        "class PluginManager:\n"
        "    plugins = {}\n"
        "    @classmethod\n"
        "    def get_instance(cls): return cls\n"
    )
    (tmp_path / "axolotl/utils/config.py").write_text(
        "def validate_config(cfg, capabilities=None): return cfg, capabilities\n"
    )
    (tmp_path / "early.py").touch()
    (tmp_path / "later.py").touch()
    return tmp_path


ACTIVATE = "from axolotl_psft_0_19 import activate; activate()\n"
BASE = "from axolotl.integrations import base\n"
CONFIG = "from axolotl.utils import config\n"
SHOW = (
    "print(type(base.load_plugin('axolotl_psft')).__name__, base.PluginManager.plugins,"
    " base.load_plugin('other.Plugin'))\n"
    "try: config.validate_config({'psft': {}, 'plugins': ['x']})\n"
    "except ValueError as error: print(error)\n"
)


def check(shown: str) -> None:
    names, error = shown.splitlines()
    assert names == f"BasePlugin {{'{DOTTED}': 'PSFTPlugin'}} Plugin"
    assert error.startswith("psft: the block is set but its plugin is not loaded, got")
    assert "plugins: ['x']" in error and ADD in error


@pytest.mark.parametrize(
    "order",
    [
        ACTIVATE + BASE + CONFIG,
        BASE + CONFIG + ACTIVATE,
        BASE + ACTIVATE + CONFIG,
        CONFIG + ACTIVATE + ACTIVATE + BASE,
    ],
    ids=["before", "after", "between", "twice"],
)
def test_any_import_order(standin: Path, order: str) -> None:
    check(python(order + SHOW, standin))


@pytest.mark.parametrize(
    "module", ["axolotl/integrations/base", "axolotl/utils/config"]
)
def test_half_imported(standin: Path, module: str) -> None:
    # As when Axolotl is imported first: it imports torch, which calls activate().
    file = standin / f"{module}.py"
    file.write_text(ACTIVATE + file.read_text())
    check(python(BASE + CONFIG + "import later\n" + SHOW, standin))


def test_a_failing_import_fails_as_it_did_and_can_be_tried_again(standin: Path) -> None:
    (standin / "early.py").write_text("1 / 0\n")
    code = (
        ACTIVATE
        + "try:\n    import axolotl.integrations.base\n"
        + "except ZeroDivisionError: pass\n"
        + f"open({str(standin / 'early.py')!r}, 'w').write('again = 1')\n"
        + "import importlib; importlib.invalidate_caches()\n"
        + BASE
        + CONFIG
        + SHOW
    )
    check(python(code, standin, PYTHONDONTWRITEBYTECODE="1"))


def test_without_axolotl_it_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "axolotl").mkdir()
    code = (
        "import sys; sys.modules['axolotl.utils.config'] = None\n"
        + ACTIVATE
        + "import importlib.util\n"
        + "print(importlib.util.find_spec('axolotl_nope'), 'axolotl' in sys.modules)"
    )
    assert python(code, tmp_path) == "None False"


def test_it_is_idempotent_and_keeps_the_originals(standin: Path) -> None:
    code = (
        ACTIVATE * 3
        + BASE
        + CONFIG
        + ACTIVATE
        + "import sys\n"
        + "print(sum(type(f).__name__ == '_MendOnImport' for f in sys.meta_path))\n"
        + "sys.meta_path.pop(0)\n"  # as if the module had been imported anew
        + ACTIVATE
        + "for f in (base.load_plugin, config.validate_config):\n"
        + "    print(hasattr(f.__wrapped__, '__wrapped__'), f.__module__)\n"
        + "print(base.load_plugin.__doc__, config.validate_config({'a': 1}, 2))"
    )
    assert python(code, standin).splitlines() == [
        "1",
        "False axolotl.integrations.base",
        "False axolotl.utils.config",
        "Loads. ({'a': 1}, 2)",
    ]


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import functools, sys, typing; before = set(sys.modules)\n"  # torch has them
        + ACTIVATE
        + "print(*sorted(set(sys.modules) - before))"
    )
    assert python(code) == "axolotl_psft_0_19"
