"""Two gloo ranks: as one process, and exact at resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.distributed.launch import run_distributed
from tests.distributed.scenarios import logs, main
from tests.tiny import config, eval_data, run

# Rounding of float32 sums over other groups of tokens, through eight descent steps.
CLOSE = {"rtol": 2e-6, "atol": 1e-6}


@pytest.fixture(scope="module")
def ranks(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    output = tmp_path_factory.mktemp("ranks")
    return run_distributed(main, 2, tiny, output, timeout=300)


def test_ranks_log_the_same(ranks: list[Any]) -> None:
    # The loss and every metric are reduced over ranks before they are logged.
    assert ranks[0]["plain"] == ranks[1]["plain"]


def test_data_parallel_size_changes_no_step(
    ranks: list[Any], tiny: Path, tmp_path: Path
) -> None:
    alone = logs(run(config(tiny, tmp_path, micro_batch_size=8)))
    assert_close(torch.tensor(ranks[0]["plain"]), torch.tensor(alone), **CLOSE)
    assert max(clip_frac for _, _, _, clip_frac, _ in alone) > 0.05


def test_each_rank_scores_its_share_of_the_initial_policy(
    ranks: list[Any], tiny: Path, tmp_path: Path
) -> None:
    psft = {"objective": "sft_kl"}
    alone = logs(run(config(tiny, tmp_path, micro_batch_size=8, psft=psft)))
    assert_close(torch.tensor(ranks[0]["sft_kl"]), torch.tensor(alone), **CLOSE)
    assert max(surrogate - nll for surrogate, _, nll, *_ in alone) > 0.01
    assert ranks[0]["sft_kl parts"] == ["part-0.safetensors", "part-1.safetensors"]
    assert ranks[0]["sft_kl, resumed"] == ranks[0]["sft_kl, packed"][9:]


def test_eval_loss_counts_every_sample_once(
    ranks: list[Any], tiny: Path, tmp_path: Path
) -> None:
    # 13 samples on two ranks of four: accelerate repeats some to fill the last batch.
    trainer = run(
        config(
            tiny,
            tmp_path,
            micro_batch_size=8,
            eval_batch_size=4,
            eval_steps=2,
            save_steps=2,
            save_strategy=None,
            max_steps=2,
            **eval_data(tiny),
        )
    )
    alone = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert ranks[0]["eval"] == pytest.approx(alone, rel=1e-6)


def test_packed_runs_resume_to_the_last_bit_on_two_ranks(ranks: list[Any]) -> None:
    result = ranks[0]
    # Step 9 lies in the second epoch, where accelerate forgets to set the epoch.
    assert result["epochs"][8] > 1
    for step in (2, 9):
        assert result[f"resumed-{step}"] == result["packed"][step:]


def test_epochs_are_shuffled_anew(ranks: list[Any]) -> None:
    steps_per_epoch = next(i for i, e in enumerate(ranks[0]["epochs"]) if e >= 1) + 1
    first_nll = [nll for _, _, nll, _, _ in ranks[0]["packed"]]
    assert first_nll[0] != first_nll[steps_per_epoch]


def test_the_trainer_may_not_multiply_by_the_number_of_ranks(ranks: list[Any]) -> None:
    assert ranks[0]["tokens averaged"] == ranks[0]["plain"]


def test_data_files_are_read_by_one_rank_and_once(ranks: list[Any]) -> None:
    # Training and evaluation; the second start finds them prepared.
    assert [result["files read"] for result in ranks] == [[2, 0], [0, 0]]


def test_a_nan_on_one_rank_stops_both_and_names_it(ranks: list[Any]) -> None:
    for result in ranks:
        assert "the loss of rank 1 is not finite in optimizer step 3" in result["error"]
