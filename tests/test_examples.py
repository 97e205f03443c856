"""Every recipe in examples/yaml passes Axolotl's own validation and is a psft run."""

from pathlib import Path

import pytest
import yaml

from tests.tiny import load

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "examples" / "yaml").glob("*.yaml"))

# What a recipe for GPUs needs that this machine lacks; the rest of it is validated.
GPU_ONLY = {"bf16": False, "tf32": False}


def test_there_are_recipes() -> None:
    names = {path.stem for path in RECIPES}
    assert {"quickstart", "quickstart-tp2", "gsm8k-7b", "gsm8k-7b-lora"} <= names
    assert {"llama-8b-tp2", "llama-70b-tp8"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path: Path, tiny: Path, tmp_path: Path) -> None:
    text = path.read_text()
    cfg = yaml.safe_load(text)
    assert text.startswith("# accelerate launch -m axolotl.cli.train examples/yaml/")
    assert path.name in text.splitlines()[0]
    assert None not in cfg.values(), "a recipe has no empty keys"
    assert cfg["plugins"] == ["axolotl_psft"]
    # Axolotl reads the model's config: a local model stands for one on a hub.
    local = {"base_model": str(tiny / "model"), "output_dir": str(tmp_path)}
    validated = load({**cfg, **GPU_ONLY, **local})
    assert validated.psft.refresh_steps == cfg["psft"]["refresh_steps"]
    assert validated.psft.epsilon_high == cfg["psft"]["epsilon_high"]
    assert set(cfg) <= set(validated), "Axolotl drops keys it does not know"
    size = cfg.get("tensor_parallel_size", 1)
    assert (validated.psft_tensor_parallel_size or 1) == size


def gigabytes(parameters: float, tp_size: int, dp_size: int) -> float:
    """Of a rank: bf16 weights, float32 gradients, the distributed optimizer's part."""
    return parameters / tp_size * (2 + 4 + 12 / dp_size) / 1e9


@pytest.mark.parametrize(
    "name, parameters, dp_size, too_few",
    [("llama-8b-tp2", 8.03e9, 4, None), ("llama-70b-tp8", 70.55e9, 8, 4)],
)
def test_memory_arithmetic(
    name: str, parameters: float, dp_size: int, too_few: int | None
) -> None:
    text = (ROOT / "examples" / "yaml" / f"{name}.yaml").read_text()
    tp_size = yaml.safe_load(text)["tensor_parallel_size"]
    total = gigabytes(parameters, tp_size, dp_size)
    assert total < 80
    assert f"sum                                           = {total:.1f} GB" in text
    assert f"tensor parallel {tp_size} " in text and f"data parallel {dp_size}" in text
    if too_few is not None:
        needed = gigabytes(parameters, tp_size, too_few)
        assert f"{too_few} nodes need {needed:.1f} GB" in text
