"""Megatron-Core's training step around a Hugging Face model with parallel layers.

forward_backward_func, DistributedDataParallel, the (distributed) optimizer with its
gradient-norm clipping, and finalize_model_grads. What a micro-batch's loss is, and when
a step happens, is the trainer's business.

Collectives of one optimizer step, beside those of the model (layers.py) and the head
(logprobs.py), each micro-batch's: the reduction of gradients over the data-parallel
group (one a bucket, and one all-gather of its weights with the distributed optimizer),
one all-reduce of partial gradients over the tensor-parallel group where the model has
any, one all-reduce of the gradient norm; once a run, at the first clipping, one more.
On an accelerator a bucket's reduction runs beside the rest of the last backward pass,
and the all-gathers beside what comes before the layers that wait for them.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    ParamWithNamePredicate,
    get_megatron_optimizer,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from axolotl_psft.files import FileError, check_format, replacing
from axolotl_psft.megatron.groups import Layout, on_this_device
from axolotl_psft.megatron.layers import partial_gradients

_FORMAT = "axolotl_psft.megatron_optimizer/3"


@dataclass(frozen=True)
class OptimizerSettings:
    """What the trainer's arguments say about the optimizer."""

    name: str
    """``adam`` (decoupled weight decay) or ``sgd``."""
    lr: float
    weight_decay: float = 0.0
    decayed: frozenset[str] = field(default_factory=frozenset)
    """Names of the parameters that weight decay applies to."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class _Wrapped(MegatronModule):
    """The model as Megatron's schedule and optimizer want it."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: TransformerConfig, model: PreTrainedModel) -> None:
        super().__init__(config)
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with on_this_device():  # scoring and evaluation come straight here
            return self.model(*args, **kwargs)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """For pipeline stages; there is one."""


class MegatronStep:
    """One model, its gradients and its optimizer on this rank.

    Args:
        model: with parallel layers (layers.py), weights loaded.
        layout: this rank's place.
        settings: of the optimizer.
    """

    def __init__(
        self, model: PreTrainedModel, layout: Layout, settings: OptimizerSettings
    ) -> None:
        self.layout = layout
        dtype = next(model.parameters()).dtype
        # Megatron's distributed optimizer, which splits moments and float32 weights
        # over the data-parallel ranks, knows Adam only; SGD has no moments.
        distributed = layout.dp_size > 1 and settings.name == "adam"
        config = _step_config(model, layout, dtype)
        with on_this_device():
            self.ddp = _data_parallel(config, model, layout, distributed)
            config.no_sync_func = self.ddp.no_sync
            config.finalize_model_grads_func = finalize_model_grads
            chained = get_megatron_optimizer(
                _optimizer_config(settings, dtype, distributed),
                [self.ddp],
                config_overrides=_no_decay(model, settings),
                use_gloo_process_groups=False,
            )
        (self.optimizer,) = chained.chained_optimizers
        if self._gathers_late:
            # From an update until the gathers are through, a rank has old values of
            # the others' shards. Modules wait before their forward; whoever reads all
            # of the weights, to save or to replace them, takes them from here.
            model.register_state_dict_pre_hook(lambda *_: self._finish_gathering())
            # Loaded, they are the same everywhere: not to be gathered at a forward,
            # which not all ranks may have before the first update.
            for group in self.ddp.bucket_groups:
                group.param_gather_dispatched = True
        self.adapter = OptimizerAdapter(self)

    def forward_backward(
        self, batches: list[Any], loss_func: Callable[[nn.Module, Any], Tensor]
    ) -> Tensor:
        """Gradients of one optimizer step, reduced and ready for clipping.

        Args:
            batches: its micro-batches.
            loss_func: model and micro-batch -> its part of the step's loss, scaled so
                that the mean over data-parallel ranks of the sum over micro-batches is
                the loss.

        Returns:
            The sum of this rank's losses, detached.
        """
        num = len(batches)

        def forward(data: Iterator[Any], model: nn.Module) -> tuple[Tensor, Any]:
            # Megatron's schedule takes the mean over micro-batches: we want the sum.
            return loss_func(model, next(data)), lambda x: (x * num, x.detach())

        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        with on_this_device():
            losses = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter(batches),
                model=self.ddp,
                num_microbatches=num,
                seq_length=0,
                micro_batch_size=0,
            )
            self.optimizer.prepare_grads()
        return torch.stack(losses).sum()

    def grad_norm(self) -> float | Tensor:
        """L2 norm over the whole model, each shard and each replica counted once.

        With Transformer Engine Megatron-Core leaves it on the device.
        """
        with on_this_device():
            return self.optimizer.get_grad_norm()

    def clip_grad_norm(self, max_norm: float) -> float | Tensor:
        """Scale the gradients down to ``max_norm``; returns the norm before."""
        with on_this_device():
            return self.optimizer.clip_grad_norm(max_norm)

    def update(self) -> None:
        """Step the optimizer; with the distributed one, gather the new weights."""
        with on_this_device():
            self.optimizer.step_with_ready_grads()
            if self._gathers_late:
                self._start_gathering()

    @property
    def _gathers_late(self) -> bool:
        return self.ddp.ddp_config.overlap_param_gather

    def _start_gathering(self) -> None:
        # All here, and not each bucket's before the forward that needs it: of what
        # ranks do next, not all have the same to do, and a group's collectives must
        # have one order. The last bucket has the first layers.
        for group in reversed(self.ddp.bucket_groups):
            group.start_param_sync()

    def _finish_gathering(self) -> None:
        for group in self.ddp.bucket_groups:
            if group.param_gather_handle is not None:  # else it would gather again
                group.start_param_sync(force_sync=True)

    # ---- State of the optimizer, one file a rank ----

    def save_optimizer(self, folder: str | os.PathLike) -> None:
        """Write this rank's part: moments and float32 weights. Atomic."""
        path = _optimizer_path(folder, self.layout)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "format": _FORMAT,
            "layout": self.layout.describe(),
            "inner": self.optimizer.optimizer.state_dict(),
            "main": [[p.detach() for p in group] for group in self._main_groups()],
        }
        with replacing(path) as partial:
            torch.save(state, partial)

    def load_optimizer(self, folder: str | os.PathLike) -> None:
        """Read this rank's part back.

        Raises:
            FileError: it was written under another layout, or not at all.
        """
        path = _optimizer_path(folder, self.layout)
        if not path.is_file():
            others = sorted(Path(folder).glob("megatron_optimizer_*.pt"))
            raise FileError(
                f"{path}: not found; this run is {self.layout.describe()}, the folder "
                f"has {[p.name for p in others]}. Optimizer state is resumed at the "
                "layout that wrote it: launch with the same tensor_parallel_size and "
                "number of processes, or start a new run with base_model set to this "
                "checkpoint, whose weights any layout reads."
            )
        device = next(self.ddp.parameters()).device
        state = torch.load(path, map_location=device, weights_only=True)
        check_format(path, state.get("format"), _FORMAT)
        if state["layout"] != self.layout.describe():
            raise FileError(
                f"{path}: written under {state['layout']}, this run is "
                f"{self.layout.describe()}. Launch with that layout, or start a new "
                "run with base_model set to this checkpoint."
            )
        self.optimizer.optimizer.load_state_dict(state["inner"])
        with torch.no_grad():
            for group, saved in zip(self._main_groups(), state["main"], strict=True):
                for parameter, value in zip(group, saved, strict=True):
                    parameter.copy_(value)

    def _main_groups(self) -> list[list[Tensor]]:
        """Float32 copies of half-precision parameters (of their shards)."""
        for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
            if hasattr(self.optimizer, name):
                return getattr(self.optimizer, name)
        return []


