"""The Axolotl plugin: hooks only. Without a `psft:` block every hook does nothing."""

from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger

from axolotl_psft import checkpoints, data_files
from axolotl_psft.config import PSFTConfig

LOG = get_logger(__name__)


class PSFTPlugin(BasePlugin):
    """Proximal Supervised Fine-Tuning for Axolotl's causal-LM trainer."""

    # Of the training data, where all of it is local files.
    _num_rows = 0

    def get_input_args(self) -> str:
        return "axolotl_psft.config.PSFTArgs"

    def register(self, cfg: Any) -> None:
        # Before Axolotl writes its log there: the first hook of its command line.
        if cfg.get("psft") and cfg.get("output_dir"):
            checkpoints.check_writable(cfg["output_dir"])

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        # Nothing to load: this is the last hook before Axolotl reads the device map,
        # which on several ranks is the rank's number even where there is no GPU, and
        # the attention implementation.
        if cfg.psft and cfg.device == "cpu" and cfg.device_map:
            cfg.device_map = {"": "cpu"}
        if cfg.psft and cfg.device == "cpu":
            _stand_in_on_cpu(cfg)
        if cfg.psft:
            report = data_files.check(cfg)
            self._num_rows = report.num_rows
            for note in report.notes:
                LOG.warning(f"psft: {note}")
            if not preprocess:
                _choose_checkpoint(cfg)
        if _tensor_parallel(cfg) and not preprocess:
            from axolotl_psft.megatron import engine

            engine.prepare(cfg)

    def pre_model_load(self, cfg: Any) -> None:
        if not cfg.psft:
            LOG.warning(
                "plugins lists axolotl_psft but there is no `psft:` block: this run is "
                "plain SFT. Add `psft: {}` for Proximal SFT with the defaults."
            )

    def post_model_build(self, cfg: Any, model: Any) -> None:
        if engine := _prepared_engine(cfg):
            engine.build(cfg, model)

    def post_model_load(self, cfg: Any, model: Any) -> None:
        if engine := _prepared_engine(cfg):
            engine.finish_loading(cfg, model)

    def post_train(self, cfg: Any, model: Any) -> None:
        if engine := _prepared_engine(cfg):
            engine.save(cfg, model)

    def get_trainer_cls(self, cfg: Any) -> type | None:
        if not cfg.psft:
            return None
        if _tensor_parallel(cfg):
            from axolotl_psft.megatron.trainer import MegatronPSFTTrainer

            return MegatronPSFTTrainer
        from axolotl_psft.trainer import PSFTTrainer

        return PSFTTrainer

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if not cfg.psft:
            return
        from axolotl_psft.trainer import PSFTTrainer

        if not isinstance(trainer, PSFTTrainer):
            raise ValueError(
                f"plugins: {list(cfg.plugins)} gave a {type(trainer).__name__}: another"
                " plugin brings its own trainer, and a psft block needs PSFTTrainer. "
                "Remove that plugin or the psft block."
            )
        trainer.psft = PSFTConfig(**cfg.psft)
        self._report_left_out(cfg, trainer)

    def _report_left_out(self, cfg: Any, trainer: Any) -> None:
        """Say how many rows are no samples: Axolotl drops them without a word."""
        if trainer.is_stream:
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


def _stand_in_on_cpu(cfg: Any) -> None:
    """Let a GPU's attn_implementation run where there is none.

    Raises:
        ValueError: it computes something else than attention.
    """
    from axolotl_psft import attention

    if not attention.trains_on_gpus_only(cfg.attn_implementation):
        return
    if cfg.scaling_softmax:
        raise ValueError(
            f"scaling_softmax: {cfg.scaling_softmax} is part of flex_attention, which "
            "has no gradient on a CPU. Train on a GPU, or remove it."
        )
    LOG.info(
        f"psft: attn_implementation: {cfg.attn_implementation} cannot train on a CPU; "
        f"{attention.NAME} computes the same there."
    )
    attention.register()
    cfg.attn_implementation = attention.NAME


def _choose_checkpoint(cfg: Any) -> None:
    """With auto_resume_from_checkpoints, the newest one that is complete.

    Axolotl takes the newest, be it the one that the run was killed over.
    """
    if not cfg.auto_resume_from_checkpoints or cfg.resume_from_checkpoint is not None:
        return
    newest, skipped = checkpoints.newest_complete(cfg.output_dir)
    if skipped:
        begin = "starts anew" if newest is None else f"resumes from {newest.name}"
        LOG.warning(
            f"auto_resume_from_checkpoints: the run {begin}: {'; '.join(skipped)}."
        )
    if newest is None:
        cfg.auto_resume_from_checkpoints = False
    else:
        cfg.resume_from_checkpoint = str(newest)


def _tensor_parallel(cfg: Any) -> bool:
    return bool(cfg.psft and cfg.psft_tensor_parallel_size)


def _prepared_engine(cfg: Any) -> Any:
    """The tensor-parallel engine in a training run; None elsewhere.

    Axolotl's other commands (inference, merging) load the model of the same YAML whole.
    """
    if not _tensor_parallel(cfg):
        return None
    from axolotl_psft.megatron import engine

    return engine if engine.is_prepared() else None
