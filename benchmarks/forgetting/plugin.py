"""An Axolotl plugin that measures: `measure: {probe: skills, every: 80, output: FILE}`.

Listed beside axolotl_psft in a run's YAML. What is measured lives in measure.py and
text.py.
"""

from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from benchmarks.forgetting.measure import Measure, skills_probe
from benchmarks.forgetting.text import text_probe

PROBES = {"skills": skills_probe, "text": text_probe}


class MeasureArgs(BaseModel):
    """The plugin's key in the YAML."""

    measure: dict[str, Any] | None = None


class MeasurePlugin(BasePlugin):
    """Adds the callback of the YAML's `measure` block."""

    def get_input_args(self) -> str:
        return f"{__name__}.MeasureArgs"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        settings = dict(cfg.measure)
        probe = PROBES[settings["probe"]](trainer.model, settings)
        return [Measure(probe, settings["every"], Path(settings["output"]))]
