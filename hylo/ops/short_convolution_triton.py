"""The short convolution with SiLU, forward and backward, over documents packed into rows.

Bound by memory. Forward reads x and writes y. Backward goes over the tokens twice: first from x and y's gradient to
that of the convolution, from which the taps' own gradients are summed; then from there to the gradient of x. Where a
token's document begins is a number a token, so that boundaries cost nothing. Computed in float32.
"""

from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tokens and channels that a program holds, and in how many steps one goes on that sums the taps' gradients.
_FORWARD = {"TOKENS": 16, "CHANNELS": 64, "num_warps": 2}
_TAPS = {"TOKENS": 8, "CHANNELS": 64, "STEPS": 8, "num_warps": 2}
_INPUT = {"TOKENS": 16, "CHANNELS": 64, "num_warps": 2}


@triton.jit
def _convolved(  # type: ignore[no-untyped-def]
    x, weight, bias, start, place, lane, there, within, stride, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Before SiLU, `[tokens, channels]`; x and `start` count from the program's first token, as `place` does."""
    result = tl.zeros([place.shape[0], lane.shape[0]], tl.float32)
    if HAS_BIAS:
        result += tl.load(bias + lane, mask=within, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(WIDTH):
        at = place - (WIDTH - 1 - tap)
        seen = there & (at >= start)[:, None]
        value = tl.load(x + at[:, None] * stride + lane[None, :], mask=seen, other=0.0).to(tl.float32)
        result += value * tl.load(weight + lane * WIDTH + tap, mask=within, other=0.0).to(tl.float32)[None, :]
    return result


@triton.jit
def _begins(  # type: ignore[no-untyped-def]
    starts, first, place, tokens, length, PACKED: tl.constexpr
):
    """Where the documents of the tokens `first + place` begin, counted from `first`."""
    token = first + place
    begin = tl.load(starts + token, mask=token < tokens, other=0) if PACKED else token // length * length
    return begin - first


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    starts,
    y,
    tokens,
    length,
    channels,
    stride,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    first = tl.program_id(0) * TOKENS
    place, lane = tl.arange(0, TOKENS), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    within = lane < channels
    there = (first + place < tokens)[:, None] & within[None, :]
    start = _begins(starts, first, place, tokens, length, PACKED)
    x += first.to(tl.int64) * stride
    z = _convolved(x, weight, bias, start, place, lane, there, within, stride, WIDTH, HAS_BIAS)
    y += first.to(tl.int64) * channels
    y_at = place[:, None] * channels + lane[None, :]
    tl.store(y + y_at, (z * tl.sigmoid(z)).to(y.dtype.element_ty), mask=there)


@triton.jit
def _backward_taps(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    starts,
    upstream,
    inner,
    tap_gradients,
    bias_gradients,
    tokens,
    length,
    channels,
    stride,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The gradient of the convolution, and this program's share of those of taps and bias."""
    place, lane = tl.arange(0, TOKENS), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    within = lane < channels
    # Summed over tokens at the end: a sum across threads at each step would cost more than all else.
    first_tap = tl.zeros([TOKENS, CHANNELS], tl.float32)
    second_tap = tl.zeros([TOKENS, CHANNELS], tl.float32)
    third_tap = tl.zeros([TOKENS, CHANNELS], tl.float32)
    fourth_tap = tl.zeros([TOKENS, CHANNELS], tl.float32)
    bias_sums = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for step in range(STEPS):
        first = (tl.program_id(0) * STEPS + step) * TOKENS
        there = (first + place < tokens)[:, None] & within[None, :]
        start = _begins(starts, first, place, tokens, length, PACKED)
        begin = x + first.to(tl.int64) * stride
        z = _convolved(begin, weight, bias, start, place, lane, there, within, stride, WIDTH, HAS_BIAS)
        offset = first.to(tl.int64) * channels
        at = place[:, None] * channels + lane[None, :]
        given = tl.load(upstream + offset + at, mask=there, other=0.0).to(tl.float32)
        opened = tl.sigmoid(z)
        gradient = given * opened * (1 + z * (1 - opened))
        tl.store(inner + offset + at, gradient.to(inner.dtype.element_ty), mask=there)
        for tap in tl.static_range(WIDTH):
            past = place - (WIDTH - 1 - tap)
            seen = there & (past >= start)[:, None]
            value = tl.load(begin + past[:, None] * stride + lane[None, :], mask=seen, other=0.0).to(tl.float32)
            if tap == 0:
                first_tap += gradient * value
            elif tap == 1:
                second_tap += gradient * value
            elif tap == 2:
                third_tap += gradient * value
            else:
                fourth_tap += gradient * value
        if HAS_BIAS:
            bias_sums += gradient
    share = tl.program_id(0).to(tl.int64) * channels
    tap_gradients += share * WIDTH
    for tap in tl.static_range(WIDTH):
        if tap == 0:
            summed = tl.sum(first_tap, 0)
        elif tap == 1:
            summed = tl.sum(second_tap, 0)
        elif tap == 2:
            summed = tl.sum(third_tap, 0)
        else:
            summed = tl.sum(fourth_tap, 0)
        tl.store(tap_gradients + lane * WIDTH + tap, summed, mask=within)
    if HAS_BIAS:
        tl.store(bias_gradients + share + lane, tl.sum(bias_sums, 0), mask=within)


@triton.jit
def _backward_input(  # type: ignore[no-untyped-def]
    inner,
    weight,
    starts,
    gradient,
    tokens,
    length,
    channels,
    WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A token's gradient: from those after it that saw it."""
    first = tl.program_id(0) * TOKENS
    place, lane = tl.arange(0, TOKENS), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    within = lane < channels
    there = (first + place < tokens)[:, None] & within[None, :]
    offset = first.to(tl.int64) * channels
    inner += offset
    result = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for later in tl.static_range(WIDTH):
        at = place + later
        start = _begins(starts, first, at, tokens, length, PACKED)
        seen = there & ((first + at < tokens) & (start <= place))[:, None]
        value = tl.load(inner + at[:, None] * channels + lane[None, :], mask=seen, other=0.0).to(tl.float32)
        tap = tl.load(weight + lane * WIDTH + (WIDTH - 1 - later), mask=within, other=0.0).to(tl.float32)
        result += value * tap[None, :]
    at = place[:, None] * channels + lane[None, :]
    tl.store(gradient + offset + at, result.to(gradient.dtype.element_ty), mask=there)


def _rows(x: Tensor) -> Tensor:
    """With its rows one after the other, at one distance; a part of wider rows stays where it is."""
    one_distance = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if x.stride(-1) == 1 and one_distance else x.contiguous()


def _grid(x: Tensor, tile: dict[str, int]) -> tuple[int, int]:
    tokens = tile["TOKENS"] * tile.get("STEPS", 1)
    return triton.cdiv(x.shape[0] * x.shape[1], tokens), triton.cdiv(x.shape[2], tile["CHANNELS"])


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None) -> Tensor:
        x, weight = _rows(x), weight.contiguous()
        batch, length, channels = x.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        sizes: dict[str, Any] = {"WIDTH": weight.shape[1], "PACKED": starts is not None}
        with torch.cuda.device_of(x):
            _forward[_grid(x, _FORWARD)](
                x,
                weight,
                bias,
                starts,
                y,
                batch * length,
                length,
                channels,
                x.stride(1),
                HAS_BIAS=bias is not None,
                **sizes,
                **_FORWARD,
            )
        ctx.save_for_backward(x, weight, bias, starts)
        ctx.sizes = sizes
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, starts = ctx.saved_tensors
        batch, length, channels = x.shape
        upstream = upstream.contiguous()
        inner, gradient = torch.empty_like(upstream), torch.empty_like(upstream)
        grid = _grid(x, _TAPS)
        taps = torch.empty(grid[0], *weight.shape, dtype=torch.float32, device=x.device)
        biases = taps.new_empty(grid[0], channels) if bias is not None else None
        with torch.cuda.device_of(x):
            _backward_taps[grid](
                x,
                weight,
                bias,
                starts,
                upstream,
                inner,
                taps,
                biases,
                batch * length,
                length,
                channels,
                x.stride(1),
                HAS_BIAS=bias is not None,
                **ctx.sizes,
                **_TAPS,
            )
            _backward_input[_grid(x, _INPUT)](
                inner, weight, starts, gradient, batch * length, length, channels, **ctx.sizes, **_INPUT
            )
        bias_gradient = biases.sum(0).to(bias.dtype) if biases is not None else None
        return gradient, taps.sum(0).to(weight.dtype), bias_gradient, None


def short_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None) -> Tensor:
    """As `hylo.ops.short_convolution.short_convolution`, without a past.

    Args:
        weight: `[C, W]`, W at most 4.
        starts: `[T]` int32, where the document of each token begins; None for one document a row.
    """
    return _Convolution.apply(x, weight, bias, starts)
