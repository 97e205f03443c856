"""MegatronPSFTTrainer: PSFT whose step, weights and checkpoints are sharded.

Objective, windows, metrics and data order are the base class's (trainer.py one level
up). Here is what the Trainer must do otherwise when no rank has the whole model.

Overridden of its private methods, beside the base class's, are those that would treat
a split model as a whole one: `_wrap_model` (by DistributedDataParallel, which sends
rank 0's shard to all), `_clip_grad_norm` and `_get_grad_norm` (of this rank's shard),
`_load_from_checkpoint` and `_load_best_model` (whole files), and Axolotl's
`_data_parallel_size` (the number of processes).
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from torch import Tensor, nn
from torch import distributed as dist
from transformers.trainer import TRAINING_ARGS_NAME

from axolotl_psft.megatron import groups
from axolotl_psft.megatron.step import MegatronStep, OptimizerSettings
from axolotl_psft.megatron.weights import load_weights, save_weights
from axolotl_psft.packing import Batch
from axolotl_psft.resume import digest
from axolotl_psft.sampling import keep_mesh_when_skipping
from axolotl_psft.trainer import PSFTTrainer

LOG = get_logger(__name__)


class MegatronPSFTTrainer(PSFTTrainer):
    """PSFT with tensor parallelism.

    The model must have parallel layers (megatron/layers.py), and :meth:`split_over` be
    called before anything else: the plugin sees to both.
    """

    model: Any
    layout: groups.Layout

    def split_over(self, layout: groups.Layout) -> None:
        """Take the groups that the model is split over."""
        keep_mesh_when_skipping()
        self.layout = layout
        self.data_ranks = layout.data_ranks
        # accelerate reads it when it shards a data loader.
        timeout = self.args.ddp_timeout_delta
        self.accelerator.state.device_mesh = groups.data_mesh(layout, timeout)
        self._step: Any = None  # made with the optimizer
        self._micro_batches: list[Batch] = []
        self._batches_compared = False
        LOG.info(f"psft: {layout.describe()}, Megatron-Core's training step.")

    # ---- Layout ----

    def _data_parallel_size(self) -> int:
        # balance_labels deals batches out by it.
        return self.layout.dp_size

    def get_tp_size(self) -> int:
        """The ranks of one copy of the model."""
        return self.layout.tp_size

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | None]:
        """The base class's, which all ranks of a group must get alike."""
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
        """Megatron-Core's, which comes with its gradients and their reduction."""
        args: Any = self.args
        settings = OptimizerSettings(
            # rules.py lets AdamW and SGD through.
            name="sgd" if args.optim.value == "sgd" else "adam",
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            decayed=frozenset(self.get_decay_parameter_names(self.model)),
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )
        self._step = MegatronStep(self.model, self.layout, settings)
        self.optimizer = self._step.adapter
        return self.optimizer

    def _wrap_model(
        self, model: nn.Module, training: bool = True, dataloader: Any = None
    ) -> nn.Module:
        return model if self._step is None else self._step.ddp

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """None: the parallel layers do not look at autocast.

        They compute in the weights' dtype, and so must the rest.
        """
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
        model.train()

        def loss_func(wrapped: nn.Module, batch: Batch) -> Tensor:
            on_device = self.on_device(batch)
            return self.compute_loss(
                wrapped, on_device, num_items_in_batch=num_items_in_batch
            )

        return self._step.forward_backward(batches, loss_func)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return self._step.clip_grad_norm(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = self._step.grad_norm() if grad_norm is None else grad_norm
        return super()._get_grad_norm(model, norm)

    # ---- Weights and checkpoints ----

    def start(self, train_dataloader: Any) -> None:
        """The base class's, with the optimizer's state where a run goes on."""
        super().start(train_dataloader)
        if self._checkpoint is not None:
            self._step.load_optimizer(self._checkpoint)

    def save_run(self, checkpoint: Path) -> None:
        """The base class's, and this rank's part of the optimizer."""
        super().save_run(checkpoint)
        self._step.save_optimizer(checkpoint)

    def save_model(
        self, output_dir: str | None = None, _internal_call: bool = False
    ) -> None:
        """Gather and write; every rank must call it."""
        folder = str(output_dir or self.args.output_dir)
        save_weights(self.model, folder, self.layout)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(
                commit_message="Model save", revision=self.args.hub_revision
            )

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
