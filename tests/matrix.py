"""What Axolotl can combine with a psft block: what runs, what is refused, by whom.

Judged cell by cell by distributed/test_matrix.py. The tables in docs/compatibility.md
are made of it: `python -m tests.matrix` writes them.
"""

import itertools
import json
import random
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tiny import PROMPT, write_dataset, write_model, write_rows

Config = dict[str, Any]

STEPS = 6
PSFT = {"epsilon_high": 0.05, "refresh_steps": 3}
# The first learning rate is 0: what is scored for the second step is what it computes.
BASE: Config = {
    "psft": PSFT,
    "max_steps": STEPS,
    "num_epochs": 4,
    "lr_scheduler": "constant_with_warmup",
    "warmup_steps": 1,
}

# ---- What can be chosen ----

# Axolotl's LoRA kernels are Triton's, for GPUs.
_LORA: Config = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")},
}
_ADAM: Config = {"optimizer": "adamw_torch"}
METHODS: dict[str, Config] = {
    "full": {},
    "LoRA": _LORA,
    "DoRA": {**_LORA, "peft_use_dora": True},
    "QLoRA": {**_LORA, "adapter": "qlora", "load_in_4bit": True},
    "ReLoRA": {
        **_LORA,
        **_ADAM,
        "relora": True,
        "jagged_restart_steps": 2,
        "jagged_restart_warmup_steps": 1,
        "relora_prune_method": "reset",
    },
}


def _zero(stage: int) -> Config:
    # Overlapped collectives are put in order by streams, which a CPU has none of.
    zero: Config = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "deepspeed": {
            "zero_optimization": zero,
            "bf16": {"enabled": "auto"},
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            # SGD and others that DeepSpeed does not vouch for.
            "zero_allow_untested_optimizer": True,
        }
    }


PARALLEL: dict[str, Config] = {
    "one process": {},
    "DDP": {},
    "FSDP2": {
        "fsdp_version": 2,
        "fsdp_config": {
            "state_dict_type": "FULL_STATE_DICT",
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": "Qwen3DecoderLayer",
            "reshard_after_forward": True,
        },
    },
    "ZeRO-1": _zero(1),
    "ZeRO-2": _zero(2),
    "ZeRO-3": _zero(3),
    "tensor parallel": {"tensor_parallel_size": 2},
    "context parallel": {"context_parallel_size": 2},
}

_CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w0 {{ m['content'] }} w1 "
    "{% else %}w2 {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
# Paths are within the folder of `write_data`.
DATA: dict[str, Config] = {
    "packed": {"sample_packing": True, "micro_batch_size": 1},
    "unpacked": {},
    "streaming": {
        "streaming": True,
        "sample_packing": True,
        "micro_batch_size": 1,
        "datasets": [
            {"path": "json", "data_files": "train.jsonl", "split": "train"}
            | {"type": PROMPT}
        ],
    },
    "pretraining text": {
        "pretraining_dataset": [
            {"path": "json", "data_files": "text.jsonl", "split": "train"}
            | {"text_column": "text", "type": "pretrain"}
        ],
        "datasets": None,
    },
    "multi-turn chat": {
        "datasets": [
            {"path": "chat.jsonl", "type": "chat_template"}
            | {"field_messages": "messages", "message_field_training": "train"}
            | {"roles_to_train": ["assistant"]}
        ],
        "chat_template": "jinja",
        "chat_template_jinja": _CHAT_TEMPLATE,
        "eot_tokens": ["<eos>"],
    },
    "curriculum": {"curriculum_sampling": True},
    "label-balanced": {
        "balance_labels": True,
        "label_balance_window_optim_steps": 2,
        "sample_packing": True,
        "micro_batch_size": 1,
    },
    "group_by_length": {"group_by_length": True},
}

