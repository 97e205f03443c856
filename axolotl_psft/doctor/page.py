"""Reads a YAML as a run of Axolotl would, and prints a page about it.

Nothing is trained, and no weights are read. What a data file must hold is in files.py
and rows.py, the estimate of memory in memory.py.
"""

import logging
import math
import os
import tempfile
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import click
import datasets
import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.utils.trainer import calculate_total_num_steps
from pydantic import ValidationError

from axolotl_psft import objective, rules
from axolotl_psft.config import PSFTArgs
from axolotl_psft.configuration import tensor_parallel_size
from axolotl_psft.doctor import files, memory


class Page:
    """What is printed: lines, each about a topic. Counts those that say it is wrong."""

    num_wrong = 0

    def say(self, topic: str, text: str) -> None:
        self.num_wrong += topic == "WRONG"
        text = textwrap.fill(
            text,
            width=88,
            initial_indent=f"{topic:10}",
            subsequent_indent=" " * 10,
            break_on_hyphens=False,
        )
        click.echo(text)


class Steps(NamedTuple):
    """Optimizer steps of a run."""

    an_epoch: int
    in_all: int


def examine(config: str, num_gpus: int, overrides: dict[str, Any]) -> int:
    """Print a page about a YAML.

    Args:
        config: its path.
        num_gpus: of the run.
        overrides: of its keys.

    Returns:
        How much is wrong.
    """
    page = Page()
    os.environ.setdefault("AXOLOTL_TEE_STDOUT", "0")
    datasets.disable_progress_bars()
    # Axolotl's log is longer than the page.
    logging.disable(logging.ERROR)
    try:
        _examine(page, config, num_gpus, overrides)
    finally:
        logging.disable(logging.NOTSET)
    return page.num_wrong


def _examine(page: Page, config: str, num_gpus: int, overrides: dict[str, Any]) -> None:
    page.say("YAML", config)
    cfg = _configuration(page, config, overrides)
    if cfg is None:
        return
    tp_size = tensor_parallel_size(cfg)
    num_gpus = max(num_gpus, tp_size)
    cfg.batch_size = cfg.micro_batch_size * cfg.gradient_accumulation_steps
    cfg.batch_size *= num_gpus // tp_size
    steps = _steps(page, cfg) if _files(page, cfg) else None
    _clip(page, cfg, steps)
    try:
        text = memory.in_words(cfg, num_gpus)
    except Exception as error:  # no causal LM, code of its own, ...
        text = f"not known: {_brief(error)}"
    page.say("memory", text)


def _configuration(page: Page, config: str, overrides: dict[str, Any]) -> Any:
    """Axolotl's configuration; None where there is none to go on with."""
    try:
        written = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        if not isinstance(written, dict) or written.get("psft") is None:
            page.say("WRONG", "psft: no such block: plain SFT. Write `psft: {}`.")
            return None
        # Not the run's own folder: its log would be emptied.
        with tempfile.TemporaryDirectory() as folder:
            cfg = load_cfg(config, **{**overrides, "output_dir": folder})
    except ValidationError as error:
        # Axolotl's own validation may have ended before it came to psft's rules.
        for text in dict.fromkeys((*_messages(error), *_refusals(written))):
            page.say("WRONG", text)
        return None
    except OSError as error:
        page.say("model", f"not here, nor what depends on it: {_brief(error)}")
        _files(page, written)
        return None
    except Exception as error:
        page.say("WRONG", _brief(error))
        return None
    block = {key: cfg.psft[key] for key in cfg.psft.keys() & written["psft"].keys()}
    for text in rules.warnings({**cfg, "psft": block}):
        page.say("warning", text)
    return cfg


def _refusals(written: dict[str, Any]) -> list[str]:
    try:
        PSFTArgs.model_validate(written)
    except ValidationError as error:
        return _messages(error)
    return []


def _messages(error: ValidationError) -> list[str]:
    messages = []
    for each in error.errors():
        # Pydantic's own do not name the key.
        where = ".".join(map(str, each["loc"])) + ": "
        text = each["msg"].removeprefix("Value error, ")
        messages += text.splitlines() if text != each["msg"] else [where + text]
    return messages


