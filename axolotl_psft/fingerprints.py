"""What tells two models, tokenizers or data sets apart: named values, small and cheap.

What is too large for a file's header is a digest of a spread of it.
"""

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from axolotl_psft.dataset import is_stream
from axolotl_psft.files import short_digest

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

_VALUES_PER_TENSOR = 32

_NUM_ROWS = 256


def tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Of a tokenizer: special tokens, and a digest of the whole vocabulary."""
    if tokenizer is None:
        return {}
    vocabulary = tokenizer.get_vocab()
    entries = (f"{token}\0{vocabulary[token]}\0" for token in sorted(vocabulary))
    return {
        "tokenizer: special tokens": plain(tokenizer.special_tokens_map),
        "tokenizer: vocabulary": short_digest(
            len(vocabulary), ["".join(entries).encode()]
        ),
    }


def model(model: nn.Module) -> dict[str, Any]:
    """Of a model: its config and its adapter's, and the weights no checkpoint holds.

    Those of a full model are in its checkpoints; the weights under an adapter are not.
    """
    values = _config("base_model", model.config)  # type: ignore[arg-type]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    names = "\0".join(sorted(trained)).encode()
    values["trained parameters"] = short_digest(len(trained), [names])
    adapters = getattr(model, "peft_config", None)
    if adapters:
        for adapter in adapters.values():
            values |= _config("adapter", adapter)
        values["base_model: frozen weights"] = _frozen(model)
    return values


def _config(prefix: str, config: Any) -> dict[str, Any]:
    values = config.to_dict()
    return {
        f"{prefix}: {key}": plain(values[key])
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
    return short_digest(len(names), ["\0".join(names).encode(), bits])


def _some_values(parameter: Tensor) -> Tensor:
    flat = parameter.detach().flatten()
    stride = max(1, len(flat) // _VALUES_PER_TENSOR)
    return flat[::stride][:_VALUES_PER_TENSOR].float()


def plain(value: Any) -> Any:
    """As it comes back from JSON; sets in order."""

    def other(value: Any) -> Any:
        return sorted(map(str, value)) if isinstance(value, set) else str(value)

    return json.loads(json.dumps(value, default=other, sort_keys=True))


def samples(dataset: Any) -> dict[str, Any]:
    """Of tokenized samples: how many, the length of each, a spread of their contents.

    Args:
        dataset: with ``input_ids`` and ``labels``; of a stream nothing is known.
    """
    if is_stream(dataset):
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
        "datasets: contents": short_digest(num, contents),
        "datasets: order": None if lengths is None else short_digest(num, [lengths]),
    }


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
