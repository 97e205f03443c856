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
    assert {"quickstart.yaml", "gsm8k-7b.yaml", "gsm8k-7b-lora.yaml"} <= {
        path.name for path in RECIPES
    }


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
