"""KL(teacher || student) from the final hidden states of both, without the `[T, V]` logits.

Each of the two logit matrices would take T·V values (16 GB at 64K tokens and 128K words). Here the heads are applied to
some rows at a time, and the gradient is taken while their logits are at hand: in place of the student's. Four matrix
products are the work of a step: logits of the student, logits of the teacher, gradient of the hidden states, gradient
of the head. The head's gradient is read and written once for every chunk, so chunks are as long as memory allows; the
teacher's logits are needed only row by row, so a third of a chunk at a time is enough, which makes longer chunks.

On a GPU softmaxes, KL and gradient are one kernel (hylo/ops/linear_kl_triton.py); `difference_` here is its reference,
and what runs elsewhere or where `hylo.ops.kernels` chooses `reference`.
"""

import functools
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hylo.ops.kernels import chosen_kernels, will_differentiate
from hylo.ops.sharding import ranks_of, sum_into_shards, whole

# On a GPU the largest chunk for which all that the loss takes beyond its inputs and gradients stays under 1 GiB.
WORKSPACE_BYTES = 2**30 - 2**20
_MOST_ROWS = 8192
# On a CPU a chunk whose logits its caches hold.
_CPU_ROWS = 128
# Rows come in multiples of the tiles of matrix products.
_TILE = 128
# Float32 copies of a part's logits that `difference_` makes, at its most, in bytes of each.
_EAGER_BYTES = 4 * 4
# Words at a time where a product cannot be added to the head's gradient in place.
_WORDS = 8192


def linear_kl_reference(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    mask: Tensor | None = None,
    *,
    count: Tensor | float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """The definition, with whole matrices in float64, by autograd; see `fused_linear_kl`."""
    _check(student_hidden, student_head, teacher_hidden, teacher_head, mask, count, temperature, top_k)
    student = (student_hidden.double() @ student_head.double().T / temperature).log_softmax(-1)
    teacher = (teacher_hidden.double() @ teacher_head.double().T / temperature).log_softmax(-1).detach()
    terms = teacher.exp() * (teacher - student)
    if top_k is None or top_k >= terms.shape[-1]:
        per_token = terms.sum(-1)
    else:
        rest = teacher < teacher.topk(top_k).values[:, -1:]
        p = teacher.exp().masked_fill(~rest, 0).sum(-1)
        # Where nothing is left over, logarithms of one in place of zero: no term, and no gradient that is not a number.
        empty = ~rest.any(-1)
        q = student.exp().masked_fill(~rest, 0).sum(-1) + empty
        per_token = terms.masked_fill(rest, 0).sum(-1) + p * ((p + empty).log() - q.log())
    if mask is None:
        mask = torch.ones_like(per_token)
    count = mask.sum().clamp(min=1) if count is None else count
    return temperature**2 * (per_token * mask).sum() / count


def _check(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    mask: Tensor | None,
    count: Tensor | float | None,
    temperature: float,
    top_k: int | None,
) -> None:
    """Raises ValueError on what the loss is not defined for."""
    for name, hidden, head in (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)):
        if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
            raise ValueError(
                f"{name}: hidden states {tuple(hidden.shape)} and head {tuple(head.shape)}; expected [N, D] and [V, D]"
            )
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"student and teacher heads differ in vocabulary: {student_head.shape[0]} and {teacher_head.shape[0]}"
        )
    tokens = student_hidden.shape[0]
    if teacher_hidden.shape[0] != tokens:
        raise ValueError(f"student and teacher differ in tokens: {tokens} and {teacher_hidden.shape[0]}")
    if mask is not None and mask.shape != (tokens,):
        raise ValueError(f"mask {tuple(mask.shape)}; expected one value for each of {tokens} tokens")
    if mask is not None and mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask holds values between 0 and 1 or beyond; expected a token to count or not")
    # A tensor on a GPU is taken as it is: to look at it would wait for the work queued before.
    if count is not None and not (isinstance(count, Tensor) and count.is_cuda):
        value = float(count)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"count {value}; expected a positive number")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature {temperature}; expected a positive number")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k}; expected at least 1")


