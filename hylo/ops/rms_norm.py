"""RMS norms, alone or of a sum that is kept: fla's kernels, or plain torch."""

import torch
from torch import Tensor

from hylo.ops.kernels import fuses


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x over the root of its mean square in the last dim, in the dtype of x; computed in float32 or wider.

    Args:
        x: `[..., D]`.
        weight: `[D]`.
    """
    if fuses(x):
        from fla.modules.norm.layernorm import rms_norm as fused

        return fused(x, weight, None, eps=eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_then_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of residual + x, and that sum, in the dtype of the residual.

    Args:
        x, residual: `[..., D]`.
        weight: `[D]`.
    """
    if fuses(residual) and x.dtype == residual.dtype:
        from fla.modules.norm.layernorm import rms_norm as fused

        normed, total = fused(x, weight, None, residual=residual, eps=eps, prenorm=True)
        return normed, total
    total = residual + x
    return rms_norm(total, weight, eps), total
