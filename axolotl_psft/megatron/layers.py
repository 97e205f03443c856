"""Hugging Face modules -> Megatron-Core parallel layers, by the model's own tp plan.

A block (attention, MLP) takes hidden states that all ranks of a tp group hold, splits
its heads or columns over them and sums the results. Collectives of one block: one
all-reduce in forward (its last layer) and one in backward (its entrance); with
sequence parallelism an all-gather and a reduce-scatter in their place, and the hidden
states between blocks are 1/tp of the tokens. Embedding: one all-reduce. What becomes
of the head's weight is in logprobs.py; reading and writing weights is in weights.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from axolotl_psft.megatron.groups import Layout, on_this_device
from axolotl_psft.megatron.plan import (
    COLUMN,
    EMBEDDING,
    PARTIAL_GRAD,
    ROW,
    check_model,
    pattern,
    styles_of,
)
from axolotl_psft.token_logprobs import LogprobsHead


def parallelize(
    model: PreTrainedModel,
    layout: Layout,
    *,
    dtype: torch.dtype,
    device: torch.device,
    sequence_parallel: bool = False,
) -> None:
    """Replace the model's modules in place; weights are allocated, not read.

    Args:
        model: on the meta device, so that nothing is ever whole.
        layout: this rank's place.
        dtype: of parameters.
        device: of parameters.
        sequence_parallel: split the hidden states between blocks along the sequence.

    Raises:
        ValueError: a module of the plan is not a plain Linear or Embedding.
    """
    check_model(model.config, layout.tp_size)
    make = _Factory(layout, dtype, device, sequence_parallel)
    styles = styles_of(model)
    blocks: dict[str, None] = {}
    for name, module in list(model.named_modules()):
        style = styles.get(pattern(name))
        if style == COLUMN:
            model.set_submodule(name, make.column(name, module))
            blocks[name.rpartition(".")[0]] = None
        elif style == ROW:
            model.set_submodule(name, make.row(name, module))
        elif style == EMBEDDING:
            model.set_submodule(name, make.embedding(name, module))
    model.set_output_embeddings(make.head("lm_head", model.get_output_embeddings()))
    _materialize(model, device, dtype)
    if model.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    _mark_partial_gradients(model, styles, sequence_parallel)

    sequence = _Sequence(layout) if sequence_parallel else None
    for name in blocks:
        block = model.get_submodule(name)
        _enter_block(block, layout, sequence)
        _split_dropout(block, layout)
    if sequence is not None:
        sequence.install(model.base_model)


class ColumnLinear(ColumnParallelLinear):
    """Output features split; takes and returns a tensor, as nn.Linear does."""

    get_extra_state = nn.Module.get_extra_state

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class RowLinear(RowParallelLinear):
    """Input features split, results summed over the ranks."""

    get_extra_state = nn.Module.get_extra_state
    sequence: "_Sequence | None" = None

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence is None:
            return super().forward(x)[0]
        return self.sequence.tokens_last(super().forward(self.sequence.tokens_first(x)))


class Head(LogprobsHead, ColumnParallelLinear):
    """lm_head with its vocabulary shard; log-probs never need the whole.

    Called with hidden states alone it returns all logits, for inference.
    """

    get_extra_state = nn.Module.get_extra_state

    def forward(  # type: ignore[override]
        self, x: Tensor, targets: Tensor | None = None, **options: Any
    ) -> Any:
        if targets is not None:
            return self.logprobs(x, targets, **options)
        with on_this_device():  # generation comes here without the step's
            return super().forward(x)[0]


class Embedding(VocabParallelEmbedding):
    """Vocabulary split; the padding id's row gets no gradient, as in nn.Embedding."""

    padding_idx: int | None = None

    def forward(self, ids: Tensor) -> Tensor:
        output = super().forward(ids)
        if self.padding_idx is None:
            return output
        return torch.where(
            (ids == self.padding_idx)[..., None], output.detach(), output
        )


class _Factory:
    """Makes parallel layers, allocated but not initialized."""

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        sequence_parallel: bool,
    ) -> None:
        self.sequence_parallel = sequence_parallel
        self.group = layout.tp_group
        self.options = {
            "tensor_model_parallel_size": layout.tp_size,
            "params_dtype": dtype,
            "perform_initialization": False,
            "use_cpu_initialization": device.type == "cpu",
        }

    def _config(self, sequence_parallel: bool = False) -> ModelParallelConfig:
        return ModelParallelConfig(**self.options, sequence_parallel=sequence_parallel)

    def column(self, name: str, linear: Any) -> ColumnLinear:
        # The entrance of the block sums the gradients of all its columns at once.
        options = {"gather_output": False, "disable_grad_reduce": True}
        return self._linear(ColumnLinear, name, linear, self._config(), **options)

    def row(self, name: str, linear: Any) -> RowLinear:
        config = self._config(self.sequence_parallel)
        options = {"input_is_parallel": True, "skip_bias_add": False}
        return self._linear(RowLinear, name, linear, config, **options)

    def head(self, name: str, linear: Any) -> Head:
        return self._linear(Head, name, linear, self._config(), gather_output=True)

    def _linear(
        self,
        kind: type[nn.Module],
        name: str,
        linear: Any,
        config: ModelParallelConfig,
        **options: Any,
    ) -> Any:
        _expect(name, linear, nn.Linear)
        return kind(
            linear.in_features,
            linear.out_features,
            config=config,
            init_method=_leave,
            bias=linear.bias is not None,
            tp_group=self.group,
            **options,
        )

    def embedding(self, name: str, module: Any) -> Embedding:
        _expect(name, module, nn.Embedding)
        layer = Embedding(
            module.num_embeddings,
            module.embedding_dim,
            config=self._config(),
            init_method=_leave,
            tp_group=self.group,
        )
        layer.padding_idx = module.padding_idx
        return layer


