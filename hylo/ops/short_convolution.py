"""Causal depthwise convolution over time, then SiLU: one kernel, fla's where inputs are cached, or plain torch."""

import torch
from torch import Tensor
from torch.nn import functional

from hylo.ops.kernels import fuses, use_fla
from hylo.ops.packing import document_starts, each_document

_MOST_FUSED_TAPS = 4


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    past: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """SiLU of `causal_convolution`.

    Args:
        x: `[B, T, C]`.
        weight: `[C, W]`.
        bias: `[C]`.
        past: the W - 1 inputs before x, `[B, W - 1, C]`; zeros by default.
        cu_seqlens: offsets of documents, none of which sees another; B must be 1 and `past` None.

    Returns:
        `[B, T, C]`, in the dtype of x.
    """
    if past is not None and cu_seqlens is not None:
        raise ValueError("expected past inputs or packed documents, not both")
    if past is None and weight.shape[1] <= _MOST_FUSED_TAPS and fuses(x, "triton"):
        from hylo.ops import short_convolution_triton

        starts = None if cu_seqlens is None else document_starts(cu_seqlens, x.shape[1])
        return short_convolution_triton.short_convolution(x, weight, bias, starts)
    if use_fla(x):
        from fla.modules.causal_conv1d import causal_conv1d

        state = None
        if past is not None:
            # fla keeps W inputs, of which the oldest meets no new one.
            state = functional.pad(past, (0, 0, 1, 0)).transpose(1, 2).contiguous()
        out, _ = causal_conv1d(
            x, weight.contiguous(), bias, initial_state=state, activation="silu", cu_seqlens=cu_seqlens
        )
        return out
    if cu_seqlens is not None:
        return each_document(lambda part: functional.silu(causal_convolution(part, weight, bias)), cu_seqlens, x)
    length = x.shape[1]
    if past is not None:
        x = torch.cat([past, x], dim=1)
    return functional.silu(causal_convolution(x, weight, bias)[:, -length:])


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_t = sum_j weight_j * x_{t - W + 1 + j} (+ bias), per channel; the last tap meets the newest input.

    Summed tap by tap, in float32 or wider: convolution kernels for low precision differ between devices.

    Args:
        x: `[B, T, C]`; zeros are assumed before it.
        weight: `[C, W]`.
        bias: `[C]`.

    Returns:
        `[B, T, C]`, in the dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    length, width = x.shape[1], weight.shape[-1]
    padded = functional.pad(x, (0, 0, width - 1, 0)).to(wide)
    out = sum(padded[:, j : j + length] * weight[:, j].to(wide) for j in range(width))
    assert isinstance(out, Tensor)
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)
