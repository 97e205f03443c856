"""PSFTTrainer: what Axolotl's causal-LM trainer must be told, and nothing else.

Joins the rooms: windows (old_policy.py, initial_policy.py), the forward step
(token_logprobs.py), the loss (loss.py), evaluation (evaluation.py), data order
(sampling.py), what resumes (resume.py, checkpoints.py), failures (failures.py).

Four private methods of the Trainer are overridden, each for want of a public way:
`_get_train_sampler` (what a data loader samples by is set inside of it),
`_get_grad_norm` (no callback is given the norm), `_save_checkpoint` (no callback comes
before it, nor fails with it) and `_save_rng_state` (none comes before the file that
makes a checkpoint complete). tests/test_trainer.py notices when they change.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import send_to_device
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.utils.logging import get_logger
from axolotl.utils.samplers import MultipackBatchSampler
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from axolotl_psft import checkpoints, failures, initial_policy, relora, resume
from axolotl_psft.attention import takes_lengths
from axolotl_psft.config import PSFTConfig
from axolotl_psft.dataset import check_supervised, is_stream
from axolotl_psft.evaluation import Evaluation
from axolotl_psft.initial_policy import InitialPolicy
from axolotl_psft.loss import TrainingLoss
from axolotl_psft.objective import Objective, find
from axolotl_psft.old_policy import Scorer, Window, attached
from axolotl_psft.packing import Batch, complete
from axolotl_psft.ranks import DataRanks
from axolotl_psft.sampling import EpochMultipackBatchSampler, set_sampler_epoch
from axolotl_psft.token_logprobs import prepare_model, token_logprobs

LOG = get_logger(__name__)


class PSFTTrainer(AxolotlTrainer):
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
        model = prepare_model(self.model, self.accelerator)
        self._is_packed = bool(getattr(self.args, "sample_packing", False))
        self._takes_lengths = takes_lengths(model)
        self.psft = psft or PSFTConfig()
        self.data_ranks = DataRanks.of_all()
        self._check_loss_func()
        # The loss divides by the step's tokens itself: the Trainer must not average
        # over micro-batches again.
        self.model_accepts_loss_kwargs = True
        # The Trainer would replace a NaN by the running mean and train on.
        self.args.logging_nan_inf_filter = False
        for callback in relora.callbacks_of(self):
            relora.share_draws(callback)
        self.add_callback(_AtTheRightTime(self))

    def _check_loss_func(self) -> None:
        """Refuse a loss that another option, plugin or caller has set.

        Raises:
            ValueError: there is one.
        """
        if (found := self.compute_loss_func) is not None:
            raise ValueError(
                f"compute_loss_func: {getattr(found, '__name__', found)} replaces the "
                "loss, and psft brings its own. Remove the option or the plugin that "
                "sets it, or the psft block."
            )

    @property
    def objective(self) -> Objective:
        """What is minimized."""
        return find(self.psft.objective)

    # ---- Start, resume, end ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; where several ranks fail, all name the one that was first.

        Raises:
            ValueError: the checkpoint to resume from was never completed, or another
                loss was set.
            FileError: it is damaged, or of a run with other settings.
            CheckpointError: a checkpoint could not be written.
            NonFiniteLossError: see there.
            DataWorkerError: a process of the data loader ended.
            PeerFailedError: another rank failed, was killed or hangs.
        """
        self._check_loss_func()
        check_supervised(self.train_dataset)
        resume_from = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        # True: Axolotl has looked, and found none.
        is_path = isinstance(resume_from, (str, os.PathLike))
        self._checkpoint = Path(resume_from) if is_path else None  # type: ignore[arg-type]
        self._initial_policy: InitialPolicy | None = None
        self._being_saved: Path | None = None
        self._run = resume.Run.of(self)
        # Before weights are read: is it complete, and of a run like this one?
        self._saved_window = resume.read_checkpoint(self, self._checkpoint, self._run)
        try:
            return super().train(*args, **kwargs)
        except failures.NonFiniteLossError:
            raise  # as on all ranks
        except Exception as error:
            checkpoints.explain(
                error,
                self.args,
                being_saved=self._being_saved,
                resumed_from=self._checkpoint,
            )
            raise

    def start(self, train_dataloader: Any) -> None:
        """What a run, or a new attempt of one, begins with: weights are read by now."""
        self._loss = TrainingLoss(
            self.objective, self.psft, self.data_ranks, self.args.device
        )
        self._scorer = Scorer(self)
        self._restored: resume.SavedWindow | None = self._saved_window
        self._warn_of_warmup()
        # Not twice in a run: where auto_find_batch_size starts over, the model has been
        # trained already.
        compares = self.objective.reference == "initial policy"
        if compares and self._initial_policy is None:
            run_id = getattr(self._saved_window, "initial_policy", None)
            self._initial_policy = initial_policy.find(
                self, self._scorer, train_dataloader, self._checkpoint, run_id
            )
        self._window = Window(
            self.args.gradient_accumulation_steps,
            self._window_steps,
            self._scorer,
            self._initial_policy,
            is_stream(self.train_dataset),
        )

    def _window_steps(self, step: int) -> int:
        return self.psft.refresh_steps if self._loss.in_psft_phase(step) else 1

    def _warn_of_warmup(self) -> None:
        warmup, max_steps = self.psft.sft_warmup_steps, self.state.max_steps
        if self.objective.reference == "old policy" and warmup >= max_steps:
            LOG.warning(
                f"psft.sft_warmup_steps: {warmup} is not shorter than the run "
                f"({max_steps} steps): all of it is plain SFT. Lower it."
            )

    def begin_epoch(self, epoch: int, train_dataloader: Any) -> None:
        """Before the epoch's data are read."""
        set_sampler_epoch(train_dataloader, epoch)
        # A window never spans two epochs; one left over is from an epoch cut short.
        self._window.steps.clear()

    # ---- Checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any, **kwargs: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._being_saved = Path(self.args.output_dir) / name
        checkpoints.begin(self._being_saved)
        if not self.args.save_only_model:
            self.save_run(self._being_saved)
        super()._save_checkpoint(model, trial, **kwargs)
        self._being_saved = None

    def save_run(self, checkpoint: Path) -> None:
        """Write what the Trainer does not know of: the window."""
        resume.save_window(
            checkpoint,
            self._window,
            self._run,
            global_step=self.state.global_step,
            initial_policy=getattr(self._initial_policy, "run_id", None),
        )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # trainer_state.json is written next, by rank 0, and makes the checkpoint
        # complete: not before all ranks' files are there.
        checkpoints.list_files(Path(output_dir))

    # ---- Data ----

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

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """The next optimizer step's micro-batches and its active tokens."""
        if self._restored is not None:
            self._restored.restore(self._window, epoch_iterator)
            self._restored = None
        step = self._window.next_step(epoch_iterator, self.state.global_step)
        return step.batches, step.num_tokens

    def complete(self, batch: Batch) -> None:
        """Add to a micro-batch what the host must know of it."""
        model: Any = self.model
        complete(
            batch,
            model.config,
            is_packed=self._is_packed,
            with_lengths=self._takes_lengths,
        )

    def on_device(self, batch: Batch) -> Batch:
        """A micro-batch of the data loader, complete and on its way to the device."""
        self.complete(batch)
        # The Trainer's own copy would wait for all that the device has still to do.
        return send_to_device(batch, self.args.device, non_blocking=True)

    # ---- The step ----

    def training_step(
        self,
        model: nn.Module,
        inputs: Batch,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The Trainer's, on a micro-batch that is on its way to the device."""
        return super().training_step(model, self.on_device(inputs), num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Loss of one micro-batch: see :class:`TrainingLoss`.

        Args:
            model: the wrapped model.
            inputs: a micro-batch on the device.
            return_outputs: also return the :class:`TokenLogprobs`.
            num_items_in_batch: active tokens of the optimizer step, over all ranks.
        """
        if self.args.include_tkps:
            self._count_throughput(inputs)
        tokens, step = token_logprobs(model, inputs), self.state.global_step
        loss = self._loss(tokens, attached(inputs), num_items_in_batch, step)
        return (loss, tokens) if return_outputs else loss

    def _count_throughput(self, inputs: Batch) -> None:
        """Axolotl's token counts, of ranks with the same micro-batches once."""
        labels = inputs["labels"]
        shown = labels if self.data_ranks.is_first else labels[:0]
        self._accumulate_token_counts({"labels": shown})

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # fp16's gradient scaler meets infinite gradients by design and skips the step.
        scaled = getattr(self.accelerator, "scaler", None) is not None
        failures.stop_if_not_finite(
            self._loss.of_step,
            0.0 if grad_norm is None or scaled else float(grad_norm),
            step=self.state.global_step + 1,
            # DeepSpeed updates the weights at the end of its backward pass.
            is_updated=self.is_deepspeed_enabled,
        )
        self._loss.of_step.zero_()
        return grad_norm

    # ---- Evaluation and logging ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, None, None]:
        """Mean NLL of a micro-batch; logits do not exist."""
        with torch.no_grad(), self.compute_loss_context_manager():
            tokens = token_logprobs(model, self.on_device(inputs))
        return self._evaluation.add(tokens), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's loop, with token-weighted ``eval_loss`` (NLL) and entropy."""
        is_packed = self._is_packed and self.args.eval_sample_packing is not False
        # accelerate repeats samples to fill the last batch and knows which; packed
        # batches are never filled up, and it would count wrongly there.
        state = None if is_packed else self.accelerator.gradient_state
        self._evaluation = Evaluation(self.args.device, self.data_ranks, state)
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update(self._evaluation.metrics(prefix))
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's; with the loss go the metrics of the same steps."""
        if "loss" in logs:
            # It runs after the step was counted.
            last_step = self.state.global_step - 1
            metrics = self._loss.metrics()
            metrics["old_policy_age"] = last_step - self._window.start_step
            metrics["phase"] = int(self._loss.in_psft_phase(last_step))
            metrics["score_seconds"] = self._scorer.seconds
            self._scorer.seconds = 0.0
            logs.update({f"psft/{name}": value for name, value in metrics.items()})
        super().log(logs, start_time)


class _AtTheRightTime(TrainerCallback):
    """Calls the trainer back where the Trainer offers it."""

    def __init__(self, trainer: PSFTTrainer) -> None:
        self._trainer = trainer
        self._epoch = 0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        self._epoch = int(state.epoch or 0)
        self._trainer.start(kwargs["train_dataloader"])

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        self._trainer.begin_epoch(self._epoch, kwargs["train_dataloader"])
        self._epoch += 1
