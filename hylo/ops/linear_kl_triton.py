"""The softmaxes, their KL and its gradient in one kernel: two reads of both logit matrices, one write.

It is bound by memory, and by torch's own operations it would take three times the traffic. One program goes along one
row twice: first for the log-sum-exps, then back from the end, where the cache still holds what was read last, for the
KL and the gradient, which replaces the student's logits. Exponentials are in base 2; sums are kept for each lane and
joined at the end of the row.
"""

import math

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

# Words at a time, warps of a program, and reads in flight.
BLOCK, WARPS, STAGES = 2048, 8, 3

_LN_2: tl.constexpr = tl.constexpr(math.log(2))
# Below any logit, and finite: minus infinity less itself would not be a number.
_LOWEST: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def _add(maximum, total, x):  # type: ignore[no-untyped-def]
    """Takes x into sums of 2^x, each kept as maximum and total: one exponential, whichever is the larger."""
    gap = x - maximum
    ratio = tl.exp2(-tl.abs(gap))
    return tl.maximum(maximum, x), tl.where(gap > 0, total * ratio + 1.0, total + ratio)


@triton.jit
def _join(maximum, total):  # type: ignore[no-untyped-def]
    """log2 of the sum over lanes; minus infinity where nothing was added."""
    highest = tl.max(maximum, 0)
    return highest + tl.log2(tl.sum(total * tl.exp2(maximum - highest), 0))


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    student,
    teacher,
    lowest_kept,
    kl,
    student_stride,
    teacher_stride,
    words,
    factor,
    TOP_K: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    lanes = tl.arange(0, BLOCK)
    nothing = tl.full([BLOCK], _LOWEST, tl.float32)
    none = tl.zeros([BLOCK], tl.float32)
    q_maximum, q_total, p_maximum, p_total = nothing, none, nothing, none
    if TOP_K:
        q_rest_maximum, q_rest_total, p_rest_maximum, p_rest_total = nothing, none, nothing, none
        lowest = tl.load(lowest_kept + row).to(tl.float32)

    for start in tl.range(0, words, BLOCK, num_stages=STAGES):
        inside = start + lanes < words
        q = tl.load(student + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        p = tl.load(teacher + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
        q_maximum, q_total = _add(q_maximum, q_total, q * factor)
        p_maximum, p_total = _add(p_maximum, p_total, p * factor)
        if TOP_K:
            rest = p < lowest
            q_rest = tl.where(rest, q * factor, float("-inf"))
            q_rest_maximum, q_rest_total = _add(q_rest_maximum, q_rest_total, q_rest)
            p_rest = tl.where(rest, p * factor, float("-inf"))
            p_rest_maximum, p_rest_total = _add(p_rest_maximum, p_rest_total, p_rest)
    q_sum = _join(q_maximum, q_total)
    p_sum = _join(p_maximum, p_total)
    if TOP_K:
        q_rest_sum = _join(q_rest_maximum, q_rest_total)
        p_rest_log = _join(p_rest_maximum, p_rest_total) - p_sum
        p_rest_share = tl.exp2(p_rest_log)

    divergence = none
    last = (tl.cdiv(words, BLOCK) - 1) * BLOCK
    for back in tl.range(0, words, BLOCK, num_stages=STAGES):
        start = last - back
        inside = start + lanes < words
        q_logit = tl.load(student + start + lanes, mask=inside, other=0.0).to(tl.float32)
        p_logit = tl.load(teacher + start + lanes, mask=inside, other=0.0).to(tl.float32)
        q_log = q_logit * factor - q_sum
        p_log = p_logit * factor - p_sum
        p = tl.exp2(p_log)
        counted = inside
        target = p
        if TOP_K:
            kept = p_logit >= lowest
            counted = inside & kept
            target = tl.where(kept, p, p_rest_share * tl.exp2(q_logit * factor - q_rest_sum))
        divergence += tl.where(counted, p * (p_log - q_log), 0.0)
        if GRADIENT:
            gradient = tl.exp2(q_log) - target
            # Not read again soon: it leaves the cache first.
            tl.store(
                student + start + lanes,
                gradient.to(student.dtype.element_ty),
                mask=inside,
                eviction_policy="evict_first",
            )
    total = tl.sum(divergence, 0)
    if TOP_K:
        total += tl.where(p_rest_share > 0, p_rest_share * (p_rest_log - (q_rest_sum - q_sum)), 0.0)
    tl.store(kl + row, total * _LN_2)


def difference_(
    student: Tensor, teacher: Tensor, kl: Tensor, *, temperature: float, top_k: int | None, gradient: bool
) -> None:
    """As `hylo.ops.linear_kl.difference_`, with sums in float32."""
    lowest = None if top_k is None else teacher.topk(top_k).values[:, -1].contiguous()
    with torch.cuda.device_of(student):
        _kernel[(len(student),)](
            student,
            teacher,
            lowest,
            kl,
            student.stride(0),
            teacher.stride(0),
            student.shape[1],
            math.log2(math.e) / temperature,
            TOP_K=top_k is not None,
            GRADIENT=gradient,
            BLOCK=BLOCK,
            STAGES=STAGES,
            num_warps=WARPS,
        )
