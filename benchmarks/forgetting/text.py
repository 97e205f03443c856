"""The second experiment: the same on real text, where ../shared/data is present.

A small language model is trained on dialogues (HH-RLHF) and mathematics (MATH-500) and
fine-tuned on GSM8K; its NLL and entropy on held-out parts of all three are followed.
The texts are measured, never shown.
"""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.forgetting import QUICKSTART
from benchmarks.forgetting.measure import Point, Probe
from benchmarks.forgetting.runs import PROMPT, Run, axolotl_config, train

DATA = QUICKSTART.parents[2] / "shared" / "data"
SOURCES = ("hh-rlhf", "math500", "gsm8k")
FORMAT = "Question: {instruction}\nAnswer: "

VOCAB_SIZE = 2048
BLOCK = 256
BASE_BATCH, BASE_LR = 8, 3e-3
# Of each of the base's two sources so many texts are for training, the rest held out.
NUM_BASE = {"hh-rlhf": 2000, "math500": 400}
NUM_BLOCKS = 20
NUM_ANSWERS = 64
NUM_TRAIN = 256


def is_present() -> bool:
    """Whether the real samples are at hand."""
    return all((DATA / source).is_dir() for source in SOURCES)


def _rows(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / path).read_text().splitlines()]


def base_texts(*, held_out: bool) -> dict[str, list[str]]:
    """Dialogues and worked problems, the training part or the rest."""
    texts = {
        "hh-rlhf": [
            row["chosen"].strip() for row in _rows("hh-rlhf/harmless-base-test.jsonl")
        ],
        "math500": [
            f"{row['problem']}\n{row['solution']}"
            for row in _rows("math500/test.jsonl")
        ],
    }
    parts = {}
    for source, all_texts in texts.items():
        # Dialogues may share their opening; a whole text is in one part only.
        unique = list(dict.fromkeys(all_texts))
        num = NUM_BASE[source]
        parts[source] = unique[num:] if held_out else unique[:num]
    return parts


def train_rows(seed: int, num_train: int) -> list[dict[str, str]]:
    """Demonstrations: GSM8K's training questions, drawn by the seed."""
    rows = _rows("gsm8k/train.jsonl")
    return [
        {"instruction": row["question"], "output": row["answer"]}
        for row in random.Random(seed).sample(rows, num_train)
    ]


def test_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Test and validation questions; GSM8K's own test split."""
    rows = _rows("gsm8k/test.jsonl")
    return rows[:NUM_ANSWERS], rows[NUM_ANSWERS : 2 * NUM_ANSWERS]


def check_no_leak(train: Iterable[dict[str, str]]) -> None:
    """No test or validation question is trained on.

    Raises:
        ValueError: names the split.
    """
    questions = {row["instruction"] for row in train}
    for name, rows in zip(("test", "validation"), test_rows(), strict=True):
        if any(row["question"] in questions for row in rows):
            raise ValueError(f"GSM8K: a question of the {name} split is trained on.")


# ---- The base ----


def make_tokenizer() -> Any:
    """Byte-level BPE, learnt from the base's training part only."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [text for part in base_texts(held_out=False).values() for text in part],
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<eos>"],
        show_progress=False,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>"
    )


def blocks(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """The texts, each with its end, as rows of BLOCK tokens [N, BLOCK]."""
    ids = [
        token
        for encoded in tokenizer(list(texts))["input_ids"]
        for token in (*encoded, tokenizer.eos_token_id)
    ]
    num = len(ids) // BLOCK
    return torch.tensor(ids[: num * BLOCK]).view(num, BLOCK)


def train_base(folder: Path, seed: int, steps: int) -> None:
    """A Qwen3 of 0.9M parameters on the base's training part."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    rows = torch.cat(
        [blocks(tokenizer, t) for t in base_texts(held_out=False).values()]
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, BASE_LR, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    order = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        batch = rows[torch.randint(len(rows), (BASE_BATCH,), generator=order)]
        logits = model(input_ids=batch).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"  step {step}  loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- Fine-tuning ----


def fine_tune(base: Path, output: Path, run: Run) -> dict[str, Any]:
    """Train on GSM8K through Axolotl and measure along the way."""
    output.mkdir(parents=True, exist_ok=True)
    data = base / f"train-{run.num_train}-seed{run.seed}.jsonl"
    rows = train_rows(run.seed, run.num_train)
    check_no_leak(rows)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = axolotl_config(base, data, output, run, {"probe": "text"})
    cfg["datasets"][0]["type"] = {
        **PROMPT,
        "format": FORMAT,
        "no_input_format": FORMAT,
    }
    # About five samples an update.
    cfg |= {"micro_batch_size": 2, "sequence_len": 512, "sample_packing": True}
    return train(cfg, output)


def _answers(tokenizer: Any, rows: Sequence[dict[str, str]]) -> list[tuple[int, Any]]:
    """Each question with its answer, [1, S], and where the answer starts."""
    encoded = []
    for row in rows:
        prompt = tokenizer(FORMAT.format(instruction=row["question"]))["input_ids"]
        answer = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
        encoded.append((len(prompt), torch.tensor([prompt + answer])))
    return encoded


def text_probe(start: Any, settings: dict[str, Any]) -> Probe:
    """NLL, entropy and KL from the start on held-out GSM8K, dialogues, mathematics."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start.config.name_or_path)
    rest = base_texts(held_out=True)
    rows = {
        source: [(1, row[None]) for row in blocks(tokenizer, texts)[:NUM_BLOCKS]]
        for source, texts in rest.items()
    }
    test, validation = test_rows()
    rows |= {
        "gsm8k": _answers(tokenizer, test),
        "validation": _answers(tokenizer, validation),
    }

    def logprobs(model: Any, first: int, ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids).logits[0, first - 1 : -1].float()
        return logits.log_softmax(-1)

    start.eval()
    with torch.no_grad():
        p0 = {
            name: [logprobs(start, *row) for row in part] for name, part in rows.items()
        }

    def probe(model: Any) -> Point:
        point: Point = {}
        for name, part in rows.items():
            sums = torch.zeros(4, dtype=torch.float64)
            for (first, ids), log_p0 in zip(part, p0[name], strict=True):
                log_p = logprobs(model, first, ids)
                nll = -log_p.gather(-1, ids[0, first:, None]).sum()
                entropy = -(log_p.exp() * log_p).sum()
                kl = (log_p.exp() * (log_p - log_p0)).sum()
                sums += torch.stack([nll, entropy, kl, torch.tensor(float(len(log_p)))])
            nll, entropy, kl = (sums[:3] / sums[3]).tolist()
            point |= {f"{name}/nll": nll, f"{name}/entropy": entropy, f"{name}/kl": kl}
        return point

    return probe
