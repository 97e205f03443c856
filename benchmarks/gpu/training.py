"""Training steps on a GPU: a random 1.5B, a run through Axolotl, Megatron's step."""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from axolotl_psft.objective import psft_loss, sft_loss
from axolotl_psft.token_logprobs import install_logprobs_forward
from benchmarks.gpu.measure import Bench, Figure, relative_error

WINDOW = 8  # optimizer steps a refresh


def _large_model(bench: Bench) -> Any:
    """Random, 1.5B parameters, Qwen2.5's vocabulary; bfloat16."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = bench.size(
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "vocab_size": 151_936,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "vocab_size": 507,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    )
    config = Qwen2Config(**sizes, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(bench.device):
        return Qwen2ForCausalLM._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )


def step(bench: Bench) -> Iterator[Figure]:
    """A PSFT step's share beside an SFT step, and what a stock step costs."""
    model = _large_model(bench)
    size = sum(p.numel() for p in model.parameters()) / 1e9
    yield Figure("parameters", size, "billions")
    length = bench.size(8192, 64)
    ids = torch.randint(model.config.vocab_size, (1, length), device=bench.device)
    targets = ids.clone()
    targets[:, 0] = -100
    num = length - 1
    stock_model_loss = model.forward
    install_logprobs_forward(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)

    def forward() -> Any:
        return model(input_ids=ids, logprob_targets=targets, num_active=num)

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def score() -> torch.Tensor:
        with torch.no_grad():
            return forward().logprobs

    def sft() -> None:
        out = forward()
        update(sft_loss(out.logprobs, out.mask, num_tokens=num)[0])

    def psft(old: Any = None) -> None:
        old = old_logprobs if old is None else old
        out = forward()
        loss = psft_loss(
            out.logprobs, old, out.mask, epsilon_high=0.28, num_tokens=num
        )[0]
        update(loss)

    old_logprobs = score()
    for mode, logprobs in (("no grad", score()), ("grad", forward().logprobs.detach())):
        ratio = (logprobs - old_logprobs).exp()
        same = bool((ratio == 1).all())
        yield Figure(f"ratio on unmoved weights, {mode}: exactly 1", same)

    def window() -> None:
        """A window's steps: scored once each but the first, whose ratio is 1."""
        psft()
        for _ in range(WINDOW - 1):
            psft(score())

    def sft_window() -> None:
        for _ in range(WINDOW):
            sft()

    def stock() -> None:
        update(stock_model_loss(input_ids=ids, labels=ids).loss)

    for name, run in (("SFT", sft), ("PSFT", psft)):
        yield Figure(f"memory of a {name} step", bench.peak_mb(run), "MB")
    runs: dict[str, Callable[[], Any]] = {"SFT step": sft, "scoring": score}
    times = bench.milliseconds(runs, 5)
    windows = bench.milliseconds({"PSFT window": window, "SFT window": sft_window}, 3)
    for name, took in (times | windows).items():
        yield Figure(name, took, "ms")
    yield Figure("tokens a second, SFT", 1e3 * num / times["SFT step"])
    f = times["scoring"] / times["SFT step"]
    yield Figure("f, scoring over an SFT step", f)
    limit = 1.03 * (1 + (WINDOW - 1) / WINDOW * f)
    ratio = windows["PSFT window"] / windows["SFT window"]
    yield Figure(f"PSFT over SFT at {WINDOW} steps a refresh", ratio, "", limit)
    try:
        yield Figure("stock step", bench.milliseconds({"": stock}, 3)[""], "ms")
        yield Figure("memory of a stock step", bench.peak_mb(stock), "MB")
    except torch.OutOfMemoryError:
        yield Figure("stock step", "out of memory")


# ---- Through Axolotl ----


