"""Which modules of a Hugging Face model are split, and how: its own tp plan.

And which models cannot be, before any weight is read. How a module is split is in
layers.py.
"""

import re
from typing import Any

from transformers import PreTrainedModel

TESTED_MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral")

COLUMN, ROW, EMBEDDING = "colwise", "rowwise", "embedding_rowwise"
# A parameter that every rank holds whole and uses on its own heads only.
PARTIAL_GRAD = "replicated_with_grad_allreduce"
_STYLES = (COLUMN, ROW, EMBEDDING, PARTIAL_GRAD)


def check_model(config: Any, tp_size: int) -> None:
    """Refuse a model that cannot be split, before any weight is read.

    Args:
        config: the model's Hugging Face config.
        tp_size: tensor_parallel_size.

    Raises:
        ValueError: names what does not fit, its value and the remedy.
    """
    name = f"tensor_parallel_size: {tp_size} with a {config.model_type} model"
    if getattr(config, "text_config", None) is not None:
        raise ValueError(f"{name}: multimodal models are not supported. Set it to 1.")
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise ValueError(
            f"{name}: its config has no base_model_tp_plan, so nobody says how to "
            f"split it. Set it to 1, or use one of {', '.join(TESTED_MODEL_TYPES)}."
        )
    for pattern, style in plan.items():
        if style not in _STYLES:
            raise ValueError(
                f"{name}: its plan splits {pattern} as {style!r} (mixture of experts, "
                "or a fused projection), which is not supported. Set it to 1."
            )
    for key in (
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    ):
        size = getattr(config, key, None)
        if size is not None and size % tp_size:
            remedy = "use a tensor_parallel_size that does"
            if key == "vocab_size":
                remedy = "pad the checkpoint's: resize_token_embeddings"
            raise ValueError(f"{name}: it does not divide {key}: {size}; {remedy}.")


def styles_of(model: PreTrainedModel) -> dict[str, str]:
    """How modules are split, by the patterns of their names (:func:`pattern`)."""
    prefix = model.base_model_prefix
    plan = model.config.base_model_tp_plan or {}
    styles = {f"{prefix}.{pattern}": style for pattern, style in plan.items()}
    # Not in every plan.
    styles[f"{prefix}.embed_tokens"] = EMBEDDING
    return styles


def pattern(name: str) -> str:
    """A module's name as tp plans write it: layers.3.mlp -> layers.*.mlp."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
