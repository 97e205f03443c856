"""The bare plugin name on stock Axolotl, and what a `psft:` block without it gives.

This process was prepared by torch itself, as users' are. Other import orders are tried
on a stand-in for Axolotl, which costs 20 seconds a process, and once on the real one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from axolotl_psft import _autoload
from tests.tiny import config, load

ADD = "Add `plugins: [axolotl_psft]` to the YAML"
ROOT = Path(__file__).parent.parent


def python(code: str, path: Path | None = None, **env: str) -> str:
    """Standard output of a fresh interpreter that sees ``path`` before all else."""
    search = [str(part) for part in (path, ROOT) if part is not None]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
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
        "    if 'Bad' in plugin_name: raise AttributeError('no ' + plugin_name)\n"
        "    module, name = plugin_name.rsplit('.', 1)\n"
        "    return plugin_name\n"
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


ACTIVATE = "from axolotl_psft._autoload import activate; activate()\n"
BASE = "from axolotl.integrations import base\n"
CONFIG = "from axolotl.utils import config\n"
SHOW = (
    "print(base.load_plugin('axolotl_psft'), base.load_plugin('other.Plugin'))\n"
    "try: config.validate_config({'psft': {}, 'plugins': ['x']})\n"
    "except ValueError as error: print(error)\n"
)


def check(shown: str) -> None:
    names, error = shown.splitlines()
    assert names == "axolotl_psft.PSFTPlugin other.Plugin"
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
def test_any_import_order(standin: Path, order: str):
    check(python(order + SHOW, standin))


@pytest.mark.parametrize(
    "module", ["axolotl/integrations/base", "axolotl/utils/config"]
)
def test_half_imported(standin: Path, module: str):
    # As when Axolotl is imported first: it imports torch, which calls activate().
    file = standin / f"{module}.py"
    file.write_text(ACTIVATE + file.read_text())
    check(python(BASE + CONFIG + "import later\n" + SHOW, standin))


def test_a_failing_import_fails_as_it_did_and_can_be_tried_again(standin: Path):
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


@pytest.mark.parametrize("patched", ["load_plugin", "validate_config"])
def test_a_patched_axolotl_stays_as_it_is(standin: Path, patched: str):
    # By the names that the diffs in patches/ bring; test_patches.py has the real ones.
    name, line = {
        "load_plugin": ("integrations/base", "PLUGIN_ENTRY_POINT_GROUP = 'group'\n"),
        "validate_config": ("utils/config", "def refuse_unknown_blocks(): ...\n"),
    }[patched]
    file = standin / f"axolotl/{name}.py"
    file.write_text(line + file.read_text())
    code = (
        ACTIVATE
        + BASE
        + CONFIG
        + "for f in (base.load_plugin, config.validate_config):\n"
        + "    if not hasattr(f, '_axolotl_psft_original'): print(f.__name__)"
    )
    assert python(code, standin) == patched


def test_without_axolotl_it_does_nothing(tmp_path: Path):
    (tmp_path / "axolotl").mkdir()
    code = (
        "import sys; sys.modules['axolotl.utils.config'] = None\n"
        + ACTIVATE
        + "import importlib.util\n"
        + "print(importlib.util.find_spec('axolotl_nope'), 'axolotl' in sys.modules)"
    )
    assert python(code, tmp_path) == "None False"


def test_it_is_idempotent_and_keeps_the_originals(standin: Path):
    code = (
        ACTIVATE * 3
        + BASE
        + CONFIG
        + ACTIVATE
        + "import sys\n"
        + "print(sum(type(f).__name__ == '_PatchOnImport' for f in sys.meta_path))\n"
        + "sys.meta_path.pop(0)\n"  # as if the package had been imported anew
        + ACTIVATE
        + "for f in (base.load_plugin, config.validate_config):\n"
        + "    original = f._axolotl_psft_original\n"
        + "    print(hasattr(original, '_axolotl_psft_original'), f.__module__)\n"
        + "print(base.load_plugin.__doc__, config.validate_config({'a': 1}, 2))"
    )
    assert python(code, standin).splitlines() == [
        "1",
        "False axolotl.integrations.base",
        "False axolotl.utils.config",
        "Loads. ({'a': 1}, 2)",
    ]


def test_it_imports_little_and_only_the_standard_library():
    code = (
        "import sys; before = set(sys.modules)\n"
        + ACTIVATE
        + "new = set(sys.modules) - before\n"
        + "known = sys.stdlib_module_names\n"
        + "foreign = {name for name in new if name.split('.')[0] not in known}\n"
        + "print(len(new - foreign), *sorted(foreign))"
    )
    num_stdlib, *foreign = python(code).split()
    assert foreign == ["axolotl_psft", "axolotl_psft._autoload"]
    # importlib.abc brings 27 of the smaller ones; inspect alone would bring 15 more.
    assert int(num_stdlib) < 35


@pytest.mark.parametrize(
    "name",
    [
        "axolotl_pstf",
        "axolotl-psft",
        "axolotl_psft_",
        "PSFT.Bad",
        "axolotl_psft.PSFTPluginBad",
    ],
)
def test_misspelt_names(standin: Path, name: str):
    code = (
        ACTIVATE
        + BASE
        + f"try: base.load_plugin({name!r})\n"
        + "except Exception as error: print(type(error).__name__, error)"
    )
    shown = python(code, standin)
    if name == "PSFT.Bad":  # nothing like ours
        assert shown == "AttributeError no PSFT.Bad"
    else:
        assert shown == (
            f"ValueError plugins: there is no plugin named {name}. Did you mean "
            "`plugins: [axolotl_psft]`?"
        )


# ---- The real Axolotl ----


def test_torch_has_prepared_this_process():
    from axolotl.integrations import base
    from axolotl.utils import config as axolotl_config

    for function in (base.load_plugin, axolotl_config.validate_config):
        original = getattr(function, _autoload._MARK)
        assert not hasattr(original, _autoload._MARK)
        assert original.__module__ == function.__module__


@pytest.mark.parametrize("name", ["axolotl_psft", "axolotl_psft.PSFTPlugin"])
def test_both_names_load_the_plugin(name: str):
    from axolotl.integrations.base import load_plugin

    plugin = load_plugin(name)
    assert type(plugin).__module__ == "axolotl_psft.plugin"
    assert type(plugin).__name__ == "PSFTPlugin"


def test_other_names_are_untouched():
    from axolotl.integrations.base import load_plugin

    plugin = load_plugin("axolotl.integrations.liger.LigerPlugin")
    assert type(plugin).__name__ == "LigerPlugin"
    original = getattr(load_plugin, _autoload._MARK)
    for name in ("nope", "nope.Plugin", "axolotl.integrations.liger.Nope"):
        with pytest.raises(Exception) as expected:
            original(name)
        with pytest.raises(type(expected.value)) as caught:
            load_plugin(name)
        assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize(
    "plugins",
    [None, [], ["axolotl.integrations.liger.LigerPlugin"], ["axolotl_pstf.PSFTPlugin"]],
    ids=["absent", "empty", "another", "misspelt"],
)
def test_a_block_without_its_plugin_is_an_error(tiny: Path, tmp_path: Path, plugins):
    cfg = config(tiny, tmp_path, plugins=plugins)
    with pytest.raises(
        ValueError, match=r"psft: .* not loaded, got plugins: "
    ) as caught:
        load(cfg)
    assert f"got plugins: {plugins}. " in str(caught.value)
    assert ADD in str(caught.value)


@pytest.mark.parametrize("name", ["axolotl_pstf", "axolotl_psft.PSFTPlugn"])
def test_a_misspelt_plugin_is_named(tiny: Path, tmp_path: Path, name: str):
    with pytest.raises(ValueError, match=f"plugins: there is no plugin named {name}"):
        load(config(tiny, tmp_path, plugins=[name]))


def test_without_block_and_plugin_nothing_is_asked(tiny: Path, tmp_path: Path):
    assert load(config(tiny, tmp_path, plugins=None, psft=None)).psft is None


def test_axolotl_that_was_imported_before(tiny: Path, tmp_path: Path):
    code = (
        "import axolotl.integrations.base as base, axolotl.utils.config as config\n"
        "from axolotl_psft import _autoload\n"
        "assert not hasattr(base.load_plugin, _autoload._MARK)\n"
        "_autoload.activate()\n"
        "from tests import tiny\n"
        "from pathlib import Path\n"
        f"cfg = tiny.config(Path({str(tiny)!r}), Path({str(tmp_path)!r}))\n"
        "loaded = tiny.load({**cfg, 'plugins': ['axolotl_psft']})\n"
        "assert loaded.psft.refresh_steps == 4\n"
        "try: tiny.load({**cfg, 'plugins': []})\n"
        "except ValueError as error: print('REFUSED', error)"
    )
    shown = python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    (refusal,) = (line for line in shown.splitlines() if line.startswith("REFUSED"))
    assert ADD in refusal
