"""What a checkpoint's run and the one that resumes it must have in common.

Named values, small enough for a file's header and cheap for any size of model and data:
what is too large is a digest of a spread of it. Comparing them is old_policy.py.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# By the YAML's key: what decides the order of the data and where a step's data end.
_ORDER = {
    "seed": "seed",
    "sequence_len": "max_seq_length",
    "sample_packing": "sample_packing",
    "sample_packing_sequentially": "sample_packing_sequentially",
    "sample_packing_bin_size": "sample_packing_bin_size",
    "sample_packing_group_size": "sample_packing_group_size",
    "multipack_real_batches": "multipack_real_batches",
    "curriculum_sampling": "curriculum_sampling",
    "balance_labels": "balance_labels",
    "label_balance_window_optim_steps": "label_balance_window_optim_steps",
    "group_by_length": "train_sampling_strategy",
    "dataloader_drop_last": "dataloader_drop_last",
}

# Another number of processes may share a global batch out otherwise.
_BATCHING = {
    "micro_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}

# Of a model's or an adapter's config: where it came from and how it is computed.
_UNLIKE = {
    "architectures",
    "auto_mapping",
    "base_model_name_or_path",
    "dtype",
    "inference_mode",
    "peft_version",
    "revision",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}

_NUM_ROWS = 256
_VALUES_PER_TENSOR = 32


def order(args: Any) -> dict[str, Any]:
    """Settings of the data order, by the YAML's keys; of the trainer's arguments."""
    return {key: _plain(getattr(args, name, None)) for key, name in _ORDER.items()}


def batching(args: Any) -> dict[str, Any]:
    """How an optimizer step's samples are shared out, by the YAML's keys."""
    return {key: _plain(getattr(args, name)) for key, name in _BATCHING.items()}


def tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Of a tokenizer: special tokens, and a digest of the whole vocabulary."""
    if tokenizer is None:
        return {}
    vocabulary = tokenizer.get_vocab()
    entries = (f"{token}\0{vocabulary[token]}\0" for token in sorted(vocabulary))
    return {
        "tokenizer: special tokens": _plain(tokenizer.special_tokens_map),
        "tokenizer: vocabulary": _digest(len(vocabulary), ["".join(entries).encode()]),
    }


def model(model: nn.Module) -> dict[str, Any]:
    """Of a model: its config and its adapter's, and the weights no checkpoint holds.

    Those of a full model are in its checkpoints; the weights under an adapter are not.
    """
    values = _config("base_model", model.config)  # type: ignore[arg-type]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    names = "\0".join(sorted(trained)).encode()
    values["trained parameters"] = _digest(len(trained), [names])
    adapters = getattr(model, "peft_config", None)
    if adapters:
        for adapter in adapters.values():
            values |= _config("adapter", adapter)
        values["base_model: frozen weights"] = _frozen(model)
    return values


def data(dataset: Any) -> dict[str, Any]:
    """Of tokenized samples: how many, the length of each, a spread of their contents.

    Args:
        dataset: with ``input_ids`` and ``labels``; of a stream nothing is known.
    """
    if not hasattr(dataset, "__len__"):
        return {}
    num = len(dataset)
    spread = np.unique(np.linspace(0, num - 1, _NUM_ROWS).astype(int)).tolist()
    rows = (dataset[index] for index in spread)
    contents = (
        np.asarray(row[name], dtype=np.int64).tobytes() + b"\0"
        for row in rows
        for name in ("input_ids", "labels")
    )
    lengths = _lengths(dataset)
    return {
        "datasets: contents": _digest(num, contents),
        "datasets: order": None if lengths is None else _digest(num, [lengths]),
    }


def _config(prefix: str, config: Any) -> dict[str, Any]:
    values = config.to_dict()
    return {
        f"{prefix}: {key}": _plain(values[key])
        for key in sorted(values, key=lambda key: (key != "model_type", key))
        if key not in _UNLIKE and not key.startswith("_")
    }


def _frozen(model: nn.Module) -> str:
    """Digest of a few values of every frozen parameter.

    Not of quantized ones: those bytes depend on the device that quantized.
    """
    values = []
    names = []
    for name, parameter in sorted(model.named_parameters()):
        is_there = parameter.numel() and not parameter.is_meta
        if parameter.requires_grad or not parameter.is_floating_point() or not is_there:
            continue
        names.append(name)
        values.append(_some_values(parameter))
    # One transfer from the device.
    bits = torch.cat(values).cpu().numpy().tobytes() if values else b""
    return _digest(len(names), ["\0".join(names).encode(), bits])


def _some_values(parameter: Tensor) -> Tensor:
    flat = parameter.detach().flatten()
    stride = max(1, len(flat) // _VALUES_PER_TENSOR)
    return flat[::stride][:_VALUES_PER_TENSOR].float()


def _lengths(dataset: Any) -> bytes | None:
    """The number of tokens of each row, without reading the tokens; None: unknown.

    Arrow keeps where each row begins, and that is all that is read.
    """
    table = getattr(dataset, "data", None)
    if table is None:
        return None
    chunks = table.column("input_ids").chunks
    if not all(hasattr(chunk, "offsets") for chunk in chunks):
        return None
    lengths = np.concatenate([np.diff(chunk.offsets.to_numpy()) for chunk in chunks])
    # Rows that were selected or shuffled are an index over the table.
    chosen = getattr(dataset, "_indices", None)
    if chosen is not None:
        lengths = lengths[chosen.column(0).to_numpy()]
    return lengths.astype(np.int32).tobytes()


def _digest(num: int, parts: Iterable[bytes]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return f"{num:,} with digest {sha.hexdigest()[:16]}"


def _plain(value: Any) -> Any:
    """As it comes back from JSON; sets in order."""

    def other(value: Any) -> Any:
        return sorted(map(str, value)) if isinstance(value, set) else str(value)

    return json.loads(json.dumps(value, default=other, sort_keys=True))
