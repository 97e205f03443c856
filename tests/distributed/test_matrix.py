"""Every cell of docs/compatibility.md: run and compared, or refused by name."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import filterfalse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.distributed import cpu_ranks
from tests.distributed.launch import run_alone, run_distributed
from tests.matrix import (
    DATA,
    METHODS,
    OPTIMIZERS_NOT_HERE,
    OPTIMIZERS_REFUSED,
    OPTIMIZERS_RUN,
    PAGE,
    PARALLEL,
    PSFT,
    REFUSALS,
    STEPS,
    Cell,
    Config,
    all_cells,
    in_page,
    needs_gpu,
    refusal,
    sampled_cells,
    write_data,
)
from tests.tiny import column, config, load, run

Logs = dict[str, list[float]]

ADAPTER = "adapter_model.safetensors"

METRICS = [
    *("loss", "grad_norm", "psft/nll", "psft/surrogate", "psft/clip_frac"),
    "psft/ratio_max",
]
# Those of the tables, and some of the other products of all axes.
CELLS = all_cells() + sampled_cells(200)
RUN = [cell for cell in CELLS if not refusal(cell) and not needs_gpu(cell)]
ALONE = [cell for cell in RUN if not cell.num_ranks]
VALIDATED = [cell for cell in CELLS if not refusal(cell) and needs_gpu(cell)]
WRAPPED_IN = {
    "one process": "NO",
    "DDP": "MULTI_CPU",
    "FSDP2": "FSDP",
    "ZeRO-1": "DEEPSPEED",
    "ZeRO-2": "DEEPSPEED",
    "ZeRO-3": "DEEPSPEED",
    # Megatron-Core's wrapper is not accelerate's business.
    "tensor parallel": "MULTI_CPU",
}


def prepare(cell: Cell) -> None:
    """Make this process one that can run the cell on a CPU."""
    if cell.option == "bf16":
        cpu_ranks.allow_bf16()
    if cell.option in ("Muon", "8-bit AdamW, torchao"):
        cpu_ranks.without_compiler()
    if cell.parallel in ("DDP", "FSDP2"):
        cpu_ranks.allow_mesh()
    if cell.parallel == "FSDP2" or cell.parallel.startswith("ZeRO"):
        cpu_ranks.allow_sharding()
    if cell.parallel in ("ZeRO-1", "ZeRO-2"):
        cpu_ranks.allow_zero()


def logs_of(trainer: Any, metrics: list[str] = METRICS) -> Logs:
    return {name: column(trainer, name) for name in metrics}


def run_cell(
    folder: Path, output: Path, cell: Cell, overrides: Config | None = None
) -> Any:
    """The cell's logs, and what accelerate took it for."""
    prepare(cell)
    options = {**cell.config(folder), **(overrides or {})}
    trainer = run(config(folder, output, **options))
    return logs_of(trainer), trainer.accelerator.distributed_type.value


def run_reference(folder: Path, output: Path, cell: Cell, overrides: Config) -> Logs:
    """The logs of one process that does what several do."""
    cpu_ranks.distributed_muon()
    logs, _ = run_cell(folder, output, cell, overrides)
    return logs


def run_sft(
    folder: Path,
    output: Path,
    cell: Cell,
    stock: bool,
    overrides: Config | None = None,
) -> Logs:
    """The cell as PSFT that is SFT, or as Axolotl without this plugin."""
    prepare(cell)
    options = {**cell.config(folder), **(overrides or {})}
    options["psft"] = {**PSFT, "refresh_steps": 1}
    seeded = options.get("streaming") or options.get("balance_labels")
    if options.get("sample_packing") and not seeded:
        # Packed, Axolotl shuffles by the state of the global generator.
        options["curriculum_sampling"] = True
    if stock:
        options |= {"psft": None, "plugins": None}
    trainer = run(config(folder, output, **options))
    return logs_of(trainer, ["loss", "grad_norm"])


def tolerance(cell: Cell) -> dict[str, float]:
    """How far two orders of summation may take the cell's metrics in six steps."""
    if cell.option == "bf16":
        # 8 bits of mantissa; weights in bf16 or not, by wrapper; tokens near the bound
        # are clipped or not, and their gradients come and go.
        return {"rtol": 0.05, "atol": 0.05}
    if cell.option == "Muon":
        # Takes gradients in bf16: a last bit of float32 can be one of eight there.
        return {"rtol": 0.01, "atol": 0.002}
    if cell.option.startswith("8-bit") and cell.parallel not in ("one process", "DDP"):
        # A shard is rounded in other blocks than the whole; adapters learn faster.
        rtol = 0.01 if cell.method == "full" else 0.1
        return {"rtol": rtol, "atol": rtol / 2}
    is_adaptive = "Ada" in cell.option or cell.option == "schedule-free"
    if is_adaptive or cell.method == "ReLoRA":
        # Divides by the root of gradients that may be all rounding.
        return {"rtol": 1e-4, "atol": 1e-4}
    return {"rtol": 5e-6, "atol": 2e-6}


