"""Liger's norm, rope and activation in a PSFT model, whole and split over ranks.

As Axolotl's own plugin patches them in; the kernels run in Triton's interpreter.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.distributed.launch import run_alone, run_distributed
from tests.distributed.tensor_parallel import logs, tp_config, write_models
from tests.distributed.test_megatron import TP, split, written
from tests.tiny import run

tl = pytest.importorskip("triton.language", reason="installed on Linux only")

# float32 sums of 32 and 64 products in another order, through three layers.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


KEYS = ("liger_rms_norm", "liger_rope", "liger_glu_activation")
# An Axolotl run of a window's first two steps; the interpreter is slow.
SHORT = {
    "base_model": "llama, untied",
    "psft": {"refresh_steps": 2, "sft_warmup_steps": 0, "sequence_parallel": True},
    "micro_batch_size": 1,
    "max_steps": 2,
    "num_epochs": 1,
}


def interpret() -> None:
    """What a compiled kernel has, and the interpreter of Triton 3.8 has not."""
    import liger_kernel.ops.rms_norm
    import numpy as np
    import triton
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        """Scalars are tensors, not numbers."""
        if not isinstance(argument, float):
            return convert(argument)
        value = np.array([argument], dtype=np.float32)
        return tl.tensor(interpreter.TensorHandle(value, tl.float32), tl.float32)

    interpreter._implicit_cvt = with_floats
    liger_kernel.ops.rms_norm.rsqrt = triton.jit(rsqrt)


def rsqrt(x):  # type: ignore[no-untyped-def]  # a function of CUDA's library
    return 1 / tl.sqrt(x)


def patch(model_type: str) -> None:
    """As in an Axolotl run, before the model is built."""
    from axolotl.integrations.liger import LigerPlugin
    from axolotl.utils.dict import DictDefault

    cfg = {"model_config_type": model_type, **dict.fromkeys(KEYS, True)}
    LigerPlugin().pre_model_load(DictDefault(cfg))


def results(model: Any) -> dict[str, Tensor]:
    """Log-probs of packed samples, and every parameter's gradient."""
    from axolotl_psft.megatron.groups import on_this_device
    from axolotl_psft.token_logprobs import install_logprobs_forward

    install_logprobs_forward(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.arange(18).view(2, 9)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(2, 9)
    with on_this_device():
        output = model(input_ids=ids, position_ids=positions, logprob_targets=ids)
        output.logprobs.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logprobs": output.logprobs.detach(), **gradients}


def trained(models: Path, output: Path, tp_size: int) -> list[list[float]]:
    """What an Axolotl run logs, with both plugins."""
    interpret()
    plugins = ["axolotl_psft", "axolotl.integrations.liger.LigerPlugin"]
    cfg = {"plugins": plugins, **dict.fromkeys(KEYS, True), **SHORT}
    trainer = run(tp_config(models, output, tp_size, **cfg))
    norms = [m for m in trainer.model.modules() if type(m).__name__ == "LigerRMSNorm"]
    assert len(norms) == 5  # of two layers, and the last one
    return logs(trainer)


def compare(folder: Path, model_type: str) -> list[tuple[dict[str, Tensor], ...]]:
    from transformers import AutoModelForCausalLM

    def models() -> list[Any]:
        whole = AutoModelForCausalLM.from_pretrained(folder)
        parts, _ = split(model_type, folder, sequence_parallel=True)
        return [whole, parts]

    plain = models()
    interpret()
    patch(model_type)
    fused = models()
    for model in fused:
        kinds = {type(module).__name__ for module in model.modules()}
        assert {"LigerRMSNorm", "LigerSwiGLUMLP"} <= kinds
        assert not [kind for kind in kinds if kind.endswith(("3RMSNorm", "3MLP"))]
    return [(results(a), results(b)) for a, b in zip(fused, plain, strict=True)]


@pytest.mark.parametrize(
    "model_type",
    [
        "qwen3",
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("llama", "qwen2")),
    ],
)
def test_models_agree_with_and_without_it(tmp_path: Path, model_type: str) -> None:
    folder = written(tmp_path, model_type)
    for rank in run_distributed(compare, TP, folder, model_type):
        for fused, plain in rank:
            assert len(plain) >= 30
            assert_close(fused, plain, **CLOSE)


@pytest.mark.soak  # the interpreter takes its time
def test_runs_agree_with_and_without_it(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    plain = torch.tensor(logs(run(tp_config(models, tmp_path / "plain", 1, **SHORT))))
    assert len(plain) == 2
    alone = run_alone(trained, models, tmp_path / "alone", 1)
    assert_close(torch.tensor(alone), plain, **CLOSE)
    for rank in run_distributed(trained, TP, models, tmp_path / "split", TP):
        assert_close(torch.tensor(rank), plain, **CLOSE)
