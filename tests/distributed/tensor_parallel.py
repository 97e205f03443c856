"""Runs that must not depend on how the model is split, and what ranks do with them.

Judged by test_tensor_parallel.py, which runs the same configurations dense.
"""

import os
from pathlib import Path
from typing import Any

from tests.distributed.cpu_ranks import overlap
from tests.distributed.launch import keep_process_group
from tests.tiny import (
    config,
    eval_data,
    run,
    steps_after,
    train_logs,
    write_dataset,
    write_model,
)

METRICS = [
    *("psft/surrogate", "grad_norm", "psft/nll", "psft/clip_frac"),
    *("psft/entropy", "loss"),
]
PACKED = {"sample_packing": True, "micro_batch_size": 1}
SAVE = {"save_strategy": None, "save_steps": 1, "save_total_limit": 100}
# Every model divides by 4: kv heads, and a vocabulary that the tokenizer does not fill.
SIZES = {"vocab_size": 64, "num_key_value_heads": 4}
# With what the family is known for; q and k norms are Qwen3's.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama": {"attention_bias": True},
    "qwen2": {},
    "mistral": {},
}
LLAMA = "llama, untied"
RUNS: dict[str, dict[str, Any]] = {
    f"{family}, {tied}, {packed}": {
        "base_model": f"{family}, {tied}",
        **(PACKED if packed == "packed" else {}),
    }
    for family in FAMILIES
    for tied in ("tied", "untied")
    for packed in ("packed", "unpacked")
}
RUNS |= {
    "accumulated": {
        **PACKED,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "base_model": LLAMA,
    },
    "sequence": {"psft": {"sequence_parallel": True}, **PACKED},
    "sequence, llama": {
        "psft": {"sequence_parallel": True},
        "base_model": LLAMA,
        "gradient_checkpointing": True,
    },
}
FLASH = {"attn_implementation": "flash_attention_2"}
RUNS |= {
    "varlen": {**PACKED, **FLASH, "base_model": LLAMA},
    "varlen, sequence": {**PACKED, **FLASH, "psft": {"sequence_parallel": True}},
}
ADAM = {"optimizer": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1}
# Two data-parallel ranks: a dense run's step has both their samples.
DATA_PARALLEL: dict[str, dict[str, Any]] = {
    "two copies": {"micro_batch_size": 4},
    "two copies, adam": {
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "psft": {"sequence_parallel": True},
        **ADAM,
    },
    "two copies, sft_kl": {"micro_batch_size": 4, "psft": {"objective": "sft_kl"}},
}
RUNS["adam"] = {"base_model": LLAMA, **ADAM}


def dense(options: dict[str, Any]) -> dict[str, Any]:
    """A data-parallel run's options for one process."""
    return {**options, "micro_batch_size": 2 * options["micro_batch_size"]}


def write_models(folder: Path) -> Path:
    for name, options in FAMILIES.items():
        for tied in (True, False):
            write_model(
                folder / f"{name}, {'tied' if tied else 'untied'}",
                model_type=name,
                tie_word_embeddings=tied,
                **SIZES,
                **options,
            )
    write_dataset(folder / "train.jsonl", num_samples=96, seed=0)
    write_dataset(folder / "test.jsonl", num_samples=13, seed=1)
    return folder


def tp_config(models: Path, output: Path, tp_size: int, **overrides: Any) -> Any:
    """20 steps with SFT warm-up, two refreshes and an active clip."""
    psft = {"epsilon_high": 0.05, "refresh_steps": 8, "sft_warmup_steps": 4}
    psft |= overrides.pop("psft", {})
    if tp_size == 1:
        psft.pop("sequence_parallel", None)
        overrides.pop("attn_implementation", None)  # what the others are compared with
    model = overrides.pop("base_model", "qwen3, tied")
    options = {
        "base_model": str(models / model),  # an absolute path stays what it is
        # transformers makes a Llama's tokenizer out of any file beside a Llama.
        "tokenizer_config": str(models / "qwen3, tied"),
        "psft": psft,
        "max_steps": 20,
        "num_epochs": 10,
        # Half of the other tests': in 20 steps a larger one multiplies the rounding of
        # a sum of shards by a hundred, as it does for any other order of summation.
        "learning_rate": 0.1,
        "tensor_parallel_size": tp_size,
    }
    return config(models, output, **{**options, **overrides})


def logs(trainer: Any, first_step: int = 0) -> list[list[float]]:
    return steps_after(trainer, first_step, METRICS)


def main(models: Path, output: Path, tp_size: int, names: list[str]) -> dict[str, Any]:
    """The results of runs and scenarios on this rank, by name."""
    keep_process_group()
    results: dict[str, Any] = {}
    for name in names:
        folder = output / name
        runs = RUNS | DATA_PARALLEL
        if name in runs:
            trainer = run(tp_config(models, folder, tp_size, **runs[name]))
            results[name] = logs(trainer)
            results[f"{name}: replicas"] = replicas(trainer)
        else:
            results[name] = globals()[name](models, folder, tp_size)
    return results


