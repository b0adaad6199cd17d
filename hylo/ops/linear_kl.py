"""KL(teacher || student) from the final hidden states of both, without the `[T, V]` logits.

Each of the two logit matrices would take T * V values (16 GB at 64K tokens and 128K words). Here the heads are applied
to `chunk_size` tokens at a time, and the gradient of a chunk is taken while its logits are at hand:
d KL / d logits_student = softmax(logits_student) - softmax(logits_teacher).
"""

from typing import Any

import torch
from torch import Tensor


def linear_kl_reference(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, mask: Tensor
) -> Tensor:
    """The definition, with whole logit matrices: mean over real tokens of sum_v p (log p - log q), in nats."""
    student = (student_hidden @ student_head.T).log_softmax(-1)
    teacher = (teacher_hidden @ teacher_head.T).log_softmax(-1)
    per_token = (teacher.exp() * (teacher - student)).sum(-1)
    return (per_token * mask).sum() / mask.sum()


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        mask: Tensor,
        count: Tensor | float,
        chunk_size: int,
    ) -> Tensor:
        wide = torch.promote_types(student_hidden.dtype, torch.float32)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        hidden_grad = torch.zeros_like(student_hidden) if needs_hidden else None
        head_grad = torch.zeros_like(student_head, dtype=wide) if needs_head else None
        total = torch.zeros((), dtype=wide, device=student_hidden.device)
        for start in range(0, student_hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            hidden, weight = student_hidden[rows], mask[rows] / count
            student = (hidden @ student_head.T).log_softmax(-1, dtype=wide)
            teacher = (teacher_hidden[rows] @ teacher_head.T).log_softmax(-1, dtype=wide)
            # In place from here: the chunk's logits are the largest thing in memory, and reading them the slowest.
            probabilities = teacher.exp()
            total += torch.linalg.vecdot(probabilities, teacher.sub_(student)) @ weight
            if needs_hidden or needs_head:
                grad = student.exp_().sub_(probabilities).to(hidden.dtype)
                if hidden_grad is not None:
                    hidden_grad[rows] = (grad @ student_head) * weight[:, None]
                if head_grad is not None:
                    head_grad += grad.T @ (hidden * weight[:, None].to(hidden.dtype))
        ctx.save_for_backward(hidden_grad, None if head_grad is None else head_grad.to(student_head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        hidden_grad = None if hidden_grad is None else hidden_grad * grad
        head_grad = None if head_grad is None else head_grad * grad
        return hidden_grad, head_grad, None, None, None, None, None


def linear_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    mask: Tensor,
    *,
    count: Tensor | float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """KL(teacher || student) in nats, summed over real tokens and divided by `count`.

    Args:
        student_hidden: `[N, D]`, after the final norm. Gradients flow to it and to `student_head`.
        student_head: `[V, D]`.
        teacher_hidden: `[N, D']`; the teacher's width may differ. No gradient.
        teacher_head: `[V, D']`.
        mask: `[N]`, true (or 1) where the token counts.
        count: what to divide by; the number of real tokens by default. Pass the number over a whole accumulated batch
            to make the loss independent of how the batch is cut.
        chunk_size: tokens whose logits exist at a time; by default, what suits the caches of a CPU or fills a GPU.

    Raises:
        ValueError: where the two heads differ in vocabulary.
    """
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"student and teacher heads differ in vocabulary: {student_head.shape[0]} and {teacher_head.shape[0]}"
        )
    device = student_hidden.device.type
    if torch.is_autocast_enabled(device):
        # Once here, not chunk by chunk.
        dtype = torch.get_autocast_dtype(device)
        student_hidden, student_head = student_hidden.to(dtype), student_head.to(dtype)
        teacher_hidden, teacher_head = teacher_hidden.to(dtype), teacher_head.to(dtype)
    mask = mask.to(torch.promote_types(student_hidden.dtype, torch.float32))
    if chunk_size is None:
        chunk_size = 128 if device == "cpu" else 1024
    if count is None:
        count = mask.sum().clamp(min=1)
    return _LinearKL.apply(student_hidden, student_head, teacher_hidden, teacher_head, mask, count, chunk_size)
