"""Whole runs in this process: what the objective, the window and the logs must do."""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.core.trainers.base import AxolotlTrainer
from torch.testing import assert_close
from transformers import Trainer

from axolotl_psft import linear_logprobs, logprobs, token_logprobs
from axolotl_psft.failures import NonFiniteLossError
from axolotl_psft.loss import TrainingLoss
from axolotl_psft.metrics import TokenSums
from axolotl_psft.old_policy import Scorer
from axolotl_psft.trainer import PSFTTrainer
from tests.host_waits import HostWaits
from tests.tiny import PROMPT, column, config, eval_data, run, train_logs, write_dataset

# Same maths, other summation order, in float32: a few units in the last place (1e-7)
# of sums over some hundred tokens, carried through eight steps of gradient descent.
CLOSE = {"rtol": 2e-6, "atol": 1e-6}

# What must agree between two runs that differ in how a step is cut up.
STEP_METRICS = [
    *("psft/nll", "psft/entropy", "psft/clip_frac", "psft/surrogate"),
    *("grad_norm", "loss"),
]

PSFT = {"epsilon_high": 0.28, "refresh_steps": 4}


def assert_same_steps(a: Any, b: Any, metrics: list[str] = STEP_METRICS) -> None:
    for metric in metrics:
        left, right = column(a, metric), column(b, metric)
        assert_close(torch.tensor(left), torch.tensor(right), msg=_say(metric), **CLOSE)


def _say(metric: str) -> Any:
    return lambda message: f"{metric}: {message}"


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return trainer.model.state_dict()


@pytest.fixture(scope="module")
def psft_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(config(tiny, tmp_path_factory.mktemp("psft"), micro_batch_size=8))


def test_the_clip_acts_in_the_runs_of_this_file(psft_run: Any) -> None:
    assert max(column(psft_run, "psft/clip_frac")) > 0.05


def test_first_step_of_a_window_has_ratio_exactly_one(psft_run: Any) -> None:
    ages = column(psft_run, "psft/old_policy_age")
    assert ages == [0, 1, 2, 3, 0, 1, 2, 3]
    for entry in train_logs(psft_run):
        if entry["psft/old_policy_age"] == 0:
            assert entry["psft/ratio_mean"] == entry["psft/ratio_max"] == 1.0
            assert entry["psft/clip_frac"] == entry["psft/approx_kl"] == 0.0
            assert entry["psft/surrogate"] == -1.0
        else:
            assert entry["psft/ratio_max"] != 1.0


def test_first_step_of_a_window_has_the_gradient_of_sft(
    tiny: Path, tmp_path: Path
) -> None:
    options = {"max_steps": 1}
    psft = run(config(tiny, tmp_path / "psft", **options))
    sft = run(config(tiny, tmp_path / "sft", psft={"objective": "sft"}, **options))
    # The ratio is exp(0) = 1, so even the rounding is the same but for the order in
    # which -1/N and the gradient of log p are multiplied.
    for name, weight in weights(psft).items():
        assert_close(weight, weights(sft)[name], rtol=0, atol=1e-7, msg=_say(name))
    for each in (psft, sft):
        assert column(each, "loss") == pytest.approx(column(each, "psft/nll"), rel=1e-6)
    assert column(sft, "psft/surrogate") == column(sft, "psft/nll")


def test_refresh_every_step_trains_like_plain_axolotl(
    tiny: Path, tmp_path: Path
) -> None:
    psft = run(config(tiny, tmp_path / "psft", psft={"refresh_steps": 1}))
    stock = run(config(tiny, tmp_path / "stock", psft=None, plugins=None))
    for key in ("loss", "grad_norm"):
        # fp32: 1e-6, relative to losses near 4 and norms near 1.
        ours, theirs = (torch.tensor(column(each, key)) for each in (psft, stock))
        assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=_say(key))
    assert column(psft, "ppl") == pytest.approx(column(stock, "ppl"), rel=1e-5)


def test_dft_trains_like_axolotls_own(tiny: Path, tmp_path: Path) -> None:
    dft = run(config(tiny, tmp_path / "psft", psft={"objective": "dft"}))
    options: dict[str, Any] = {"psft": None, "plugins": None, "use_dft": True}
    stock = run(config(tiny, tmp_path / "stock", **options))
    for key, of_stock in (("psft/surrogate", "loss"), ("grad_norm", "grad_norm")):
        # fp32: 1e-6, relative to losses and norms near 1.
        ours, theirs = column(dft, key), column(stock, of_stock)
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6), key
    for name, weight in weights(dft).items():
        assert_close(weight, weights(stock)[name], rtol=0, atol=1e-6, msg=_say(name))
    assert column(dft, "psft/ratio_max") == [1.0] * 8