def check_close(ours: Logs, theirs: Logs, cell: Cell) -> None:
    limits = tolerance(cell)
    for name in theirs:
        if name == "psft/clip_frac" and limits["atol"] > 1e-3:
            # Of some 50 tokens, those that such a difference takes over the bound.
            limits = {**limits, "atol": 0.1}
        ours_, expected = torch.tensor(ours[name]), torch.tensor(theirs[name])
        assert_close(ours_, expected, **limits, msg=lambda m, name=name: f"{name}: {m}")


def check_objective(logs: Logs, cell: Cell) -> None:
    """What PSFT's metrics must be in any run of the matrix."""
    assert len(logs["loss"]) == STEPS
    assert torch.tensor(list(logs.values())).isfinite().all()
    ratio_max = logs["psft/ratio_max"]
    assert ratio_max[0] == ratio_max[PSFT["refresh_steps"]] == 1
    # These two have schedules of their own; elsewhere the first learning rate is 0.
    if cell.option != "schedule-free" and cell.method != "ReLoRA":
        # Scoring and training compute the same log-probs, in any precision.
        assert ratio_max[1] == pytest.approx(1, abs=1e-5)
    assert ratio_max[2] > 1.001
    # ReLoRA's rate is kept low for the steps after its restart.
    assert max(logs["psft/clip_frac"]) > 0 or cell.method == "ReLoRA"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def one_process(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Logs]:
    """A cell's logs in one process, by accumulation steps; each run once."""
    made: dict[Any, Logs] = {}

    def result(cell: Cell, accumulation: int) -> Logs:
        cell = replace(cell, parallel="one process")
        if (cell, accumulation) not in made:
            output = tmp_path_factory.mktemp("one")
            steps = {"gradient_accumulation_steps": accumulation}
            job = (run_reference, folder, output, cell, steps)
            made[cell, accumulation] = run_alone(*job)
        return made[cell, accumulation]

    return result


def in_processes(
    func: Callable[..., Any], folder: Path, output: Path, cell: Cell, *args: Any
) -> list[Any]:
    """The results of ``func`` in as many processes as the cell has ranks."""
    job = (folder, output, cell, *args)
    if cell.num_ranks is None:
        return [run_alone(func, *job, timeout=180)]
    return run_distributed(func, cell.num_ranks, *job, timeout=180)


def ids(cell: Cell) -> str:
    return str(cell)


def is_neutral(cell: Cell) -> bool:
    """Whether its option saves memory or time, and may round otherwise."""
    saves_memory = ("checkpointing", "offloading")
    return cell.option.startswith(saves_memory) or cell.option == "torch.compile"


def params(cells: Iterable[Cell]) -> list[Any]:
    """Parameters of a test, some of them for the soak only."""
    soak = pytest.mark.soak
    return [pytest.param(c, marks=soak) if is_long(c) else c for c in cells]


def is_long(cell: Cell) -> bool:
    """Whether it is of the last table or of none, of which there are many.

    Or compiles, which takes half a minute; alone and in DDP are enough for each day.
    """
    plain = Cell()
    if cell.option == "torch.compile":
        return replace(cell, option="") not in (plain, Cell("DDP"))
    is_of_none = len(cell.choices - plain.choices) > 2
    return is_of_none or (cell.option != plain.option and cell.data != plain.data)


@pytest.mark.parametrize("cell", params(c for c in RUN if c.num_ranks), ids=ids)
def test_two_ranks_equal_one_process(
    folder: Path, tmp_path: Path, one_process: Any, cell: Cell
) -> None:
    # Data-parallel ranks share a step's micro-batches, those of a group have all.
    accumulation = 1 if cell.parallel == "tensor parallel" else 2
    expected = one_process(cell, accumulation)
    for logs, distributed_type in in_processes(run_cell, folder, tmp_path, cell):
        assert distributed_type == WRAPPED_IN[cell.parallel]
        check_objective(logs, cell)
        check_close(logs, expected, cell)


@pytest.mark.parametrize("cell", params(filter(is_neutral, ALONE)), ids=ids)
def test_what_saves_memory_or_time_changes_nothing(
    folder: Path, tmp_path: Path, one_process: Any, cell: Cell
) -> None:
    logs, _ = run_alone(run_cell, folder, tmp_path, cell, timeout=180)
    check_objective(logs, cell)
    check_close(logs, one_process(replace(cell, option=""), 1), cell)


