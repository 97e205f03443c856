"""The `psft:` block of an Axolotl YAML: its keys, their ranges and defaults.

Checked inside Axolotl's own validation, before any model is loaded. Rules about the
rest of the YAML are in rules.py; what a run does with the settings is in trainer.py.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from axolotl.utils.logging import get_logger
from pydantic import BaseModel, ConfigDict, Field, model_validator

from axolotl_psft import objective, rules
from axolotl_psft.configuration import tensor_parallel_size

LOG = get_logger(__name__)

# Of each number: what it must be, and what else to write.
_NUMBERS = {
    "epsilon": ("> 0", "0.2 (PPO's usual setting)"),
    "epsilon_high": (
        ">= 0",
        "0.28 (the paper's setting), or leave it out to use epsilon",
    ),
    "refresh_steps": (">= 1", "8 (the paper's setting); 1 is plain SFT"),
    "sft_warmup_steps": (">= 0", "0 for none"),
    "kl_coef": (">= 0 and finite", "0.5 (the paper's setting)"),
}


class PSFTConfig(BaseModel):
    """The settings of the `psft:` block."""

    model_config = ConfigDict(extra="forbid")

    epsilon: float = Field(
        default=0.2,
        description="Trust region. The upper bound 1 + epsilon where epsilon_high is "
        "not set; otherwise without effect.",
    )
    epsilon_high: float | None = Field(
        default=None,
        description="Upper bound of the ratio: a token whose ratio is above "
        "1 + epsilon_high gets no gradient. Default: epsilon.",
    )
    refresh_steps: int = Field(
        default=8,
        description="Optimizer steps between two refreshes of the old policy.",
    )
    sft_warmup_steps: int = Field(
        default=0, description="Optimizer steps of plain SFT before PSFT starts."
    )
    sequence_parallel: bool = Field(
        default=False,
        description="With tensor_parallel_size: split the hidden states between blocks "
        "along the sequence. Less memory for activations, the same losses.",
    )
    objective: str = Field(
        default="psft",
        description="`sft`, `sft_kl`, `dft` and `asft` train baselines with the same "
        "metrics; an import path is an objective of your own.",
    )
    kl_coef: float = Field(
        default=0.5,
        description="With objective: sft_kl or asft, the weight of the KL term that "
        "holds the model near the initial policy.",
    )

    check_data_files: bool = Field(
        default=True,
        description="Read local data files through before Axolotl does, so that a row "
        "at fault is an error with file and line.",
    )

    @model_validator(mode="before")
    @classmethod
    def _keys_and_values(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            raise ValueError(
                f"psft must be a block of settings, got {data!r}. "
                "Write `psft: {}` to use the defaults."
            )
        for key in data:
            if key not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                close = difflib.get_close_matches(str(key), cls.model_fields, n=1)
                hint = f"Did you mean `{close[0]}`? " if close else ""
                raise ValueError(
                    f"psft.{key} is not a setting, got {data[key]!r}. "
                    f"{hint}Known settings: {known}."
                )
        try:
            objective.find(str(data.get("objective", "psft")))
        except ValueError as error:
            raise ValueError(
                f"psft.objective must be an objective, got {data['objective']!r}. "
                f"{error}"
            ) from error
        for key in ("sequence_parallel", "check_data_files"):
            default = cls.model_fields[key].default
            if not isinstance(data.get(key, default), bool):
                raise ValueError(
                    f"psft.{key} must be true or false, got {data[key]!r}. Use "
                    f"{str(default).lower()}."
                )
        # Here and not in field types: pydantic's own messages know no remedy, and it
        # takes `true` for 1.
        return {**data, **_numbers(data)}


def _numbers(block: Mapping[str, Any]) -> dict[str, float | None]:
    """The block's numbers; YAML gives some as strings (2e-1).

    Raises:
        ValueError: names the key, its value and the remedy.
    """
    numbers: dict[str, float | None] = {}
    for key, (bound, remedy) in _NUMBERS.items():
        if key not in block or (key == "epsilon_high" and block[key] is None):
            continue
        value = block[key]
        is_whole = PSFTConfig.model_fields[key].annotation is int
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isnan(number) or (is_whole and not number.is_integer()):
            kind = "a whole number" if is_whole else "a number"
            raise ValueError(f"psft.{key} must be {kind}, got {value!r}. Use {remedy}.")
        if not _holds(number, bound):
            raise ValueError(f"psft.{key} must be {bound}, got {value}. Use {remedy}.")
        numbers[key] = int(number) if is_whole else number
    return numbers


def _holds(number: float, bound: str) -> bool:
    sign, limit, *and_finite = bound.split()
    is_inside = number > float(limit) or (sign == ">=" and number == float(limit))
    return is_inside and not (and_finite and math.isinf(number))


class PSFTArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration: the `psft` key and its rules."""

    psft: PSFTConfig | None = Field(
        default=None, description="Proximal SFT; absent: the plugin does nothing."
    )
    psft_tensor_parallel_size: int | None = Field(
        default=None,
        description="Not for users: the plugin moves tensor_parallel_size here, since "
        "Axolotl would start its own tensor parallelism where it sees it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fits_the_rest(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("psft") is None:
            return data
        rules.refuse(data)
        tp_size = tensor_parallel_size(data)
        if tp_size == 1:
            return data
        return {**data, "tensor_parallel_size": 1, "psft_tensor_parallel_size": tp_size}

    @model_validator(mode="after")
    def _fits_what_axolotl_made_of_it(self) -> "PSFTArgs":
        if self.psft is not None:
            block = self.psft.model_dump(exclude_unset=True)
            cfg = {**self.model_dump(), "psft": block}
            rules.refuse(cfg, validated=True)
            for warning in rules.warnings(cfg):
                _warn_once(warning)
        return self


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    # Axolotl validates a configuration more than once.
    if message not in _warned:
        _warned.add(message)
        LOG.warning(message)
