"""PSFTTrainer: Axolotl's causal-LM trainer with the PSFT objective.

Joins the rooms: windows (old_policy.py), initial policy (initial_policy.py), log-probs
(causal_lm.py), loss (objective.py), metrics (metrics.py), data order (sampling.py),
checkpoints (checkpoints.py, same_run.py), failures (failures.py), ReLoRA's restarts
(relora.py). No maths lives here.
"""

import contextlib
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import send_to_device
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.monkeypatch.relora import ReLoRACallback
from axolotl.utils.logging import get_logger
from axolotl.utils.samplers import MultipackBatchSampler, get_dataset_lengths
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from axolotl_psft import (
    checkpoints,
    failures,
    initial_policy,
    old_policy,
    relora,
    same_run,
)
from axolotl_psft.attention import takes_lengths
from axolotl_psft.causal_lm import (
    TokenLogprobsOutput,
    check_against_logits,
    install_logprobs_forward,
    unwrap_peft,
)
from axolotl_psft.checkpoints import CheckpointError, FirstError
from axolotl_psft.config import PSFTConfig
from axolotl_psft.failures import DataWorkerError
from axolotl_psft.initial_policy import InitialPolicy
from axolotl_psft.metrics import TokenSums
from axolotl_psft.objective import SFT, Objective, find
from axolotl_psft.old_policy import Batch, SavedWindow, Step, Window
from axolotl_psft.packing import (
    IGNORE_INDEX,
    attention_lengths,
    count_on_host,
    targets_of,
)
from axolotl_psft.sampling import EpochMultipackBatchSampler, set_sampler_epoch

LOG = get_logger(__name__)

# Scoring that takes longer than this shows a progress bar.
_PROGRESS_AFTER_SECONDS = 5.0

# Settings of the block that change no step.
_CHANGE_NO_STEP = {"sequence_parallel", "check_data_files"}

