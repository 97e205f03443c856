"""Every recipe in examples/yaml passes Axolotl's own validation and is what it claims.

Launch line, order, truncation, counts of updates and memory, as comments have them.
Nothing is trained here; test_recipes.py does, and `make quickstart` and
`make quickstart-tp2`.
"""

import json
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import WORDS, load, write_model

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "examples" / "yaml").glob("*.yaml"))
LARGE = ("llama-8b-tp2", "llama-70b-tp8")
GRPO = "psft-then-grpo-2-grpo"  # the one recipe that is not a psft run
NAMES = {
    "quickstart",
    "quickstart-tp2",
    "gsm8k-7b",
    "gsm8k-7b-lora",
    "math-7b",
    "limo-7b",
    "hh-rlhf-4b",
    "openr1-math-7b",
    "openr1-math-7b-lora",
    "openr1-math-llama-8b",
    "psft-then-grpo-1-psft",
    GRPO,
    *LARGE,
}
PSFT = [path.stem for path in RECIPES if path.stem != GRPO]

# What a recipe for GPUs needs that this machine lacks; the rest of it is validated.
GPU_ONLY = {"bf16": False, "tf32": False}
# Axolotl's keys for kernels that need a GPU: test_liger.py runs those.
LIGER = ("liger_rms_norm", "liger_rope", "liger_glu_activation")


def recipe(name: str) -> tuple[str, dict[str, Any]]:
    text = (ROOT / "examples" / "yaml" / f"{name}.yaml").read_text()
    return text, yaml.safe_load(text)


def launch_command(text: str) -> str:
    """The command that the comment at the top of a recipe opens with, in one line."""
    lines = [line.removeprefix("#").strip() for line in text.splitlines()]
    continued = list(takewhile(lambda line: line.endswith("\\"), lines))
    return " ".join(line.rstrip("\\").strip() for line in lines[: len(continued) + 1])


def num_processes(text: str) -> int:
    found = re.search(r"--num_processes (\d+)", launch_command(text))
    return int(found[1]) if found else 1


def test_there_are_recipes() -> None:
    assert {path.stem for path in RECIPES} == NAMES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path: Path, tiny: Path, tmp_path: Path) -> None:
    text, cfg = recipe(path.stem)
    command = launch_command(text)
    assert "accelerate launch" in command
    assert command.endswith(f"-m axolotl.cli.train examples/yaml/{path.name}")
    assert None not in cfg.values(), "a recipe has no empty keys"
    # Axolotl reads the model's config: a local model stands for one on a hub.
    local = {"base_model": str(tiny / "model"), "output_dir": str(tmp_path)}
    validated = load({**cfg, **GPU_ONLY, **local})
    assert set(cfg) <= set(validated), "Axolotl drops keys it does not know"
    for given, kept in zip(cfg["datasets"], validated.datasets, strict=True):
        assert set(given) <= set(kept), "of a data set's keys, too"
    if path.stem == GRPO:
        # The plugin is inert without its block, and refuses `rl` with it.
        assert not {"plugins", "psft"} & set(cfg)
        assert set(cfg["trl"]) <= set(validated.trl)
        return
    is_for_cpus = path.stem.startswith("quickstart")
    liger = [] if is_for_cpus else ["axolotl.integrations.liger.LigerPlugin"]
    assert cfg["plugins"] == ["axolotl_psft", *liger]
    assert all(validated[key] is (not is_for_cpus or None) for key in LIGER)
    assert validated.psft.refresh_steps == cfg["psft"]["refresh_steps"]
    assert validated.psft.epsilon_high == cfg["psft"]["epsilon_high"]


# ---- What all recipes keep to ----

ORDER = [
    "base_model",
    "plugins psft liger_rms_norm liger_rope liger_glu_activation",
    "rl trl adapter lora_r lora_alpha lora_dropout lora_target_linear",
    "tensor_parallel_size",
    "chat_template datasets test_datasets val_set_size train_on_inputs",
    "dataset_prepared_path output_dir",
    "sequence_len excess_length_strategy sample_packing eval_sample_packing "
    "attn_implementation",
    "micro_batch_size gradient_accumulation_steps num_epochs max_steps special_tokens",
    "optimizer learning_rate lr_scheduler warmup_steps warmup_ratio weight_decay "
    "max_grad_norm dataloader_num_workers dataset_num_proc",
    "bf16 fp16 tf32 gradient_checkpointing gradient_checkpointing_kwargs seed",
    "logging_steps use_tensorboard eval_strategy eval_steps save_steps "
    "save_total_limit load_best_model_at_end",
]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_keys_are_in_the_house_order(name: str) -> None:
    keys = [key for line in ORDER for key in line.split()]
    used = list(recipe(name)[1])
    assert used == sorted(used, key=keys.index)


