"""The initial policy: samples, order of scoring, files; and whole runs of SFT-KL."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from axolotl_psft.files import FileError
from axolotl_psft.initial_policy import (
    InitialPolicy,
    Scores,
    clear,
    folder_in,
    samples,
    scoring_batches,
)
from axolotl_psft.old_policy import Scorer
from axolotl_psft.packing import Batch
from axolotl_psft.ranks import DataRanks
from tests.test_resume import bits
from tests.test_resume import options as resume_options
from tests.tiny import (
    PROMPT,
    column,
    config,
    run,
    train_logs,
    write_dataset,
    write_model,
)

X = -100
SFT_KL = {"objective": "sft_kl"}

# ---- Samples ----

FIRST = ([3, 4, 5, 6, 7], [X, X, 5, X, 7])
SECOND = ([8, 9, 3], [X, 9, X])


def batch(
    ids: list[list[int]], labels: list[list[int]], **others: list[list[int]]
) -> Batch:
    tensors = {"input_ids": ids, "labels": labels, **others}
    return {name: torch.tensor(rows) for name, rows in tensors.items()}


def seen(made: Batch) -> list[tuple[int, list[int], int]]:
    return [(s.row, s.columns.tolist(), s.digest) for s in samples(made)]


def digest_of(ids: list[int], labels: list[int]) -> int:
    ((_, _, digest),) = seen(batch([ids], [labels]))
    return digest


def test_a_sample_is_the_same_wherever_it_stands():
    first, second = digest_of(*FIRST), digest_of(*SECOND)
    assert first != second
    pad, zero, one = [0] * 3, [0] * 3, [1] * 5

    right = batch(
        [FIRST[0] + pad, SECOND[0] + pad + [0, 0]],
        [FIRST[1] + [X] * 3, SECOND[1] + [X] * 5],
        attention_mask=[one + zero, [1, 1, 1, *zero, 0, 0]],
    )
    assert seen(right) == [(0, [2, 4], first), (1, [1], second)]

    left = batch(
        [pad + FIRST[0], pad + [0, 0] + SECOND[0]],
        [[X] * 3 + FIRST[1], [X] * 5 + SECOND[1]],
        attention_mask=[zero + one, [*zero, 0, 0, 1, 1, 1]],
    )
    assert seen(left) == [(0, [5, 7], first), (1, [6], second)]

    # Axolotl numbers padding of packed rows from 0, as if it were a sample.
    packed = batch(
        [SECOND[0] + FIRST[0] + pad, FIRST[0] + SECOND[0] + pad],
        [SECOND[1] + FIRST[1] + [X] * 3, FIRST[1] + SECOND[1] + [X] * 3],
        position_ids=[[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2]] * 1
        + [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2]],
    )
    assert seen(packed) == [
        (0, [1], second),
        (0, [5, 7], first),
        (1, [2, 4], first),
        (1, [6], second),
    ]


def test_a_label_that_nothing_predicts_is_no_part_of_a_sample():
    ids, labels = FIRST
    everything = [3, *labels[1:]]
    assert digest_of(ids, everything) == digest_of(ids, labels)
    left = batch([[0, *ids]], [[X, *everything]], attention_mask=[[0, 1, 1, 1, 1, 1]])
    assert seen(left) == [(0, [3, 5], digest_of(ids, labels))]


def test_what_follows_the_last_active_token_bears_on_nothing():
    assert digest_of([*SECOND[0], 5], [*SECOND[1], X]) == digest_of(*SECOND)


@pytest.mark.parametrize(
    "ids, labels",
    [
        ([3, 4, 5, 6, 8], [X, X, 5, X, 8]),  # another answer
        ([9, 4, 5, 6, 7], [X, X, 5, X, 7]),  # another prompt
        ([3, 4, 5, 6, 7], [X, X, X, X, 7]),  # less of it trained on
        ([3, 4, 5, 6, 7], [X, 4, 5, X, 7]),
        ([4, 5, 6, 7], [X, 5, X, 7]),
    ],
)
def test_another_sample_has_another_digest(ids: list[int], labels: list[int]):
    assert digest_of(ids, labels) != digest_of(*FIRST)


def test_nothing_supervised_is_no_sample():
    assert seen(batch([[3, 4]], [[X, X]])) == []
    assert seen(batch([[3, 4]], [[3, X]])) == []


# ---- The order of scoring ----


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    num_rows=st.integers(1, 5),
    row_tokens=st.none() | st.integers(40, 90),
    num_ranks=st.integers(1, 5),
)
def test_scoring_takes_every_sample_in_as_many_batches_on_every_rank(
    lengths, num_rows, row_tokens, num_ranks
):
    shares = [
        scoring_batches(
            lengths,
            num_rows=num_rows,
            row_tokens=row_tokens,
            ranks=DataRanks(rank, num_ranks),
        )
        for rank in range(num_ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    dealt = [b for turn in zip(*shares, strict=True) for b in turn]
    assert all(0 < len(batch) <= num_rows for batch in dealt)
    # As few as do, and the first ones again where they do not come out even.
    distinct = next((i for i in range(1, len(dealt)) if dealt[i] == dealt[0]), None)
    assert distinct is None or len(dealt) - distinct < num_ranks
    rows = [row for batch in dealt[:distinct] for row in batch]
    if row_tokens is None:
        flat = rows
    else:
        assert all(sum(lengths[i] for i in row) <= row_tokens for row in rows)
        flat = [index for row in rows for index in row]
    assert sorted(flat) == list(range(len(lengths)))
    taken = [lengths[index] for index in flat]
    assert taken == sorted(taken, reverse=True)


def test_a_sample_longer_than_a_row_has_one_of_its_own():
    made = scoring_batches([3, 90, 4], num_rows=1, row_tokens=8, ranks=DataRanks())
    assert made == [[[1]], [[2, 0]]]


# ---- Files ----

IDS = torch.arange(3, 27).view(4, 6)


def four() -> Batch:
    labels = IDS.clone()
    labels[:, :2] = X
    labels[1, 4:] = X
    return {"input_ids": IDS, "labels": labels}


def scored(made: Batch) -> Tensor:
    return -made["input_ids"].float() / 7


def rows(made: Batch, *which: int) -> Batch:
    return {name: tensor[list(which)] for name, tensor in made.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four samples in two parts; one of them in both."""
    folder = folder_in(tmp_path)
    for part, which in enumerate([(0, 1), (2, 3, 1)]):
        scores = Scores()
        for row in which:
            share = rows(four(), row)
            scores.add(share, scored(share))
        scores.save(folder, run_id="run", part=part, num_parts=2)
    return folder