def overlapping(models: Path, output: Path, tp_size: int) -> None:
    """From here on: what data-parallel ranks exchange is as late as it can be."""
    from axolotl_psft.megatron import step

    overlap(late=True)
    step._bucket_size = lambda layout: 2000  # several in so small a model


def varlen_lengths(models: Path, output: Path, tp_size: int) -> dict[str, Any]:
    """What attention gets in each layer of a forward, and how often a host waits."""
    from axolotl_psft import attention
    from tests.host_waits import HostWaits, uncounted

    results: dict[str, Any] = {}
    for name in ("varlen", "varlen, sequence"):
        cfg = tp_config(models, output / name, tp_size, **RUNS[name], max_steps=1)
        trainer = run(cfg)
        batch = next(iter(trainer.get_train_dataloader()))
        given, mode = [], HostWaits()
        original = attention.varlen_attention

        def attend(
            q: Any,
            k: Any,
            v: Any,
            ends: Any,
            original: Any = original,
            given: Any = given,
            mode: Any = mode,
            **kwargs: Any,
        ) -> Any:
            # The kernel for CPUs looks at the lengths; flash-attn's need not.
            with uncounted(mode):
                given.append((id(ends), q.shape[1], ends.tolist()))
                return original(q, k, v, ends, **kwargs)

        base = trainer.model.base_model
        forward = base.forward

        def counted(
            *args: Any, forward: Any = forward, mode: Any = mode, **kwargs: Any
        ) -> Any:
            with mode:
                return forward(*args, **kwargs)

        attention.varlen_attention, base.forward = attend, counted
        try:
            list(trainer._scorer.scored([batch], "a batch"))
        finally:
            attention.varlen_attention = original
        starts = (batch["position_ids"] == 0).flatten().nonzero().flatten().tolist()
        results[name] = {
            "tensors": len({ends for ends, _, _ in given}),
            "heads": [heads for _, heads, _ in given],
            "ends": [ends for _, _, ends in given],
            "expected": [*starts, batch["position_ids"].numel()],
            "waits": mode.total,
        }
    return results


def replicas(trainer: Any) -> list[str]:
    """Digests of the parameters that every rank holds whole."""
    import hashlib

    return [
        hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
        for p in trainer.model.parameters()
        if not getattr(p, "tensor_model_parallel", False)
    ]


def evaluated(models: Path, output: Path, tp_size: int) -> dict[str, list[float]]:
    """Losses of evaluations, and Axolotl's counts of tokens."""
    options = {"eval_batch_size": 4, "eval_steps": 2, "save_steps": 2}
    cfg = tp_config(
        models,
        output,
        tp_size,
        max_steps=4,
        save_strategy=None,
        include_tkps=True,
        **options,
        **eval_data(models),
    )
    history = run(cfg).state.log_history
    return {
        key: [entry[key] for entry in history if key in entry]
        for key in ("eval_loss", "tokens/total", "tokens/trainable")
    }


DROPOUT = {"overrides_of_model_config": {"attention_dropout": 0.2}, **PACKED}


def resumed(
    models: Path, output: Path, tp_size: int, **overrides: Any
) -> dict[str, Any]:
    """Adam, dropout and packing; resumed mid-window, at a window's end, in epoch 2."""
    options: dict[str, Any] = {**ADAM, **DROPOUT, "gradient_checkpointing": True}
    options |= overrides
    whole = run(tp_config(models, output / "whole", tp_size, **options, **SAVE))
    results = {"whole": logs(whole)}
    for step in (7, 12, 19):
        checkpoint = output / "whole" / "run" / f"checkpoint-{step}"
        cfg = tp_config(
            models,
            output / str(step),
            tp_size,
            resume_from_checkpoint=str(checkpoint),
            **options,
        )
        results[str(step)] = logs(run(cfg), step)
    return results


def resumed_sft_kl(models: Path, output: Path, tp_size: int) -> dict[str, Any]:
    return resumed(models, output, tp_size, psft={"objective": "sft_kl"})


def dropout(models: Path, output: Path, tp_size: int) -> dict[str, Any]:
    """Recomputation must draw the masks of the first computation again."""
    return {
        str(recompute): logs(
            run(
                tp_config(
                    models,
                    output / str(recompute),
                    tp_size,
                    gradient_checkpointing=recompute,
                    **DROPOUT,
                )
            )
        )
        for recompute in (False, True)
    }


def half(models: Path, output: Path, tp_size: int) -> dict[str, Any]:
    """bfloat16 weights; learning rates too small for them must still add up."""
    import transformers.training_args

    # transformers wants a GPU for it, or use_cpu, which Axolotl does not pass on.
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    options = {**ADAM, "learning_rate": 1e-5, "bfloat16": True, "max_steps": 12}
    trainer = run(tp_config(models, output, tp_size, **options, **SAVE))
    checkpoint = output / "run" / "checkpoint-7"
    cfg = tp_config(
        models,
        output / "resumed",
        tp_size,
        resume_from_checkpoint=str(checkpoint),
        **options,
    )
    results = {"whole": logs(trainer), "resumed": logs(run(cfg), 7)}
    if tp_size > 1:
        groups = trainer._step._main_groups()
        main = [p for group in groups for p in group]
        results["main"] = sorted({str(p.dtype) for p in main})
        results["gradients"] = sorted(
            {str(p.main_grad.dtype) for p in trainer.model.parameters()}
        )
        results["weights"] = sorted({str(p.dtype) for p in trainer.model.parameters()})
    return results