@pytest.mark.parametrize("name", PSFT)
def test_truncation_and_checkpoints(name: str) -> None:
    _, cfg = recipe(name)
    # A cut answer would end without its end-of-turn token.
    assert cfg["excess_length_strategy"] == "drop"
    assert cfg["save_steps"] % cfg["psft"]["refresh_steps"] == 0


def test_grpo_completions_that_were_cut_train_nothing() -> None:
    _, cfg = recipe(GRPO)
    assert cfg["trl"]["max_completion_length"] > 0
    assert cfg["trl"]["mask_truncated_completions"] is True


def test_grpo_has_a_window_too() -> None:
    text, cfg = recipe(GRPO)
    sampled, group = cfg["trl"]["generation_batch_size"], cfg["trl"]["num_generations"]
    updates, rest = divmod(sampled, update(cfg, num_processes(text)))
    assert updates > 1, "else the ratio is always 1"
    assert rest == 0 == sampled % group
    prose = " ".join(text.replace("#", "").split())
    assert f"{sampled} completions of {sampled // group} prompts" in prose
    assert f"in {updates} updates of {sampled // updates}" in prose


@pytest.mark.parametrize("name", sorted(NAMES))
def test_small_steps_are_not_taken_on_bf16_weights(name: str) -> None:
    """With `bf16: true` Axolotl's full fine-tuning has bf16 weights, unless split."""
    _, cfg = recipe(name)
    is_split = cfg.get("tensor_parallel_size", 1) > 1
    assert not cfg["bf16"] or "adapter" in cfg or is_split


def test_small_steps_round_away_on_bf16_weights() -> None:
    """The reason the recipes give, with AdamW on weights of a usual size."""
    import torch

    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(20_000, generator=generator) * 0.02).bfloat16()
    gradient = torch.randn(20_000, generator=generator)
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.nn.Parameter(start.to(dtype))
        optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.1)
        for _ in range(64):
            weight.grad = gradient.to(dtype)
            optimizer.step()
        moved[dtype] = (weight.detach() != start.to(dtype)).float().mean().item()
    assert moved[torch.bfloat16] < 0.05
    assert moved[torch.float32] > 0.99
    spacing = torch.tensor(0.02).bfloat16()
    after = torch.nextafter(spacing, torch.ones_like(spacing)) - spacing
    assert f"{after.item():.1e}" == "1.2e-04"
    assert "0.02 has its" in recipe("gsm8k-7b")[0]


# ---- The paper's counts, in optimizer updates ----


def update(cfg: dict[str, Any], processes: int) -> int:
    """Rows of one optimizer update."""
    ranks = processes // cfg.get("tensor_parallel_size", 1)
    return ranks * cfg["micro_batch_size"] * cfg["gradient_accumulation_steps"]


MAIN = {"batch": 256, "mini": 32, "epochs": 10}


@pytest.mark.parametrize(
    "name, rows, paper",
    [
        ("gsm8k-7b", 32, MAIN),
        ("gsm8k-7b-lora", 32, MAIN),
        ("math-7b", 32, MAIN),
        ("psft-then-grpo-1-psft", 32, MAIN),
        # Packed: 16 rows of 8192 tokens for 32 samples of 4096.
        ("openr1-math-7b", 16, MAIN),
        ("openr1-math-7b-lora", 16, MAIN),
        ("openr1-math-llama-8b", 16, MAIN),
        ("limo-7b", 8, {"batch": 64, "mini": 8, "epochs": 25}),
        ("hh-rlhf-4b", 32, {**MAIN, "epochs": 3}),
    ],
)
def test_the_papers_counts(name: str, rows: int, paper: dict[str, int]) -> None:
    text, cfg = recipe(name)
    assert update(cfg, num_processes(text)) == rows
    if cfg["sample_packing"]:
        tokens = rows * cfg["sequence_len"]
        assert f"mini-batch of 32 samples is {tokens} tokens" in text
        assert tokens == paper["mini"] * 4096
        assert f"An update is {rows} packed rows of {cfg['sequence_len']}" in text
    else:
        assert rows == paper["mini"]
    assert cfg["psft"]["refresh_steps"] == paper["batch"] // paper["mini"]
    assert cfg["warmup_steps"] == 10 * paper["batch"] // paper["mini"]
    assert cfg["num_epochs"] == paper["epochs"]
    expected = {
        "learning_rate": 2e-5 if "adapter" in cfg else 1e-6,
        "lr_scheduler": "constant_with_warmup",
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "optimizer": "adamw_torch_fused",
    }
    assert {key: cfg[key] for key in expected} == expected
    assert cfg["psft"]["epsilon_high"] == 0.28


