"""Rotary embedding in one pass: reads a head where it lies, turns its last values, copies the others."""

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from torch.autograd.function import once_differentiable

# Values that a program holds.
_TILE = 2048


@triton.jit
def _rotate(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    y,
    row_stride,
    token_stride,
    head_stride,
    angle_stride,
    tokens,
    rows,
    HEADS: tl.constexpr,
    FIXED: tl.constexpr,
    HALF: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    FIXED_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    # A row here is one head of one token.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    token = row // HEADS
    batch = token // tokens
    source = (batch * row_stride + (token % tokens) * token_stride + (row % HEADS) * head_stride)[:, None]
    target = (row * (FIXED + 2 * HALF))[:, None]
    angle = (batch * angle_stride + (token % tokens) * (2 * HALF))[:, None]
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    inside = there & (pair < HALF)
    first = tl.load(x + source + FIXED + pair, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + source + FIXED + HALF + pair, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + angle + pair, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle + pair, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    kind = y.dtype.element_ty
    tl.store(y + target + FIXED + pair, (first * c - second * s).to(kind), mask=inside)
    tl.store(y + target + FIXED + HALF + pair, (second * c + first * s).to(kind), mask=inside)
    if FIXED > 0:
        lane = tl.arange(0, FIXED_BLOCK)[None, :]
        kept = there & (lane < FIXED)
        tl.store(y + target + lane, tl.load(x + source + lane, mask=kept), mask=kept)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, tokens, heads, size = x.shape
    half = cos.shape[-1] // 2
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = batch * tokens * heads
    block, fixed_block = triton.next_power_of_2(half), triton.next_power_of_2(max(1, size - 2 * half))
    # A power of two.
    at_once = triton.next_power_of_2(max(1, _TILE // (2 * block + fixed_block)) + 1) // 2
    with torch.cuda.device_of(x):
        _rotate[(triton.cdiv(rows, at_once),)](
            x,
            cos,
            sin,
            y,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            cos.stride(0) if cos.shape[0] > 1 else 0,
            tokens,
            rows,
            HEADS=heads,
            FIXED=size - 2 * half,
            HALF=half,
            BACK=back,
            ROWS=at_once,
            FIXED_BLOCK=fixed_block,
            HALF_BLOCK=block,
            num_warps=4,
        )
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(upstream, cos, sin, back=True), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `hylo.ops.rotary.rotate`; no gradients of the angles."""
    return _Rotate.apply(x, cos.contiguous(), sin.contiguous())
