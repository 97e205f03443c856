"""The Axolotl plugin: hooks only. Without a `psft:` block every hook does nothing.

Axolotl imports this file in every run where the package is installed, and goes on
without it where that fails: it imports nothing that could.
"""

from typing import TYPE_CHECKING, Any

from axolotl.integrations.base import BasePlugin, PluginManager
from axolotl.utils.logging import get_logger

if TYPE_CHECKING:
    from axolotl_psft.megatron.engine import TensorParallelEngine

LOG = get_logger(__name__)

# How `plugins:` may write it, beside `axolotl_psft.PSFTPlugin`.
_BARE_NAME = "axolotl_psft"


class PSFTPlugin(BasePlugin):
    """Proximal Supervised Fine-Tuning for Axolotl's causal-LM trainer."""

    # Of the training data, where all of it is local files.
    _num_rows = 0
    # In a tensor-parallel training run. Axolotl's other commands (inference, merging)
    # load the model of the same YAML whole.
    _engine: "TensorParallelEngine | None" = None

    def __init__(self) -> None:
        super().__init__()
        # Axolotl makes this plugin of its entry point, under the dotted name, before it
        # resolves the names in `plugins:`, and leaves alone those that it knows: of the
        # bare one it could make nothing. It stands for a plugin without hooks, so that
        # ours run once however it was written.
        PluginManager().plugins.setdefault(_BARE_NAME, BasePlugin())

    def get_input_args(self) -> str:
        return "axolotl_psft.config.PSFTArgs"

    def register(self, cfg: Any) -> None:
        if cfg.get("psft") is None:
            return
        import torch

        from axolotl_psft import checkpoints

        if not torch.accelerator.is_available():
            from axolotl_psft.cpu import run

            run.let_ranks_start()
        # Before Axolotl writes its log there: the first hook of its command line.
        if cfg.get("output_dir"):
            checkpoints.check_writable(cfg["output_dir"])

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        # Nothing to load: this is the last hook before Axolotl reads the data, the
        # device map and the attention implementation.
        if not cfg.psft:
            return
        self._engine = None
        if cfg.device == "cpu":
            from axolotl_psft.cpu import run

            run.prepare(cfg)
        else:
            from axolotl_psft import attention

            attention.choose(cfg)
        from axolotl_psft import checkpoints
        from axolotl_psft.doctor import files

        report = files.check_once(cfg)
        self._num_rows = report.num_rows
        for note in report.notes:
            LOG.warning(f"psft: {note}")
        if preprocess:
            return
        checkpoints.choose(cfg)
        if cfg.psft_tensor_parallel_size:
            from axolotl_psft.megatron.engine import TensorParallelEngine

            self._engine = TensorParallelEngine.prepare(cfg)

    def pre_model_load(self, cfg: Any) -> None:
        names = {_BARE_NAME, f"{_BARE_NAME}.{type(self).__name__}"}
        if not cfg.psft and names & set(cfg.plugins or ()):
            LOG.warning(
                "plugins lists axolotl_psft but there is no `psft:` block: this run is "
                "plain SFT. Add `psft: {}` for Proximal SFT with the defaults."
            )

    def post_model_build(self, cfg: Any, model: Any) -> None:
        if self._engine:
            self._engine.build(cfg, model)

    def post_model_load(self, cfg: Any, model: Any) -> None:
        if self._engine:
            self._engine.finish_loading(cfg, model)

    def post_train(self, cfg: Any, model: Any) -> None:
        if self._engine:
            self._engine.save(cfg, model)

    def get_trainer_cls(self, cfg: Any) -> type | None:
        if not cfg.psft:
            return None
        if cfg.psft_tensor_parallel_size:
            from axolotl_psft.megatron.trainer import MegatronPSFTTrainer

            return MegatronPSFTTrainer
        from axolotl_psft.trainer import PSFTTrainer

        return PSFTTrainer

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if not cfg.psft:
            return
        from axolotl_psft.config import PSFTConfig
        from axolotl_psft.trainer import PSFTTrainer

        if not isinstance(trainer, PSFTTrainer):
            raise ValueError(
                f"plugins: {list(cfg.plugins or ())} gave a {type(trainer).__name__}: "
                "another plugin brings its own trainer, and a psft block needs "
                "PSFTTrainer. Remove that plugin or the psft block."
            )
        trainer.psft = PSFTConfig(**cfg.psft)
        if self._engine:
            trainer.split_over(self._engine.layout)
        self._report_left_out(cfg, trainer)

    def _report_left_out(self, cfg: Any, trainer: Any) -> None:
        """Say how many rows are no samples: Axolotl drops them without a word."""
        from axolotl_psft.dataset import is_stream

        if is_stream(trainer.train_dataset):
            return
        num_samples = len(trainer.train_dataset)
        if cfg.val_set_size and trainer.eval_dataset is not None:
            num_samples += len(trainer.eval_dataset)
        # Some prompt strategies make several samples of a row.
        if 0 < num_samples < self._num_rows:
            LOG.warning(
                f"psft: {self._num_rows:,} rows in the data files, {num_samples:,} "
                f"samples: {self._num_rows - num_samples:,} rows were left out (empty, "
                "without a supervised token, double, or longer than sequence_len)."
            )
