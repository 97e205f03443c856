"""MegatronPSFTTrainer: PSFT whose step, weights and checkpoints are sharded.

Objective, windows, metrics and data order are the base class's (trainer.py one level
up). Here is what the Trainer must do otherwise when no rank has the whole model.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor, nn
from torch import distributed as dist
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME

from axolotl_psft.megatron import groups
from axolotl_psft.megatron.step import MegatronStep, OptimizerSettings
from axolotl_psft.megatron.weights import load_weights, save_weights
from axolotl_psft.old_policy import Batch, digest
from axolotl_psft.sampling import keep_mesh_when_skipping
from axolotl_psft.trainer import PSFTTrainer

LOG = get_logger(__name__)


class MegatronPSFTTrainer(PSFTTrainer):
    """PSFT with tensor parallelism.

    The model must have parallel layers (megatron/layers.py); the plugin sees to that.
    """

    model: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        keep_mesh_when_skipping()
        self.layout = groups.current()
        # accelerate reads it when it shards a data loader.
        timeout = self.args.ddp_timeout_delta
        self.accelerator.state.device_mesh = groups.data_mesh(self.layout, timeout)
        self._megatron: MegatronStep | None = None
        self._micro_batches: list[Batch] = []
        self._batches_compared = False
        LOG.info(f"psft: {self.layout.describe()}, Megatron-Core's training step.")

    # ---- Layout ----

    @property
    def _data_group(self) -> dist.ProcessGroup:
        return self.layout.dp_group

    @property
    def _is_first_of_data_rank(self) -> bool:
        return self.layout.tp_rank == 0

    def get_tp_size(self) -> int:
        return self.layout.tp_size

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        batches, num_tokens = super().get_batch_samples(
            epoch_iterator, num_batches, device
        )
        if batches and not self._batches_compared:
            self._compare_batches(batches[0])
        return batches, num_tokens

    def _compare_batches(self, batch: Batch) -> None:
        """Once: all ranks of a group must work on the same tokens."""
        digests: list[str | None] = [None] * self.layout.tp_size
        dist.all_gather_object(digests, digest(batch), group=self.layout.tp_group)
        if len(set(digests)) > 1:
            raise RuntimeError(
                "tensor_parallel_size: the ranks of one group got different batches. "
                "All of them must read the same data in the same order: check that "
                "datasets and dataset_prepared_path are the same on every node."
            )
        self._batches_compared = True

    # ---- The step ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self._megatron = MegatronStep(self.model, self.layout, self._settings_of_args())
        self.optimizer = self._megatron.adapter
        return self.optimizer

    def _settings_of_args(self) -> OptimizerSettings:
        args: Any = self.args
        return OptimizerSettings(
            # config.py lets AdamW and SGD through.
            name="sgd" if args.optim.value == "sgd" else "adam",
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            decayed=frozenset(self.get_decay_parameter_names(self.model)),
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )

    def _wrap_model(
        self, model: nn.Module, training: bool = True, dataloader: Any = None
    ) -> nn.Module:
        return model if self._megatron is None else self._megatron.ddp

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        # The parallel layers do not look at autocast: they compute in the weights'
        # dtype, and so must the rest.
        return contextlib.ExitStack()

    def training_step(
        self,
        model: nn.Module,
        inputs: Batch,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Runs at the last micro-batch of an optimizer step, for all of them."""
        self._micro_batches.append(inputs)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._micro_batches = self._micro_batches, []
        assert self._megatron is not None
        model.train()

        def loss_func(wrapped: nn.Module, batch: Batch) -> Tensor:
            prepared = self._prepare_inputs(batch)
            return self.compute_loss(
                wrapped, prepared, num_items_in_batch=num_items_in_batch
            )

        return self._megatron.forward_backward(batches, loss_func)

    def _clip_grad_norm(self, model: nn.Module) -> float | Tensor:
        assert self._megatron is not None
        return self._megatron.clip_grad_norm(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            assert self._megatron is not None
            grad_norm = self._megatron.grad_norm()
        return super()._get_grad_norm(model, grad_norm)

    # ---- Weights and checkpoints ----

    def save_model(
        self, output_dir: str | None = None, _internal_call: bool = False
    ) -> None:
        """Gather and write; every rank must call it."""
        folder = str(output_dir or self.args.output_dir)
        with self._failure_kept():
            self._write_model(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(
                commit_message="Model save", revision=self.args.hub_revision
            )

    def _write_model(self, folder: str) -> None:
        save_weights(self.model, folder, self.layout)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        LOG.info(f"Loading model from {resume_from_checkpoint}.")
        load_weights(self.model, resume_from_checkpoint, self.layout)

    def _load_best_model(self) -> None:
        LOG.info(
            f"Loading best model from {self.state.best_model_checkpoint} "
            f"(score: {self.state.best_metric})."
        )
        load_weights(self.model, str(self.state.best_model_checkpoint), self.layout)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self._megatron is not None
        with self._failure_kept():
            self._megatron.save_optimizer(output_dir)
            if self.args.should_save:
                state = self.lr_scheduler.state_dict()
                torch.save(state, os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self._megatron is not None
        self._megatron.load_optimizer(checkpoint)
        path = os.path.join(checkpoint, SCHEDULER_NAME)
        self.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))
