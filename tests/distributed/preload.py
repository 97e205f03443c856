"""What the processes of launch.py find imported: all that a run of Axolotl imports."""

import contextlib
import gc

import axolotl.cli.config
import axolotl.common.datasets
import axolotl.core.builders.causal
import axolotl.core.training_args
import axolotl.train  # noqa: F401

import axolotl_psft.trainer

with contextlib.suppress(ImportError):
    import axolotl_psft.megatron.trainer  # noqa: F401

# Axolotl collects garbage some twenty times a run, a second each over all of this.
gc.collect()
gc.freeze()
