"""The forgetting benchmark: its tasks, its choices, its workers, its document.

One short fine-tuning run is trained here; `make evidence-quick` runs all of it.
"""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.forgetting import plan, report, runs, tasks, text
from benchmarks.forgetting.jobs import Job, Jobs
from benchmarks.forgetting.plan import FULL, QUICK
from benchmarks.forgetting.runs import Run
from tests.tiny import load

DOCS = Path(__file__).parent.parent / "docs"
RUN = Run("psft", 1e-3, 0, steps=16, every=8, num_train=64)

# ---- Tasks ----


@pytest.mark.parametrize("skill", (*tasks.BASE_SKILLS, tasks.TARGET))
def test_answers_are_checkable(skill: Any) -> None:
    for sample in tasks.make_samples(skill, 8, seed=0, held_out=False):
        assert skill.check(sample.letters, sample.answer)
        assert not skill.check(sample.letters, sample.answer[:-1])
        assert not skill.check(sample.letters, (*sample.answer, sample.answer[-1]))


@pytest.mark.parametrize(
    "answer, right",
    [
        ("3 = 3 + 5 = 8", True),
        ("5 = 5 / 3 = 8", True),
        ("5 5 - 3 8", True),
        ("3 = 3 + 5 = 9", False),
        ("3 = 3 + 3 = 6", False),
        ("3 = 3 5 = 8", False),
        ("3 = 3 + 5 = 8 +", False),
        ("3 = 3", False),
        ("8", False),
        ("", False),
    ],
)
def test_the_target_is_any_right_chain(answer: str, right: bool) -> None:
    assert tasks.check_chain(("3", "5"), answer.split()) is right


def test_target_has_real_spread_and_the_base_another_style() -> None:
    digits, rng = ("1", "2", "3"), random.Random(0)
    answers = {tuple(tasks.TARGET.solve(digits, rng)) for _ in range(1500)}
    assert len(answers) == 6 * 16
    assert all("=" in answer for answer in answers)
    assert "=" not in tasks.TARGET_OF_BASE.solve(digits, rng)


def test_no_test_sample_is_in_training() -> None:
    parts = tasks.test_samples(), tasks.validation_samples(), tasks.earlier_samples()
    train = tasks.train_samples(0)
    tasks.check_no_leak(train, *parts)
    assert not {s.letters for s in parts[0]} & {s.letters for s in parts[1]}
    with pytest.raises(ValueError, match="may be in training"):
        tasks.check_no_leak([*train, parts[0][0]], *parts)
    with pytest.raises(ValueError, match="is held out"):
        tasks.check_no_leak([parts[1][0]], parts[0])


def test_everything_fits_and_is_in_the_vocabulary() -> None:
    tokenizer = tasks.tokenizer()
    samples = [
        *tasks.train_samples(1),
        *tasks.test_samples(),
        *tasks.earlier_samples(),
    ]
    for sample in samples:
        ids = tokenizer.encode(f"{sample.instruction} {sample.output}")
        assert tokenizer.unk_token_id not in ids
        assert len(ids) < tasks.SEQUENCE_LEN
        assert len(sample.answer) < tasks.MAX_NEW_TOKENS
    per_family = dict.fromkeys(tasks.FAMILIES, 0)
    for sample in tasks.earlier_samples():
        per_family[sample.skill.family] += 1
    assert min(per_family.values()) >= tasks.NUM_FAMILY_PROMPTS


@pytest.mark.skipif(not text.is_present(), reason=f"needs the samples in {text.DATA}")
def test_no_real_test_sample_is_in_training() -> None:
    rows = text.train_rows(0, 64)
    text.check_no_leak(rows)
    question = text.test_rows()[1][0]["question"]
    with pytest.raises(ValueError, match="validation"):
        text.check_no_leak([*rows, {"instruction": question, "output": ""}])
    train, rest = (text.base_texts(held_out=x) for x in (False, True))
    for source in train:
        assert rest[source] and not set(train[source]) & set(rest[source])


# ---- Runs ----


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    runs.train_base(folder, seed=0, steps=3)
    return folder


def _methods() -> list[Run]:
    lr = {"sft": 3e-4, "psft": 1e-3}
    return [*plan.grid(QUICK), *plan.others(replace(FULL, seeds=(0,)), lr)]


@pytest.mark.parametrize("run", _methods(), ids=lambda run: run.name)
def test_every_run_is_a_valid_configuration(
    run: Run, base: Path, tmp_path: Path
) -> None:
    data = tmp_path / "train.jsonl"
    runs.prepare.write_jsonl(data, tasks.train_samples(0, 16))
    cfg = runs.axolotl_config(base, data, tmp_path, run, {"probe": "skills"})
    loaded = load({**cfg, "micro_batch_size": 16, "sequence_len": 32})
    expected = {
        "sft": ("sft", 0.2, None, 8),
        "sft_kl": ("sft_kl", 0.2, None, 8),
        "psft": ("psft", 0.2, run.epsilon_high, run.refresh_steps),
        "psft_warmup": ("psft", 0.2, 0.28, 8),
        "psft_noclip": ("psft", 0.2, float("inf"), 8),
    }[run.method]
    block = loaded.psft
    assert (
        block.objective,
        block.epsilon,
        block.epsilon_high,
        block.refresh_steps,
    ) == expected
    assert (block.sft_warmup_steps > 0) == (run.method == "psft_warmup")


def test_names_are_unique_and_the_comparison_is_fair() -> None:
    all_runs = [
        *plan.grid(FULL),
        *plan.others(FULL, {"sft": 3e-4, "psft": 1e-3}),
    ]
    assert len({run.name for run in all_runs}) == len(set(all_runs))
    # Equal data and equal updates, whatever the method.
    assert len({(run.steps, run.num_train) for run in all_runs}) == 1


