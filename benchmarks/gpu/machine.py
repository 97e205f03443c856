"""What this machine is, and its two ceilings: matmuls and memory."""

import importlib.metadata
import platform
from collections.abc import Iterator

import torch

from benchmarks.gpu.measure import Bench, Figure

PACKAGES = ("torch", "triton", "transformers", "accelerate", "axolotl", "megatron-core")


def machine(bench: Bench) -> Iterator[Figure]:
    """Card, versions, matmul rate in 16 bits and with float32 results, bandwidth."""
    yield Figure("python", platform.python_version())
    for name in PACKAGES:
        try:
            yield Figure(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Figure(name, "not installed")
    if bench.rehearsing:
        yield Figure("card", "none: a rehearsal")
    else:
        card = torch.cuda.get_device_properties(0)
        yield Figure("card", card.name)
        yield Figure("capability", f"{card.major}.{card.minor}")
        yield Figure("memory", card.total_memory / 1e9, "GB")
    n = bench.size(8192, 256)
    options = {"device": bench.device, "dtype": torch.bfloat16}
    a, b = (torch.randn(n, n, **options) for _ in range(2))
    runs = {"bf16 matmul": lambda: a @ b}
    if not bench.rehearsing:
        total = torch.zeros(n, n, device=bench.device)
        runs |= {
            "bf16 matmul, float32 result": lambda: torch.mm(
                a, b, out_dtype=torch.float32
            ),
            "the same, added in place": lambda: torch.addmm(
                total, a, b, out_dtype=torch.float32, out=total
            ),
        }
    for name, took in bench.milliseconds(runs).items():
        yield Figure(name, 2 * n**3 / took / 1e9, "TFLOP/s")
    big = torch.empty(
        bench.size(1 << 30, 1 << 20), dtype=torch.uint8, device=bench.device
    )
    other = torch.empty_like(big)
    took = bench.milliseconds({"": lambda: other.copy_(big)})[""]
    yield Figure("copy, read + written", 2 * big.numel() / took / 1e9, "TB/s")
