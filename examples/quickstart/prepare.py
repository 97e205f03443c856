"""Makes the quickstart's base model, tokenizer and data sets from this repository.

Nothing is downloaded. skill_data.py defines the skills; fine-tuning is Axolotl's
business (examples/yaml/quickstart.yaml), and skills.py compares the results.
"""

import argparse
import hashlib
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from skill_data import (
    BASE_SKILLS,
    EOS,
    NEW_SKILL,
    PAD,
    Sample,
    Skill,
    make_sample,
    make_samples,
    make_tokenizer,
    vocabulary,
)
from skills import print_table, score_model
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

BATCH_SIZE = 96
PEAK_LR = 3e-3
WARMUP_STEPS = 50
DECAY_STEPS = 135
# How soon the skills are learned depends on how a CPU rounds: the learning rate decays
# once the loss is here (nats a token, smoothed), or after this many steps.
LEARNED_LOSS = 0.1
MAX_STEPS = 1500
MIN_BASE_ACCURACY = 0.95
NUM_TRAIN, NUM_TEST = 512, 128
IGNORE_INDEX = -100


def make_model(seed: int, words: Sequence[str] | None = None) -> Qwen3ForCausalLM:
    """A Qwen3 of 0.28M parameters with random weights, for these words."""
    words = words or vocabulary()
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(words),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=24,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=words.index(PAD),
            eos_token_id=words.index(EOS),
            bos_token_id=None,
        )
    )


def collate(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [B, S], padded at the end; the answer and its eos count."""
    rows = []
    for sample in samples:
        prompt = tokenizer.encode(sample.instruction)
        answer = [*tokenizer.encode(sample.output), tokenizer.eos_token_id]
        rows.append((prompt + answer, [IGNORE_INDEX] * len(prompt) + answer))
    width = max(len(ids) for ids, _ in rows)
    # Causal attention never sees padding at the end, so no mask is needed.
    ids = [r + [tokenizer.pad_token_id] * (width - len(r)) for r, _ in rows]
    labels = [r + [IGNORE_INDEX] * (width - len(r)) for _, r in rows]
    return torch.tensor(ids), torch.tensor(labels)


def train_base(
    model: Qwen3ForCausalLM,
    skills: Sequence[Skill],
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    *,
    learned_loss: float = LEARNED_LOSS,
    max_steps: int = MAX_STEPS,
) -> None:
    """Trains the base on every earlier skill, on prompts outside the held-out part."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98))
    rng = random.Random(seed)
    start = time.perf_counter()
    last_step, smoothed = max_steps, 10.0
    for step in range(1, max_steps + 1):
        if smoothed < learned_loss and last_step == max_steps:
            last_step = min(step + DECAY_STEPS, max_steps)
        if step > last_step:
            break
        decay = (last_step + 1 - step) / DECAY_STEPS
        lr_share = min(step / WARMUP_STEPS, decay, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * lr_share
        samples = [
            make_sample(rng.choice(skills), rng, held_out=False)
            for _ in range(BATCH_SIZE)
        ]
        ids, labels = collate(samples, tokenizer)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smoothed += 0.1 * (loss.item() - smoothed)
        if step % 50 == 0 or step == last_step:
            seconds = time.perf_counter() - start
            print(f"  step {step}  loss {smoothed:.4f}  {seconds:.0f} s", flush=True)


def write_jsonl(path: Path, samples: Sequence[Sample]) -> None:
    rows = ({"instruction": s.instruction, "output": s.output} for s in samples)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_version(seed: int) -> str:
    """Changes with the seed and with the code that makes the model and the data."""
    here = Path(__file__).resolve().parent
    code = b"".join((here / n).read_bytes() for n in ("prepare.py", "skill_data.py"))
    return f"{hashlib.sha256(code).hexdigest()[:16]}-seed{seed}"


def prepare(output_dir: Path, seed: int) -> None:
    """Makes what is missing below `output_dir`: base/, train.jsonl, test.jsonl."""
    stamp = output_dir / "recipe.txt"
    version = recipe_version(seed)
    if stamp.exists() and stamp.read_text() == version:
        print(f"Base model and data in {output_dir} are up to date: nothing to make.")
        return
    # The stamp is the last thing written: an interrupted run is made anew.
    stamp.unlink(missing_ok=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    train = make_samples(NEW_SKILL, NUM_TRAIN, seed, held_out=False)
    test = make_samples(NEW_SKILL, NUM_TEST, seed, held_out=True)
    write_jsonl(output_dir / "train.jsonl", train)
    write_jsonl(output_dir / "test.jsonl", test)
    print(f"New skill, {NUM_TRAIN} train and {NUM_TEST} test samples, such as:")
    print(f"  {train[0].instruction} {train[0].output}")

    print(f"Training the base model on {len(BASE_SKILLS)} skills, about a minute:")
    # One thread: the same sums, so the same model, whatever the number of cores; and on
    # a busy machine two threads wait for each other far longer than they save.
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(seed)
    train_base(model, BASE_SKILLS, tokenizer, seed)
    scores = score_model(model, tokenizer)
    print_table({"base": scores})
    if scores.earlier_mean < MIN_BASE_ACCURACY:
        raise SystemExit(
            f"prepare.py: the base model answers {scores.earlier_mean:.1%} of the "
            f"earlier skills' prompts, less than {MIN_BASE_ACCURACY:.0%}: too little "
            f"to compare what fine-tuning keeps. Try another --seed than {seed}."
        )
    model.save_pretrained(output_dir / "base")
    tokenizer.save_pretrained(output_dir / "base")
    stamp.write_text(version)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"Made {output_dir}/base ({num_parameters:,} parameters), train.jsonl and")
    print(f"test.jsonl in {output_dir}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("outputs/quickstart"),
        help="where base/, train.jsonl and test.jsonl go (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the weights and of every sample (default: %(default)s)",
    )
    args = parser.parse_args()
    prepare(args.output_dir, args.seed)


if __name__ == "__main__":
    main()
