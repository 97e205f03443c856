"""What tests compare with: the textbook loss head, and a watch on what torch runs."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def naive_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logits_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies with whole logits, in the dtype of the inputs."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * logits_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return naive_logprobs_of(logits, targets)


def naive_logprobs_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp, active = logits.log_softmax(-1), targets != -100
    target = logp.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    entropy = -(logp.exp() * logp).sum(1)
    return target.where(active, 0), entropy.where(active, 0).detach()


def head_inputs(
    num_tokens: int,
    vocab_size: int,
    ignored: float = 0.2,
    hidden_size: int = 123,
    num_shards: int = 4,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden, weight, targets and an incoming gradient, the same in every process.

    The first targets are the ids on both sides of every border of 2 or 4 shards. A
    quarter of the gradient is exactly zero, as where tokens are clipped.
    """
    rng = torch.Generator().manual_seed(num_tokens * vocab_size)
    hidden = torch.randn(num_tokens, hidden_size, generator=rng, dtype=torch.float64)
    weight = torch.randn(vocab_size, hidden_size, generator=rng, dtype=torch.float64)
    targets = torch.randint(vocab_size, (num_tokens,), generator=rng)
    shard = -(-vocab_size // num_shards)
    borders = [i for s in range(1, num_shards) for i in (s * shard - 1, s * shard)]
    edges = torch.tensor([*borders, 0, vocab_size - 1])[:num_tokens]
    targets[torch.rand(num_tokens, generator=rng) < ignored] = -100
    if ignored < 1:
        targets[: len(edges)] = edges
    grad = torch.randn(num_tokens, generator=rng, dtype=torch.float64)
    grad[3::4] = 0
    # Logits of a spread of about 3, as a trained model's.
    weight *= 3 / hidden_size**0.5
    return hidden.to(dtype), weight.to(dtype), targets, grad


def grads(loss: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs' gradients, for an incoming one of any dtype."""
    return torch.autograd.grad(loss, inputs, grad.to(loss.dtype))


class Watch(TorchDispatchMode):
    """Counts matmul operations and collectives, and notes the largest tensors made."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.collectives: list[str] = []
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        if namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            self.collectives.append(name)
        if name in ("mm", "addmm", "addmm_", "bmm"):
            a, b = (args[-2], args[-1]) if name.endswith("bmm") else args[-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        is_view = any(result.alias_info for result in func._schema.returns)
        if isinstance(out, Tensor) and not is_view:
            before = self.largest.get(out.dtype, 0)
            self.largest[out.dtype] = max(before, out.numel())
        return out