@pytest.mark.parametrize("cell", params(filterfalse(is_neutral, ALONE)), ids=ids)
def test_one_process_equals_stock_axolotl(
    folder: Path, tmp_path: Path, cell: Cell
) -> None:
    psft, _ = run_alone(run_cell, folder, tmp_path / "psft", cell)
    check_objective(psft, cell)
    ours = run_alone(run_sft, folder, tmp_path / "sft", cell, False)
    stock = run_alone(run_sft, folder, tmp_path / "stock", cell, True)
    check_close(ours, stock, cell)


@pytest.mark.parametrize("name", OPTIMIZERS_RUN)
def test_optimizer_equals_stock_axolotl(
    folder: Path, tmp_path: Path, name: str
) -> None:
    # Without its compiler, as 8-bit AdamW of the tables.
    cell = Cell(option="8-bit AdamW, torchao")
    optimizer = {"optimizer": name}
    ours = run_alone(run_sft, folder, tmp_path / "sft", cell, False, optimizer)
    stock = run_alone(run_sft, folder, tmp_path / "stock", cell, True, optimizer)
    assert ours["grad_norm"][0] != ours["grad_norm"][-1]
    check_close(ours, stock, cell)


@pytest.mark.parametrize("name", OPTIMIZERS_REFUSED)
def test_updates_inside_backward_are_refused(
    folder: Path, tmp_path: Path, name: str
) -> None:
    message = f"optimizer: {name} cannot be combined with a psft block"
    with pytest.raises(ValueError, match=message):
        load(config(folder, tmp_path, **Cell().config(folder) | {"optimizer": name}))


def test_every_optimizer_of_axolotl_is_in_the_readme() -> None:
    from axolotl.utils.schemas.enums import CustomSupportedOptimizers
    from transformers.training_args import OptimizerNames

    known = [*OPTIMIZERS_RUN, *OPTIMIZERS_REFUSED, *OPTIMIZERS_NOT_HERE]
    offered = {each.value for each in (*OptimizerNames, *CustomSupportedOptimizers)}
    assert sorted(known) == sorted(offered)


# Adam: FSDP2's loader of optimizer states cannot find the device of SGD's none.
RESUMED = [
    *(Cell(parallel, option="AdamW") for parallel in WRAPPED_IN),
    *(Cell(data=data) for data in DATA),
    *(Cell(method=method) for method in METHODS if method != "ReLoRA"),
    *(Cell("FSDP2", method, option="AdamW") for method in ("LoRA", "DoRA")),
    Cell("ZeRO-3", "LoRA", option="AdamW"),
    Cell("tensor parallel", data="streaming"),
]


@pytest.mark.parametrize("cell", dict.fromkeys(RESUMED), ids=ids)
def test_resumes_to_the_last_bit(folder: Path, tmp_path: Path, cell: Cell) -> None:
    saves = {"save_strategy": None, "save_steps": 4}
    (whole, _), *_ = in_processes(run_cell, folder, tmp_path / "whole", cell, saves)
    checkpoint = str(tmp_path / "whole" / "run" / "checkpoint-4")
    resume = {"resume_from_checkpoint": checkpoint}
    # The log of a resumed run begins with that of the first steps.
    job = (folder, tmp_path / "resumed", cell, resume)
    (resumed, _), *_ = in_processes(run_cell, *job)
    assert resumed == whole


def test_the_best_adapter_of_shards_is_read_whole(folder: Path, tmp_path: Path) -> None:
    cell = Cell("FSDP2", "LoRA", option="AdamW")
    # A rate at which one of the first is the best.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    best |= {"val_set_size": 0.1, "eval_steps": 1, "learning_rate": 0.5}
    best |= {"save_strategy": None, "save_steps": 1, "save_total_limit": 9}
    in_processes(run_cell, folder, tmp_path, cell, best)
    last = tmp_path / "run" / f"checkpoint-{STEPS}"
    state = json.loads((last / "trainer_state.json").read_text())
    expected = load_file(Path(state["best_model_checkpoint"]) / ADAPTER)
    final = load_file(tmp_path / "run" / ADAPTER)
    assert_close(final, expected, rtol=0, atol=0)


@pytest.mark.parametrize("parallel", ["FSDP2", "ZeRO-2", "ZeRO-3"])
def test_a_nan_on_one_rank_of_a_sharded_run_is_named(
    folder: Path, tmp_path: Path, parallel: str
) -> None:
    for message in in_processes(poisoned, folder, tmp_path, Cell(parallel)):
        assert "the loss of rank 1 is not finite in optimizer step 3." in message
        updated = "The weights were not updated" not in message
        assert updated == parallel.startswith("ZeRO")


