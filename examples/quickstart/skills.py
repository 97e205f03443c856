"""Compares models on the earlier skills and on the new one: a table, a row a model.

Prompts are held out from all training. `python examples/quickstart/skills.py DIR...`
scores saved models; nothing is trained here.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from statistics import mean

import torch
from skill_data import (
    BASE_SKILLS,
    EOS,
    MAX_LETTERS,
    NEW_SKILL,
    OPERATIONS,
    Sample,
    make_samples,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

NUM_PROMPTS_PER_SKILL = 24
NUM_NEW_PROMPTS = 128
TEST_SEED = 1234
MAX_NEW_TOKENS = 2 * MAX_LETTERS  # the longest valid answer and its eos


@dataclass(frozen=True)
class Scores:
    """Accuracies are shares of prompts with a valid answer.

    Attributes:
        earlier: accuracy per operation of the earlier skills, over all its styles.
        new: accuracy of greedy answers to the new skill's prompts.
        new_sampled: the same with answers sampled at temperature 1.
        entropy: nats per answer token of the new skill's held-out samples.
        nll: nats per answer token of the same samples.
    """

    earlier: dict[str, float]
    new: float
    new_sampled: float
    entropy: float
    nll: float

    @property
    def earlier_mean(self) -> float:
        return mean(self.earlier.values())


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    generator: torch.Generator | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[list[str]]:
    """Answers as words, up to eos; greedy, or sampled where a generator is given."""
    by_length = defaultdict(list)  # prompts of one length need no padding
    for i, sample in enumerate(samples):
        prompt = tokenizer.encode(sample.instruction)
        by_length[len(prompt)].append((i, prompt))
    answers: list[list[str]] = [[] for _ in samples]
    for length, group in by_length.items():
        ids = torch.tensor([prompt for _, prompt in group])
        step_input, cache = ids, DynamicCache(config=model.config)
        for _ in range(max_new_tokens):
            output = model(step_input, past_key_values=cache, logits_to_keep=1)
            logits = output.logits[:, -1].float()
            if generator is None:
                step_input = logits.argmax(-1, keepdim=True)
            else:
                probs = logits.softmax(-1)
                step_input = torch.multinomial(probs, 1, generator=generator)
            ids = torch.cat([ids, step_input], dim=1)
        for (i, _), row in zip(group, ids[:, length:].tolist(), strict=True):
            words = tokenizer.convert_ids_to_tokens(row)
            answers[i] = list(takewhile(lambda word: word != EOS, words))
    return answers


def accuracy(samples: Sequence[Sample], answers: Sequence[Sequence[str]]) -> float:
    pairs = zip(samples, answers, strict=True)
    return mean(float(s.skill.check(s.letters, answer)) for s, answer in pairs)


@torch.no_grad()
def answer_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [T, V] at every token of the samples' answers, and the tokens [T]."""
    logprobs, tokens = [], []
    by_length = defaultdict(list)
    for sample in samples:
        prompt = tokenizer.encode(sample.instruction)
        answer = [*tokenizer.encode(sample.output), tokenizer.eos_token_id]
        by_length[len(prompt), len(answer)].append(prompt + answer)
    for (prompt_length, _), rows in by_length.items():
        ids = torch.tensor(rows)
        logits = model(input_ids=ids).logits[:, prompt_length - 1 : -1].float()
        logprobs.append(logits.log_softmax(-1).flatten(0, 1))
        tokens.append(ids[:, prompt_length:].flatten())
    return torch.cat(logprobs), torch.cat(tokens)


def entropy_and_nll(
    logprobs: torch.Tensor, tokens: torch.Tensor
) -> tuple[float, float]:
    """Both in nats per token of the samples' answers, eos included."""
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean()
    return entropy.item(), -logprobs.gather(-1, tokens[:, None]).mean().item()


def score_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scores:
    """Scores on prompts that are the same at each call and outside all training."""
    model.eval()
    earlier = [
        sample
        for skill in BASE_SKILLS
        for sample in make_samples(
            skill, NUM_PROMPTS_PER_SKILL, TEST_SEED, held_out=True
        )
    ]
    new = make_samples(NEW_SKILL, NUM_NEW_PROMPTS, TEST_SEED, held_out=True)
    right = defaultdict(list)
    for sample, answer in zip(
        earlier, generate(model, tokenizer, earlier), strict=True
    ):
        is_right = sample.skill.check(sample.letters, answer)
        right[sample.skill.family].append(float(is_right))
    rng = torch.Generator().manual_seed(TEST_SEED)
    entropy, nll = entropy_and_nll(*answer_logprobs(model, tokenizer, new))
    return Scores(
        earlier={family: mean(values) for family, values in right.items()},
        new=accuracy(new, generate(model, tokenizer, new)),
        new_sampled=accuracy(new, generate(model, tokenizer, new, rng)),
        entropy=entropy,
        nll=nll,
    )


def print_table(scores: dict[str, Scores]) -> None:
    columns = [*OPERATIONS, "earlier", "new", "sampled", "entropy", "nll"]
    width = max(map(len, (*scores, "model")))
    print("model".ljust(width), *(c.rjust(8) for c in columns))
    for name, s in scores.items():
        shares = [*(s.earlier[op] for op in OPERATIONS), s.earlier_mean, s.new]
        cells = [f"{x:8.1%}" for x in (*shares, s.new_sampled)]
        print(name.ljust(width), *cells, f"{s.entropy:8.3f}", f"{s.nll:8.3f}")
    print(
        "earlier: mean accuracy over the skills before fine-tuning; new: the new "
        f"skill ({NEW_SKILL.name}), greedy;\nsampled: the same at temperature 1; "
        "entropy, nll: nats per token on the new skill's held-out samples."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model_dir", type=Path, nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)  # models this small gain nothing from more
    scores = {}
    for path in args.model_dir:
        if not (path / "config.json").exists():
            parser.error(f"{path} holds no saved model (no config.json)")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        scores[str(path)] = score_model(model, AutoTokenizer.from_pretrained(path))
    print_table(scores)


if __name__ == "__main__":
    main()
