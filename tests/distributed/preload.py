"""What the processes of launch.py find imported: all that a run of Axolotl imports."""

import contextlib
import gc
import importlib

import axolotl.cli.config
import axolotl.common.datasets
import axolotl.core.builders.causal
import axolotl.core.training_args
import axolotl.train  # noqa: F401

import axolotl_psft.trainer

with contextlib.suppress(ImportError):
    import axolotl_psft.megatron.trainer  # noqa: F401

# What a run imports on its way: half of what a short one takes.
for name in (
    "axolotl.core.trainers.diffusion_lm.sampling",
    "axolotl.integrations.kernels.plugin",
    "axolotl.model_support.native_adapters",
    "axolotl.model_support.native_packing",
    "axolotl.monkeypatch.deepspeed_utils",
    "axolotl.monkeypatch.models.recurrent_support",
    "axolotl.monkeypatch.moe_quant",
    "axolotl.monkeypatch.ring_attn.patch",
    "axolotl_psft.doctor.files",
    "deepspeed",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

# Axolotl collects garbage some twenty times a run, a second each over all of this.
gc.collect()
gc.freeze()