def test_every_sample_gets_its_own_log_probs(folder: Path):
    policy = InitialPolicy(folder, "run")
    for order in itertools.permutations(range(4)):
        made = rows(four(), *order)
        expected = scored(made).masked_fill(made["labels"] == X, 0)
        assert torch.equal(policy.logprobs(made), expected)


def test_log_probs_follow_a_sample_into_a_packed_row(folder: Path):
    made = rows(four(), 3, 1, 0)
    packed = {name: tensor.reshape(1, -1) for name, tensor in made.items()}
    packed["position_ids"] = torch.arange(6).repeat(3)[None]
    logprobs = InitialPolicy(folder, "run").logprobs(packed)
    expected = scored(made).masked_fill(made["labels"] == X, 0)
    assert torch.equal(logprobs, expected.reshape(1, -1))


def test_a_rank_without_a_sample_writes_an_empty_part(tmp_path: Path):
    scores = Scores()
    nothing = rows(four(), 0)
    nothing["labels"] = torch.full_like(nothing["labels"], X)
    scores.add(nothing, scored(nothing))
    scores.save(tmp_path, run_id="run", part=0, num_parts=1)
    policy = InitialPolicy(tmp_path, "run")
    assert torch.equal(policy.logprobs(nothing), torch.zeros(1, 6))
    with pytest.raises(FileError, match="no log-probs for a sample"):
        policy.logprobs(four())


