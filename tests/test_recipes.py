"""Recipes on real samples: what is supervised, and a few steps of training.

Data sets and models are small local ones in the place of those on a hub; all else is
the recipe's own. Samples come from ../shared/data; skipped where it is absent.
OpenR1-Math and LIMO are not there: MATH-500's samples stand for them, in the published
columns.
"""

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.test_example_scripts import script
from tests.test_examples import GPU_ONLY, GRPO, LIGER, recipe
from tests.tiny import column, load, run, train_logs, write_model, write_rows

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
if not DATA.is_dir():
    pytest.skip(f"needs the samples in {DATA}", allow_module_level=True)

QWEN = {
    "pad_token": "<|endoftext|>",
    "eos_token": "<|im_end|>",
    "extra_special_tokens": ["<|im_start|>"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": QWEN,
    # A base model: its own end of text, not of a turn.
    "qwen3": {
        "pad_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "extra_special_tokens": ["<|im_start|>", "<|im_end|>"],
    },
    "llama": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "extra_special_tokens": [
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|finetune_right_pad_id|>",
        ],
    },
}
# Of each recipe: model family, its data here, and what closes a turn.
RECIPES = {
    "gsm8k-7b": ("qwen2", "gsm8k", "<|im_end|>"),
    "gsm8k-7b-lora": ("qwen2", "gsm8k", "<|im_end|>"),
    "psft-then-grpo-1-psft": ("qwen2", "gsm8k", "<|im_end|>"),
    "math-7b": ("qwen2", "math", "<|im_end|>"),
    "limo-7b": ("qwen2", "limo", "<|im_end|>"),
    "hh-rlhf-4b": ("qwen3", "hh-rlhf", "<|im_end|>"),
    "openr1-math-7b": ("qwen2", "openr1", "<|im_end|>"),
    "openr1-math-7b-lora": ("qwen2", "openr1", "<|im_end|>"),
    "openr1-math-llama-8b": ("llama", "openr1", "<|eot_id|>"),
}
# One of each data set and model family.
DISTINCT = ["gsm8k-7b", "math-7b", "limo-7b", "hh-rlhf-4b", "openr1-math-7b"]
DISTINCT += ["openr1-math-llama-8b"]
NUM_ROWS = 150  # enough that 9 updates do not end an epoch, and a window with it
SEQUENCE_LEN = 1024
LORA_KERNELS = [f"lora_{part}_kernel" for part in ("mlp", "qkv", "o", "embedding")]
DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
Row = dict[str, Any]
# Prompt and answer, once a turn.
Turns = list[tuple[str, str]]


def samples(path: str) -> list[Row]:
    return [json.loads(line) for line in (DATA / path).read_text().splitlines()]


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_rows(path, rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `.jsonl` for each data set, or a folder of its configurations."""
    folder = tmp_path_factory.mktemp("data")
    write(folder / "gsm8k.jsonl", samples("gsm8k/train.jsonl")[:NUM_ROWS])
    problems = samples("math500/test.jsonl")
    for problem in problems[:NUM_ROWS]:
        subject = problem["subject"].lower().replace("&", "and").replace(" ", "_")
        with (folder / f"math-{subject}.jsonl").open("a") as file:
            file.write(json.dumps(problem) + "\n")
    limo = [
        {"question": p["problem"], "solution": p["solution"], "answer": p["answer"]}
        for p in problems[:NUM_ROWS]
    ]
    write(folder / "limo.jsonl", limo)
    openr1 = [
        {
            "problem": p["problem"],
            "solution": p["solution"],
            "answer": p["answer"],
            "generations": [p["solution"]],
            "correctness_count": 1,
            "messages": [
                {"role": "user", "content": p["problem"]},
                {
                    "role": "assistant",
                    "content": f"<think>\n{p['solution']}\n</think>\n\n{p['answer']}",
                },
            ],
        }
        for p in problems
    ]
    write(folder / "openr1.jsonl", openr1)
    published = DATA / "hh-rlhf" / "harmless-base-test.jsonl"
    chosen = folder / "hh-rlhf.jsonl"
    script("examples/data/hh_rlhf.py").main([str(published), "--output", str(chosen)])
    chosen.write_text("".join(chosen.read_text().splitlines(True)[:NUM_ROWS]))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A folder with a tiny random model of each family.

    One vocabulary of bytes and their merges, learnt from the samples, with the special
    tokens of each family.
    """
    from tokenizers import ByteLevelBPETokenizer, processors
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models")
    texts = [path.read_text() for path in sorted(data.glob("*.jsonl"))]
    for family, specials in FAMILIES.items():
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            [text[:40_000] for text in texts], vocab_size=800, show_progress=False
        )
        bpe.save(str(folder / "bpe.json"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "bpe.json"), **specials
        )
        if tokenizer.bos_token:
            # As Llama's does: a text on its own begins with it.
            bos = (tokenizer.bos_token, tokenizer.bos_token_id)
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos[0]} $A", special_tokens=[bos]
            )
        tokenizer.save_pretrained(folder / family)
        # A few more than there are tokens, as those of real models are.
        write_model(folder / family, tokenizer, family, vocab_size=832)
    return folder


