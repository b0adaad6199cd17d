"""RMS norms with a gate: fla's kernels, or plain torch."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from hylo.ops.kernels import use_fla

Activation = Literal["silu", "sigmoid"]


def norm_then_gate(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Activation = "silu") -> Tensor:
    """RMSNorm(x) * activation(gate) over the last dim, in the dtype of x.

    Args:
        x, gate: `[..., D]`.
        weight: `[D]`.
    """
    if use_fla(x):
        from fla.modules.norm.fused_norm_gate import rms_norm_gated

        return rms_norm_gated(x, gate, weight, None, activation=activation, eps=eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    opened = functional.silu(gate.to(wide)) if activation == "silu" else gate.to(wide).sigmoid()
    return (rms_norm(x.to(wide), eps) * weight * opened).to(x.dtype)


def gate_then_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(x * SiLU(gate)) over the last dim (Mamba-2's order), in the dtype of x.

    Args:
        x, gate: `[B, T, H, D]`, each head a group of its own.
        weight: `[H * D]`.
    """
    if use_fla(x):
        from fla.modules.norm.layernorm_gated import rmsnorm_fn

        out = rmsnorm_fn(
            x.flatten(-2), weight, None, z=gate.flatten(-2), eps=eps, group_size=x.shape[-1], norm_before_gate=False
        )
        return out.view_as(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    gated = x.to(wide) * functional.silu(gate.to(wide))
    return (rms_norm(gated, eps) * weight.view(x.shape[-2:])).to(x.dtype)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x over the root of its mean square in the last dim."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
