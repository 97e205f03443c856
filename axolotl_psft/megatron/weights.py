"""Sharded weights: read slices from safetensors files, write Hugging Face files.

No rank ever holds the whole model: reading takes this rank's slices only, writing
gathers it on the first rank file by file, in CPU memory; that rank's device holds a few
rows of one tensor besides its shards.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from axolotl_psft.files import replacing
from axolotl_psft.megatron.groups import Layout
from axolotl_psft.ranks import is_first_rank

# What transformers writes by default: the most that one rank gathers at a time.
MAX_SHARD_SIZE = "5GB"

# The most that the first rank's device holds of all ranks' rows while it gathers.
GATHERED_BYTES = 64 * 2**20


def load_weights(
    model: nn.Module, source: str | os.PathLike, layout: Layout, **hub: Any
) -> None:
    """Fill the model's parameters with this rank's slices of a checkpoint.

    Args:
        model: with parallel layers (layers.py).
        source: a folder or a hub id, with safetensors files.
        layout: this rank's place.
        **hub: ``revision``, ``token`` and the like for a hub id.

    Raises:
        ValueError: no safetensors files, a tensor is missing, or its shape differs.
    """
    files = _files(source, **hub)
    wanted = _tensors(model)
    where: dict[str, Path] = {}
    for path in files:
        with safetensors.safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    missing = sorted(wanted.keys() - where.keys())
    if missing:
        raise ValueError(
            f"{source}: {len(missing)} tensors of {type(model).__name__} are not in "
            f"its safetensors files, the first is {missing[0]}. Is it a checkpoint of "
            "this model type?"
        )
    progress = tqdm(
        sorted(wanted, key=lambda name: where[name]),
        desc="Reading weight slices",
        disable=not is_first_rank(),
    )
    opened: Path | None = None
    for name in progress:
        if where[name] != opened:  # sorted by file: each is opened once
            opened = where[name]
            file = safetensors.safe_open(opened, framework="pt")
        _read(wanted[name], file.get_slice(name), f"{source}: {name}", layout)


@torch.no_grad()
def _read(tensor: Tensor, stored: Any, name: str, layout: Layout) -> None:
    dim, shape = partition_dim(tensor), list(stored.get_shape())
    if shape != _whole_shape(tensor, layout):
        raise ValueError(
            f"{name} is {shape} in the checkpoint and {_whole_shape(tensor, layout)} in"
            " the model. Was the vocabulary resized, or is it another model?"
        )
    if dim is None:
        tensor.copy_(stored[...])
        return
    start = layout.tp_rank * tensor.shape[dim]
    part = slice(start, start + tensor.shape[dim])
    tensor.copy_(stored[part] if dim == 0 else stored[:, part])


def save_weights(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    layout: Layout,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write the whole model as Hugging Face safetensors files, config included.

    Every rank must call it. Rank 0 writes; it holds one file's tensors at a time.
    """
    tensors = _tensors(model)
    whole = {
        name: torch.empty(_whole_shape(t, layout), dtype=t.dtype, device="meta")
        for name, t in tensors.items()
    }
    plan = split_torch_state_dict_into_shards(whole, max_shard_size=max_shard_size)
    is_writer = is_first_rank()
    folder = Path(folder)
    if is_writer:
        _write_configs(model, folder)
    if layout.dp_rank == 0:  # the other copies are the same
        for filename, names in plan.filename_to_tensors.items():
            gathered = {name: _gather(tensors[name], layout) for name in names}
            if is_writer:
                _write_file(folder / filename, gathered)
            del gathered  # before the next file's are
    if is_writer:
        _write_index(folder, plan)
    dist.barrier()


def _write_configs(model: PreTrainedModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _write_file(path: Path, gathered: dict[str, Tensor | None]) -> None:
    content = {k: v for k, v in gathered.items() if v is not None}
    with replacing(path) as partial:
        save_file(content, partial, metadata={"format": "pt"})


def _write_index(folder: Path, plan: Any) -> None:
    """The index, and no weight file of an earlier save beside it."""
    kept = set(plan.filename_to_tensors)
    for path in folder.glob("model*.safetensors"):
        if path.name not in kept:
            path.unlink()
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not plan.is_sharded:
        index.unlink(missing_ok=True)
        return
    content = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _gather(tensor: Tensor, layout: Layout) -> Tensor | None:
    """The whole tensor on rank 0, in CPU memory; None elsewhere."""
    dim, local = partition_dim(tensor), tensor.detach()
    is_first = layout.tp_rank == 0
    if dim is None or layout.tp_size == 1:
        return local.cpu().contiguous().clone() if is_first else None
    shape = _whole_shape(tensor, layout)
    whole = torch.empty(shape, dtype=local.dtype) if is_first else None
    for start, rows in _in_chunks(local, layout):
        parts = _gather_rows(rows, layout)
        if whole is None:
            continue
        for shard, part in zip(whole.chunk(layout.tp_size, dim), parts, strict=True):
            shard[start : start + len(part)] = part
    return whole


def _in_chunks(local: Tensor, layout: Layout) -> Iterator[tuple[int, Tensor]]:
    """Rows of a shard and the first one's number; of all ranks GATHERED_BYTES."""
    row_bytes = local[0].numel() * local.element_size()
    num_rows = max(1, GATHERED_BYTES // (row_bytes * layout.tp_size))
    for start in range(0, len(local), num_rows):
        yield start, local[start : start + num_rows].contiguous()


def _gather_rows(rows: Tensor, layout: Layout) -> list[Tensor]:
    """What each rank gave, on rank 0's device; elsewhere nothing."""
    is_first = layout.tp_rank == 0
    parts = [torch.empty_like(rows) for _ in range(layout.tp_size * is_first)]
    first = dist.get_global_rank(layout.tp_group, 0)
    dist.gather(rows, parts or None, dst=first, group=layout.tp_group)
    return parts


def partition_dim(tensor: Tensor) -> int | None:
    """The dimension a parameter is split along; None: every rank holds it whole."""
    is_shard = getattr(tensor, "tensor_model_parallel", False)
    return tensor.partition_dim if is_shard else None  # type: ignore[attr-defined]


def _whole_shape(tensor: Tensor, layout: Layout) -> list[int]:
    shape, dim = list(tensor.shape), partition_dim(tensor)
    if dim is not None:
        shape[dim] *= layout.tp_size
    return shape


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds, by name; of tied parameters the first."""
    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def _files(source: str | os.PathLike, **hub: Any) -> list[Path]:
    source = str(source)
    options = {**hub, "_raise_exceptions_for_missing_entries": False}
    single = cached_file(source, SAFE_WEIGHTS_NAME, **options)
    if single is not None:
        return [Path(single)]
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, **options)
    if index is None:
        raise ValueError(
            f"base_model: {source} has no safetensors files, and tensor parallelism "
            "reads slices of those. Save it once with transformers' save_pretrained."
        )
    _check_index(Path(index))
    paths, _ = get_checkpoint_shard_files(source, index, **hub)
    return [Path(path) for path in paths]


def _check_index(path: Path) -> None:
    """Refuse an index that is none, or names files elsewhere than beside it."""
    try:
        names = set(json.loads(path.read_text())["weight_map"].values())
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: no index of safetensors files: {error!r}. Save the model once "
            "more with transformers' save_pretrained."
        ) from error
    if outside:
        raise ValueError(
            f"{path}: names {min(outside)!r}, which is not a file beside it. Do not "
            "use this checkpoint, or save it once more with transformers' "
            "save_pretrained."
        )
