"""TensorParallelEngine: what the plugin's hooks do with `tensor_parallel_size` > 1."""

import os
from typing import Any

from accelerate import PartialState
from axolotl.loaders.utils import load_model_config
from axolotl.utils.distributed import init_distributed_state
from axolotl.utils.logging import get_logger
from transformers import PreTrainedModel

from axolotl_psft.megatron import groups
from axolotl_psft.megatron.layers import parallelize
from axolotl_psft.megatron.plan import TESTED_MODEL_TYPES, check_model
from axolotl_psft.megatron.weights import load_weights, save_weights

LOG = get_logger(__name__)


class TensorParallelEngine:
    """The groups of a run whose model is split, and what becomes of the model.

    Args:
        layout: this rank's place.
    """

    def __init__(self, layout: groups.Layout) -> None:
        self.layout = layout
        self._is_saved = False

    @classmethod
    def prepare(cls, cfg: Any) -> "TensorParallelEngine":
        """Check layout and model, create the groups, have the model built hollow.

        Raises:
            ValueError: the processes or the model do not fit; nothing was loaded yet.
        """
        tp_size = cfg.psft_tensor_parallel_size
        groups.check_world_size(tp_size, int(os.environ.get("WORLD_SIZE", 1)))
        config = load_model_config(cfg)
        check_model(config, tp_size)
        if config.model_type not in TESTED_MODEL_TYPES:
            LOG.warning(
                f"tensor_parallel_size: {tp_size} is tested with "
                f"{', '.join(TESTED_MODEL_TYPES)}, not with {config.model_type}: "
                "compare the first losses with a run at tensor_parallel_size: 1."
            )
        init_distributed_state()
        timeout = float(cfg.ddp_timeout or 1800) / 60
        layout = groups.initialize(tp_size, timeout_minutes=timeout)
        # Axolotl counts every process as a data-parallel one.
        cfg.batch_size = cfg.batch_size // tp_size
        # transformers then builds the modules and reads no weight.
        cfg.device_map = {"": "meta"}
        return cls(layout)

    def build(self, cfg: Any, model: PreTrainedModel) -> None:
        """Split the model that Axolotl built and read this rank's slices."""
        device = PartialState().device
        parallelize(
            model,
            self.layout,
            dtype=cfg.torch_dtype,
            device=device,
            sequence_parallel=cfg.psft["sequence_parallel"],
        )
        source, revision = cfg.base_model, cfg.revision_of_model
        load_weights(model, source, self.layout, revision=revision)
        _guard_methods(model)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        LOG.info(f"psft: this rank holds {size:,.1f} million parameters on {device}.")

    def finish_loading(self, cfg: Any, model: PreTrainedModel) -> None:
        """One dtype for all parameters: Axolotl has made norms and embeddings float32.

        Under autocast that would be right; the parallel layers do not look at it.
        Nothing is lost, for the optimizer keeps float32 weights of its own.
        """
        for parameter in model.parameters():
            parameter.data = parameter.data.to(cfg.torch_dtype)

    def save(self, cfg: Any, model: Any) -> None:
        """Write the trained model, once; every rank must call it.

        Axolotl (0.19 to 0.21) calls the hook twice: after training, and when it has
        ended the process group, without which nothing can be gathered.
        """
        if self._is_saved:
            return
        LOG.info(f"psft: gathering the weights into {cfg.output_dir}.")
        save_weights(model, cfg.output_dir, self.layout)
        self._is_saved = True


def _guard_methods(model: Any) -> None:
    """Replace what one rank cannot do alone and Axolotl calls."""

    def save_pretrained(*args: Any, **kwargs: Any) -> None:
        LOG.info(
            "psft: sharded weights are written by all ranks together, at each "
            "checkpoint and after training; this call of one rank writes nothing."
        )

    def resize_token_embeddings(*args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "tensor_parallel_size: the tokenizer has more tokens than the model, whose "
            "embeddings are split already. Resize them once with transformers, save, "
            "and set base_model to the result."
        )

    def tie_weights(*args: Any, **kwargs: Any) -> None:
        """They are (layers.py); the stock one knows no parallel modules."""

    model.save_pretrained = save_pretrained
    model.resize_token_embeddings = resize_token_embeddings
    model.tie_weights = tie_weights