def difference_(
    student: Tensor, teacher: Tensor, kl: Tensor, *, temperature: float, top_k: int | None, gradient: bool
) -> None:
    """KL of each row from logits, and its gradient by `student / temperature`, which replaces the student's logits.

    Args:
        student, teacher: `[N, V]`. The teacher's may be overwritten too.
        kl: `[N]`, written.
        gradient: whether one is wanted; else the student's logits are left or overwritten by anything.
    """
    q = _log_softmax(student, temperature)
    p = _log_softmax(teacher, temperature)
    probabilities = p.exp()
    if top_k is None:
        # In place from here: reading these is the slowest there is.
        torch.linalg.vecdot(probabilities, p.sub_(q), out=kl)
        if gradient:
            student.copy_(q.exp_().sub_(probabilities))
        return
    rest = teacher < teacher.topk(top_k).values[:, -1:]
    q_rest = q.masked_fill(~rest, -math.inf).logsumexp(-1)
    p_rest = p.masked_fill(~rest, -math.inf).logsumexp(-1)
    share = p_rest.exp()
    between = torch.where(share > 0, share * (p_rest - q_rest), 0.0)
    terms = p.sub_(q).mul_(probabilities).masked_fill_(rest, 0)
    torch.add(terms.sum(-1), between, out=kl)
    if gradient:
        # Within the rest the student's own proportions are the target: only the rest as a whole is pulled.
        target = torch.where(rest, (q - q_rest[:, None]).exp_().mul_(share[:, None]), probabilities)
        student.copy_(q.exp_().sub_(target))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = _wide(logits)
    if temperature != 1:
        logits = logits.to(wide) / temperature
    return logits.log_softmax(-1, dtype=wide)