def test_asft_starts_as_dft_and_is_held_back(tiny: Path, tmp_path: Path) -> None:
    runs = {
        name: run(config(tiny, tmp_path / name, psft=psft))
        for name, psft in {
            "dft": {"objective": "dft"},
            "asft": {"objective": "asft", "kl_coef": 0.5},
        }.items()
    }
    norms = [column(each, "grad_norm") for each in runs.values()]
    # Where p is p0, the penalty has no gradient.
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-6)
    assert norms[0][-1] != pytest.approx(norms[1][-1], rel=1e-3)
    kl = column(runs["asft"], "psft/approx_kl")
    # Scored in batches of another shape: rounding, squared.
    assert kl[0] < 1e-8 < kl[-1]
    assert column(runs["asft"], "psft/nll")[-1] > column(runs["dft"], "psft/nll")[-1]


def unbounded_loss(
    new: Any, old: Any, mask: Any, num_tokens: Any, settings: Any
) -> Any:
    ratio = torch.where(mask, (new - old).exp(), 0.0)
    return -ratio.sum() / num_tokens, {}


def test_an_objective_by_its_import_path(
    tiny: Path, tmp_path: Path, psft_run: Any
) -> None:
    psft = {**PSFT, "objective": f"{__name__}.unbounded_loss"}
    own = run(config(tiny, tmp_path / "own", psft=psft, micro_batch_size=8))
    wide = {**PSFT, "epsilon_high": 1e9}
    expected = run(config(tiny, tmp_path / "wide", psft=wide, micro_batch_size=8))
    key = "psft/surrogate"
    assert column(own, key) == column(expected, key)
    assert column(own, "psft/old_policy_age") == [0, 1, 2, 3, 0, 1, 2, 3]
    # What would have been clipped is counted all the same.
    assert max(column(own, "psft/clip_frac")) > 0
    assert column(own, key) != column(psft_run, key)


def test_a_plugin_without_a_block_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    listed = run(config(tiny, tmp_path / "listed", psft=None))
    stock = run(config(tiny, tmp_path / "stock", psft=None, plugins=None))
    assert column(listed, "loss") == column(stock, "loss")
    assert column(listed, "grad_norm") == column(stock, "grad_norm")
    assert type(listed) is type(stock)


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(4, 2), (1, 8)])
def test_micro_batches_and_accumulation_change_no_step(
    tiny: Path, tmp_path: Path, psft_run: Any, micro_batch: int, accumulation: int
) -> None:
    other = run(
        config(
            tiny,
            tmp_path,
            micro_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
        )
    )
    assert_same_steps(psft_run, other)


def test_refresh_every_step_takes_the_token_mean_at_any_accumulation(
    tiny: Path, tmp_path: Path
) -> None:
    psft = {"refresh_steps": 1}
    whole = run(config(tiny, tmp_path / "a", psft=psft, micro_batch_size=8))
    cut = run(
        config(
            tiny,
            tmp_path / "b",
            psft=psft,
            micro_batch_size=2,
            gradient_accumulation_steps=4,
        )
    )
    assert_same_steps(whole, cut)


@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_packed_equals_unpacked(
    tiny: Path, tmp_path: Path, train_on_inputs: bool
) -> None:
    # All samples in every step, so that the order in which they are drawn and packed
    # cannot matter.
    write_dataset(tmp_path / "few.jsonl", num_samples=6, seed=3)
    options = {
        "datasets": [{"path": str(tmp_path / "few.jsonl"), "type": PROMPT}],
        "train_on_inputs": train_on_inputs,
        "num_epochs": 8,
        "sequence_len": 128,
        "sample_packing_eff_est": None,
    }
    plain = run(config(tiny, tmp_path / "a", micro_batch_size=6, **options))
    packed = run(
        config(tiny, tmp_path / "b", micro_batch_size=1, sample_packing=True, **options)
    )
    assert_same_steps(plain, packed)


def test_lower_epsilon_is_inert(tiny: Path, tmp_path: Path, psft_run: Any) -> None:
    block = {**PSFT, "epsilon": 0.9}
    other = run(config(tiny, tmp_path, psft=block, micro_batch_size=8))
    for metric in STEP_METRICS:
        assert column(other, metric) == column(psft_run, metric)


