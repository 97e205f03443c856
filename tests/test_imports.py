"""What importing the package costs, and that its public names exist."""

import subprocess
import sys

import pytest

import axolotl_psft


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
    rooms = "axolotl_psft.objective, axolotl_psft.logprobs, axolotl_psft.packing"
    heavy = ("torch", "axolotl", "transformers", "megatron", "accelerate", "peft")
    assert _imported(f"import {rooms}", *heavy) == ["torch"]


@pytest.mark.parametrize("name", axolotl_psft.__all__)
def test_every_public_name_resolves(name: str):
    assert name in dir(axolotl_psft)
    value = getattr(axolotl_psft, name)
    assert name == "__version__" or value.__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'axolotl_psft' has no attribute 'nope'"):
        _ = axolotl_psft.nope