@pytest.mark.parametrize("name", ["gsm8k-7b", "openr1-math-7b", "openr1-math-llama-8b"])
def test_the_sft_baseline_by_overrides(name: str, tiny: Path) -> None:
    """The comment's options, as Axolotl's command line takes them."""
    import fire
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault

    text, cfg = recipe(name)
    comment = text.partition("SFT baseline")[2].partition("base_model:")[0]
    options = re.findall(r"--\S+=\S+", comment)
    assert len(options) == 5
    parsed = fire.Fire(lambda **kwargs: kwargs, command=options)
    local = {"base_model": str(tiny / "model")}
    baseline = load_cfg(DictDefault({**cfg, **GPU_ONLY, **local}), **parsed)
    assert baseline.psft.objective == "sft"
    assert baseline.learning_rate == 2e-5
    assert baseline.warmup_steps == 10
    assert baseline.output_dir == f"outputs/{name}/sft" != cfg["output_dir"]
    # Validation moves tensor_parallel_size elsewhere; it is not overridden.
    batch = {
        key: baseline[key] for key in cfg if key.startswith(("micro", "gradient_a"))
    }
    processes = num_processes(text)
    assert update({**cfg, **batch}, processes) == 8 * update(cfg, processes)


def test_the_second_stage_goes_on_from_the_first() -> None:
    (_, first), (text, second) = recipe("psft-then-grpo-1-psft"), recipe(GRPO)
    assert second["base_model"] == first["output_dir"]
    assert "adapter" not in first, "an adapter would have to be merged in between"
    assert second["output_dir"] != first["output_dir"]
    assert second["dataset_prepared_path"] != first["dataset_prepared_path"]
    assert launch_command(text).startswith("PYTHONPATH=examples/grpo ")


def test_no_two_recipes_write_to_one_place() -> None:
    places = [recipe(name)[1]["output_dir"] for name in sorted(NAMES)]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    "name, tp_size",
    [
        ("quickstart", 1),
        ("quickstart-tp2", 2),
        ("llama-8b-tp2", 2),
        ("llama-70b-tp8", 8),
    ],
)
def test_tensor_parallel_reaches_the_engine(
    name: str, tp_size: int, tiny: Path, tmp_path: Path
) -> None:
    text, cfg = recipe(name)
    local = {"base_model": str(tiny / "model"), "output_dir": str(tmp_path)}
    validated = load({**cfg, **GPU_ONLY, **local})
    assert (validated.psft_tensor_parallel_size or 1) == tp_size
    assert validated.tensor_parallel_size in (None, 1), "Axolotl's own must stay off"
    assert num_processes(text) % tp_size == 0


def test_quickstart_tp2_is_the_quickstart() -> None:
    (_, dense), (text, split) = recipe("quickstart"), recipe("quickstart-tp2")
    own = {"tensor_parallel_size": 2, "output_dir": "outputs/quickstart/psft-tp2"}
    assert split == {**dense, **own}
    makefile = (ROOT / "Makefile").read_text().partition("\nquickstart-tp2:")[2]
    assert f"--num_processes {num_processes(text)} " in makefile


# ---- Memory, as the comments of the large recipes have it ----

AVAILABLE = 85 - 3  # GB of an "80 GB" card, less CUDA, NCCL and fragments
ACTIVATIONS = {"llama-8b-tp2": (32, 4096), "llama-70b-tp8": (80, 8192)}
INSIDE = 2.0  # GB, an estimate: one recomputed layer, or the loss head


def state(parameters: float, tp_size: int, dp_size: int) -> float:
    """GB a rank: bf16 weights, float32 gradients, its part of Adam's 12 bytes."""
    return parameters / tp_size * (2 + 4 + 12 / dp_size) / 1e9


def updating(parameters: float, tp_size: int, dp_size: int) -> float:
    """GB a rank with the float32 temporary of torch's AdamW, sqrt of a moment."""
    return state(parameters, tp_size, dp_size) + parameters / tp_size * 4e-9 / dp_size


def numbers(text: str, label: str) -> list[float]:
    """Of the comment's lines that open with `label`: the number after `=`."""
    found = re.findall(rf"^#   {re.escape(label)} .*= +([\d.]+)$", text, re.MULTILINE)
    return [float(number) for number in found]