def test_upper_epsilon_is_not_inert(tiny: Path, tmp_path: Path, psft_run: Any) -> None:
    block = {**PSFT, "epsilon_high": 0.1}
    other = run(config(tiny, tmp_path, psft=block, micro_batch_size=8))
    assert column(other, "psft/nll") != column(psft_run, "psft/nll")


def test_warm_up_is_sft_and_then_psft_starts(tiny: Path, tmp_path: Path) -> None:
    warm = run(config(tiny, tmp_path / "a", psft={**PSFT, "sft_warmup_steps": 3}))
    sft = run(config(tiny, tmp_path / "b", psft={"objective": "sft"}))
    assert column(warm, "psft/phase") == [0, 0, 0, 1, 1, 1, 1, 1]
    assert column(warm, "psft/old_policy_age") == [0, 0, 0, 0, 1, 2, 3, 0]
    # The fourth step's NLL is that of weights made by three steps of SFT.
    assert column(warm, "psft/nll")[:4] == column(sft, "psft/nll")[:4]
    key = "psft/surrogate"
    assert column(warm, key)[:3] == column(sft, key)[:3]
    assert column(warm, key)[3] == -1.0


def test_sft_baseline_logs_the_same_metrics(
    tiny: Path, tmp_path: Path, psft_run: Any
) -> None:
    sft = run(config(tiny, tmp_path, psft={"objective": "sft"}, max_steps=2))
    assert train_logs(sft)[0].keys() == train_logs(psft_run)[0].keys()
    assert column(sft, "psft/phase") == [0, 0]
    assert column(sft, "psft/ratio_mean") == [1.0, 1.0]


def test_a_window_ends_with_the_epoch(tiny: Path, tmp_path: Path) -> None:
    # 96 samples in 24 micro-batches: 5 steps of 5 micro-batches an epoch, the last of 4
    trainer = run(config(tiny, tmp_path, gradient_accumulation_steps=5, max_steps=12))
    ages = column(trainer, "psft/old_policy_age")
    assert ages == [0, 1, 2, 3, 0, 0, 1, 2, 3, 0, 0, 1]