def local(name: str, models: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    """The recipe on one CPU process, with data sets and model that are at hand.

    What is taken from it: tensor parallelism (tests/distributed has it), bf16, and
    kernels for GPUs; what is smaller: sequence length and accumulation.
    """
    _, cfg = recipe(name)
    family, source, _ = RECIPES[name]
    for key in ("tensor_parallel_size", "save_steps", "eval_steps", "test_datasets"):
        cfg.pop(key, None)
    for key in ("val_set_size", "eval_sample_packing"):
        cfg.pop(key, None)
    cfg["psft"].pop("sequence_parallel", None)
    datasets = []
    for given in cfg["datasets"]:
        # Under the configuration's name where the data set has several.
        file = f"math-{given['name']}.jsonl" if source == "math" else f"{source}.jsonl"
        datasets.append(
            {
                **{key: given[key] for key in given if key not in ("name", "path")},
                "path": str(data / file),
                "ds_type": "json",
                "split": "train",
            }
        )
    if "adapter" in cfg:
        # Axolotl turns these on where an adapter has no dropout.
        cfg |= dict.fromkeys(LORA_KERNELS, False)
    return {
        **cfg,
        **GPU_ONLY,
        **dict.fromkeys(LIGER, False),
        "base_model": str(models / family),
        "datasets": datasets,
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / "run"),
        "attn_implementation": "sdpa",
        "sequence_len": SEQUENCE_LEN,
        # 8 rows an update or fewer: enough are left for an epoch of nine updates.
        "gradient_accumulation_steps": 1 if cfg["micro_batch_size"] == 8 else 2,
        "eval_strategy": "no",
        "save_strategy": "no",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "use_tensorboard": False,
        "include_tkps": False,
        "logging_steps": 1,
    }


