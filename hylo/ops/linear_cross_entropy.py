"""Cross-entropy of the next token from final hidden states, without the `[T, V]` logits.

As in hylo/ops/linear_kl.py the head is applied to some rows at a time, and the gradient is taken while their logits are
at hand: d CE / d logits = softmax(logits) - onehot(target).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hylo.ops.kernels import will_differentiate
from hylo.ops.sharding import ranks_of, sum_into_shards, whole

IGNORED = -100
# Tokens whose logits exist at a time: on a CPU as many as its caches hold, on a GPU enough to fill it.
_CPU_ROWS, _GPU_ROWS = 128, 1024


def linear_cross_entropy_reference(
    hidden: Tensor, head: Tensor, targets: Tensor, *, count: Tensor | float | None = None
) -> Tensor:
    """The definition, with a whole matrix in float64, by autograd; see `linear_cross_entropy`."""
    counts = targets != IGNORED
    logits = (hidden.double() @ head.double().T)[counts]
    total = torch.nn.functional.cross_entropy(logits, targets[counts], reduction="sum")
    return total / (counts.sum().clamp(min=1) if count is None else count)


@dataclass(frozen=True)
class _Settings:
    chunk_size: int
    dtype: torch.dtype
    needs_hidden: bool
    needs_head: bool


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, rows: Tensor, count: Tensor, settings: _Settings
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            weight = whole(head, settings.dtype)
            total, hidden_grad, head_grad = _forward_and_backward(hidden, weight, targets, rows, settings)
        ctx.save_for_backward(hidden_grad, head_grad, count)
        ctx.hidden_dtype, ctx.head = hidden.dtype, head
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad, count = ctx.saved_tensors
        scale = grad / count
        if hidden_grad is not None:
            hidden_grad = (hidden_grad * scale).to(ctx.hidden_dtype)
        if head_grad is not None:
            head_grad = head_grad * (scale / ranks_of(ctx.head))
            head_grad = sum_into_shards(head_grad, ctx.head).to(ctx.head.dtype)
        return hidden_grad, head_grad, None, None, None, None


def _forward_and_backward(
    hidden: Tensor, head: Tensor, targets: Tensor, rows: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum over `rows`, and its gradients."""
    wide = torch.promote_types(settings.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    hidden_grad = torch.zeros_like(hidden, dtype=settings.dtype) if settings.needs_hidden else None
    head_grad = torch.zeros_like(head, dtype=wide) if settings.needs_head else None
    for chosen in rows.split(settings.chunk_size):
        some, right = hidden[chosen].to(settings.dtype), targets[chosen][:, None]
        logarithms = (some @ head.T).log_softmax(-1, dtype=wide)
        total -= logarithms.gather(-1, right).sum()
        if not (settings.needs_hidden or settings.needs_head):
            continue
        grad = logarithms.exp_()
        grad.scatter_add_(-1, right, torch.full_like(right, -1, dtype=wide))
        grad = grad.to(settings.dtype)
        if hidden_grad is not None:
            hidden_grad.index_copy_(0, chosen, grad @ head)
        if head_grad is not None:
            head_grad += grad.T @ some
    return total, hidden_grad, head_grad


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    count: Tensor | float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """-log p(target) in nats, summed over tokens that have a target and divided by `count`; gradients are made with it.

    Products are taken in the dtype of autocast where it is on, else in that of the hidden states; softmaxes and sums
    are in float32. Heads that FSDP2 shards are treated as `fused_linear_kl` does.

    Args:
        hidden: `[N, D]`, after the final norm. Gradients flow to it and to `head`, where they require one.
        head: `[V, D]`.
        targets: `[N]`, the token that follows each; -100 where none counts.
        count: what to divide by; the number of targets by default.
        chunk_size: tokens whose logits exist at a time.
    """
    device = hidden.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
    rows = (targets != IGNORED).nonzero()[:, 0]
    settings = _Settings(
        chunk_size=chunk_size or (_CPU_ROWS if device.type == "cpu" else _GPU_ROWS),
        dtype=dtype,
        needs_hidden=will_differentiate(hidden),
        needs_head=will_differentiate(head),
    )
    wide = torch.promote_types(dtype, torch.float32)
    divisor = torch.as_tensor(max(1, len(rows)) if count is None else count, dtype=wide, device=device)
    return _LinearCrossEntropy.apply(hidden, head, targets, rows, divisor, settings)