_RECOMPUTE = {"gradient_checkpointing": True}
OPTIONS: dict[str, Config] = {
    "checkpointing": {
        **_RECOMPUTE,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "checkpointing, reentrant": {
        **_RECOMPUTE,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "offloading, hidden_states": {
        **_RECOMPUTE,
        "activation_offloading": "hidden_states",
    },
    "offloading, true": {**_RECOMPUTE, "activation_offloading": True},
    # Dynamo without the C++ compiler: that takes a minute a run, and is not ours.
    "torch.compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "bf16": {"bf16": True},
    "8-bit AdamW": {**_ADAM, "optimizer": "adamw_bnb_8bit"},
    "8-bit AdamW, torchao": {**_ADAM, "optimizer": "adamw_torch_8bit"},
    "schedule-free": {**_ADAM, "optimizer": "schedule_free_adamw"},
    "AdamW": _ADAM,
    "Adafactor": {**_ADAM, "optimizer": "adafactor"},
    "Muon": {**_ADAM, "optimizer": "muon"},
}


# ---- Optimizers, each in one process ----

OPTIMIZERS_RUN = [
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_8bit", "adamw_torch_4bit"),
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("ao_adamw_fp8", "adopt_adamw", "adamc", "ademamix", "ademamix_8bit"),
    *("paged_ademamix_32bit", "paged_ademamix_8bit", "lion_32bit", "lion_8bit"),
    *("paged_lion_32bit", "paged_lion_8bit", "schedule_free_adamw"),
    *("schedule_free_radam", "schedule_free_sgd", "adafactor", "adagrad", "rmsprop"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "sgd", "sinkgd", "muon"),
    "muon_8bit",
]
OPTIMIZERS_REFUSED = [
    *("lomo", "adalomo", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise"),
    *("galore_adafactor_layerwise", "apollo_adamw_layerwise"),
]
# Packages or machines that the pinned release does not bring, or settings of their own.
OPTIMIZERS_NOT_HERE = [
    *("adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision", "optimi_adamw"),
    *("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "q_galore_adamw8bit"),
    *("apollo_adamw", "grokadamw", "stable_adamw", "came_pytorch", "dion", "polora"),
    *("flash_adamw", "flash_adam", "flash_sgd", "flash_sgdw", "flash_lion"),
    *("ao_adamw_4bit", "ao_adamw_8bit", "scao"),
]


@dataclass(frozen=True)
class Cell:
    """One combination: a choice of each axis."""

    parallel: str = "one process"
    method: str = "full"
    data: str = "unpacked"
    option: str = ""

    @property
    def choices(self) -> set[str]:
        return {self.parallel, self.method, self.data, self.option}

    @property
    def num_ranks(self) -> int | None:
        """Processes of a run; None: one, without a process group."""
        return None if self.parallel == "one process" else 2

    def config(self, folder: Path) -> Config:
        """The cell's part of an Axolotl configuration."""
        merged = {**BASE, **METHODS[self.method], **DATA[self.data]}
        merged |= {**OPTIONS.get(self.option, {}), **PARALLEL[self.parallel]}
        merged["learning_rate"] = self._learning_rate("optimizer" in merged)
        return _with_paths(merged, folder)

    def _learning_rate(self, is_adaptive: bool) -> float:
        """One that moves the policy beyond the clip's bound within a window."""
        if self.method == "ReLoRA":
            return 5e-3  # after a restart, Adam's steps are large
        if self.method == "full":
            bf16_or_not = 0.05 if self.option == "bf16" else 0.5
            return 1e-3 if is_adaptive else bf16_or_not
        adaptive = 5e-2 if self.option == "Muon" else 2e-2
        return adaptive if is_adaptive else 1.0

    def __str__(self) -> str:
        parts = [self.parallel, self.method, self.data, self.option]
        return ", ".join(part for part in parts if part)


def _with_paths(cfg: Config, folder: Path) -> Config:
    text = json.dumps(cfg)
    for name in ("train.jsonl", "text.jsonl", "chat.jsonl"):
        text = text.replace(f'"{name}"', json.dumps(str(folder / name)))
    return json.loads(text)


# ---- What comes of it ----


@dataclass(frozen=True)
class Refusal:
    """Who refuses a combination of choices, in what words, and why, for a reader."""

    choices: tuple[set[str], ...]
    by: str
    message: str
    why: str

    def covers(self, cell: Cell) -> bool:
        """Whether the cell has one of each set of choices."""
        return all(cell.choices & each for each in self.choices)


_ADAPTERS = {"LoRA", "DoRA", "QLoRA", "ReLoRA"}
_ZERO = {"ZeRO-1", "ZeRO-2", "ZeRO-3"}
_NOT_MEGATRON = {"8-bit AdamW", "8-bit AdamW, torchao", "schedule-free"}
_NOT_MEGATRON |= {"Adafactor", "Muon"}
# In the page's order; the first that covers a cell is its reason.
REFUSALS = [
    Refusal(
        ({"context parallel"},),
        "psft",
        "context_parallel_size: 2 cannot be combined with a psft block",
        "a log-prob is lost where a sequence is cut: use tensor parallel with "
        "`psft.sequence_parallel`",
    ),
    Refusal(
        ({"tensor parallel"}, _ADAPTERS),
        "psft",
        "adapter: q?lora cannot be combined with tensor_parallel_size: 2",
        "only full fine-tuning is split",
    ),
    Refusal(
        ({"tensor parallel"}, {"torch.compile"}),
        "psft",
        "torch_compile: True cannot be combined with tensor_parallel_size: 2",
        "compiled collectives are not tested",
    ),
    Refusal(
        ({"tensor parallel"}, {"offloading, hidden_states", "offloading, true"}),
        "psft",
        "activation_offloading: .* cannot be combined with tensor_parallel_size: 2",
        "use `gradient_checkpointing` alone, or `psft.sequence_parallel`",
    ),
    Refusal(
        ({"tensor parallel"}, _NOT_MEGATRON),
        "psft",
        "optimizer: .* cannot be combined with tensor_parallel_size: 2",
        "Megatron-Core brings AdamW and SGD",
    ),
    Refusal(
        ({"ZeRO-3"}, {"DoRA"}),
        "psft",
        "peft_use_dora: True cannot be combined with DeepSpeed's ZeRO-3",
        "DoRA needs norms of whole weights",
    ),
    Refusal(
        ({"ZeRO-3"}, {"schedule-free"}),
        "psft",
        "optimizer: schedule_free_adamw cannot be combined with DeepSpeed's ZeRO-3",
        "ZeRO-3 calls it several times a step, and it counts each call as a step",
    ),
    Refusal(
        ({"ZeRO-1", "ZeRO-2"}, {"8-bit AdamW, torchao"}),
        "psft",
        "optimizer: adamw_torch_8bit cannot be combined with DeepSpeed's ZeRO-",
        "DeepSpeed cuts its state between its blocks: use `adamw_bnb_8bit`",
    ),
    Refusal(
        ({"FSDP2", *_ZERO}, {"Adafactor"}),
        "psft",
        "optimizer: adafactor cannot be combined with FSDP or DeepSpeed",
        "its factors need whole weights",
    ),
    Refusal(
        ({"FSDP2", *_ZERO}, {"ReLoRA"}),
        "Axolotl",
        "(fsdp|deepspeed) not supported with ReLoRA",
        "Axolotl does not merge sharded weights",
    ),
    Refusal(
        ({"FSDP2"}, {"8-bit AdamW"}),
        "Axolotl",
        "FSDP2 not compatible with adamw_bnb_8bit",
        "bitsandbytes has no state for shards: use `adamw_torch_8bit`",
    ),
    Refusal(
        (_ZERO, {"Muon"}),
        "Axolotl",
        "Muon optimizer is currently incompatible with DeepSpeed",
        "use FSDP2",
    ),
    Refusal(
        ({"ReLoRA"}, {"schedule-free", "Adafactor", "Muon"}),
        "psft",
        "optimizer: .* cannot be combined with relora: true",
        "a restart resets Adam's state only",
    ),
]

# What a CPU cannot run: the configuration is validated here.
NEED_GPU = [
    ({"offloading, true"}, "`activation_offloading: true` copies by streams"),
    ({"FSDP2", "QLoRA"}, "4-bit weights are sharded on accelerators only"),
    ({"ZeRO-3", "QLoRA"}, "gloo does not gather 4-bit weights with float32 ones"),
    ({"ZeRO-3", "LoRA", "bf16"}, "nor bf16 weights with float32 adapters (ZeRO-3)"),
]


def refusal(cell: Cell) -> Refusal | None:
    return next((each for each in REFUSALS if each.covers(cell)), None)


def needs_gpu(cell: Cell) -> bool:
    return any(choices <= cell.choices for choices, _ in NEED_GPU)


# ---- The tables ----

TABLES: dict[str, tuple[str, dict[str, Config], str, dict[str, Config]]] = {
    "Method": ("parallel", PARALLEL, "method", METHODS),
    "Data": ("parallel", PARALLEL, "data", DATA),
    "Data and method": ("method", METHODS, "data", DATA),
    "Option": ("option", OPTIONS, "parallel", PARALLEL),
    "Option and method": ("option", OPTIONS, "method", METHODS),
    "Option and data": ("option", OPTIONS, "data", DATA),
}


def table_cells(name: str) -> list[list[Cell]]:
    """The cells of a table, by row."""
    row_axis, rows, column_axis, columns = TABLES[name]
    return [
        [Cell(**{row_axis: row, column_axis: column}) for column in columns]
        for row in rows
    ]


def all_cells() -> list[Cell]:
    """Every cell of every table, once."""
    cells = [cell for name in TABLES for row in table_cells(name) for cell in row]
    return list(dict.fromkeys(cells))


def sampled_cells(num: int) -> list[Cell]:
    """Some of the cells that differ from a plain run in three or four choices."""
    product = itertools.product(PARALLEL, METHODS, DATA, ["", *OPTIONS])
    others = set(all_cells())
    cells = [cell for axes in product if (cell := Cell(*axes)) not in others]
    return random.Random(0).sample(cells, num)


def render() -> str:
    """The page's part: tables, and a note for each reason."""
    tables = [_table(name) for name in TABLES]
    return "\n\n".join([*tables, _notes(), _gpu_notes(), _optimizers()])


def _table(name: str) -> str:
    _, rows, _, columns = TABLES[name]
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    for row, cells in zip(rows, table_cells(name), strict=True):
        lines.append([row, *(_mark(cell) for cell in cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mark(cell: Cell) -> str:
    if reason := refusal(cell):
        return f"({REFUSALS.index(reason) + 1})"
    return "GPU" if needs_gpu(cell) else "yes"


def _notes() -> str:
    notes = [
        f"{number}. Refused by {each.by}: {each.why}."
        for number, each in enumerate(REFUSALS, start=1)
    ]
    return "\n".join(notes)


def _gpu_notes() -> str:
    return "GPU: " + "; ".join(why for _, why in NEED_GPU) + "."


def _optimizers() -> str:
    groups = {
        "Optimizers, each compared with stock Axolotl": OPTIMIZERS_RUN,
        "Refused, since they update weights inside the backward pass": (
            OPTIMIZERS_REFUSED
        ),
        "Accepted, not tried (other packages, machines or settings)": (
            OPTIMIZERS_NOT_HERE
        ),
    }
    lines = [
        f"{title}: {', '.join(f'`{name}`' for name in names)}."
        for title, names in groups.items()
    ]
    return "\n\n".join(textwrap.fill(line, 88) for line in lines)


# ---- Files ----


def write_data(folder: Path) -> Path:
    """A model that every cell can use, and its data in three forms."""
    # Quantization wants 64 columns; two ranks an even vocabulary.
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
    write_model(folder / "model", **sizes, head_dim=16)
    # A multiple of 32: group_by_length sorts pieces that depend on the batch size.
    write_dataset(folder / "train.jsonl", num_samples=256, seed=0)
    rows = [json.loads(line) for line in (folder / "train.jsonl").open()]
    texts = [{"text": f"{row['instruction']} {row['output']}"} for row in rows]
    write_rows(folder / "text.jsonl", texts)
    pairs = zip(rows[::2], rows[1::2], strict=True)
    chats = [{"messages": _chat(i, *pair)} for i, pair in enumerate(pairs)]
    write_rows(folder / "chat.jsonl", chats * 2)
    return folder


def _chat(index: int, first: Config, second: Config) -> list[Config]:
    """Two turns; in every other sample the second answer is not trained on."""
    return [
        {"role": "user", "content": first["instruction"]},
        {"role": "assistant", "content": first["output"]},
        {"role": "user", "content": second["instruction"]},
        {"role": "assistant", "content": second["output"], "train": index % 2 == 0},
    ]


PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"
_PLACE = re.compile(r"(<!-- matrix -->\n).*?(\n<!-- /matrix -->)", re.DOTALL)


def in_page() -> str:
    """docs/compatibility.md with this module's tables."""
    return _PLACE.sub(lambda m: m[1] + render() + m[2], PAGE.read_text())


if __name__ == "__main__":
    PAGE.write_text(in_page())
