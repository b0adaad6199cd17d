"""RMS norm, alone or of a sum that is kept, each way in one pass over its rows.

Bound by memory: forward reads x (and the residual) and writes the norm (and the sum); backward reads the sum and the
gradients and writes one gradient for both. A program takes some rows at a time; backward, each goes over many and keeps
its share of the weight's gradient in registers. Computed in float32.
"""

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from torch.autograd.function import once_differentiable

# Values that a program holds of each matrix, and programs of the backward pass on a multiprocessor.
_TILE, _PROGRAMS = 4096, 4


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    normed,
    total,
    scale,
    rows,
    columns,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    place, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (first + place < rows)[:, None] & (column < columns)[None, :]
    at = place[:, None] * columns + column[None, :]
    offset = first.to(tl.int64) * columns
    x += offset
    normed += offset
    if ADD:
        residual += offset
        total += offset
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        # What is normed is the sum as it is kept.
        kept = value.to(total.dtype.element_ty)
        tl.store(total + at, kept, mask=inside)
        value = kept.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / columns + eps)
    tl.store(scale + first + place, inverse, mask=first + place < rows)
    factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(normed + at, (value * inverse[:, None] * factor[None, :]).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    upstream,
    kept_upstream,
    total,
    weight,
    scale,
    gradient,
    weight_gradients,
    rows,
    columns,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    at = place[:, None] * columns + column[None, :]
    factor = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    # Summed over rows at the end: a sum across threads at each step costs more than it saves in registers.
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + place
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        offset = tl.cast(tile, tl.int64) * (ROWS * columns)
        inverse = tl.load(scale + row, mask=row < rows, other=0.0)[:, None]
        unit = tl.load(total + offset + at, mask=inside, other=0.0).to(tl.float32) * inverse
        given = tl.load(upstream + offset + at, mask=inside, other=0.0).to(tl.float32)
        sums += given * unit
        weighted = given * factor[None, :]
        along = tl.sum(weighted * unit, 1) / columns
        result = (weighted - unit * along[:, None]) * inverse
        if ADD:
            result += tl.load(kept_upstream + offset + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(gradient + offset + at, result.to(gradient.dtype.element_ty), mask=inside)
    tl.store(weight_gradients + tl.program_id(0) * columns + column, tl.sum(sums, 0), mask=column < columns)


def _shape(columns: int) -> dict[str, int]:
    block = triton.next_power_of_2(columns)
    rows = max(1, _TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(32, max(4, rows * block // 1024))}


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype | None
    ) -> Any:
        columns = x.shape[-1]
        x = x.contiguous()
        if residual is not None:
            residual = residual.contiguous()
        rows = x.numel() // columns
        normed = torch.empty_like(x if residual is None else residual, dtype=dtype)
        total = x if residual is None else torch.empty_like(residual)
        scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        shape = _shape(columns)
        with torch.cuda.device_of(x):
            _forward[(triton.cdiv(rows, shape["ROWS"]),)](
                x, residual, weight, normed, total, scale, rows, columns, eps, ADD=residual is not None, **shape
            )
        ctx.save_for_backward(total, weight, scale)
        ctx.x_dtype = x.dtype
        return normed if residual is None else (normed, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        columns, shape = total.shape[-1], _shape(total.shape[-1])
        rows = total.numel() // columns
        tiles = triton.cdiv(rows, shape["ROWS"])
        multiprocessors = (
            torch.cuda.get_device_properties(total.device).multi_processor_count if total.is_cuda else tiles
        )
        programs = min(tiles, _PROGRAMS * multiprocessors)
        given = [gradient.contiguous() for gradient in upstream]
        gradient = torch.empty_like(total)
        partial = torch.empty(programs, columns, dtype=torch.float32, device=total.device)
        with torch.cuda.device_of(total):
            _backward[(programs,)](
                given[0], given[-1], total, weight, scale, gradient, partial, rows, columns, ADD=len(given) > 1, **shape
            )
        weight_gradient = partial.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        residual_gradient = gradient if len(given) > 1 else None
        return gradient.to(ctx.x_dtype), residual_gradient, weight_gradient, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """As `hylo.ops.rms_norm.rms_norm`."""
    return _Norm.apply(x, None, weight, eps, dtype)


def add_then_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """As `hylo.ops.rms_norm.add_then_norm`."""
    return _Norm.apply(x, residual, weight, eps, dtype)