@pytest.mark.parametrize(
    "name, parameters, gpus, unit",
    [("llama-8b-tp2", 8.03e9, 2, "GPUs"), ("llama-70b-tp8", 70.55e9, 8, "nodes")],
)
def test_memory_arithmetic(name: str, parameters: float, gpus: int, unit: str) -> None:
    """`gpus` share one copy of the model; the comment counts a unit of them or each."""
    text, cfg = recipe(name)
    tp_size, prose = cfg["tensor_parallel_size"], text.replace("\n# ", " ")
    dp_size = num_processes(text) // tp_size
    assert re.search(
        rf"ensor parallel {tp_size}\b.* x data parallel {dp_size}\b", prose
    )
    share = parameters / tp_size / 1e9
    assert f"{parameters / 1e9}e9 / {tp_size} = {share:.4g}e9" in prose

    layers, hidden = ACTIVATIONS[name]
    inputs = layers * cfg["sequence_len"] * hidden * 2 / tp_size / 1e9
    product = f"{layers} x {cfg['sequence_len']} x {hidden} x 2 bytes / {tp_size}"
    assert f"{product} = {inputs:.1f}" in prose
    total = state(parameters, tp_size, dp_size)
    expected = {
        "weights, bf16": 2 * share,
        "gradients, float32": 4 * share,
        "Adam, float32 weights and moments": 12 * share / dp_size,
        "state  ": total,
        "state and the update's temporary": updating(parameters, tp_size, dp_size),
        "state and activations of 8192 tokens": total + inputs + INSIDE,
    }
    for label, value in expected.items():
        # One decimal, whichever way a half was rounded.
        assert numbers(text, label) == [pytest.approx(value, abs=0.0501)], label
    assert max(expected.values()) < AVAILABLE

    sizes = range(1, dp_size + 1)
    fewest = next(n for n in sizes if updating(parameters, tp_size, n) < AVAILABLE)
    scale = 1 if unit == "nodes" else gpus
    for n, words in ((fewest - 1, "too much"), (fewest, "fit")):
        needed = updating(parameters, tp_size, n)
        claim = rf"\b{n * scale} {unit} need {needed:.1f}\b[^.]*\b{words}"
        assert re.search(claim, prose), claim
    stored = f"{2 * parameters / 1e9:.0f} GB of weights and {12 * parameters / 1e9:.0f}"
    assert stored in prose


@pytest.mark.parametrize("name", sorted(NAMES - set(LARGE)))
def test_state_of_a_gpu(name: str) -> None:
    """One line of the comment: the parameters, and GB of a rank's weights and state."""
    text, cfg = recipe(name)
    prose = text.replace("\n# ", " ")
    claim = re.search(r"State: (\d+) GB a GPU \(([\d.e]+) parameters\)", prose)
    tp_size = cfg.get("tensor_parallel_size", 1)
    assert (claim is not None) == (tp_size > 1 and name != "quickstart-tp2")
    if claim is None:
        return
    dp_size = num_processes(text) // tp_size
    assert f"tensor parallel {tp_size} x data parallel {dp_size}" in prose
    gigabytes = state(float(claim[2]), tp_size, dp_size)
    assert int(claim[1]) == round(gigabytes)
    assert updating(float(claim[2]), tp_size, dp_size) < AVAILABLE


# ---- Data ----


def write_llama_like(folder: Path) -> Any:
    """A tiny model whose tokenizer has words and the special tokens of Llama 3."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"]
    specials += ["<|start_header_id|>", "<|end_header_id|>", "<unk>"]
    vocabulary = [*specials, "system", "user", "assistant", *WORDS]
    ids = {word: i for i, word in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=specials[0],
        eos_token=specials[1],
        pad_token=specials[2],
        unk_token="<unk>",
        extra_special_tokens=specials[3:5],
    )
    tokenizer.save_pretrained(folder)
    write_model(folder, tokenizer)
    return tokenizer


@pytest.mark.parametrize("name", LARGE)
def test_answers_and_their_end_of_turn_are_supervised(
    name: str, tmp_path: Path
) -> None:
    """Two dialogues, the second longer than a row, through Axolotl's data set code."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_datasets

    _, cfg = recipe(name)
    tokenizer = write_llama_like(tmp_path / "model")
    long = " ".join(WORDS) + " "
    rows = [
        [
            ("user", "w1 w2"),
            ("assistant", "w3"),
            ("user", "w4"),
            ("assistant", "w5 w6"),
        ],
        [("user", "w1"), ("assistant", long * 4)],
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) + "\n"
            for row in rows
        )
    )
    (data,) = cfg["datasets"]
    loaded = load(
        {
            **cfg,
            **GPU_ONLY,
            "base_model": str(tmp_path / "model"),
            "output_dir": str(tmp_path / "run"),
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "datasets": [
                {**data, "path": str(path), "ds_type": "json", "split": "train"}
            ],
            "val_set_size": 0,
            "eval_strategy": "no",
            "eval_steps": None,
            "eval_sample_packing": None,
            "sequence_len": 64,
            "dataset_num_proc": 1,
        }
    )
    meta = load_datasets(cfg=loaded, cli_args=TrainerCliArgs())
    (row,) = list(meta.train_dataset)
    supervised = [label for label in row["labels"] if label != -100]
    words = tokenizer.convert_ids_to_tokens(supervised)
    assert words == ["w3", "<|eot_id|>", "w5", "w6", "<|eot_id|>"]