def test_an_unknown_sample_is_an_error(folder: Path):
    made = four()
    made["input_ids"][2, 0] += 1
    message = r"psft_initial_logprobs: no log-probs .* 4 supervised tokens in columns 2"
    with pytest.raises(FileError, match=message) as caught:
        InitialPolicy(folder, "run").logprobs(made)
    assert "Resume with the same datasets, tokenizer, chat templ" in str(caught.value)


def refused(folder: Path, part: int, run_id: str = "run") -> str:
    with pytest.raises(FileError) as caught:
        InitialPolicy(folder, run_id)
    message = str(caught.value)
    assert message.startswith(f"{folder / f'part-{part}.safetensors'}: ")
    assert "Put back psft_initial_logprobs of the run that wrote" in message
    assert "or start a new run with base_model set to the checkpoint" in message
    return message


@pytest.mark.parametrize("part", [0, 1])
def test_missing_damaged_or_foreign_parts(folder: Path, part: int):
    path = folder / f"part-{part}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert (
        "truncated, damaged or not a file of axolotl_psft.initial_logprobs"
        in refused(folder, part)
    )
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "truncated, damaged" in refused(folder, part)
    path.unlink()
    assert "not found" in refused(folder, part)
    shutil.copyfile(folder / f"part-{1 - part}.safetensors", path)
    message = refused(folder, part)
    assert f"its part is {1 - part}, not {part}: another run wrote it" in message


def test_parts_of_another_scoring_are_refused(folder: Path):
    assert "its run id is run, not later" in refused(folder, 0, "later")
    scores = Scores()
    scores.add(four(), scored(four()))
    scores.save(folder, run_id="later", part=1, num_parts=2)
    assert "its run id is later, not run" in refused(folder, 1)


def test_copying_replaces_what_was_there(folder: Path, tmp_path: Path):
    target = folder_in(tmp_path / "other")
    target.mkdir(parents=True)
    for name in ("part-0.safetensors", "part-7.safetensors", "part-3.partial"):
        (target / name).write_bytes(b"old")
    policy = InitialPolicy(folder, "run")
    policy.copy_to(target)
    assert sorted(path.name for path in target.iterdir()) == [
        "part-0.safetensors",
        "part-1.safetensors",
    ]
    copied = InitialPolicy(target, "run").logprobs(four())
    assert torch.equal(copied, policy.logprobs(four()))
    # Onto itself, by whatever name: nothing happens.
    policy.copy_to(folder.parent / "other" / ".." / folder.name)
    assert torch.equal(InitialPolicy(folder, "run").logprobs(four()), copied)