def prepare(cfg: dict[str, Any]) -> tuple[Any, Any]:
    """Axolotl's tokenizer and its training rows, packed if the recipe packs."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_datasets
    from axolotl.loaders import load_tokenizer

    loaded = load(cfg)
    meta = load_datasets(cfg=loaded, cli_args=TrainerCliArgs())
    return load_tokenizer(loaded), meta.train_dataset


def turns(source: str, row: Row) -> Turns:
    if source in ("hh-rlhf", "openr1"):
        contents = [message["content"] for message in row["messages"]]
        return list(zip(contents[::2], contents[1::2], strict=True))
    prompt, answer = {
        "gsm8k": ("question", "answer"),
        "math": ("problem", "solution"),
        "limo": ("question", "solution"),
    }[source]
    return [(row[prompt], row[answer])]


def supervised(tokenizer: Any, row: Row) -> list[str]:
    """The text of each stretch of labels that is not -100."""
    stretches: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label != -100:
            assert label == token
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def rendered(source: str, family: str, conversation: Turns) -> str:
    """A conversation as the model family writes it."""
    if family == "llama":
        header = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    else:
        header = "<|im_start|>{}\n{}<|im_end|>\n"
    text = "<|begin_of_text|>" if family == "llama" else ""
    if family == "qwen2":
        boxed = source in ("math", "limo")
        text += header.format("system", BOXED if boxed else DEFAULT_SYSTEM)
    for prompt, answer in conversation:
        text += header.format("user", prompt) + header.format("assistant", answer)
    return text


def lengthened(row: Row, part: int) -> Row:
    """The row with its last prompt (part 0) or answer (1) longer than any sequence."""
    row = json.loads(json.dumps(row))
    if "messages" in row:
        place, key = row["messages"][part - 2], "content"
    else:
        prompt = "problem" if "problem" in row else "question"
        answer = "solution" if "solution" in row else "answer"
        place, key = row, (prompt, answer)[part]
    place[key] *= 4 * SEQUENCE_LEN // len(place[key]) + 1
    return row


@pytest.mark.parametrize("name", DISTINCT)
def test_answers_and_their_end_of_turn_are_supervised(
    name: str, models: Path, data: Path, tmp_path: Path
) -> None:
    """All of it and nothing else; and samples too long for it are dropped, not cut."""
    family, source, end_of_turn = RECIPES[name]
    own = tmp_path / "data"
    expected = []
    for path in sorted(data.glob(f"{source}*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        fit = [row for row in rows if len(json.dumps(row)) < SEQUENCE_LEN][:8]
        expected += [turns(source, row) for row in fit]
        write(own / path.name, [lengthened(fit[0], 0), *fit, lengthened(fit[1], 1)])
    cfg = local(name, models, own, tmp_path)
    # A packed row is several samples; packing itself is in test_recipe_trains.
    tokenizer, prepared = prepare({**cfg, "sample_packing": False})
    assert len(prepared) == len(expected) >= 8
    found = {tokenizer.decode(row["input_ids"]).strip(): row for row in prepared}
    for conversation in expected:
        text = rendered(source, family, conversation).strip()
        answers = [answer + end_of_turn for _, answer in conversation]
        assert supervised(tokenizer, found[text]) == answers
    if source == "hh-rlhf":
        assert max(len(conversation) for conversation in expected) > 2


def test_the_other_recipes_have_the_same_data() -> None:
    for name in set(RECIPES) - set(DISTINCT):
        family, source, _ = RECIPES[name]
        same = next(key for key in DISTINCT if RECIPES[key][:2] == (family, source))
        (_, cfg), (_, tested) = recipe(name), recipe(same)
        for key in ("base_model", "chat_template", "datasets", "special_tokens"):
            if (key, name) == ("base_model", "psft-then-grpo-1-psft"):
                continue  # a smaller one of the family
            assert cfg.get(key) == tested.get(key), (name, key)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains(name: str, models: Path, data: Path, tmp_path: Path) -> None:
    """Nine updates: a window of eight, and the first of the next."""
    cfg = {**local(name, models, data, tmp_path), "sequence_len": SEQUENCE_LEN // 2}
    cfg.pop("num_epochs")
    # A random model needs far longer steps than a trained one to move in nine.
    trainer = run({**cfg, "max_steps": 9, "learning_rate": 0.01, "warmup_steps": 0})
    logs = train_logs(trainer)
    names = ["nll", "entropy", "clip_frac", "ratio_mean", "ratio_max", "approx_kl"]
    for entry in logs:
        values = [entry[f"psft/{name}"] for name in names] + [entry["grad_norm"]]
        assert all(math.isfinite(value) for value in values)
    ages = column(trainer, "psft/old_policy_age")
    assert ages == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    for age, mean, highest in zip(
        ages,
        column(trainer, "psft/ratio_mean"),
        column(trainer, "psft/ratio_max"),
        strict=True,
    ):
        assert (mean == highest == 1.0) is (age == 0)
    clipped = column(trainer, "psft/clip_frac")
    assert clipped[0] == clipped[8] == 0.0 < max(clipped)
    nll = column(trainer, "psft/nll")
    assert nll[8] < nll[0]


# ---- PSFT, then GRPO ----


def test_grpo_goes_on_from_psft(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates of Axolotl's GRPO, on the model that the first stage saves."""
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.train import train

    first = local("psft-then-grpo-1-psft", models, data, tmp_path / "psft")
    run({**first, "max_steps": 1})

    reward = script("examples/grpo/gsm8k_reward.py")
    judged = []

    def right_answer(completions: Any, answer: Any, **others: Any) -> list[float]:
        judged.append(reward.right_answer(completions, answer, **others))
        # A random model is never right, and GRPO learns from differences only.
        return [float(i % 2) for i in range(len(completions))]

    module = ModuleType("gsm8k_reward")
    module.__dict__.update(prompts=reward.prompts, right_answer=right_answer)
    monkeypatch.setitem(sys.modules, "gsm8k_reward", module)

    _, cfg = recipe(GRPO)
    (given,) = cfg["datasets"]
    given = {key: given[key] for key in given if key not in ("name", "path")}
    given |= {"path": str(data / "gsm8k.jsonl"), "ds_type": "json", "split": "train"}
    # Nor does a random model ever end its turn.
    shorter = {"max_completion_length": 8, "mask_truncated_completions": False}
    loaded = load(
        {
            **cfg,
            **GPU_ONLY,
            "base_model": first["output_dir"],
            "datasets": [given],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "grpo"),
            "attn_implementation": "sdpa",
            "trl": {**cfg["trl"], **shorter},
            "max_steps": 2,
            "warmup_steps": 0,
            "save_steps": None,
            "save_strategy": "no",
            "dataset_num_proc": 1,
            "use_tensorboard": False,
        }
    )
    meta = load_preference_datasets(cfg=loaded, cli_args=TrainerCliArgs())
    _, tokenizer, trainer = train(cfg=loaded, dataset_meta=meta)

    logs = train_logs(trainer)
    assert len(logs) == 2
    for entry in logs:
        assert math.isfinite(entry["loss"])
        assert entry["grad_norm"] > 0
        assert not any(key.startswith("psft/") for key in entry)
    # Both updates are of one batch of completions, which is logged with the first.
    assert [entry.get("reward") for entry in logs] == [0.5, None]
    assert judged == [[0.0] * cfg["trl"]["generation_batch_size"]]

    # The prompts are those that the first stage was trained on, to the letter.
    asked = samples("gsm8k/train.jsonl")[0]["question"]
    (row,) = (r for r in meta.train_dataset if r["prompt"][0]["content"] == asked)
    prompt = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, tokenize=False
    )
    assert prompt + "<|im_end|>\n" == rendered("gsm8k", "qwen2", [(asked, "")])


@pytest.mark.parametrize(
    "name, dtype",
    [("gsm8k-7b-lora", "float32"), ("psft-then-grpo-1-psft", "bfloat16")],
)
def test_what_bf16_makes_of_trained_weights(
    name: str, dtype: str, models: Path, data: Path, tmp_path: Path
) -> None:
    """Why full fine-tuning goes another way to float32 weights, and LoRA need not."""
    from axolotl.loaders import ModelLoader, load_tokenizer

    loaded = load({**local(name, models, data, tmp_path), "bf16": True})
    model, _ = ModelLoader(loaded, load_tokenizer(loaded)).load()
    # Axolotl casts norms and embeddings by rules of their own; most weights are here.
    trained = {
        str(parameter.dtype).removeprefix("torch.")
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and "proj" in key
    }
    assert trained == {dtype}
