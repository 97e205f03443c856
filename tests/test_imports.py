"""What imports what: one way only, and what importing the package costs."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import axolotl_psft

ROOT = Path(__file__).parent.parent

# The rooms, lowest first: a room imports from lower layers only. A folder's name stands
# for all of its modules that are not named themselves.
LAYERS: list[tuple[str, set[str]]] = [
    (
        "values, files, formulas: nothing of ours",
        {"files", "metrics", "objective", "packing", "ranks", "row_kernels"},
    ),
    (
        "what is made of them",
        {"attention", "compare", "configuration", "dataset", "failures"}
        | {"logit_tiles", "relora", "sampling"},
    ),
    (
        "the loss head, the settings, the folders, stand-ins for missing hardware",
        {"checkpoints", "cpu", "fingerprints", "initial_policy", "logprobs", "rules"},
    ),
    ("the forward step, the schema", {"config", "token_logprobs"}),
    ("what is done with log-probs", {"evaluation", "loss", "old_policy"}),
    ("what stops a wrong resume", {"resume"}),
    ("before a run", {"doctor"}),
    ("the run", {"trainer"}),
    ("the model over several ranks", {"megatron", "megatron.groups", "megatron.plan"}),
    ("its parts", {"megatron.layers", "megatron.weights"}),
    ("its step", {"megatron.step"}),
    ("its run", {"megatron.engine", "megatron.trainer"}),
    ("hooks for Axolotl", {"plugin"}),
    ("the public names", {"__init__"}),
]
LAYER_OF = {name: i for i, (_, names) in enumerate(LAYERS) for name in names}


def script(path: Path) -> Any:
    """A module that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rooms = script(ROOT / "docs" / "map.py")
IMPORTS: dict[str, set[str]] = rooms.imports()


def listed(module: str) -> str:
    """The entry of LAYERS that a module belongs to; empty: there is none."""
    name = module.removeprefix("axolotl_psft").removeprefix(".") or "__init__"
    while name and name not in LAYER_OF:
        name = name.rpartition(".")[0]
    return name


# ---- One way ----


@pytest.mark.parametrize("module", IMPORTS)
def test_a_room_has_a_layer(module: str):
    assert listed(module), (
        f"{module} is new: add it to LAYERS in tests/test_imports.py, in the layer "
        "above the highest that it imports from."
    )


@pytest.mark.parametrize("module", IMPORTS)
def test_a_room_imports_from_lower_layers_only(module: str):
    own = listed(module)
    others = {each: listed(each) for each in IMPORTS[module]}
    upwards = [
        f"{module} ({LAYERS[LAYER_OF[own]][0]}) imports {each} "
        f"({LAYERS[LAYER_OF[other]][0]})"
        for each, other in others.items()
        # One without a layer has a test of its own; a folder's modules may import one
        # another.
        if own and other and other != own and LAYER_OF[other] >= LAYER_OF[own]
    ]
    assert not upwards, "\n".join(upwards)


def test_every_room_in_a_layer_exists():
    gone = LAYER_OF.keys() - {listed(module) for module in IMPORTS}
    assert not gone, f"take {sorted(gone)} out of LAYERS in tests/test_imports.py"


def test_no_cycle():
    left = dict(IMPORTS)
    while ends := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in ends:
            del left[name]
    assert not left, f"a cycle of imports is among {sorted(left)}"


def test_stand_ins_are_imported_where_they_are_needed_only():
    at_top = {
        module: rooms.imported_names(path, at_top=True)
        for module, path in rooms.modules().items()
        if listed(module) != "cpu"
    }
    stand_ins = [
        module
        for module, names in at_top.items()
        if any(f"{name}.".startswith("axolotl_psft.cpu.") for name in names)
    ]
    assert not stand_ins, "a run on a GPU must not import them: do it in a function"


def test_the_map_is_current():
    assert rooms.PAGE.read_text() == rooms.render(), "run python docs/map.py"


# ---- What it costs ----


def _imported(statement: str, *packages: str) -> list[str]:
    """Which of ``packages`` a fresh interpreter has loaded after ``statement``."""
    code = (
        f"{statement}\nimport sys\nprint(*sorted({set(packages)} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_package_imports_no_torch():
    heavy = ("torch", "numpy", "pydantic", "axolotl", "transformers", "megatron")
    assert _imported("import axolotl_psft", *heavy) == []


def test_the_maths_imports_torch_only():
    names = "axolotl_psft.objective, axolotl_psft.logprobs, axolotl_psft.packing"
    heavy = ("torch", "axolotl", "transformers", "megatron", "accelerate", "peft")
    assert _imported(f"import {names}", *heavy) == ["torch"]


def test_megatron_has_a_room_of_its_own():
    importing = {
        module
        for module, path in rooms.modules().items()
        if any(name.startswith("megatron.") for name in rooms.imported_names(path))
    }
    # What stands in for a GPU there changes Megatron-Core, too.
    allowed = ("axolotl_psft.megatron", "axolotl_psft.cpu")
    assert importing
    assert all(module.startswith(allowed) for module in importing), importing


@pytest.mark.parametrize("name", axolotl_psft.__all__)
def test_every_public_name_resolves(name: str):
    assert name in dir(axolotl_psft)
    value = getattr(axolotl_psft, name)
    assert name == "__version__" or value.__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'axolotl_psft' has no attribute 'nope'"):
        _ = axolotl_psft.nope
