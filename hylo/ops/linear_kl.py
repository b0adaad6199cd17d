"""KL(teacher || student) from the final hidden states of both, without the `[T, V]` logits.

Each of the two logit matrices would take T * V values (16 GB at 64K tokens and 128K words). Here the heads are applied
to `chunk_size` tokens at a time, and the gradient of a chunk is taken while its logits are at hand:
d KL / d logits_student = softmax(logits_student) - softmax(logits_teacher).
"""

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
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, mask, count, chunk_size):
        wide = torch.promote_types(student_hidden.dtype, torch.float32)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        hidden_grad = torch.zeros_like(student_hidden) if needs_hidden else None
        head_grad = torch.zeros_like(student_head, dtype=wide) if needs_head else None
        total = torch.zeros((), dtype=wide, device=student_hidden.device)
        for start in range(0, student_hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            real = mask[rows]
            hidden = student_hidden[rows]
            student = (hidden @ student_head.T).to(wide).log_softmax(-1)
            teacher = (teacher_hidden[rows] @ teacher_head.T).to(wide).log_softmax(-1)
            probabilities = teacher.exp()
            total += (probabilities * (teacher - student)).sum(-1).mul(real).sum()
            if needs_hidden or needs_head:
                # In place: the chunk's logits are the largest thing in memory.
                grad = student.exp_().sub_(probabilities).mul_((real / count)[:, None]).to(hidden.dtype)
                if needs_hidden:
                    hidden_grad[rows] = grad @ student_head
                if needs_head:
                    head_grad += grad.T @ hidden
        ctx.save_for_backward(hidden_grad, None if head_grad is None else head_grad.to(student_head.dtype))
        return total / count

    @staticmethod
    def backward(ctx, grad):
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
    chunk_size: int = 512,
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
        chunk_size: tokens whose logits exist at a time.

    Raises:
        ValueError: where the two heads differ in vocabulary.
    """
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"student and teacher heads differ in vocabulary: {student_head.shape[0]} and {teacher_head.shape[0]}"
        )
    mask = mask.to(torch.promote_types(student_hidden.dtype, torch.float32))
    if count is None:
        count = mask.sum().clamp(min=1)
    return _LinearKL.apply(student_hidden, student_head, teacher_hidden, teacher_head, mask, count, chunk_size)
