"""Lengths of differences of rows in one pass each way: no difference is kept for the backward pass."""

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from torch.autograd.function import once_differentiable

# Values that a program holds of each matrix.
_TILE = 4096


@triton.jit
def _distances(  # type: ignore[no-untyped-def]
    x,
    y,
    distance,
    upstream,
    gradient,
    rows,
    columns,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    place, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (first + place < rows)[:, None] & (column < columns)[None, :]
    at = place[:, None] * columns + column[None, :]
    offset = first.to(tl.int64) * columns
    difference = tl.load(x + offset + at, mask=inside, other=0.0).to(tl.float32)
    difference -= tl.load(y + offset + at, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        length = tl.load(distance + first + place, mask=first + place < rows, other=0.0)
        given = tl.load(upstream + first + place, mask=first + place < rows, other=0.0)
        factor = tl.where(length > 0, given / length, 0.0)
        tl.store(gradient + offset + at, (difference * factor[:, None]).to(gradient.dtype.element_ty), mask=inside)
    else:
        length = tl.sqrt(tl.sum(difference * difference, 1))
        tl.store(distance + first + place, length, mask=first + place < rows)


class _Distances(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        x, y = x.contiguous(), y.contiguous()
        distance = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, y, distance)
        _launch(x, y, distance, None, None)
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        x, y, distance = ctx.saved_tensors
        gradient = torch.empty_like(x)
        _launch(x, y, distance, upstream.contiguous(), gradient)
        return gradient, None


def _launch(x: Tensor, y: Tensor, distance: Tensor, upstream: Tensor | None, gradient: Tensor | None) -> None:
    columns = x.shape[-1]
    rows, block = x.numel() // columns, triton.next_power_of_2(columns)
    at_once = max(1, _TILE // block)
    with torch.cuda.device_of(x):
        _distances[(triton.cdiv(rows, at_once),)](
            x,
            y,
            distance,
            upstream,
            gradient,
            rows,
            columns,
            BACK=gradient is not None,
            ROWS=at_once,
            BLOCK=block,
            num_warps=min(32, max(4, at_once * block // 512)),
        )


def row_distances(x: Tensor, y: Tensor) -> Tensor:
    """As `hylo.ops.row_distance.row_distances`."""
    return _Distances.apply(x, y.detach())