class OptimizerAdapter(torch.optim.Optimizer):
    """Megatron's optimizer where the Trainer and its scheduler want torch's."""

    def __init__(self, step: MegatronStep) -> None:
        # Not super().__init__: parameters and state are Megatron's.
        self._step = step
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self._step.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self._step.optimizer.optimizer.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._step.update()

    def zero_grad(self, set_to_none: bool = True) -> None:
        # At the start of the next step, with the gradient buffer.
        pass

    # The real state is saved rank by rank; accelerate moves this one between devices.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def _optimizer_path(folder: str | os.PathLike, layout: Layout) -> Path:
    name = f"megatron_optimizer_tp{layout.tp_rank}_dp{layout.dp_rank}.pt"
    return Path(folder) / name


def can_overlap(layout: Layout) -> bool:
    """Whether collectives of the data-parallel group run beside the computation.

    On a CPU they would take its cores from it; of one rank there is nothing to reduce.
    Every trainable parameter must then get a gradient in every step, if of zeros.
    """
    return layout.dp_size > 1 and torch.accelerator.is_available()


def _bucket_size(layout: Layout) -> int:
    """Parameters whose gradients are reduced at once. Megatron-Core's default."""
    return max(40_000_000, 1_000_000 * layout.dp_size)


def _data_parallel(
    config: TransformerConfig,
    model: PreTrainedModel,
    layout: Layout,
    distributed: bool,
) -> DistributedDataParallel:
    overlap = can_overlap(layout)
    ddp_config = DistributedDataParallelConfig(
        # Half-precision gradients of many micro-batches and ranks lose their tail.
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        bucket_size=_bucket_size(layout),
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed,
        # The gathers are started by MegatronStep.update, not by each other's end.
        align_param_gather=True,
    )
    wrapped = _Wrapped(config, model)
    parts: dict[str, Any] = {}
    if distributed:
        # Of every bucket each rank has a part in its optimizer. Megatron's own choice
        # is a single one where nothing overlaps: a checkpoint's optimizer would depend
        # on that.
        parts["full_param_layout"] = DistributedOptimizer.compute_full_param_layout(
            [p for p in wrapped.parameters() if p.requires_grad],
            ddp_config.bucket_size,
            layout.dp_size,
            ddp_config,
        )
    return DistributedDataParallel(config, ddp_config, wrapped, **parts)


def _step_config(
    model: PreTrainedModel, layout: Layout, dtype: torch.dtype
) -> TransformerConfig:
    text = model.config
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        ffn_hidden_size=text.intermediate_size,
        tensor_model_parallel_size=layout.tp_size,
        # To finalize_model_grads it says: sum the marked parameters' gradients. The
        # layers have configs of their own.
        sequence_parallel=partial_gradients(model),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
    )


def _optimizer_config(
    settings: OptimizerSettings, dtype: torch.dtype, distributed: bool
) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer=settings.name,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        sgd_momentum=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
    )


def _no_decay(model: nn.Module, settings: OptimizerSettings) -> dict[ParamKey, Any]:
    """The trainer's choice of decayed parameters; Megatron's own differs from it."""
    spared = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if name not in settings.decayed
    }
    key = ParamKey(
        with_name_predicate=ParamWithNamePredicate(
            name="no_decay", fn=lambda parameter, _: id(parameter) in spared
        )
    )
    return {key: {"weight_decay": 0.0}}
