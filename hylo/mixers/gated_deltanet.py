"""Gated DeltaNet (arXiv 2412.06464), laid out as the layer of flash-linear-attention."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hylo.mixers.delta import DeltaGeometry, DeltaNet
from hylo.ops.gated_delta_rule import gated_delta_net


@dataclass(frozen=True)
class GDNGeometry(DeltaGeometry):
    """Sizes of a Gated DeltaNet layer."""

    mixer = "gdn"


class GatedDeltaNet(DeltaNet):
    """The delta rule with one decay a head, g = -exp(A_log) softplus(W_a x + dt_bias), and the gate SiLU(W_g x)."""

    name = "gdn"
    block = "GDN"
    geometry_class = GDNGeometry

    def _add_decays_and_gate(self, hidden: int) -> nn.Parameter:
        self.g_proj = nn.Linear(hidden, self.geometry.value_size, bias=False)
        self.a_proj = nn.Linear(hidden, self.geometry.num_heads, bias=False)
        return nn.Parameter(torch.zeros(self.geometry.num_heads))

    def _recur(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        return gated_delta_net(q, k, v, self.a_proj(x), self.b_proj(x), self.A_log, self.dt_bias, **options)