def _files(page: Page, cfg: Any) -> bool:
    """Whether the rows of local data files can be trained on."""
    num_rows, num_wrong = 0, page.num_wrong
    for key in ("datasets", "test_datasets"):
        for entry in cfg.get(key) or ():
            try:
                report = files.check({key: [entry]})
            except files.DataFileError as error:
                page.say("WRONG", str(error))
                continue
            num_rows += report.num_rows
            for note in report.notes:
                page.say("warning", note)
    is_fine = page.num_wrong == num_wrong
    if is_fine and num_rows:
        page.say("data", f"{num_rows:,} rows in local files, none at fault")
    return is_fine


def _steps(page: Page, cfg: Any) -> Steps | None:
    """By Axolotl's own loading; None where they cannot be known."""
    if cfg.streaming or cfg.pretraining_dataset or cfg.skip_prepare_dataset:
        page.say("samples", "not counted: they are read during the run")
        return Steps(cfg.max_steps, cfg.max_steps) if cfg.max_steps else None
    try:
        samples = load_datasets(cfg=cfg).train_dataset
        one_epoch = type(cfg)({**cfg, "num_epochs": 1, "sample_packing_eff_est": None})
        an_epoch = calculate_total_num_steps(one_epoch, samples, update=False)
    except Exception as error:
        is_here = all(Path(entry["path"]).exists() for entry in cfg.datasets or ())
        text = f"the data cannot be loaded: {_brief(error)}"
        page.say("WRONG" if is_here else "samples", text)
        return None
    supervised, num_tokens = cfg.total_supervised_tokens, cfg.total_num_tokens
    about = f"{supervised:,} supervised tokens of {num_tokens:,}"
    page.say("samples", f"{len(samples):,} an epoch, {about}")
    if not supervised:
        page.say("WRONG", "datasets: no supervised token to train on. Mend the labels.")
    in_all = cfg.max_steps or math.ceil(an_epoch * (cfg.num_epochs or 1))
    number = f"{an_epoch:,} an epoch{' or so' if cfg.sample_packing else ''}"
    page.say("steps", f"{number}, {in_all:,} in all; global batch: {cfg.batch_size}")
    return Steps(an_epoch, in_all)


def _clip(page: Page, cfg: Any, steps: Steps | None) -> None:
    """Whether it can act, in which windows, and what scoring costs."""
    rule = objective.find(cfg.psft["objective"])
    if rule.reference is None:
        page.say("clip", f"psft.objective: {rule.name} has none, and scores nothing")
        return
    if rule.reference == "initial policy":
        page.say("scoring", "every sample once: about 1/3 of an epoch")
        return
    size = refresh_steps = cfg.psft["refresh_steps"]
    if steps:
        # A window ends with the epoch.
        size = min(size, max(steps.an_epoch, 1))
        number = math.ceil(steps.an_epoch / refresh_steps)
        page.say("windows", f"{number:,} an epoch, of at most {size} steps")
    why_not = _why_idle(cfg, steps)
    can = f"can act in all but the first of a window's {size} steps"
    page.say("WRONG" if why_not else "clip", why_not or can)
    tokens = cfg.gradient_accumulation_steps * cfg.micro_batch_size * cfg.sequence_len
    cost = f"about {(size - 1) / size / 3:.0%} of a step"
    what = f"a forward pass without gradient for {size - 1} of {size} steps"
    memory = f"old log-probs take at most {4 * tokens * size:,} bytes"
    page.say("scoring", f"{cost}: {what}; {memory}")


def _why_idle(cfg: Any, steps: Steps | None) -> str | None:
    """Why the clip never acts; None: it may."""
    warmup = cfg.psft["sft_warmup_steps"]
    if cfg.psft["refresh_steps"] == 1:
        why = (
            "psft.refresh_steps: 1 refreshes it each step. Use 8 (the paper's setting)"
        )
    elif steps and steps.an_epoch < 2:
        why = (
            "a window ends with the epoch, which has one step. Use a smaller batch or "
            "more data"
        )
    elif steps and warmup > steps.in_all - 2:
        why = f"psft.sft_warmup_steps: {warmup} leaves no second step. Lower it"
    else:
        return None
    return f"the clip cannot act, the policy is never older than its steps: {why}."


def _brief(error: Exception) -> str:
    return textwrap.shorten(str(error) or repr(error), 300)
