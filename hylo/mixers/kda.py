"""Kimi Delta Attention (arXiv 2510.26692), laid out as the layer of flash-linear-attention."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hylo.mixers.delta import DeltaGeometry, DeltaNet
from hylo.ops.kimi_delta_rule import kimi_delta_attention


@dataclass(frozen=True, kw_only=True)
class KDAGeometry(DeltaGeometry):
    """Sizes of a Kimi Delta Attention layer.

    Attributes:
        gate_rank: rank of the maps to the decays and to the output gate.
    """

    mixer = "kda"

    gate_rank: int


class KimiDeltaAttention(DeltaNet):
    """The delta rule with one decay a key channel, and the gate sigmoid(W_g2 W_g1 x + b_g).

    g = -exp(A_log) softplus(W_f2 W_f1 x + dt_bias), head_k_dim values a head; both maps have rank `gate_rank`.
    """

    name = "kda"
    block = "KDA"
    geometry_class = KDAGeometry
    gate = "sigmoid"

    def _add_decays_and_gate(self, hidden: int) -> nn.Parameter:
        sizes = self.geometry
        assert isinstance(sizes, KDAGeometry)
        rank = sizes.gate_rank
        self.g_proj = nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, sizes.value_size))
        self.f_proj = nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, sizes.key_size, bias=False))
        return nn.Parameter(torch.zeros(sizes.key_size))

    def _recur(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        decays = self.f_proj(x).unflatten(-1, (self.geometry.num_heads, -1))
        return kimi_delta_attention(q, k, v, decays, self.b_proj(x), self.A_log, self.dt_bias, **options)

    @classmethod
    def default_geometry(
        cls, num_heads: int, num_kv_heads: int, head_dim: int, given: dict[str, Any]
    ) -> dict[str, Any]:
        """As Gated DeltaNet's; gates of a head's rank, as published."""
        return super().default_geometry(num_heads, num_kv_heads, head_dim, given) | {"gate_rank": head_dim}
