"""auto_find_batch_size: a run that runs out of memory starts over with smaller batches.

With the weights as they are by then: the Trainer counts steps from 0 again, and keeps
the model.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from axolotl_psft import initial_policy
from axolotl_psft.trainer import PSFTTrainer
from tests.tiny import column, config, run

OPTIONS = {
    "auto_find_batch_size": True,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    # The data's order, which does not depend on what was drawn before.
    "curriculum_sampling": True,
    "shuffle_merged_datasets": False,
}


class Failure:
    """Out of memory once: in the third step, in its second micro-batch.

    Attributes:
        model: the weights by then.
        scored: how often the initial policy was scored.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder, self.scored = folder, 0
        self._losses: list[int] = []
        self._failed = False
        loss, score = PSFTTrainer.compute_loss, initial_policy.score

        def failing(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            result = loss(trainer, *args, **kwargs)
            if trainer.state.global_step == 2:
                self._losses.append(1)
                if len(self._losses) == 2:
                    trainer.model.save_pretrained(self.folder)
                    raise RuntimeError("CUDA out of memory.")
            return result

        def counted(*args: Any) -> Any:
            self.scored += 1
            return score(*args)

        monkeypatch.setattr(PSFTTrainer, "compute_loss", failing)
        monkeypatch.setattr(initial_policy, "score", counted)


def test_windows_start_anew_with_the_weights_of_that_time(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a run does that starts from them: nothing of the first attempt is left."""
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "model")
    with monkeypatch.context() as patched:
        Failure(patched, tmp_path / "model")
        # The third of four steps: old log-probs of the first attempt are still there.
        # Prepared here: what other tests have left is shuffled.
        prepared = {"dataset_prepared_path": str(tmp_path / "prepared")}
        restarted = run(config(tiny, tmp_path / "restarted", **OPTIONS, **prepared))
    assert restarted._train_batch_size == 3
    fresh = {**OPTIONS, **prepared, "auto_find_batch_size": None}
    fresh["micro_batch_size"] = 3
    base_model = str(tmp_path / "model")
    expected = run(config(tiny, tmp_path / "fresh", base_model=base_model, **fresh))
    for name in ("psft/ratio_mean", "psft/nll", "psft/clip_frac", "grad_norm"):
        assert column(restarted, name) == column(expected, name)
    assert column(restarted, "psft/old_policy_age") == [0, 1, 2, 3, 0, 1]
    assert column(restarted, "psft/ratio_mean")[0] == 1
    weights = (trainer.model.state_dict() for trainer in (restarted, expected))
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_the_initial_policy_is_that_of_the_first_attempt(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = Failure(monkeypatch, tmp_path / "model")
    psft = {"objective": "sft_kl"}
    trainer = run(config(tiny, tmp_path, psft=psft, **OPTIONS))
    assert trainer._train_batch_size == 3
    assert len(column(trainer, "loss")) == 6
    assert failure.scored == 1
    # Two updates lie between; scored again it would be 0 up to rounding.
    assert column(trainer, "psft/approx_kl")[0] > 1e-3


def test_a_second_run_of_a_trainer_has_an_initial_policy_of_its_own(
    tiny: Path, tmp_path: Path
) -> None:
    options = {**OPTIONS, "auto_find_batch_size": None, "max_steps": 2}
    trainer = run(config(tiny, tmp_path, psft={"objective": "sft_kl"}, **options))
    first = trainer._initial_policy
    trainer.train()
    assert trainer._initial_policy.run_id != first.run_id
    assert abs(column(trainer, "psft/approx_kl")[0]) < 1e-6
