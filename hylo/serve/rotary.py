"""Rotary angles of a flat batch of tokens, once for all layers of a mixer."""

import torch
from torch import Tensor, nn

from hylo.mixers.rotary import RotaryEmbedding

Angles = tuple[Tensor, Tensor]


class RotaryAngles(nn.Module):
    """cos and sin as `hylo.mixers.rotary` gives them, without what traces badly."""

    inv_freq: Tensor

    def __init__(self, rotary: RotaryEmbedding) -> None:
        super().__init__()
        self.register_buffer("inv_freq", rotary.inv_freq.float(), persistent=False)
        self.scaling = float(rotary.attention_scaling)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """Positions `[T]` to cos and sin, `[T, 1, rotary values]` each."""
        turns = positions[:, None].float() * self.inv_freq
        both = torch.cat([turns, turns], dim=-1)[:, None]
        return (both.cos() * self.scaling).to(dtype), (both.sin() * self.scaling).to(dtype)


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotates `[T, heads, rotary values]`; pair i is the values i and i + half."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
