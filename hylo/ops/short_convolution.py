"""Causal depthwise convolution over time, in plain torch."""

import torch
from torch import Tensor
from torch.nn import functional


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
