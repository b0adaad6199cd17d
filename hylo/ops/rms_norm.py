"""RMS norms, alone or of a sum that is kept: a kernel on a GPU, plain torch as its reference and elsewhere."""

import torch
from torch import Tensor

from hylo.ops.kernels import fuses


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """weight * x over the root of its mean square in the last dim; computed in float32 or wider.

    Args:
        x: `[..., D]`.
        weight: `[D]`.
        dtype: of the result; that of x by default.
    """
    if fuses(x, "triton"):
        from hylo.ops import rms_norm_triton

        return rms_norm_triton.rms_norm(x, weight, eps, dtype)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (weight * unit).to(dtype or x.dtype)


def add_then_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of residual + x, and that sum, in the dtype of the residual.

    Args:
        x, residual: `[..., D]`.
        weight: `[D]`.
        dtype: of the norm; that of the residual by default.
    """
    if fuses(residual, "triton"):
        from hylo.ops import rms_norm_triton

        return rms_norm_triton.add_then_norm(x, residual, weight, eps, dtype)
    total = residual + x
    return rms_norm(total, weight, eps, dtype), total
