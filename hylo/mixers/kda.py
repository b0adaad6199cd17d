"""Kimi Delta Attention (arXiv 2510.26692), laid out as the layer of flash-linear-attention."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache

from hylo.errors import HyLoError
from hylo.mixers.base import Geometry, is_whole
from hylo.mixers.gated_deltanet import GatedNorm, start_decays
from hylo.mixers.linear import LinearMixer, depthwise, without_padding
from hylo.ops.kimi_delta_rule import kimi_delta_attention

if TYPE_CHECKING:
    from hylo.config import HyLoConfig


@dataclass(frozen=True)
class KDAGeometry(Geometry):
    """Sizes of a Kimi Delta Attention layer.

    Attributes:
        num_heads: heads of q, k and v alike.
        head_k_dim: size of q, k and the decay a head.
        head_v_dim: size of v, the output gate and the output norm a head.
        gate_rank: rank of the maps to the decays and to the output gate.
        conv_size: taps of the causal convolutions over q, k and v.
    """

    num_heads: int
    head_k_dim: int
    head_v_dim: int
    gate_rank: int
    conv_size: int = 4

    def __post_init__(self) -> None:
        for size in ("num_heads", "head_k_dim", "head_v_dim", "gate_rank", "conv_size"):
            value = getattr(self, size)
            least = 2 if size == "conv_size" else 1
            if not is_whole(value, least):
                raise HyLoError(f"geometry of kda: {size} is {value!r}; expected a whole number of at least {least}")

    @property
    def key_size(self) -> int:
        return self.num_heads * self.head_k_dim

    @property
    def value_size(self) -> int:
        return self.num_heads * self.head_v_dim


class KimiDeltaAttention(LinearMixer):
    """Gated DeltaNet with one decay a key channel: y = W_o (RMSNorm(o) * sigmoid(W_g2 W_g1 x + b_g)).

    q and k pass SiLU and an L2 norm, v passes SiLU; beta = sigmoid(W_b x) and, of rank `gate_rank`,
    g = -exp(A_log) softplus(W_f2 W_f1 x + dt_bias), head_k_dim values a head.
    """

    name = "kda"
    block = "KDA"
    geometry_class = KDAGeometry

    def __init__(self, config: "HyLoConfig", layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        geometry = config.geometry("kda")
        assert isinstance(geometry, KDAGeometry)
        self.geometry = geometry
        hidden, rank = config.hidden_size, geometry.gate_rank
        self.q_proj = nn.Linear(hidden, geometry.key_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(hidden, geometry.key_size, bias=False)
        self.v_proj = nn.Linear(hidden, geometry.value_size, bias=False)
        self.f_proj = nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, geometry.key_size, bias=False))
        self.b_proj = nn.Linear(hidden, geometry.num_heads, bias=False)
        self.g_proj = nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, geometry.value_size))
        self.q_conv1d = depthwise(geometry.key_size, geometry.conv_size)
        self.k_conv1d = depthwise(geometry.key_size, geometry.conv_size)
        self.v_conv1d = depthwise(geometry.value_size, geometry.conv_size)
        self.A_log = nn.Parameter(torch.zeros(geometry.num_heads))
        self.dt_bias = nn.Parameter(torch.zeros(geometry.key_size))
        self.o_norm = GatedNorm(geometry.head_v_dim, activation="sigmoid")
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
        output, state = kimi_delta_attention(
            q.unflatten(-1, (sizes.num_heads, -1)),
            k.unflatten(-1, (sizes.num_heads, -1)),
            v.unflatten(-1, (sizes.num_heads, -1)),
            self.f_proj(x).unflatten(-1, (sizes.num_heads, -1)),
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
        """Head-aligned: one head for each attention head, of the same size; gates of a head's rank, as published."""
        return {"num_heads": num_heads, "head_k_dim": head_dim, "head_v_dim": head_dim, "gate_rank": head_dim}

    @classmethod
    def convolution_elements(cls, config: "HyLoConfig") -> int:
        geometry = config.geometry("kda")
        assert isinstance(geometry, KDAGeometry)
        return (2 * geometry.key_size + geometry.value_size) * (geometry.conv_size - 1)

    @classmethod
    def state_elements(cls, config: "HyLoConfig") -> int:
        geometry = config.geometry("kda")
        assert isinstance(geometry, KDAGeometry)
        return geometry.num_heads * geometry.head_k_dim * geometry.head_v_dim
