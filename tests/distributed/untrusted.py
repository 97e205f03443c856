"""Checkpoints of several ranks with a pickle bomb in each kind of file.

Judged by test_untrusted_ranks.py.
"""

import pickle
import shutil
from pathlib import Path
from typing import Any

from torch import distributed as dist

from tests.distributed.launch import keep_process_group
from tests.distributed.tensor_parallel import (
    ADAM,
    SAVE,
    _forget_failure,
    tp_config,
)
from tests.test_untrusted import Bomb
from tests.tiny import run, train_logs

# What a resumed run reads, relative to the checkpoint; of all ranks.
PATTERNS = {
    "optimizer": "*optimizer*.pt",
    "scheduler": "scheduler.pt",
    "random state": "rng_state_*.pth",
    "windows": "psft_window_rank*.safetensors",
    "weights": "model.safetensors",
    "initial policy": "../psft_initial_logprobs/part-*.safetensors",
    "trainer state": "trainer_state.json",
    # Written, never read.
    "arguments": "training_args.bin",
}


def bombed(models: Path, output: Path, tp_size: int) -> dict[str, Any]:
    """Of each kind of file: how many it is, the error, and whether a bomb went off."""
    keep_process_group()
    options: dict[str, Any] = {"psft": {"objective": "sft_kl"}, "num_epochs": 1, **ADAM}
    trusted = output / "trusted" / "run"
    run(tp_config(models, trusted.parent, tp_size, max_steps=2, **options, **SAVE))
    results = {}
    for name, pattern in PATTERNS.items():
        folder, marker = output / name / "saved", output / name / "marker"
        checkpoint = folder / "checkpoint-2"
        if dist.get_rank() == 0:
            shutil.copytree(trusted, folder)
            for path in checkpoint.glob(pattern):
                path.write_bytes(pickle.dumps(Bomb(marker)))
        dist.barrier()
        error = ""
        try:
            trainer = run(
                tp_config(
                    models,
                    output / name,
                    tp_size,
                    resume_from_checkpoint=str(checkpoint),
                    **{**options, "max_steps": 3},
                )
            )
            error = f"none in {len(train_logs(trainer))} steps"
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        _forget_failure()
        number = len(list(checkpoint.glob(pattern)))
        results[name] = (number, error, marker.exists())
    return results