def test_scoring_costs_one_forward_less_than_the_window(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []
    original = Scorer.attach

    def count(self: Any, batches: list[Any]) -> None:
        scored.append(len(batches))
        original(self, batches)

    monkeypatch.setattr(Scorer, "attach", count)
    calls = []

    def head(*args: Any, **kwargs: Any) -> Any:
        calls.append((torch.is_grad_enabled(), kwargs["with_entropy"]))
        return linear_logprobs(*args, **kwargs)

    monkeypatch.setattr(token_logprobs, "linear_logprobs", head)
    trainer = run(config(tiny, tmp_path, gradient_accumulation_steps=2, max_steps=6))
    # 4 steps of 2 micro-batches each: all but the first step's are scored. The second
    # window goes beyond the end of the run, for one that resumes it.
    assert scored == [6, 6]
    assert calls.count((False, False)) == 12, "scoring wants no entropy"
    assert calls.count((True, True)) == len(calls) - 13 == 12
    seconds = column(trainer, "psft/score_seconds")
    assert [s > 0 for s in seconds] == [True, False, False, False, True, False]


def test_no_micro_batch_makes_the_host_wait(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, waits = PSFTTrainer.training_step, []

    def training_step(*args: Any, **kwargs: Any) -> Any:
        with HostWaits() as mode:
            loss = original(*args, **kwargs)
        waits.append(mode.total)
        return loss

    monkeypatch.setattr(PSFTTrainer, "training_step", training_step)
    # Rows without a gradient are left out on a CPU only, which waits for nobody.
    keep_all = lambda rows, grad, lse: (rows, grad[rows].to(lse.dtype), lse)  # noqa: E731
    monkeypatch.setattr(logprobs, "_moving_rows", keep_all)
    trainer = run(config(tiny, tmp_path, gradient_accumulation_steps=2))
    # transformers looks twice a forward, whether rows are padded and how.
    assert waits == [2] * 16
    # What must be known of a micro-batch is known before it is on the device.
    assert trainer.get_train_dataloader().device is None


def test_long_scoring_shows_progress(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from axolotl_psft import old_policy

    monkeypatch.setattr(old_policy, "_PROGRESS_AFTER_SECONDS", 0.0)
    run(config(tiny, tmp_path, max_steps=4))
    assert "Scoring the old policy" in capfd.readouterr().err


def test_perplexity_is_that_of_the_nll(psft_run: Any) -> None:
    for entry in train_logs(psft_run):
        assert entry["ppl"] == pytest.approx(math.exp(entry["psft/nll"]), rel=1e-4)


EVAL = {"eval_steps": 2, "save_steps": 2, "save_strategy": None}


@pytest.mark.parametrize("packed", [False, True])
def test_eval_loss_is_the_token_mean_of_the_nll(
    tiny: Path, tmp_path: Path, packed: bool
) -> None:
    trainer = run(
        config(
            tiny,
            tmp_path,
            # 13 samples: the last batch is not full, or, since packing drops what does
            # not fill a batch, one row holds all.
            eval_batch_size=1 if packed else 4,
            sample_packing=packed,
            sequence_len=512,
            micro_batch_size=1 if packed else 4,
            max_steps=4,
            **eval_data(tiny),
            **EVAL,
        )
    )
    entry = [e for e in trainer.state.log_history if "eval_loss" in e][-1]
    nll, entropy = _reference_eval(trainer, tiny / "test.jsonl")
    assert entry["eval_loss"] == pytest.approx(nll, rel=1e-5)
    assert entry["eval_psft/entropy"] == pytest.approx(entropy, rel=1e-5)
    assert entry["eval_ppl"] == pytest.approx(math.exp(nll), rel=1e-4)


def _reference_eval(trainer: Any, path: Path) -> tuple[float, float]:
    """NLL and entropy of the answers, sample by sample, by transformers alone."""
    import json

    tokenizer = trainer.processing_class
    nll, entropy, count = 0.0, 0.0, 0
    model = trainer.model.eval()
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["instruction"])["input_ids"]
        ids = prompt + tokenizer(row["output"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        targets = torch.tensor(ids[len(prompt) :])
        nll -= logprobs.gather(1, targets[:, None]).sum().item()
        entropy -= (logprobs.exp() * logprobs).sum().item()
        count += len(targets)
    return nll / count, entropy / count


def test_early_stopping_and_best_model(tiny: Path, tmp_path: Path) -> None:
    trainer = run(
        config(
            tiny,
            tmp_path,
            early_stopping_patience=1,
            load_best_model_at_end=True,
            # Far too high after a while: eval loss rises and stops the run.
            optimizer="adamw_torch",
            learning_rate=0.2,
            max_steps=40,
            **eval_data(tiny),
            **EVAL,
        )
    )
    losses = {
        e["step"]: e["eval_loss"]
        for e in trainer.state.log_history
        if "eval_loss" in e and e["step"] > 0
    }
    best = min(losses, key=losses.__getitem__)
    assert trainer.state.global_step < 40
    assert trainer.state.best_metric == pytest.approx(losses[best])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


def test_a_step_without_supervised_tokens_is_harmless(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from axolotl_psft.trainer import PSFTTrainer

    original = PSFTTrainer.get_train_dataloader

    def mask_some(self: Any) -> Any:
        loader = original(self)
        collate = loader.collate_fn
        seen = []

        def masked(features: Any) -> Any:
            batch = collate(features)
            # The second optimizer step whole, and half of the third.
            if len(seen) in (2, 3, 4):
                batch["labels"].fill_(-100)
            seen.append(batch)
            return batch

        loader.base_dataloader.collate_fn = masked
        return loader

    monkeypatch.setattr(PSFTTrainer, "get_train_dataloader", mask_some)
    trainer = run(config(tiny, tmp_path, gradient_accumulation_steps=2, max_steps=4))
    empty = train_logs(trainer)[1]
    assert empty["loss"] == 0.0
    assert empty["grad_norm"] == 0.0
    assert "psft/nll" not in empty
    others = [e for i, e in enumerate(train_logs(trainer)) if i != 1]
    assert all(math.isfinite(e["psft/nll"]) and e["grad_norm"] > 0 for e in others)
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    original = TrainingLoss.__call__

    def poisoned(self: Any, tokens: Any, old: Any, num: Any, step: int) -> Any:
        loss = original(self, tokens, old, num, step)
        if step == 5:
            loss = loss * math.nan
            self.of_step += loss.detach()
        return loss

    options = {"save_strategy": None, "save_steps": 2}
    monkeypatch.setattr(TrainingLoss, "__call__", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"loss of rank 0 .* step 6\b"):
        run(config(tiny, tmp_path, **options))
    monkeypatch.undo()

    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert sorted(p.name for p in checkpoint.parent.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert all(p.isfinite().all() for p in model.parameters())
    resumed = run(
        config(tiny, tmp_path, resume_from_checkpoint=str(checkpoint), **options)
    )
    assert resumed.state.global_step == 8


def test_a_non_finite_gradient_stops_the_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = AxolotlTrainer._get_grad_norm

    def poisoned(self: Any, model: Any, grad_norm: Any = None) -> Any:
        return original(self, model, torch.tensor(math.inf))

    monkeypatch.setattr(AxolotlTrainer, "_get_grad_norm", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"gradient norm \(inf\) .* step 1\b"):
        run(config(tiny, tmp_path))


def test_old_logprobs_stay_with_their_micro_batch(psft_run: Any) -> None:
    trainer = psft_run
    batches = list(trainer.get_train_dataloader())[:2]
    trainer._scorer.attach(batches)
    prepared = [trainer.on_device(batch) for batch in batches]
    trainer._loss._sums = TokenSums("cpu")
    trainer.model.train()
    for inputs in prepared:
        trainer.compute_loss(trainer.model, inputs, num_items_in_batch=1)
    assert trainer._loss.metrics()["ratio_max"] == 1.0


def test_another_loss_function_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*args: Any, **kwargs: Any) -> None: ...

    message = r"compute_loss_func: other replaces the loss, .* Remove the option"
    original = PSFTTrainer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "compute_loss_func": other})

    monkeypatch.setattr(PSFTTrainer, "__init__", init)
    with pytest.raises(ValueError, match=message):
        run(config(tiny, tmp_path))
    monkeypatch.undo()

    trainer = run(config(tiny, tmp_path, max_steps=1))
    trainer.compute_loss_func = other
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_warm_up_longer_than_the_run_is_said(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    logger = logging.getLogger("axolotl_psft")
    logger.addHandler(caplog.handler)
    try:
        run(config(tiny, tmp_path, psft={**PSFT, "sft_warmup_steps": 8}))
    finally:
        logger.removeHandler(caplog.handler)
    assert "psft.sft_warmup_steps: 8 is not shorter than the run (8 steps)" in (
        caplog.text
    )


def test_lora_trains_the_adapter_with_ratio_one_first(
    tiny: Path, tmp_path: Path
) -> None:
    trainer = run(
        config(
            tiny,
            tmp_path,
            adapter="lora",
            lora_r=4,
            lora_alpha=8,
            lora_target_linear=True,
            # Enough for an adapter to show in batches that differ.
            optimizer="adamw_torch",
            learning_rate=0.05,
            max_steps=24,
            # Axolotl's fused LoRA kernels need a GPU.
            lora_mlp_kernel=False,
            lora_qkv_kernel=False,
            lora_o_kernel=False,
        )
    )
    assert column(trainer, "psft/ratio_max")[0] == 1.0
    nll = column(trainer, "psft/nll")
    assert sum(nll[-4:]) < sum(nll[:4])
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_gradient_checkpointing_changes_nothing(
    tiny: Path, tmp_path: Path, psft_run: Any
) -> None:
    other = run(config(tiny, tmp_path, gradient_checkpointing=True, micro_batch_size=8))
    assert_same_steps(psft_run, other)


# ---- What the trainer knows of Axolotl's and transformers' insides ----

# The private methods that are overridden, with the parameters they have upstream.
OVERRIDDEN = {
    "_get_train_sampler": ["train_dataset"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_save_checkpoint": ["model", "trial"],
    "_save_rng_state": ["output_dir"],
}
OVERRIDDEN_SPLIT = {
    "_clip_grad_norm": ["model"],
    "_data_parallel_size": [],
    "_get_grad_norm": ["model", "grad_norm"],
    "_load_best_model": [],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_wrap_model": ["model", "training", "dataloader"],
}


def private_overrides(cls: type) -> set[str]:
    names = {name for name in vars(cls) if name.startswith("_") and "__" not in name}
    return {name for name in names if hasattr(AxolotlTrainer, name)}


def test_the_private_methods_that_are_overridden_are_as_they_were() -> None:
    from axolotl_psft.megatron.trainer import MegatronPSFTTrainer

    for cls, expected in (
        (PSFTTrainer, OVERRIDDEN),
        (MegatronPSFTTrainer, OVERRIDDEN_SPLIT),
    ):
        assert private_overrides(cls) == expected.keys()
        for name, parameters in expected.items():
            # Of Axolotl's wrappers around it what transformers has is passed through.
            of = Trainer if hasattr(Trainer, name) else AxolotlTrainer
            found = inspect.signature(getattr(of, name)).parameters
            assert list(found)[1:] == parameters, name


def test_the_trainer_uses_what_axolotl_counts_tokens_with() -> None:
    found = inspect.signature(AxolotlTrainer._accumulate_token_counts).parameters
    assert list(found) == ["self", "inputs"]
