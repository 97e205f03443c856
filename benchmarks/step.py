"""A PSFT optimizer step against an SFT step, on a CPU.

    python -m benchmarks.step [--repeats N] [--threads 1]

Run from the root of the repository. A PSFT step costs what an SFT step costs, plus its
share of scoring: f = a scoring pass over an SFT step, times (N - 1) / N at N steps a
refresh. Everything is measured in one process, interleaved; the minimum of --repeats.
The data loader, the Trainer's book-keeping and more than one rank are not here.
"""

import argparse
import functools
import random
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from axolotl_psft.metrics import TokenSums
from axolotl_psft.objective import psft_loss, sft_loss
from axolotl_psft.token_logprobs import install_logprobs_forward

WINDOWS = (1, 2, 4, 8, 16)
VOCAB_SIZE = 8192
BATCH, LENGTH = 2, 256


class Steps:
    """One small model and one batch; every optimizer step works on the same tokens."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=256,
                intermediate_size=1024,
                num_hidden_layers=6,
                num_attention_heads=8,
                num_key_value_heads=4,
            )
        )
        install_logprobs_forward(self.model)
        # So small a step that the model, and with it the clip, stays what it was.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-9)
        self.input_ids = torch.randint(VOCAB_SIZE, (BATCH, LENGTH))
        self.targets = self.input_ids.clone()
        # Prompts: half of each row is not supervised.
        self.targets[:, : LENGTH // 2] = -100
        self.sums = TokenSums("cpu")

    def forward(self) -> torch.Tensor:
        return self.model(input_ids=self.input_ids, logprob_targets=self.targets)

    def score(self) -> torch.Tensor:
        with torch.no_grad():
            return self.forward().logprobs

    def step(self, old_logprobs: torch.Tensor | None = None, psft: bool = True) -> None:
        output = self.forward()
        if psft:
            old = output.logprobs.detach() if old_logprobs is None else old_logprobs
            loss, sums = psft_loss(output.logprobs, old, output.mask)
        else:
            loss, sums = sft_loss(output.logprobs, output.mask)
        self.sums.add({**sums, "entropy_sum": output.entropy.sum()})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sft(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step(psft=False)

    def window(self, num_steps: int) -> None:
        old = [None, *(self.score() for _ in range(num_steps - 1))]
        for old_logprobs in old:
            self.step(old_logprobs)


def fastest(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each run, the minimum; every round in another order.

    A fixed order would let one of two runs always follow the longer one, and meet the
    clock and the caches that it leaves.
    """
    # On one thread: this process's CPU time, which neighbours do not lengthen.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(runs, float("inf"))
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(runs), len(runs)):
            started = clock()
            runs[name]()
            best[name] = min(best[name], clock() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="1: CPU time instead of wall time, for a machine that is not idle",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    steps = Steps()
    steps.window(2)
    runs: dict[str, Callable[[], object]] = {"score": steps.score}
    runs |= {f"sft {n}": functools.partial(steps.sft, n) for n in WINDOWS}
    runs |= {f"psft {n}": functools.partial(steps.window, n) for n in WINDOWS}
    best = fastest(runs, args.repeats)
    print(f"{'N':>3} {'f':>6} {'PSFT / SFT':>11} {'limit':>7}  ")
    for n in WINDOWS:
        f = best["score"] / (best[f"sft {n}"] / n)
        ratio = best[f"psft {n}"] / best[f"sft {n}"]
        limit = 1.02 if n == 1 else 1.03 * (1 + (n - 1) / n * f)
        verdict = "pass" if ratio <= limit else "miss"
        print(f"{n:>3} {f:>6.3f} {ratio:>11.3f} {limit:>7.3f}  {verdict}", flush=True)


if __name__ == "__main__":
    main()
