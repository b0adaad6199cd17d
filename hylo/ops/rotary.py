"""Rotary embedding of the last values of each head (arXiv 2104.09864): a kernel on a GPU, plain torch elsewhere."""

import torch
from torch import Tensor

from hylo.ops.kernels import fuses


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the last R values of each head, pair i being the values i and i + R / 2 of them (Llama's layout).

    Args:
        x: `[B, T, H, D]`.
        cos, sin: `[B or 1, T, R]`, R at most D; the second half of the last dim as the first.

    Returns:
        `[B, T, H, D]`, in the dtype of x.
    """
    if fuses(x, "triton"):
        from hylo.ops import rotary_triton

        return rotary_triton.rotate(x, cos, sin)
    size = cos.shape[-1]
    fixed, turned = x.split([x.shape[-1] - size, size], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    crossed = torch.cat([-second, first], dim=-1)
    result = (turned * cos[:, :, None] + crossed * sin[:, :, None]).to(x.dtype)
    return torch.cat([fixed, result], dim=-1) if fixed.shape[-1] else result