def stopped_early(models: Path, output: Path, tp_size: int) -> dict[str, Any]:
    """Axolotl's early stopping, its best checkpoint and a schedule, on all ranks."""
    cfg = tp_config(
        models,
        output,
        tp_size,
        # Away from the minimum from the start: no evaluation is better than the first.
        learning_rate=3.0,
        max_grad_norm=0.0,
        lr_scheduler="cosine",
        warmup_steps=2,
        save_strategy=None,
        save_steps=2,
        eval_steps=2,
        early_stopping_patience=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        eval_batch_size=4,
        **eval_data(models),
    )
    trainer = run(cfg)
    history = trainer.state.log_history
    return {
        "steps": trainer.state.global_step,
        "best": Path(trainer.state.best_model_checkpoint).name,
        "eval": [e["eval_loss"] for e in history if "eval_loss" in e],
        "rates": [e["learning_rate"] for e in train_logs(trainer)],
    }


def cut_short(models: Path, output: Path, tp_size: int) -> dict[str, Any]:
    """A run that ends while it writes a checkpoint, and what can be resumed then."""
    from axolotl_psft.megatron.step import MegatronStep

    options: dict[str, Any] = {**ADAM, **DROPOUT, "gradient_checkpointing": True}
    original, saves = MegatronStep.save_optimizer, []

    def interrupted(self: Any, folder: Any) -> None:
        saves.append(folder)
        if len(saves) == 6:
            # Not an exception: those remove what was half written.
            raise KeyboardInterrupt("interrupted")
        original(self, folder)

    MegatronStep.save_optimizer = interrupted  # type: ignore[method-assign]
    results = {}
    folder = output / "first" / "run"
    try:
        run(tp_config(models, output / "first", tp_size, **options, **SAVE))
    except KeyboardInterrupt as error:
        results["error"] = str(error)
    finally:
        MegatronStep.save_optimizer = original  # type: ignore[method-assign]
        _forget_failure()

    def resume(step: int) -> Any:
        checkpoint = str(folder / f"checkpoint-{step}")
        return run(
            tp_config(
                models,
                output / f"resumed-{step}",
                tp_size,
                resume_from_checkpoint=checkpoint,
                **options,
            )
        )

    try:
        resume(6)
    except ValueError as error:
        results["incomplete"] = str(error)
    return {**results, "resumed": logs(resume(5), 5)}


def different_batches(models: Path, output: Path, tp_size: int) -> str:
    import axolotl_psft.megatron.trainer as room

    original = room.digest
    room.digest = lambda batch: original(batch) + os.environ["RANK"]
    try:
        run(tp_config(models, output, tp_size))
    except RuntimeError as error:
        return str(error)
    finally:
        room.digest = original
        _forget_failure()
    return "no error"


def _forget_failure() -> None:
    # A process of Axolotl's own ends with its first failure.
    import torch.distributed as dist

    from axolotl_psft.failures import _FIRST

    dist.barrier()
    if dist.get_rank() == 0:
        dist.distributed_c10d._get_default_store().delete_key(_FIRST)
    dist.barrier()


def other_layout(models: Path, output: Path, tp_size: int) -> dict[str, Any]:
    """Resume at half the tensor-parallel size: refused; as a new run's start: fine."""
    options: dict[str, Any] = {**ADAM, "max_steps": 3, "num_epochs": 1}
    run(tp_config(models, output / "a", tp_size, **options, **SAVE))
    checkpoint = str(output / "a" / "run" / "checkpoint-2")
    other = tp_size // 2
    try:
        run(
            tp_config(
                models,
                output / "b",
                other,
                resume_from_checkpoint=checkpoint,
                **options,
            )
        )
        error = "no error"
    except RuntimeError as caught:
        error = f"{type(caught).__name__}: {caught}"
    restarted = run(
        tp_config(models, output / "c", other, **options | {"max_steps": 1})
    )
    options["base_model"] = checkpoint
    continued = run(tp_config(models, output / "d", other, **options))
    nll = [column[2] for column in (logs(restarted)[0], logs(continued)[0])]
    return {"error": error, "nll": nll}


def one_rank_fails(models: Path, output: Path, tp_size: int) -> None:
    from axolotl_psft.trainer import PSFTTrainer

    original = PSFTTrainer.compute_loss

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2 and self.args.process_index == 1:
            raise RuntimeError("rank 1 met a bad sample")
        return original(self, *args, **kwargs)

    PSFTTrainer.compute_loss = poisoned
    run(tp_config(models, output, tp_size))
