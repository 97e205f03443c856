"""Whole tensor-parallel runs against dense ones."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from tests.commands import finish, start
from tests.distributed.launch import run_distributed
from tests.distributed.tensor_parallel import (
    DATA_PARALLEL,
    RUNS,
    dense,
    evaluated,
    logs,
    main,
    one_rank_fails,
    tp_config,
    write_models,
)
from tests.tiny import load, run

pytestmark = pytest.mark.timeout(1200)

# 20 optimizer steps; measured: 4e-7. Sums of shards in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
AT_4 = ["qwen3, tied, unpacked", "llama, untied, packed", "accumulated", "sequence"]


def launch(num_processes: int, module: str, *args: str) -> str:
    accelerate = str(Path(sys.executable).parent / "accelerate")
    options = f"launch --multi_gpu --num_processes {num_processes} --num_machines 1"
    options += " --mixed_precision no --main_process_port 0 -m"
    env = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return finish(start([accelerate, *options.split(), module, *args], env, Path.cwd()))


class Ranks:
    """Results of runs in ranks, by name; rank 0's unless said."""

    def __init__(
        self, models: Path, output: Path, world_size: int, tp_size: int, *names: str
    ) -> None:
        self.output = output
        self.ranks = run_distributed(
            main, world_size, models, output, tp_size, list(names), timeout=900
        )

    def __getitem__(self, name: str) -> Any:
        return self.ranks[0][name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def two(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    scenarios = [
        "evaluated",
        "resumed",
        "resumed_sft_kl",
        "dropout",
        "half",
        "stopped_early",
    ]
    scenarios += ["cut_short", "different_batches", "varlen_lengths"]
    output = tmp_path_factory.mktemp("two")
    return Ranks(models, output, 2, 2, *RUNS, *scenarios)


@pytest.fixture(scope="module")
def four(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    output = tmp_path_factory.mktemp("four")
    return Ranks(models, output, 4, 4, *AT_4, "other_layout")


@pytest.fixture(scope="module")
def two_by_two(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    output = tmp_path_factory.mktemp("two-by-two")
    return Ranks(models, output, 4, 2, *DATA_PARALLEL, "evaluated")


@pytest.fixture(scope="module")
def late(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """As `two_by_two`, with collectives beside the computation, as on GPUs."""
    output = tmp_path_factory.mktemp("late")
    names = ["overlapping", *DATA_PARALLEL, "evaluated", "resumed"]
    return Ranks(models, output, 4, 2, *names)


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Dense runs, each made once: a function of the name."""
    output = tmp_path_factory.mktemp("dense")
    options = RUNS | {name: dense(run) for name, run in DATA_PARALLEL.items()}
    made: dict[str, list[list[float]]] = {}

    def result(name: str) -> tuple[list[list[float]], Path]:
        if name not in made:
            made[name] = logs(run(tp_config(models, output / name, 1, **options[name])))
        return made[name], output / name / "run"

    return result


def check(ranks: Ranks, alone: Any, name: str) -> None:
    expected, folder = alone(name)
    assert len(expected) == 20
    # Something of the objective acts: the clip, or the distance to the initial policy.
    surrogate, _, nll, clip_frac, *_ = torch.tensor(expected).T
    assert clip_frac.max() > 0.1 or (surrogate - nll).max() > 0.01
    assert_close(torch.tensor(ranks[name]), torch.tensor(expected), **CLOSE)
    ours = ranks.output / name / "run"
    # Adam divides by gradients as small as their rounding: of a key's bias, which
    # softmax nearly ignores, some are 5e-9, others 1e-1. A hundredth of a step.
    limits = {**CLOSE, "atol": 1e-5} if name.endswith("adam") else CLOSE
    assert_close(weights(ours), weights(folder), **limits)
    # Replicas see the same gradients, to the last bit.
    digests = [rank[f"{name}: replicas"] for rank in ranks.ranks]
    assert digests[0]
    assert all(digest == digests[0] for digest in digests)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_tp_2_equals_dense(two: Ranks, alone: Any, name: str) -> None:
    check(two, alone, name)


@pytest.mark.parametrize("name", AT_4)
def test_tp_4_equals_dense(four: Ranks, alone: Any, name: str) -> None:
    check(four, alone, name)


@pytest.mark.parametrize("name", DATA_PARALLEL)
def test_tp_2_by_dp_2_equals_dense(two_by_two: Ranks, alone: Any, name: str) -> None:
    check(two_by_two, alone, name)


# A step's own, test_overlap.py, is in every run of the tests.
@pytest.mark.soak
@pytest.mark.parametrize("name", DATA_PARALLEL)
def test_overlap_equals_dense(late: Ranks, alone: Any, name: str) -> None:
    check(late, alone, name)


@pytest.mark.soak
def test_overlap_evaluates_and_resumes_on_new_weights(
    late: Ranks, two_by_two: Ranks
) -> None:
    expected = two_by_two["evaluated"]["eval_loss"]
    assert len(set(expected)) == 3
    assert late["evaluated"]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    result = late["resumed"]
    for step in (7, 12, 19):
        assert result[str(step)] == result["whole"][step:], step


@pytest.mark.parametrize("name", ["varlen", "varlen, sequence"])
def test_lengths_reach_every_layer_of_a_split_model(two: Ranks, name: str) -> None:
    for rank in two.ranks:
        result = rank["varlen_lengths"][name]
        assert len(result["expected"]) > 3
        # One tensor for both layers, each of which has half the heads.
        assert result["ends"] == [result["expected"]] * 2
        assert result["tensors"] == 1
        assert result["heads"] == [2, 2]
        # In the whole forward: transformers looks once whether the row is packed.
        assert result["waits"] == 1


def test_transformers_loads_what_was_saved(two: Ranks, alone: Any) -> None:
    for name in ("qwen3, tied, packed", "llama, untied, packed"):
        folder = two.output / name / "run"
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
        ids = torch.arange(5, 14)[None]
        reference = AutoModelForCausalLM.from_pretrained(alone(name)[1])
        # Weights differ by 1e-5 at most, logits of two layers little more.
        assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-5)
        files = {path.name for path in folder.iterdir()}
        assert {"config.json", "generation_config.json", "tokenizer.json"} <= files


def test_eval_and_token_counts_take_every_sample_once(
    two: Ranks, two_by_two: Ranks, models: Path, tmp_path: Path
) -> None:
    expected = evaluated(models, tmp_path, 1)
    losses = expected.pop("eval_loss")
    assert len(losses) == 3 and len(expected["tokens/total"]) == 4
    assert two["evaluated"].pop("eval_loss") == pytest.approx(losses, rel=1e-5)
    # Both ranks work on the same tokens.
    assert two["evaluated"] == expected
    # Two ranks of 13 samples: accelerate repeats some. The first evaluation is before
    # any step; later ones follow steps of other sizes.
    first = two_by_two["evaluated"]["eval_loss"][0]
    assert first == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("name", ["resumed", "resumed_sft_kl"])
def test_resumes_to_the_last_bit(two: Ranks, name: str) -> None:
    result = two[name]
    for step in (7, 12, 19):
        assert result[str(step)] == result["whole"][step:], step


def test_a_run_cut_short_while_saving_resumes_from_the_checkpoint_before(
    two: Ranks,
) -> None:
    result = two["cut_short"]
    assert "interrupted" in result["error"]
    assert "checkpoint-6 has no trainer_state.json" in result["incomplete"]
    assert "'checkpoint-4', 'checkpoint-5']" in result["incomplete"]
    assert result["resumed"] == two["resumed"]["whole"][5:]


def test_ranks_of_a_group_with_different_batches_stop(two: Ranks) -> None:
    assert "the ranks of one group got different batches" in two["different_batches"]


def test_recomputation_repeats_dropout(two: Ranks) -> None:
    result = two["dropout"]
    assert result["True"] == result["False"]
    assert result["False"] != two["sequence"], "there was dropout"


def test_half_precision_keeps_float32_weights_and_gradients(two: Ranks) -> None:
    result = two["half"]
    assert result["weights"] == ["torch.bfloat16"]
    assert result["main"] == result["gradients"] == ["torch.float32"]
    assert result["resumed"] == result["whole"][7:]


def test_schedule_early_stopping_and_best_checkpoint(two: Ranks) -> None:
    result = two["stopped_early"]
    assert result["steps"] == 6
    assert result["best"] == "checkpoint-2"
    assert result["rates"][:3] == [0.0, 1.5, 3.0]
    assert result["rates"][3] < 3.0


def test_another_layout_is_refused_for_the_optimizer_only(four: Ranks) -> None:
    result = four["other_layout"]
    # Of a rank that was not the first it is the first one's, in a PeerFailedError.
    assert "FileError" in result["error"]
    assert "tensor parallel 2 x data parallel 2" in result["error"]
    fresh, continued = result["nll"]
    assert continued != fresh


def test_from_the_command_line(models: Path, tmp_path: Path) -> None:
    """As users run it: bare plugin name, Axolotl ends the process group itself."""
    cfg = tp_config(models, tmp_path, 2, plugins=["axolotl_psft"], max_steps=2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg))
    output = launch(2, "axolotl.cli.train", str(tmp_path / "config.yaml"))
    assert "tensor parallel 2 x data parallel 1" in output
    assert output.count("gathering the weights") == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")


def test_inference_loads_the_model_whole(models: Path, tmp_path: Path) -> None:
    from axolotl.loaders import ModelLoader, load_tokenizer

    cfg = load(tp_config(models, tmp_path, 2))
    model, _ = ModelLoader(cfg, load_tokenizer(cfg), inference=True).load()
    assert type(model.lm_head) is torch.nn.Linear
    assert model(torch.arange(5, 14)[None]).logits.isfinite().all()


def test_a_failing_rank_ends_all_with_its_message(models: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        run_distributed(one_rank_fails, 2, models, tmp_path, 2, timeout=240)
    # By the rank itself where the other is ended at once, by both where the other still
    # gets to say why it failed.
    assert "rank 1 met a bad sample" in str(caught.value)
    # Far from the time-out of a collective (120 s): nobody waited for the dead rank.
    assert time.monotonic() - started < 100


def test_an_impossible_layout_stops_before_weights(
    models: Path, tmp_path: Path
) -> None:
    environment = os.environ.copy()
    try:
        os.environ["WORLD_SIZE"] = "2"
        with pytest.raises(ValueError, match="does not divide the number of processes"):
            run(tp_config(models, tmp_path, 4))
    finally:
        os.environ.clear()
        os.environ.update(environment)