def test_clear_deletes_parts_only(folder: Path):
    (folder / "notes.txt").write_text("mine")
    clear(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    clear(folder / "absent")


# ---- Whole runs ----

# Same maths, other summation order, in float32, through eight steps of descent: 7e-8
# in the first grows two- to threefold a step, to 3e-6 on some CPUs.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
METRICS = [
    *("psft/nll", "psft/approx_kl", "psft/entropy", "psft/surrogate"),
    *("grad_norm", "loss"),
]


def assert_same_steps(a: Any, b: Any) -> None:
    for metric in METRICS:
        left, right = torch.tensor(column(a, metric)), torch.tensor(column(b, metric))
        assert_close(left, right, msg=lambda text, m=metric: f"{m}: {text}", **CLOSE)


def shape(packed: bool) -> dict[str, Any]:
    if not packed:
        return {}
    return {"sample_packing": True, "micro_batch_size": 1, "num_epochs": 10}


@pytest.mark.parametrize("packed", [False, True])
def test_every_run_starts_at_its_initial_policy_and_leaves_it(
    tiny: Path, tmp_path: Path, packed: bool
) -> None:
    options = {"psft": {**SFT_KL, "kl_coef": 0.3}, **shape(packed)}
    trainer = run(config(tiny, tmp_path, **options))
    divergence = column(trainer, "psft/approx_kl")
    # A difference of 1e-6 in a log-prob, squared.
    assert divergence[0] < 1e-11
    assert all(value > 1e-4 for value in divergence[1:])
    nll = torch.tensor(column(trainer, "psft/nll"))
    expected = nll + 0.3 * torch.tensor(divergence)
    assert_close(
        torch.tensor(column(trainer, "psft/surrogate")), expected, rtol=1e-6, atol=0
    )
    for entry in train_logs(trainer):
        assert entry["psft/phase"] == entry["psft/old_policy_age"] == 0
        assert entry["psft/ratio_max"] == 1 and entry["psft/clip_frac"] == 0
    seconds = column(trainer, "psft/score_seconds")
    assert [value > 0 for value in seconds] == [True] + [False] * 7


def few(tmp_path: Path, **overrides: Any) -> dict[str, Any]:
    """Six samples, all of them in every step: no order can matter."""
    write_dataset(tmp_path / "few.jsonl", num_samples=6, seed=3)
    return {
        "datasets": [{"path": str(tmp_path / "few.jsonl"), "type": PROMPT}],
        "psft": SFT_KL,
        "num_epochs": 8,
        "sequence_len": 128,
        "sample_packing_eff_est": None,
        "micro_batch_size": 6,
        **overrides,
    }


@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_packed_equals_unpacked(
    tiny: Path, tmp_path: Path, train_on_inputs: bool
) -> None:
    options = few(tmp_path, train_on_inputs=train_on_inputs)
    plain = run(config(tiny, tmp_path / "a", **options))
    options |= {"micro_batch_size": 1, "sample_packing": True}
    packed = run(config(tiny, tmp_path / "b", **options))
    assert_same_steps(plain, packed)


def test_padding_changes_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    options = few(tmp_path, train_on_inputs=True)
    plain = run(config(tiny, tmp_path / "a", **options))
    full = run(config(tiny, tmp_path / "b", pad_to_sequence_len=True, **options))
    assert_same_steps(plain, full)

    # As Axolotl does for Mistral with flash attention.
    left = tmp_path / "left"
    shutil.copytree(tiny / "model", left)
    AutoTokenizer.from_pretrained(left, padding_side="left").save_pretrained(left)
    options["base_model"] = str(left)
    padded = run(config(tiny, tmp_path / "c", **options))
    assert padded.processing_class.padding_side == "left"
    assert_same_steps(plain, padded)


def test_the_penalty_is_that_of_the_two_models(tiny: Path, tmp_path: Path) -> None:
    """Against log-probs by transformers alone, of the base model and after one step."""
    from transformers import AutoModelForCausalLM

    options = few(tmp_path)
    once = run(config(tiny, tmp_path / "once", **options, max_steps=1))
    twice = run(config(tiny, tmp_path / "twice", **options, max_steps=2))
    base = AutoModelForCausalLM.from_pretrained(tiny / "model").eval()
    now = once.model.eval()
    total, count = 0.0, 0
    for row in once.train_dataset:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])[1:]
        p0, p = (
            model(ids[None]).logits[0, :-1].double().log_softmax(-1).detach()
            for model in (base, now)
        )
        d = (p0 - p).gather(1, ids[1:, None]).squeeze(1)[labels != X]
        total += (d.exp() - d - 1).sum().item()
        count += len(d)
    assert column(twice, "psft/approx_kl")[1] == pytest.approx(total / count, rel=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_coefficient_zero_is_sft_to_the_last_bit(
    noisy: Path, tmp_path: Path, packed: bool
) -> None:
    """With dropout and shuffled data: scoring moves no random generator."""
    options = shape(packed)
    zero = {**SFT_KL, "kl_coef": 0}
    kl = run(config(noisy, tmp_path / "a", psft=zero, **options))
    sft = run(config(noisy, tmp_path / "b", psft={"objective": "sft"}, **options))
    for metric in ("loss", "grad_norm", "psft/nll"):
        assert column(kl, metric) == column(sft, metric)
    assert column(kl, "psft/approx_kl")[-1] > 1e-4


def test_micro_batches_and_accumulation_change_no_step(
    tiny: Path, tmp_path: Path
) -> None:
    options = {"psft": SFT_KL, "max_steps": 4}
    whole = run(config(tiny, tmp_path / "a", micro_batch_size=8, **options))
    options |= {"micro_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_same_steps(whole, run(config(tiny, tmp_path / "b", **options)))


@pytest.mark.parametrize("real_batches", [False, True])
def test_scoring_takes_micro_batches_of_trainings_size(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_batches: bool
) -> None:
    shapes = []
    original = Scorer.scored

    def record(self: Any, *args: Any) -> Any:
        for scored_batch, logprobs in original(self, *args):
            shapes.append(tuple(scored_batch["input_ids"].shape))
            yield scored_batch, logprobs

    monkeypatch.setattr(Scorer, "scored", record)
    options = {**shape(True), "micro_batch_size": 2, "psft": SFT_KL}
    options["multipack_real_batches"] = real_batches
    trainer = run(config(tiny, tmp_path, **options))
    assert column(trainer, "psft/approx_kl")[0] < 1e-11
    # Two rows of 64 tokens, or both rows' tokens in one.
    num_rows, num_columns = (2, 64) if real_batches else (1, 128)
    assert all(rows <= num_rows and width <= num_columns for rows, width in shapes)
    assert shapes[0] == (num_rows, num_columns)


def test_scoring_has_no_dropout(noisy: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trainer = run(config(noisy, tmp_path, psft=SFT_KL, max_steps=1))
    row = trainer.train_dataset[0]
    made = batch([row["input_ids"]], [row["labels"]])
    stored = trainer._initial_policy.logprobs(made)
    base = AutoModelForCausalLM.from_pretrained(noisy / "model").eval()
    logits = base(made["input_ids"]).logits[:, :-1].detach()
    own = logits.log_softmax(-1).gather(2, made["input_ids"][:, 1:, None]).squeeze(2)
    active = made["labels"][:, 1:] != X
    assert_close(stored[:, 1:], own.where(active, 0), rtol=0, atol=1e-5)
    # Training has: its first step is not at the initial policy.
    assert column(trainer, "psft/approx_kl")[0] > 1e-5


def test_loading_workers_score_the_same(tiny: Path, tmp_path: Path) -> None:
    options = {"psft": SFT_KL, "max_steps": 2}
    alone = run(config(tiny, tmp_path / "a", **options))
    helped = run(config(tiny, tmp_path / "b", **options, dataloader_num_workers=1))
    assert column(alone, "loss") == column(helped, "loss")


# ---- Resume ----


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout, so that a wrong generator state shows."""
    folder = tmp_path_factory.mktemp("noisy")
    write_model(folder / "model", attention_dropout=0.1)
    write_dataset(folder / "train.jsonl", num_samples=60, seed=0)
    write_dataset(folder / "other.jsonl", num_samples=60, seed=1)
    return folder


def resumable(packed: bool, **overrides: Any) -> dict[str, Any]:
    return resume_options(packed, **{"psft": SFT_KL, "max_steps": 12, **overrides})


@pytest.fixture(scope="module", params=[False, True], ids=["unpacked", "packed"])
def undisturbed(
    request: pytest.FixtureRequest,
    noisy: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[bool, Path, Any]:
    output = tmp_path_factory.mktemp("undisturbed")
    trainer = run(config(noisy, output, **resumable(request.param)))
    return request.param, output / "run", trainer


def resume(noisy: Path, output: Path, checkpoint: Path, **options: Any) -> Any:
    return run(config(noisy, output, resume_from_checkpoint=str(checkpoint), **options))


def test_resume_is_exact_to_the_last_bit(
    noisy: Path, undisturbed: tuple[bool, Path, Any], tmp_path: Path
) -> None:
    packed, output, whole = undisturbed
    epochs = column(whole, "epoch")
    second_epoch = next(i for i, epoch in enumerate(epochs) if epoch > 1)
    # In the first epoch, at its end, in the second.
    for step in (3, second_epoch, second_epoch + 1):
        resumed = resume(
            noisy,
            tmp_path / str(step),
            output / f"checkpoint-{step}",
            **resumable(packed, save_steps=1000),
        )
        assert resumed.state.global_step == 12
        assert bits(resumed, step) == bits(whole, step), step
        seconds = column(resumed, "psft/score_seconds")
        assert seconds[0] > 0 and not any(seconds[step:]), "scored once"


def test_a_resumed_runs_own_checkpoints_resume(
    noisy: Path, undisturbed: tuple[bool, Path, Any], tmp_path: Path
) -> None:
    packed, output, whole = undisturbed
    moved = tmp_path / "moved"
    for name in ("checkpoint-3", "psft_initial_logprobs"):
        shutil.copytree(output / name, moved / name)
    options = resumable(packed, max_steps=5)
    resume(noisy, tmp_path / "first", moved / "checkpoint-3", **options)
    shutil.rmtree(moved)
    second = resume(
        noisy,
        tmp_path / "first",
        tmp_path / "first" / "run" / "checkpoint-5",
        **resumable(packed, save_steps=1000),
    )
    assert bits(second, 5) == bits(whole, 5)


def test_resume_needs_the_initial_policy_of_its_run(
    noisy: Path, undisturbed: tuple[bool, Path, Any], tmp_path: Path
) -> None:
    packed, output, _ = undisturbed
    run_folder = tmp_path / "copy"
    for name in ("checkpoint-3", "psft_initial_logprobs"):
        shutil.copytree(output / name, run_folder / name)
    part = run_folder / "psft_initial_logprobs" / "part-0.safetensors"
    intact = part.read_bytes()

    def again(**overrides: Any) -> None:
        options = resumable(packed, save_steps=1000, **overrides)
        resume(noisy, tmp_path / "resumed", run_folder / "checkpoint-3", **options)

    part.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(FileError, match=r"part-0.safetensors: truncated"):
        again()
    part.unlink()
    with pytest.raises(FileError, match=r"part-0.safetensors: not found"):
        again()
    part.write_bytes(intact)
    other = [{"path": str(noisy / "other.jsonl"), "type": PROMPT}]
    with pytest.raises(FileError, match="datasets: contents was"):
        again(datasets=other)
    with pytest.raises(FileError, match="datasets: contents was"):
        again(train_on_inputs=True)
    with pytest.raises(FileError, match=r"psft\.kl_coef was 0\.5 .* is 0\.4 now"):
        again(psft={**SFT_KL, "kl_coef": 0.4})
    with pytest.raises(FileError, match=r"psft\.objective was sft_kl .* is psft"):
        again(psft={"refresh_steps": 4})


def test_a_later_run_in_the_same_folder_is_another_run(
    noisy: Path, tmp_path: Path
) -> None:
    options = resumable(False, max_steps=2)
    first = run(config(noisy, tmp_path, **options))
    output = tmp_path / "run"
    kept = tmp_path / "kept" / "checkpoint-1"
    shutil.copytree(output / "checkpoint-1", kept)
    (output / "psft_initial_logprobs" / "part-5.safetensors").write_bytes(b"old")
    second = run(config(noisy, tmp_path, **options))
    assert bits(second, 0) == bits(first, 0)
    parts = [path.name for path in (output / "psft_initial_logprobs").iterdir()]
    assert parts == ["part-0.safetensors"]
    # The first run's checkpoint beside the second run's log-probs.
    shutil.rmtree(output / "checkpoint-1")
    shutil.copytree(kept, output / "checkpoint-1")
    with pytest.raises(FileError, match=r"part-0.*its run id is \w+, not \w+"):
        resume(noisy, tmp_path, output / "checkpoint-1", **options)


def test_the_coefficient_is_no_setting_of_another_objective(
    noisy: Path, tmp_path: Path
) -> None:
    for objective in ("psft", "sft"):
        output = tmp_path / objective
        options = resumable(False, max_steps=2, save_steps=2)
        run(config(noisy, output, **{**options, "psft": {"objective": objective}}))
        checkpoint = output / "run" / "checkpoint-2"
        assert not folder_in(output / "run").exists()
        block = {"objective": objective, "kl_coef": 0.7}
        options = resumable(False, max_steps=3, save_steps=3, psft=block)
        assert resume(noisy, output, checkpoint, **options).state.global_step == 3