def poisoned(folder: Path, output: Path, cell: Cell) -> str:
    """What a run says whose second rank gets a NaN out of the third step's loss."""
    from axolotl_psft.failures import NonFiniteLossError
    from axolotl_psft.trainer import PSFTTrainer

    original = PSFTTrainer.compute_loss

    def loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        bad = self.state.global_step == 2 and self.args.process_index == 1
        self._loss.of_step += float("nan") if bad else 0.0
        return loss * float("nan") if bad else loss

    PSFTTrainer.compute_loss = loss
    with pytest.raises(NonFiniteLossError) as error:
        run_cell(folder, output, cell)
    return str(error.value)


@pytest.mark.parametrize("data", ["streaming", "pretraining text"])
def test_a_stream_ends_and_begins_again(
    folder: Path, tmp_path: Path, data: str
) -> None:
    """A second pass, after micro-batches that do not fill a step; not resumable."""
    cell = Cell(data=data)
    size = {"gradient_accumulation_steps": 5, "max_steps": 40}
    saves = {"save_strategy": None, "save_steps": 1, "save_total_limit": 50}
    logs, _ = run_alone(run_cell, folder, tmp_path, cell, {**size, **saves})
    # Leftovers of the first pass would count twice: a loss of -2, a gradient of two.
    loss, ratio = (torch.tensor(logs[f"psft/{x}"]) for x in ("surrogate", "ratio_max"))
    assert len(loss) == 40
    assert_close(loss[ratio == 1], torch.full_like(loss[ratio == 1], -1.0))
    resume = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-39")}
    with pytest.raises(RuntimeError, match=r"lies in pass \d over a stream"):
        run_alone(run_cell, folder, tmp_path / "again", cell, {**size, **resume})


def test_a_longer_stream_goes_on_where_a_shorter_one_ended(
    folder: Path, tmp_path: Path
) -> None:
    cell, saves = Cell(data="streaming"), {"save_strategy": None, "save_steps": 4}
    whole, _ = run_alone(run_cell, folder, tmp_path / "whole", cell)
    # In the middle of a window of three steps.
    cut = {**saves, "max_steps": 4}
    run_alone(run_cell, folder, tmp_path / "cut", cell, cut)
    resume = {"resume_from_checkpoint": str(tmp_path / "cut" / "run" / "checkpoint-4")}
    resumed, _ = run_alone(run_cell, folder, tmp_path / "resumed", cell, resume)
    assert resumed == whole


def test_relora_restarts_alike_on_all_ranks(folder: Path, tmp_path: Path) -> None:
    # A stream is read by rank 0 for all: the ranks' random states part.
    cell = Cell("DDP", "ReLoRA", "streaming")
    first, second = in_processes(weights_after, folder, tmp_path, cell)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def weights_after(folder: Path, output: Path, cell: Cell) -> dict[str, torch.Tensor]:
    prepare(cell)
    trainer = run(config(folder, output, **cell.config(folder)))
    return dict(trainer.model.state_dict())


def test_relora_is_not_resumed_after_a_restart(folder: Path, tmp_path: Path) -> None:
    cell, saves = Cell(method="ReLoRA"), {"save_strategy": None, "save_steps": 1}
    run_alone(run_cell, folder, tmp_path, cell, {**saves, "save_total_limit": 9})
    resume = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-3")}
    with pytest.raises(RuntimeError, match="step 3 comes after a ReLoRA restart"):
        run_alone(run_cell, folder, tmp_path / "again", cell, resume)


@pytest.mark.parametrize("cell", params(c for c in CELLS if refusal(c)), ids=ids)
def test_what_cannot_be_right_is_refused(
    folder: Path, tmp_path: Path, cell: Cell
) -> None:
    with pytest.raises(ValueError) as error:
        load(config(folder, tmp_path, **cell.config(folder)))
    # Three choices may have several reasons, and whoever comes first says its own.
    reasons = (reason for reason in REFUSALS if reason.covers(cell))
    said = [each for each in reasons if re.search(each.message, str(error.value))]
    assert said, error.value
    if said[0].by == "psft":
        assert re.search(r"\b(Use|use|Set|Remove)\b", str(error.value)), "no remedy"


@pytest.mark.parametrize("cell", params(VALIDATED), ids=ids)
def test_what_needs_a_gpu_is_valid(folder: Path, tmp_path: Path, cell: Cell) -> None:
    steps = in_processes(validated_window, folder, tmp_path, cell)
    assert steps == [PSFT["refresh_steps"]] * (cell.num_ranks or 1)


def validated_window(folder: Path, output: Path, cell: Cell) -> int:
    prepare(cell)
    return load(config(folder, output, **cell.config(folder))).psft["refresh_steps"]


def test_the_tables_on_the_page() -> None:
    assert PAGE.read_text() == in_page(), "run python -m tests.matrix"


def test_every_cell_says_how_it_is_wrapped() -> None:
    assert set(WRAPPED_IN) == set(PARALLEL) - {"context parallel"}