LORA = {"lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}


def axolotl(bench: Bench) -> Iterator[Figure]:
    """20 packed steps of a small model, in each precision; resumed halfway."""
    from tests.tiny import column, config, stateful, write_dataset, write_model

    folder = Path(tempfile.mkdtemp())
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    write_model(folder / "model", **bench.size({**sizes, **heads}, {}))
    write_dataset(folder / "train.jsonl", num_samples=400, seed=0)
    # LoRA last: what Axolotl's LoRA kernels patch stays patched.
    precisions: dict[str, dict[str, Any]] = {
        "bf16": {"bf16": True},
        "float32": {},
        # torch's scaler wants float32 weights, and Axolotl makes all of them float16.
        "fp16, LoRA": {"fp16": True, "adapter": "lora", **LORA},
    }
    for name, precision in bench.size(precisions, {"float32": {}}).items():
        options: dict[str, Any] = {
            **stateful(packed=True),
            "sequence_len": 512,
            "max_steps": bench.size(20, 6),
            "save_steps": bench.size(10, 3),
            **precision,
        }
        trainer = _run(config(folder, folder / name, **options))
        ages = column(trainer, "psft/old_policy_age")
        ratios = column(trainer, "psft/ratio_max")
        fresh = all((r == 1) == (age == 0) for r, age in zip(ratios, ages, strict=True))
        yield Figure(f"{name}: ratio exactly 1 where the policy is fresh", fresh)
        losses = column(trainer, "psft/nll")
        yield Figure(f"{name}: nll falls", losses[-1] < losses[0])
        yield Figure(f"{name}: device", str(trainer.args.device))
        attention = trainer.model.config._attn_implementation
        yield Figure(f"{name}: attention", attention)
        halfway = options["save_steps"]
        resumed = _run(
            config(
                folder,
                folder / name,
                **options,
                resume_from_checkpoint=str(
                    folder / name / "run" / f"checkpoint-{halfway}"
                ),
            )
        )
        again = column(resumed, "psft/nll")[-halfway:]
        yield Figure(f"{name}: resumed, equal to the bit", again == losses[-halfway:])
        apart = max(abs(a - b) for a, b in zip(again, losses[-halfway:], strict=True))
        yield Figure(f"{name}: resumed, nll apart", apart)


def _run(cfg: dict[str, Any]) -> Any:
    from benchmarks.run_axolotl import run

    return run(cfg)


# ---- Megatron's step ----


def megatron(bench: Bench) -> Iterator[Figure]:
    """Megatron-Core's step on one rank (NCCL) against a dense one with AdamW."""
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    from axolotl_psft.megatron import groups
    from axolotl_psft.megatron.layers import parallelize
    from axolotl_psft.megatron.step import MegatronStep, OptimizerSettings
    from axolotl_psft.megatron.weights import load_weights
    from tests.tiny import causal_lm

    folder = Path(tempfile.mkdtemp())
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    options = bench.size({**sizes, **heads, "vocab_size": 32_000}, {"vocab_size": 64})
    causal_lm("llama", **options).save_pretrained(folder / "model")
    dist.init_process_group(
        bench.size("nccl", "gloo"),
        store=dist.FileStore(str(folder / "store"), 1),
        rank=0,
        world_size=1,
    )
    layout = groups.initialize(1)
    device = torch.device(bench.device)
    length = bench.size(2048, 32)
    batches = [
        torch.randint(options["vocab_size"], (1, length), device=device)
        for _ in range(2)
    ]
    lr = 1e-3
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        split = AutoModelForCausalLM.from_pretrained(
            folder / "model", device_map={"": "meta"}
        )
        parallelize(split, layout, dtype=dtype, device=device)
        load_weights(split, folder / "model", layout)
        split.to(device)
        install_logprobs_forward(split)
        settings = OptimizerSettings("adam", lr)
        ours = MegatronStep(split, layout, settings)

        # Megatron's optimizer keeps float32 weights beside 16-bit ones.
        dense = AutoModelForCausalLM.from_pretrained(folder / "model").to(device)
        install_logprobs_forward(dense)
        optimizer = torch.optim.AdamW(dense.parameters(), lr=lr, weight_decay=0.0)

        def loss_func(model: Any, ids: torch.Tensor) -> torch.Tensor:
            targets = ids.clone()
            targets[:, 0] = -100
            out = model(input_ids=ids, logprob_targets=targets, num_active=length - 1)
            return sft_loss(out.logprobs, out.mask, num_tokens=2 * (length - 1))[0]

        def dense_step(
            dense: Any = dense, optimizer: Any = optimizer, dtype: Any = dtype
        ) -> tuple[float, float]:
            total = torch.zeros((), device=device)
            for ids in batches:
                with torch.autocast(
                    device.type, torch.bfloat16, enabled=dtype == torch.bfloat16
                ):
                    loss = loss_func(dense, ids)
                loss.backward()
                total += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(dense.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return float(total), float(norm)

        def megatron_step(ours: Any = ours) -> tuple[float, float]:
            loss = ours.forward_backward(batches, loss_func)
            norm = ours.clip_grad_norm(1.0)
            ours.update()
            return float(loss), float(norm)

        apart = [
            max(
                abs(a - b) / abs(b)
                for a, b in zip(megatron_step(), dense_step(), strict=True)
            )
            for _ in range(5)
        ]
        # In 16 bits the dense run's weights, norms and residuals are float32 ones.
        first, limit = (1e-5, 1e-4) if dtype == torch.float32 else (1e-2, 5e-2)
        yield Figure(f"{name}: first loss, norm: apart", apart[0], "", first)
        yield Figure(f"{name}: of five steps, the most", max(apart), "", limit)
        pairs = itertools.zip_longest(
            split.state_dict().values(), dense.state_dict().values()
        )
        error = max(relative_error(a, b) for a, b in pairs if a.is_floating_point())
        yield Figure(f"{name}: weights apart from dense", error, "", limit)
        times = bench.milliseconds({"megatron": megatron_step, "dense": dense_step}, 5)
        for key, took in times.items():
            yield Figure(f"{name}: {key} step", took, "ms")
    groups.parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