def test_the_smallest_learning_rate_that_does_as_well_is_chosen() -> None:
    scores = {
        "sft": {1e-4: (0.5, 0.6), 1e-3: (0.8, 0.9), 1e-2: (0.84, 0.94)},
        "psft": {1e-4: (0.5, 0.6), 1e-3: (0.6, 0.7), 1e-2: (0.94, 0.94)},
    }
    grid, results = [], {}
    for method, by_lr in scores.items():
        for lr, values in by_lr.items():
            for seed, value in enumerate(values):
                run = Run(method, lr, seed, 8, 8)
                grid.append(run)
                # The best point counts, not the last, and not where a run starts.
                start = 1.0 if lr == 1e-4 else 0.0
                points = [{"score": start}, {"score": value}, {"score": 0.1}]
                results[run.name] = {"points": points}
    assert plan.choose_lr(grid, results, "score") == {"sft": 1e-3, "psft": 1e-2}
    negated = {
        name: {"points": [{"score": -p["score"]} for p in result["points"]]}
        for name, result in results.items()
    }
    assert plan.choose_lr(grid, negated, "score", sign=-1) == plan.choose_lr(
        grid, results, "score"
    )


# ---- Workers ----


@pytest.mark.soak  # two whole experiments
def test_same_seed_same_numbers_whatever_ran_before(base: Path, tmp_path: Path) -> None:
    """One worker trains it after another run, the other as its first."""
    first = replace(RUN, method="sft")
    together, alone = tmp_path / "together", tmp_path / "alone"

    def job(run: Run, folder: Path) -> Job:
        output = folder / "runs" / run.name
        return Job(run.name, runs.fine_tune, (base, output, run))

    results = []
    for folder, order in ((together, (first, RUN)), (alone, (RUN,))):
        jobs = Jobs(folder, num_workers=1)
        jobs.num_expected = len(order)
        results.append(jobs.run([job(run, folder) for run in order]))
        jobs.close()
    for key in ("points", "log"):
        assert results[0][RUN.name][key] == results[1][RUN.name][key]
    result = results[1][RUN.name]
    assert [point["step"] for point in result["points"]] == [0, 8, 16]
    assert result["points"][0]["kl"] == 0 < result["points"][-1]["kl"]
    assert result["log"]["step"] == [8, 16]
    assert (alone / "runs" / RUN.name / "run" / "config.json").is_file()


def _fail() -> None:
    raise ValueError("on purpose")


def _count(path: Path) -> dict[str, Any]:
    calls = int(path.read_text()) + 1 if path.exists() else 1
    path.write_text(str(calls))
    return {"calls": calls}


def test_what_is_done_is_not_done_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    counter, other = tmp_path / "counter", tmp_path / "other"
    for expected in (1, 1):
        jobs = Jobs(tmp_path, num_workers=1)
        jobs.num_expected = 2
        result = jobs.run([Job("count", _count, (counter,))])
        jobs.close()
        assert result["count"]["calls"] == expected
    # Another version of the code is another result.
    jobs = Jobs(tmp_path, num_workers=1)
    jobs.version = "other"
    jobs.num_expected = 2
    again = [Job("count", _count, (counter,)), Job("two", _count, (other,))]
    assert jobs.run(again)["count"]["calls"] == 2
    jobs.close()
    out = capfd.readouterr().out
    assert "[1/2] count: " in out and "; about 0 min left" in out
    assert "two: " in out and "[2/2] " in out


def test_a_failure_names_the_run_and_its_log(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, num_workers=1)
    with pytest.raises(RuntimeError, match=r"bad failed: on purpose.*bad\.log"):
        jobs.run([Job("bad", _fail, ())])
    assert "ValueError: on purpose" in (tmp_path / "logs" / "bad.log").read_text()


# ---- The document ----


def test_a_table_says_how_many_runs_reached_it() -> None:
    assert report._spread([0.5, 0.7], 2) == "0.600 ± 0.141"
    assert report._spread([0.5], 3) == "0.500 (1 of 3)"
    assert report._spread([], 3) == "never"
    assert report._spread([96.0, 192.0], 2) == "144 ± 68"
    assert report._spread([0.0, 1.0], 2) == "0.500 ± 0.707"


def test_the_document_has_the_tables_of_the_results() -> None:
    data = json.loads((DOCS / "evidence" / "results.json").read_text())
    rendered = report.Report(data)
    document = (DOCS / "evidence.md").read_text()
    tables = rendered.tables()
    assert report.fill(document, tables) == document
    assert {*re.findall(r"<!-- table: (\S+) -->", document)} == tables.keys()
    for name in re.findall(r"\(evidence/(\S+\.png)\)", document):
        assert (DOCS / "evidence" / name).is_file()


def test_no_number_in_the_prose_that_is_not_in_a_table() -> None:
    document = (DOCS / "evidence.md").read_text()
    blocks = r"<!-- table: \S+ -->\n.*?<!-- end -->"
    tables = " ".join(re.findall(blocks, document, flags=re.DOTALL))
    prose = re.sub(blocks, "", document, flags=re.DOTALL)
    result = prose.partition("## What was measured")[2]
    numbers = set(re.findall(r"(?<![\w.])\d?\.\d+", result))
    printed = set(re.findall(r"\d+\.\d+", tables))
    rounded = {f"{float(x):.2f}" for x in printed} | printed
    missing = {x for x in numbers if x not in rounded and f"0{x}" not in rounded}
    assert not missing


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="no table named 'x'"):
        report.fill("<!-- table: x -->\n<!-- end -->", {})
