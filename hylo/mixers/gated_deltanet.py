"""Gated DeltaNet (arXiv 2412.06464), laid out as the layer of flash-linear-attention."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from hylo.errors import HyLoError
from hylo.mixers.base import Geometry, is_whole
from hylo.mixers.linear import LinearMixer, depthwise, without_padding
from hylo.ops.gated_delta_rule import gated_delta_net
from hylo.ops.gated_norm import Activation, norm_then_gate

if TYPE_CHECKING:
    from hylo.config import HyLoConfig


@dataclass(frozen=True)
class GDNGeometry(Geometry):
    """Sizes of a Gated DeltaNet layer.

    Attributes:
        num_heads: heads of q, k and v alike.
        head_k_dim: size of q and k a head.
        head_v_dim: size of v, the output gate and the output norm a head.
        conv_size: taps of the causal convolutions over q, k and v.
    """

    num_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_size: int = 4

    def __post_init__(self) -> None:
        for size in ("num_heads", "head_k_dim", "head_v_dim", "conv_size"):
            value = getattr(self, size)
            least = 2 if size == "conv_size" else 1
            if not is_whole(value, least):
                raise HyLoError(f"geometry of gdn: {size} is {value!r}; expected a whole number of at least {least}")

    @property
    def key_size(self) -> int:
        return self.num_heads * self.head_k_dim

    @property
    def value_size(self) -> int:
        return self.num_heads * self.head_v_dim


class GatedNorm(nn.Module):
    """RMSNorm(x) * activation(gate) over the last dim."""

    def __init__(self, size: int, eps: float = 1e-5, activation: Activation = "silu") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.activation = eps, activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return norm_then_gate(x, gate, self.weight, self.eps, self.activation)


class GatedDeltaNet(LinearMixer):
    """y = W_o (RMSNorm(o) * SiLU(W_g x)), o from the gated delta rule over convolved q, k and v.

    q and k pass SiLU and an L2 norm, v passes SiLU; beta = sigmoid(W_b x), g = -exp(A_log) softplus(W_a x + dt_bias).
    The state a sequence is num_heads x head_k_dim x head_v_dim, whatever its length.
    """

    name = "gdn"
    block = "GDN"
    geometry_class = GDNGeometry

    def __init__(self, config: "HyLoConfig", layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        geometry = config.geometry("gdn")
        assert isinstance(geometry, GDNGeometry)
        self.geometry = geometry
        hidden, heads = config.hidden_size, geometry.num_heads
        self.q_proj = nn.Linear(hidden, geometry.key_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(hidden, geometry.key_size, bias=False)
        self.v_proj = nn.Linear(hidden, geometry.value_size, bias=False)
        self.g_proj = nn.Linear(hidden, geometry.value_size, bias=False)
        self.a_proj = nn.Linear(hidden, heads, bias=False)
        self.b_proj = nn.Linear(hidden, heads, bias=False)
        self.q_conv1d = depthwise(geometry.key_size, geometry.conv_size)
        self.k_conv1d = depthwise(geometry.key_size, geometry.conv_size)
        self.v_conv1d = depthwise(geometry.value_size, geometry.conv_size)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.o_norm = GatedNorm(geometry.head_v_dim)
        self.o_proj = nn.Linear(geometry.value_size, hidden, bias=config.mixer_output_bias)

    def reset_parameters(self) -> None:
        start_decays(self.A_log, self.dt_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        sizes = self.geometry
        x = without_padding(hidden_states, attention_mask)
        # Once more after the projections: that of q may have a bias.
        inputs = [without_padding(proj(x), attention_mask) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        taps = [conv.weight[:, 0] for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]
        (q, k, v), state = self._convolve(inputs, taps, [None] * 3, past_key_values, cu_seqlens)
        output, state = gated_delta_net(
            q.unflatten(-1, (sizes.num_heads, -1)),
            k.unflatten(-1, (sizes.num_heads, -1)),
            v.unflatten(-1, (sizes.num_heads, -1)),
            self.a_proj(x),
            self.b_proj(x),
            self.A_log,
            self.dt_bias,
            state=state,
            return_state=past_key_values is not None,
            cu_seqlens=cu_seqlens,
        )
        self._keep(state, past_key_values)
        output = self.o_norm(output, self.g_proj(x).unflatten(-1, (sizes.num_heads, -1)))
        return self.o_proj(output.flatten(2))

    @property
    def output_projection(self) -> nn.Linear:
        return self.o_proj

    @classmethod
    def default_geometry(
        cls, num_heads: int, num_kv_heads: int, head_dim: int, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Head-aligned: one head for each attention head, of the same size."""
        return {"num_heads": num_heads, "head_k_dim": head_dim, "head_v_dim": head_dim}

    @classmethod
    def convolution_elements(cls, config: "HyLoConfig") -> int:
        geometry = config.geometry("gdn")
        assert isinstance(geometry, GDNGeometry)
        return (2 * geometry.key_size + geometry.value_size) * (geometry.conv_size - 1)

    @classmethod
    def state_elements(cls, config: "HyLoConfig") -> int:
        geometry = config.geometry("gdn")
        assert isinstance(geometry, GDNGeometry)
        return geometry.num_heads * geometry.head_k_dim * geometry.head_v_dim


def start_decays(A_log: Tensor, dt_bias: Tensor) -> None:
    """As in Mamba-2: A uniform in [1, 16], step sizes log-uniform in [0.001, 0.1]."""
    init.copy_(A_log, torch.empty_like(A_log).uniform_(1, 16).log())
    step = torch.empty_like(dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp().clamp(min=1e-4)
    # The inverse of softplus.
    init.copy_(dt_bias, step + torch.log(-torch.expm1(-step)))