def _wide(tensor: Tensor) -> torch.dtype:
    """What sums are taken in: float32, or the tensor's own dtype where that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _in_one_kernel(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype != torch.float64 and chosen_kernels() != "reference" and _has_triton()


def part_rows(chunk_size: int) -> int:
    """Rows of the teacher's logits that exist at a time, of a chunk."""
    return min(chunk_size, _up_to_tiles(-(-chunk_size // 3)))


def _up_to_tiles(rows: int) -> int:
    return -(-rows // _TILE) * _TILE


def gpu_chunk_size(words: int, width: int, teacher_width: int, size: int, *, eager: bool = False) -> int:
    """Tokens of a chunk on a GPU by default.

    Args:
        size: bytes of a value in matrix products.
        eager: without the kernel.
    """
    sizes = (words, width, teacher_width, size, eager)
    fitting = (rows for rows in range(_MOST_ROWS, _TILE, -_TILE) if _chunk_bytes(rows, *sizes) <= WORKSPACE_BYTES)
    return next(fitting, _TILE)


def workspace_bytes(tokens: int, words: int, width: int, teacher_width: int, size: int) -> int:
    """What the loss takes on a GPU beyond its inputs and gradients, by default."""
    rows = min(gpu_chunk_size(words, width, teacher_width, size), tokens)
    return _chunk_bytes(rows, words, width, teacher_width, size)


def _chunk_bytes(rows: int, words: int, width: int, teacher_width: int, size: int, eager: bool = False) -> int:
    """Logits and the hidden states that they are made of, of a chunk and of the teacher's part of it."""
    copies = _EAGER_BYTES * words if eager else 0
    return rows * (words + width) * size + part_rows(rows) * ((words + teacher_width) * size + copies)


@dataclass(frozen=True)
class _Settings:
    """What does not change within a call.

    Attributes:
        student_dtype, teacher_dtype: of matrix products.
        head_grad_dtype: in which the head's gradient is summed.
        needs_hidden, needs_head: which gradients are wanted.
    """

    temperature: float
    top_k: int | None
    chunk_size: int
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    head_grad_dtype: torch.dtype
    needs_hidden: bool
    needs_head: bool


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        rows: Tensor | None,
        count: Tensor,
        settings: _Settings,
    ) -> Tensor:
        # Dtypes are settled here, not by autocast, which would keep a copy of what it casts.
        with torch.autocast(student_hidden.device.type, enabled=False):
            total, hidden_grad, head_grad = _forward_and_backward(
                student_hidden,
                whole(student_head, settings.student_dtype),
                teacher_hidden,
                whole(teacher_head, settings.teacher_dtype),
                rows,
                settings,
            )
        ctx.save_for_backward(hidden_grad, head_grad, settings.temperature / count)
        ctx.hidden_dtype, ctx.head = student_hidden.dtype, student_head
        return total * (settings.temperature**2 / count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad, scale = ctx.saved_tensors
        scale = scale * grad
        if hidden_grad is not None:
            hidden_grad = _scaled(hidden_grad, scale).to(ctx.hidden_dtype)
        if head_grad is not None:
            head_grad = _scaled(head_grad, scale / ranks_of(ctx.head))
            head_grad = sum_into_shards(head_grad, ctx.head).to(ctx.head.dtype)
        return hidden_grad, head_grad, None, None, None, None, None


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """In place, unless the caller keeps the graph for another backward pass."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * scale
    return gradient.mul_(scale)


def _forward_and_backward(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    rows: Tensor | None,
    settings: _Settings,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum over tokens of the KL, and its gradients times the temperature.

    Args:
        student_head, teacher_head: in the dtypes of matrix products.
        rows: which tokens count; None for all.
    """
    words, device = student_head.shape[0], student_hidden.device
    tokens = student_hidden.shape[0] if rows is None else len(rows)
    chunk = max(1, min(settings.chunk_size, tokens))
    part = part_rows(chunk)
    difference = difference_
    if _in_one_kernel(student_head):
        from hylo.ops.linear_kl_triton import difference_ as difference
    per_token = torch.empty(tokens, dtype=_wide(student_head), device=device)
    logits = torch.empty(chunk, words, dtype=settings.student_dtype, device=device)
    teacher_logits = torch.empty(part, words, dtype=settings.teacher_dtype, device=device)
    hidden_grad = head_grad = None
    if settings.needs_hidden:
        # Tokens that do not count have none.
        make = torch.empty if rows is None else torch.zeros
        hidden_grad = make(student_hidden.shape, dtype=settings.student_dtype, device=device)
    if settings.needs_head:
        head_grad = torch.zeros(student_head.shape, dtype=settings.head_grad_dtype, device=device)

    def taken(hidden: Tensor, start: int, end: int, dtype: torch.dtype) -> Tensor:
        return (hidden[start:end] if rows is None else hidden.index_select(0, rows[start:end])).to(dtype)

    for start in range(0, tokens, chunk):
        end = min(start + chunk, tokens)
        hidden = taken(student_hidden, start, end, settings.student_dtype)
        grad = torch.mm(hidden, student_head.T, out=logits[: end - start])
        for begin in range(start, end, part):
            stop = min(begin + part, end)
            teacher = taken(teacher_hidden, begin, stop, settings.teacher_dtype)
            difference(
                grad[begin - start : stop - start],
                torch.mm(teacher, teacher_head.T, out=teacher_logits[: stop - begin]),
                per_token[begin:stop],
                temperature=settings.temperature,
                top_k=settings.top_k,
                gradient=settings.needs_hidden or settings.needs_head,
            )
            # Here and below: or they would still be there when the next are gathered.
            del teacher
        if head_grad is not None:
            _add_product_(head_grad, grad, hidden)
        if hidden_grad is not None:
            if rows is None:
                torch.mm(grad, student_head, out=hidden_grad[start:end])
            else:
                # The gathered rows are not read again, and lend their memory.
                hidden_grad.index_copy_(0, rows[start:end], torch.mm(grad, student_head, out=hidden))
        del hidden
    return per_token.sum(), hidden_grad, head_grad


def _add_product_(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """`total += grad.T @ hidden`, without another `[V, D]`."""
    if total.dtype == grad.dtype:
        total.addmm_(grad.T, hidden)
    elif total.is_cuda and total.dtype == torch.float32 and grad.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, grad.T, hidden, out_dtype=torch.float32, out=total)
    else:
        for begin in range(0, len(total), _WORDS):
            total[begin : begin + _WORDS] += grad[:, begin : begin + _WORDS].T @ hidden


def fused_linear_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    mask: Tensor | None = None,
    *,
    count: Tensor | float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    chunk_size: int | None = None,
    head_grad_dtype: torch.dtype | None = None,
) -> Tensor:
    """KL(teacher || student) in nats, summed over real tokens and divided by `count`; gradients are made with it.

    With p and q the words' probabilities by teacher and student, softmax(logits / `temperature`), a token's loss is
    temperature² · Σ p log(p / q), over all words. The factor keeps gradients of one size at any temperature.

    With `top_k` the sum is over the teacher's k first words (S), with those whose logits tie with the last of them, and
    over all others as if they were one word: Σ_S p log(p / q) + (1 - Σ_S p) log((1 - Σ_S p) / (1 - Σ_S q)). This is a
    KL too, so never negative, and never more than that over all words. Its gradient is exact: the student's share of
    the others is pulled to the teacher's, and how it is divided among them is left alone.

    Products are taken in the dtype of autocast where it is on, else in that of the hidden states; logits are rounded to
    it, softmaxes and sums are in float32. Tokens that do not count are left out of all products.

    Heads may be sharded by FSDP2, as DTensors or as the whole weights that it left: each rank's loss is that of its own
    tokens. FSDP2 takes the mean of gradients over ranks, and so is done here: give every rank the `count` of all ranks
    together, and multiply the loss by the number of ranks before its backward pass. Every rank has to call, also one
    without real tokens.

    Args:
        student_hidden: `[N, D]`, after the final norm. Gradients flow to it and to `student_head`, where they require
            one; what does not require one costs no product.
        student_head: `[V, D]`. Tied to the embedding or not: its gradient adds to others.
        teacher_hidden: `[N, D']`; the teacher's width may differ. No gradient.
        teacher_head: `[V, D']`.
        mask: `[N]`, true (or 1) where the token counts; all do by default. No weights: other values are refused. On a
            GPU a mask waits for the work queued before.
        count: what to divide by, above zero; the number of real tokens by default, 1 where there is none. Pass the
            number over a whole accumulated batch, on all ranks, to make the loss independent of how the batch is cut.
            A tensor on a GPU is not looked at.
        chunk_size: tokens whose logits exist at a time; by default on a GPU as many as 1 GiB of workspace allows.
        head_grad_dtype: in which the head's gradient is summed over chunks: the head's own by default (float32 for
            float16). A sum in bfloat16 rounds once for every chunk: over 22 chunks a relative error of 0.5 %, beside
            as much again from the rounding of logits and their gradients. float32 is without it, and for a head in
            bfloat16 takes twice the gradient's memory until the end.

    Raises:
        ValueError: where the two heads differ in vocabulary, student and teacher in tokens, or an argument is out of
            its range.
    """
    _check(student_hidden, student_head, teacher_hidden, teacher_head, mask, count, temperature, top_k)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size}; expected at least 1")
    device, words = student_hidden.device, student_head.shape[0]
    if torch.is_autocast_enabled(device.type):
        student_dtype = teacher_dtype = torch.get_autocast_dtype(device.type)
    else:
        student_dtype, teacher_dtype = student_hidden.dtype, teacher_hidden.dtype
    if chunk_size is None:
        chunk_size = _CPU_ROWS
        if device.type != "cpu":
            eager = not _in_one_kernel(student_hidden)
            widths = student_hidden.shape[1], teacher_hidden.shape[1]
            chunk_size = gpu_chunk_size(words, *widths, student_dtype.itemsize, eager=eager)
    if head_grad_dtype is None:
        head_grad_dtype = torch.float32 if student_head.dtype == torch.float16 else student_head.dtype
    rows = None if mask is None else mask.to(device).nonzero()[:, 0]
    if rows is not None and len(rows) == len(student_hidden):
        rows = None
    if count is None:
        count = max(1, len(student_hidden) if rows is None else len(rows))
    wide = torch.promote_types(student_dtype, torch.float32)
    settings = _Settings(
        temperature=temperature,
        top_k=None if top_k is None or top_k >= words else top_k,
        chunk_size=chunk_size,
        student_dtype=student_dtype,
        teacher_dtype=teacher_dtype,
        head_grad_dtype=head_grad_dtype,
        needs_hidden=will_differentiate(student_hidden),
        needs_head=will_differentiate(student_head),
    )
    return _LinearKL.apply(
        student_hidden,
        student_head,
        teacher_hidden.detach(),
        teacher_head,
        rows,
        torch.as_tensor(count, dtype=wide, device=device),
        settings,
    )