def _leave(weight: Tensor) -> Tensor:
    return weight


def _expect(name: str, module: nn.Module, kind: type[nn.Module]) -> None:
    if type(module) is not kind:
        raise ValueError(
            f"tensor_parallel_size: {name} is a {type(module).__name__}, not a plain "
            f"{kind.__name__}, and cannot be split. Set tensor_parallel_size: 1, and "
            "look for an option that replaces or quantizes it."
        )


def _materialize(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> None:
    """Allocate what is still on the meta device; compute what no checkpoint holds."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                empty = torch.empty_like(parameter, device=device, dtype=dtype)
                module._parameters[name] = nn.Parameter(
                    empty, requires_grad=parameter.requires_grad
                )
        buffers = {n: b for n, b in module._buffers.items() if b is not None}
        if any(buffer.is_meta for buffer in buffers.values()):
            for name, buffer in buffers.items():
                module._buffers[name] = torch.empty_like(buffer, device=device)
            model._init_weights(module)  # rotary frequencies


def _mark_partial_gradients(
    model: PreTrainedModel, styles: dict[str, str], sequence_parallel: bool
) -> None:
    """Mark replicated parameters whose gradient each rank holds a part of.

    Megatron's finalize_model_grads sums those over the tp group, in one collective;
    `sequence_parallel` is its name for the mark.
    """
    for name, module in model.named_modules():
        partial = styles.get(pattern(name)) == PARTIAL_GRAD
        for parameter in module.parameters(recurse=False):
            is_shard = getattr(parameter, "tensor_model_parallel", False)
            if not is_shard and (partial or sequence_parallel):
                parameter.sequence_parallel = True  # type: ignore[attr-defined]


def partial_gradients(model: nn.Module) -> bool:
    """Whether any parameter carries the mark."""
    return any(getattr(p, "sequence_parallel", False) for p in model.parameters())


def _before(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Let ``change`` see the hidden states before ``module`` does."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if "hidden_states" in kwargs:
            hidden = change(kwargs["hidden_states"])
            return args, {**kwargs, "hidden_states": hidden}
        return (change(args[0]), *args[1:]), kwargs

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _enter_block(
    block: nn.Module, layout: Layout, sequence: "_Sequence | None"
) -> None:
    """Let a block's hidden states enter it once for all of its column layers."""

    def enter(hidden: Tensor) -> Tensor:
        if sequence is not None:
            return sequence.gather(hidden)
        return copy_to_tensor_model_parallel_region(hidden, group=layout.tp_group)

    _before(block, enter)
    if sequence is not None:
        for layer in block.modules():
            if isinstance(layer, RowLinear):
                layer.sequence = sequence


class _Sequence:
    """Hidden states [B, S, H] of all tokens <-> this rank's part of the tokens.

    A sequence that the group does not divide is filled up with zeros, which no block
    sees.
    """

    def __init__(self, layout: Layout) -> None:
        self.group, self.size = layout.tp_group, layout.tp_size
        self.length = 0

    def install(self, base: Any) -> None:
        if not hasattr(base, "layers") or not hasattr(base, "norm"):
            raise ValueError(
                f"psft.sequence_parallel: a {type(base).__name__} has no `layers` and "
                "`norm` between which to split its tokens. Set it to false."
            )

        def join(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return self.gather(output, whole_gradient=True)

        # Not at the embedding: the causal mask is made for all tokens.
        _before(base.layers[0], self.scatter)
        base.norm.register_forward_hook(join)

    def tokens_first(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [S', B, H], S' a multiple of the group's size."""
        fill = -x.shape[1] % self.size
        return F.pad(x.transpose(0, 1), (0, 0, 0, 0, 0, fill)).contiguous()

    def tokens_last(self, output: tuple[Tensor, Any]) -> Tensor:
        return output[0].transpose(0, 1)

    def scatter(self, hidden: Tensor) -> Tensor:
        self.length = hidden.shape[1]
        x = scatter_to_sequence_parallel_region(
            self.tokens_first(hidden), group=self.group
        )
        return x.transpose(0, 1)

    def gather(self, hidden: Tensor, whole_gradient: bool = False) -> Tensor:
        """``whole_gradient``: each rank's gradient is that of the whole, not a part."""
        x = gather_from_sequence_parallel_region(
            hidden.transpose(0, 1).contiguous(),
            tensor_parallel_output_grad=not whole_gradient,
            group=self.group,
        )
        return x[: self.length].transpose(0, 1)


def _split_dropout(block: nn.Module, layout: Layout) -> None:
    """Draw another dropout mask for each rank's heads, and the same at recomputation.

    The seed is drawn from the default generator, which ranks of a group share: so all
    dropout outside of blocks agrees, and activation checkpointing, which restores that
    generator, repeats the mask.
    """
    if not getattr(block, "attention_dropout", 0.0):
        return
    original: Callable[..., Any] = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return original(*args, **kwargs)
        seed = int(torch.randint(2**48, ()))
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed * layout.tp_size + layout.tp_rank)
            return original(*args, **kwargs)

    block.forward = forward  # type: ignore[method-assign]