_TOKEN_COUNTS = {"tokens/trainable", "tokens/total", "tokens/train_per_sec_per_gpu"}


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient norm became NaN or infinite; names step and rank."""


class _CorrectedLogs(Trainer):
    """Comes after Axolotl's `log`, and corrects what it cannot know.

    Its ppl is exp(loss), wrong for a surrogate; its token counts take every process for
    a data-parallel one.
    """

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for key in _TOKEN_COUNTS & logs.keys():
            logs[key] = type(logs[key])(logs[key] / self.get_tp_size())
        if "psft/nll" in logs:
            try:
                logs["ppl"] = round(math.exp(logs["psft/nll"]), 5)
            except OverflowError:
                logs["ppl"] = math.inf
        super().log(logs, start_time)


class PSFTTrainer(AxolotlTrainer, _CorrectedLogs):  # type: ignore[misc]
    """Trains with PSFT, or with another ``psft.objective`` and the same metrics.

    Args:
        psft: settings; the plugin sets them after construction.
        *args, **kwargs: AxolotlTrainer's.

    Raises:
        ValueError: if the model is no causal LM with a backbone and an output head, or
            torch.nn.DataParallel would be used.
    """

    def __init__(
        self, *args: Any, psft: PSFTConfig | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"psft: {self.args.n_gpu} GPUs in one process (DataParallel) is not "
                "supported. Launch one process a GPU: "
                "`accelerate launch -m axolotl.cli.train config.yaml`."
            )
        _keep_output_dtype(getattr(self.accelerator.state, "fsdp_plugin", None))
        model = unwrap_peft(self.model)
        _keep_4bit_weights(model)
        install_logprobs_forward(model)
        for callback in self._relora_callbacks:
            relora.share_draws(callback)
        # Only a packed batch says where its samples begin.
        is_packed = getattr(self.args, "sample_packing", False)
        self._takes_lengths = bool(is_packed) and takes_lengths(model)
        self.psft = psft or PSFTConfig()
        self._check_loss_func(None)
        # The loss divides by the step's tokens itself: the Trainer must not average
        # over micro-batches again, which it does unless a loss function is set, nor
        # multiply by the number of ranks.
        self.compute_loss_func = self._loss
        self.args.average_tokens_across_devices = False
        # The Trainer would replace a NaN by the running mean and train on.
        self.args.logging_nan_inf_filter = False
        self._initial_policy: InitialPolicy | None = None
        self._saving: FirstError | None = None
        self._resumed_from: Path | None = None
        self._resumed_window: SavedWindow | None = None
        self._settings: dict[str, Any] = {}
        self._reset_run_state()

    def _check_loss_func(self, expected: Any) -> None:
        """Refuse a loss that another option, plugin or caller has set.

        Raises:
            ValueError: there is one.
        """
        found = self.compute_loss_func
        if found != expected:
            raise ValueError(
                f"compute_loss_func: {getattr(found, '__name__', found)} replaces the "
                "loss, and psft brings its own. Remove the option or the plugin that "
                "sets it, or the psft block."
            )

    @property
    def _objective(self) -> Objective:
        return find(self.psft.objective)

    @property
    def is_stream(self) -> bool:
        """Whether the training data is read on the way and its size not known."""
        return not has_length(self.train_dataset)

    @property
    def _data_group(self) -> dist.ProcessGroup | None:
        """The ranks whose micro-batches differ; None: all of them."""
        return None

    @property
    def _num_data_ranks(self) -> int:
        return dist.get_world_size(self._data_group) if dist.is_initialized() else 1

    @property
    def _data_rank(self) -> int:
        return dist.get_rank(self._data_group) if dist.is_initialized() else 0

    @property
    def _is_first_of_data_rank(self) -> bool:
        """Whether this rank writes what the ranks with the same micro-batches share."""
        return True

    def _reset_run_state(self) -> None:
        device = self.args.device
        self._window = Window()
        self._saved_window: SavedWindow | None = None
        self._train_sums = TokenSums(device)
        self._score_seconds = 0.0
        self._step_loss = torch.zeros((), device=device)
        self._eval_sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._logits_checked = False

    # ---- Data order ----

    def _data_parallel_size(self) -> int:
        # Axolotl takes every process for one; balance_labels deals batches out by it.
        return self._num_data_ranks

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, MultipackBatchSampler):
            seed = self.args.data_seed
            return EpochMultipackBatchSampler.from_stock(
                sampler, self.args.seed if seed is None else seed
            )
        return sampler

    def get_train_dataloader(self) -> Any:
        """The stock one, whose batches stay on the host until it is their turn.

        A window's are looked at before, and no device need hold them meanwhile.
        """
        loader: Any = super().get_train_dataloader()
        # A stream's, which the first rank deals out, travels from device to device.
        if isinstance(loader, DataLoaderShard):
            loader.device = None
        return loader

    # ---- Start and resume ----

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        self._reset_run_state()
        warmup = self.psft.sft_warmup_steps
        if self._objective.reference == "old policy" and warmup >= max_steps:
            LOG.warning(
                f"psft.sft_warmup_steps: {warmup} is not shorter than the run "
                f"({max_steps} steps): all of it is plain SFT. Lower it."
            )
        if resume_from_checkpoint is not None:
            self._check_can_resume()
        self._saved_window = self._resumed_window
        # Not twice in a run: where auto_find_batch_size starts over, the model has been
        # trained already.
        compares = self._objective.reference == "initial policy"
        if compares and self._initial_policy is None:
            self._initial_policy = self._prepare_initial_policy(
                train_dataloader, resume_from_checkpoint
            )
        return prepared

    def _check_supervised(self) -> None:
        samples: Any = self.train_dataset
        if self.is_stream:
            return
        num_masked = _num_masked(samples)
        remedy = "Check train_on_inputs, roles_to_train and the chat template or prompt"
        if num_masked == len(samples):
            raise ValueError(
                f"psft: no supervised token in the {num_masked} samples: every label "
                f"is -100, and there is nothing to train on. {remedy} format."
            )
        if num_masked:
            LOG.warning(
                f"psft: {num_masked:,} of {len(samples):,} samples have no supervised "
                f"token. They change no gradient, but fill micro-batches. {remedy} "
                "format; with sample_packing they are left out."
            )

    def _check_can_resume(self) -> None:
        args: Any = self.args
        step, epoch = self.state.global_step, self.state.epoch or 0.0
        # At 1 exactly it was the run that ended, in the first pass.
        if self.is_stream and epoch > 1:
            raise ValueError(
                f"resume_from_checkpoint: step {step} lies in pass {int(epoch) + 1} "
                "over a stream, where it can only be found again in the first. Resume "
                "from an earlier checkpoint, or train without `streaming`."
            )
        restart = args.jagged_restart_steps
        if self._relora_callbacks and restart and step >= restart:
            raise ValueError(
                f"resume_from_checkpoint: step {step} comes after a ReLoRA restart "
                f"(jagged_restart_steps: {restart}), and Axolotl's checkpoints do not "
                "hold what it merged into the weights in a form that it reads. Start "
                "a new run with base_model set to the merged weights (the relora folder"
                " of a checkpoint), or use `adapter: lora` without relora."
            )

    @property
    def _relora_callbacks(self) -> list[ReLoRACallback]:
        callbacks = self.callback_handler.callbacks
        return [each for each in callbacks if isinstance(each, ReLoRACallback)]

    def _read_checkpoint(self, checkpoint: Path | None) -> None:
        """Before weights are read: is it complete, and of a run like this one?

        Raises:
            ValueError: the checkpoint was never completed, or ranks found others.
            WindowFileError: its window is missing, damaged or another run's.
            PeerFailedError: another rank found that.
        """
        found = failures.gather(checkpoint and str(checkpoint))
        if len(set(found)) > 1:
            raise ValueError(
                f"resume_from_checkpoint: the ranks found {found}. output_dir must be "
                "on a disk that all nodes see."
            )
        if checkpoint is None:
            return
        first = FirstError()
        with first.kept():
            self._resumed_window = old_policy.load_window(
                checkpoint, global_step=checkpoints.check(checkpoint), **self._run()
            )
            self._warn_of_other_batch(self._resumed_window)
        failures.raise_together(first.error)

    def _run(self) -> dict[str, Any]:
        """Of this run, what a window's file holds and is compared with."""
        return {
            "rank": self.args.process_index,
            "world_size": self.args.world_size,
            "settings": self._settings,
            "batching": same_run.batching(self.args),
        }

    def _read_settings(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its resumption."""
        return {
            **{f"psft.{key}": x for key, x in self._objective_settings().items()},
            **same_run.order(self.args),
            **same_run.tokenizer(self.processing_class),
            **same_run.model(self.accelerator.unwrap_model(self.model)),
            **same_run.data(self.train_dataset),
        }

    def _objective_settings(self) -> dict[str, Any]:
        if self._objective.reference == "initial policy":
            return self.psft.model_dump(
                include={"objective", *self._objective.settings}
            )
        # Of an objective without settings all the others, as ever.
        others = set() if "kl_coef" in self._objective.settings else {"kl_coef"}
        return {
            **self.psft.model_dump(exclude=_CHANGE_NO_STEP | others),
            # What takes part in the objective, not how it was written.
            "epsilon": self.psft.epsilon if self.psft.epsilon_high is None else None,
        }

    def _warn_of_other_batch(self, saved: SavedWindow) -> None:
        ours = same_run.batching(self.args)
        sizes = [
            math.prod(batching.values()) * size
            for batching, size in (
                (saved.batching, saved.world_size),
                (ours, self.args.world_size),
            )
        ]
        if sizes[0] != sizes[1] and self.is_world_process_zero():
            LOG.warning(
                f"psft: the checkpoint was written with world size {saved.world_size} "
                f"and {saved.batching}; now it is {self.args.world_size}, with {ours}. "
                "An optimizer step has another number of samples, and the place in the "
                "data is counted in steps: some samples come again in this epoch, or "
                "not at all. Keep the product of the three to go on exactly there."
            )

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        """The Trainer's, all or nothing: where one rank cannot write, all stop.

        Two small collectives beside the Trainer's own, a third before the last file.

        Raises:
            CheckpointError: it could not be written.
        """
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = Path(self._get_output_dir(trial=trial)) / name
        self._saving = FirstError()
        if self.is_world_process_zero():
            with self._failure_kept():
                checkpoints.begin(folder)
        # Nobody writes before.
        self._stop_if_not_written(folder)
        with self._failure_kept():
            if not self.args.save_only_model:
                old_policy.save_window(
                    folder,
                    self._window,
                    global_step=self.state.global_step,
                    initial_policy=getattr(self._initial_policy, "run_id", None),
                    **self._run(),
                )
        with self._failure_kept():
            super()._save_checkpoint(model, trial, **kwargs)
        self._stop_if_not_written(folder)
        self._saving = None

    def _failure_kept(self) -> contextlib.AbstractContextManager[None]:
        """While a checkpoint is saved: this rank's failure waits for the others."""
        if self._saving is None:
            return contextlib.nullcontext()
        return self._saving.kept()

    def _stop_if_not_written(self, folder: Path) -> None:
        """Raise on every rank where any rank has failed to write. One collective."""
        assert self._saving is not None
        failed = failures.described(
            failures.gather(failures.describe(self._saving.error))
        )
        if not failed:
            return
        error = checkpoints.not_written(folder, failed, self._resumed_from)
        if self.is_world_process_zero():
            # Of no use, and the disk may be full of it.
            shutil.rmtree(folder, ignore_errors=True)
        raise error from self._saving.error

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with self._failure_kept():
            super().save_model(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._failure_kept():
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with self._failure_kept():
            super()._save_rng_state(output_dir)
        # trainer_state.json is written next, by rank 0, and makes the checkpoint
        # complete: not before all ranks' files are there.
        self._stop_if_not_written(Path(output_dir))
        if self.is_world_process_zero():
            with self._failure_kept():
                checkpoints.list_files(Path(output_dir))

    # ---- Windows ----

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        set_sampler_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        # A window never spans two epochs; one left over is from an epoch cut short.
        self._window.steps.clear()
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """The next optimizer step's micro-batches and its active tokens.

        At the start of a window, looks ahead over all of it and scores it.
        """
        if self._saved_window is not None:
            self._window = self._saved_window.attach(epoch_iterator)
            self._saved_window = None
            self._count_tokens(self._window.steps)
        if not self._window.steps:
            self._start_window(epoch_iterator)
        if not self._window.steps:
            return [], None
        step = self._window.steps.popleft()
        return step.batches, step.num_tokens

    def _start_window(self, epoch_iterator: Iterator[Batch]) -> None:
        start = self.state.global_step
        num_steps = self.psft.refresh_steps if self._in_psft_phase(start) else 1
        # It ends with the epoch's data, not with the run: one that is resumed with more
        # steps finds the rest.
        steps = old_policy.collect(
            epoch_iterator, num_steps, self.args.gradient_accumulation_steps
        )
        self._drop_unfilled(steps)
        self._count_tokens(steps)
        if steps and not self._logits_checked:
            self._check_logits(steps[0].batches[0]["input_ids"])
        # In the first step the weights are still the old policy's: its log-probs are
        # the training pass's own.
        self._score([batch for step in steps[1:] for batch in step.batches])
        if self._initial_policy is not None:
            for batch in (batch for step in steps for batch in step.batches):
                old_policy.attach(batch, self._initial_policy.logprobs(batch))
        self._window = Window(start)
        self._window.steps.extend(steps)

    def _drop_unfilled(self, steps: list[Step]) -> None:
        """Leave out a stream's last micro-batches where they do not fill a step.

        The Trainer counts micro-batches to know when to step, and does not know where
        a stream ends: their gradients would be added to the next pass's first step.
        """
        size = self.args.gradient_accumulation_steps
        if self.is_stream and steps and len(steps[-1].batches) < size:
            left_out = len(steps.pop().batches)
            LOG.info(
                f"psft: {left_out} micro-batches at the end of the stream do not fill "
                f"gradient_accumulation_steps: {size} and are left out."
            )

    def _in_psft_phase(self, step: int) -> bool:
        compares = self._objective.reference == "old policy"
        return compares and step >= self.psft.sft_warmup_steps

    def _count_tokens(self, steps: Any) -> None:
        """Active tokens of each optimizer step over all ranks: one all-reduce."""
        steps = list(steps)
        if not steps:
            return
        for batch in (batch for step in steps for batch in step.batches):
            self._complete(batch)
        sums = [sum(batch["num_active"] for batch in step.batches) for step in steps]
        counts = torch.tensor(sums, device=self.args.device)
        if dist.is_initialized():
            dist.all_reduce(counts, group=self._data_group)
        for step, count in zip(steps, counts, strict=True):
            # An optimizer step without a supervised token: loss and gradient are zero.
            step.num_tokens = count.clamp(min=1)

    # ---- Scoring ----

    def _score(self, batches: list[Batch]) -> None:
        """Attach the current policy's log-probs to each micro-batch."""
        for batch, logprobs in self._scored(batches, "the old policy"):
            old_policy.attach(batch, logprobs)

    @torch.no_grad()
    def _scored(
        self, batches: list[Batch] | DataLoader, whose: str
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Each micro-batch and its log-probs [B, S] under the model, dropout off."""
        if not batches:
            return
        started = time.perf_counter()
        model = self.model_wrapped
        # Schedule-free optimizers swap weights for evaluation: score the trained ones.
        if callable(train := getattr(self.optimizer, "train", None)):
            train()
        model.eval()
        progress = tqdm(
            batches,
            desc=f"Scoring {whose}",
            delay=_PROGRESS_AFTER_SECONDS,
            leave=False,
            disable=self.args.disable_tqdm or not self.is_local_process_zero(),
        )
        for batch in progress:
            inputs = {**self._prepare_inputs(batch), "with_entropy": False}
            with self.compute_loss_context_manager():
                _, output = self.compute_loss(model, inputs, return_outputs=True)
            yield batch, output.logprobs
        model.train()
        if self.args.device.type != "cpu":
            torch.accelerator.synchronize()
        self._score_seconds += time.perf_counter() - started

    def _prepare_initial_policy(
        self, train_dataloader: Any, checkpoint: str | None
    ) -> InitialPolicy:
        """Score the data set with the model as it is, or read what was scored."""
        own = initial_policy.folder_in(self._get_output_dir(trial=None))
        if checkpoint is None:
            return InitialPolicy(own, self._score_data_set(train_dataloader, own))
        assert self._saved_window is not None
        run_id = self._saved_window.initial_policy
        assert run_id is not None, "the checkpoint's objective was compared"
        policy = InitialPolicy(
            initial_policy.folder_in(Path(checkpoint).parent), run_id
        )
        # This run's checkpoints must find it beside them, too.
        if self.is_world_process_zero():
            policy.copy_to(own)
        return policy

    def _score_data_set(self, train_dataloader: Any, folder: Path) -> str:
        """Score and write the initial policy, each data rank a share; returns its id.

        Two collectives beside those of the model.
        """
        batches = self._scoring_dataloader(train_dataloader)
        first = torch.as_tensor(batches.dataset[0]["input_ids"])
        self._check_logits(first[None])
        run_id = [uuid.uuid4().hex]
        if self.is_world_process_zero():
            initial_policy.clear(folder)
        if dist.is_initialized():
            # Nobody writes before the first rank has cleared.
            dist.broadcast_object_list(run_id)
        scores = initial_policy.Scores()
        for batch, logprobs in self._scored(batches, "the initial policy"):
            scores.add(batch, logprobs)
        if self._is_first_of_data_rank:
            scores.save(
                folder,
                run_id=run_id[0],
                part=self._data_rank,
                num_parts=self._num_data_ranks,
            )
        if dist.is_initialized():
            dist.barrier()
        return run_id[0]

    def _scoring_dataloader(self, train_dataloader: Any) -> DataLoader:
        """Every sample once, as training sees it: same columns, packing and padding."""
        args: Any = self.args
        lengths = get_dataset_lengths(self.train_dataset).tolist()
        num_rows, row_tokens = self._train_batch_size, None
        if args.sample_packing:
            row_tokens = args.max_seq_length
            if not args.multipack_real_batches:
                num_rows, row_tokens = 1, num_rows * row_tokens
        batches = initial_policy.scoring_batches(
            lengths,
            num_rows=num_rows,
            row_tokens=row_tokens,
            rank=self._data_rank,
            num_ranks=self._num_data_ranks,
        )
        return DataLoader(
            train_dataloader.dataset,
            batch_sampler=batches,
            collate_fn=train_dataloader.collate_fn,
            num_workers=args.dataloader_num_workers,
            # Of its own: the global one decides the order of training.
            generator=torch.Generator(),
        )

    def _check_logits(self, input_ids: Tensor) -> None:
        model = self.model_wrapped
        low_precision = self.accelerator.mixed_precision != "no" or any(
            parameter.dtype.itemsize < 4 for parameter in model.parameters()
        )
        model.eval()
        # Through every wrapper, which may hold shards of the weights, but not compiled:
        # no other call has these shapes.
        with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            check_against_logits(
                model,
                input_ids.to(self.args.device),
                low_precision=low_precision,
            )
        model.train()
        self._logits_checked = True

    # ---- Loss ----

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        self._complete(inputs)
        # The Trainer's own copy would wait for all that the device has still to do.
        there = send_to_device(inputs, self.args.device, non_blocking=True)
        return super()._prepare_inputs(there)

    def _complete(self, batch: Batch) -> None:
        """Add what the host must know of a micro-batch; of a window's, ahead of time.

        Into the caller's: one that is scored and then trained on has it twice for the
        price of once.
        """
        model: Any = self.model
        count_on_host(batch, model.config.get_text_config().vocab_size)
        is_packed = self._takes_lengths and "position_ids" in batch
        # Axolotl's collator has added them to what flash-attn gets.
        if is_packed and "cu_seq_lens_q" not in batch:
            batch.update(attention_lengths(batch["position_ids"]))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Loss of one micro-batch; eval and scoring take the same path.

        Args:
            model: the wrapped model.
            inputs: what ``_prepare_inputs`` has made of a micro-batch, just now:
                ``input_ids`` and ``labels`` [B, S], ``position_ids`` [B, S] where
                packed.
            return_outputs: also return the :class:`TokenLogprobsOutput`.
            num_items_in_batch: active tokens of the optimizer step, over all ranks.
        """
        return super().compute_loss(
            model,
            {**inputs, "logprob_targets": targets_of(inputs)},
            return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch,
        )

    def _loss(
        self,
        output: TokenLogprobsOutput,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        if not output.logprobs.requires_grad:
            return self._eval_loss(output)
        logprobs, mask = output.logprobs, output.mask
        if logprobs.dtype != torch.float32:
            raise TypeError(
                f"psft: log-probs came back as {logprobs.dtype}, not float32: "
                f"{type(self.model_wrapped).__name__} casts the model's outputs. Turn "
                "that off in its mixed-precision policy."
            )
        bits = output.old_logprobs
        old = logprobs.detach() if bits is None else old_policy.attached(bits)
        objective = self._objective
        warms_up = objective.reference == "old policy" and not self._in_psft_phase(
            self.state.global_step
        )
        loss, sums = (SFT if warms_up else objective).loss(
            logprobs, old, mask, num_items_in_batch, self.psft
        )
        self._train_sums.add({**sums, "entropy_sum": output.entropy.sum()})
        # Data parallelism averages gradients over ranks; the divisor already counts
        # the tokens of all of them.
        loss = loss * self._num_data_ranks
        self._step_loss += loss.detach()
        return loss

    def _eval_loss(self, output: TokenLogprobsOutput) -> Tensor:
        """Mean NLL of the micro-batch; keeps each row's sums for the true mean."""
        self._eval_rows = torch.stack(
            [-output.logprobs.sum(1), output.entropy.sum(1), output.mask.sum(1)], dim=1
        )
        nll, _, num_tokens = self._eval_rows.sum(0)
        return nll / num_tokens.clamp(min=1)

    # ---- Safety ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; where several ranks fail, all name the one that was first.

        Raises:
            ValueError: the checkpoint to resume from was never completed, or another
                loss was set.
            WindowFileError: it is damaged, or of a run with other settings.
            CheckpointError: a checkpoint could not be written.
            NonFiniteLossError: see there.
            DataWorkerError: a process of the data loader ended.
            PeerFailedError: another rank failed, was killed or hangs.
        """
        self._check_loss_func(self._loss)
        resume = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        is_path = isinstance(resume, (str, os.PathLike))
        self._resumed_from = Path(resume) if is_path else None  # type: ignore[arg-type]
        self._resumed_window = None
        self._check_supervised()
        self._settings = self._read_settings()
        self._read_checkpoint(self._resumed_from)
        self._initial_policy = None
        try:
            return super().train(*args, **kwargs)
        except (NonFiniteLossError, CheckpointError):
            # All ranks raise them.
            raise
        except Exception as error:
            self._explain(error)
            raise

    def _explain(self, error: Exception) -> None:
        """Raise the failure that ``error`` is the consequence of, if it is one."""
        output_dir = self._get_output_dir(trial=None)
        remedy = checkpoints.how_to_resume(output_dir, self._resumed_from)
        if not failures.is_of_data_worker(error):
            failures.name_first(error, remedy)
            return
        ended = DataWorkerError(
            f"dataloader_num_workers: {self.args.dataloader_num_workers}: one of them "
            f"has ended ({failures.describe(error)}). They are killed where memory or "
            f"/dev/shm runs out: use fewer if that was it. {remedy}"
        )
        failures.name_first(ended, remedy)
        raise ended from error

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The last thing before optimizer.step().
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._stop_if_not_finite(grad_norm)
        return grad_norm

    def _stop_if_not_finite(self, grad_norm: Any) -> None:
        """Raise on every rank where any rank's loss or the gradient is not finite."""
        world_size = self.accelerator.num_processes
        loss_is_finite = torch.isfinite(self._step_loss)
        finite = torch.ones(world_size, device=self.args.device)
        finite[self.accelerator.process_index] = loss_is_finite
        finite = self.accelerator.reduce(finite, reduction="sum") > world_size - 1
        # fp16's gradient scaler meets infinite gradients by design and skips the step.
        scaled = getattr(self.accelerator, "scaler", None) is not None
        norm = 0.0 if grad_norm is None or scaled else float(grad_norm)
        self._step_loss.zero_()
        if finite.all() and math.isfinite(norm):
            return
        step = self.state.global_step + 1
        ranks = (~finite).nonzero().flatten().tolist()
        what = (
            f"the loss of rank {', '.join(map(str, ranks))}"
            if ranks
            else f"the gradient norm ({norm})"
        )
        # DeepSpeed updates the weights at the end of its backward pass.
        weights = "" if self.is_deepspeed_enabled else "The weights were not updated. "
        raise NonFiniteLossError(
            f"psft: {what} is not finite in optimizer step {step}. {weights}Earlier "
            "checkpoints are intact. Look at the data of this step and lower "
            "learning_rate, or use bf16/fp32 instead of fp16."
        )

    # ---- Evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, None, None]:
        # Logits do not exist, so there is nothing but the loss to return.
        loss, _, _ = super().prediction_step(
            model, inputs, prediction_loss_only=True, ignore_keys=ignore_keys
        )
        self._eval_sums += self._gather_eval_rows(self._eval_rows.double()).sum(0)
        return loss, None, None

    def _gather_eval_rows(self, rows: Tensor) -> Tensor:
        """Each data rank's rows [B, 3], without those that fill the last batch."""
        if dist.is_initialized():
            parts = [torch.empty_like(rows) for _ in range(self._num_data_ranks)]
            dist.all_gather(parts, rows.contiguous(), group=self._data_group)
            rows = torch.cat(parts)
        # accelerate repeats samples to fill it and knows which; packed batches are
        # never filled up, and it would count wrongly there.
        args: Any = self.args
        state = self.accelerator.gradient_state
        is_packed = args.sample_packing and args.eval_sample_packing is not False
        if not is_packed and state.end_of_dataloader and state.remainder > 0:
            return rows[: state.remainder]
        return rows

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop, with token-weighted ``eval_loss`` (NLL) and entropy."""
        self._eval_sums.zero_()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        nll, entropy, num_tokens = self._eval_sums.tolist()
        if num_tokens == 0:
            LOG.warning(f"{prefix}: no supervised token in the evaluation data.")
            num_tokens = math.nan
        metrics: Any = output.metrics
        metrics[f"{prefix}_loss"] = nll / num_tokens
        metrics[f"{prefix}_psft/entropy"] = entropy / num_tokens
        return output

    # ---- Logging ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._train_metrics())
        super().log(logs, start_time)

    def _train_metrics(self) -> dict[str, float]:
        # `log` runs after the step was counted.
        last_step = self.state.global_step - 1
        metrics = self._train_sums.reduce(self._data_group)
        metrics["old_policy_age"] = last_step - self._window.start_step
        metrics["phase"] = int(self._in_psft_phase(last_step))
        metrics["score_seconds"] = self._score_seconds
        self._train_sums = TokenSums(self.args.device)
        self._score_seconds = 0.0
        return {f"psft/{name}": value for name, value in metrics.items()}


def _keep_output_dtype(fsdp_plugin: Any) -> None:
    """Let FSDP2 return float32 log-probs from a model of 16-bit weights.

    accelerate's policy casts every module's outputs to the weights' dtype: for hidden
    states a cast that changes nothing, for log-probs one that loses 16 bits.
    """
    policy = getattr(fsdp_plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        fsdp_plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def _keep_4bit_weights(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights on a CPU when they are first evaluated.

    Packed for inference in bf16, once and for all, they give training other log-probs
    and other gradients; scoring evaluates them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def _num_masked(samples: Any) -> int:
    """How many samples of a data set have no supervised token."""
    num_masked = 0
    for table in samples.select_columns("labels").with_format("arrow").iter(1000):
        labels = table["labels"].combine_chunks()
        supervised = np.asarray(labels.flatten()) != IGNORE_INDEX
        before = np.concatenate([[0], supervised.cumsum()])
        ends = np.asarray(labels.value_lengths()).cumsum()
        num_masked += int((np.diff(before[ends], prepend=0) == 0).sum())
    return num_masked
