"""Gated DeltaNet (arXiv 2412.06464), laid out as the layer of flash-linear-attention."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache
from transformers import initialization as init

from hylo.errors import HyLoError
from hylo.mixers.base import Geometry, TokenMixer, is_whole
from hylo.ops.gated_delta_rule import chunk_gated_delta_rule, recurrent_gated_delta_rule
from hylo.ops.short_convolution import causal_convolution

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
    """RMSNorm(x) * SiLU(gate) over the last dim."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight * functional.silu(gate.to(wide.dtype))).to(x.dtype)


class GatedDeltaNet(TokenMixer):
    """y = W_o (RMSNorm(o) * SiLU(W_g x)), o from the gated delta rule over convolved q, k and v.

    q and k pass SiLU and an L2 norm, v passes SiLU; beta = sigmoid(W_b x), g = -exp(A_log) softplus(W_a x + dt_bias).
    The state a sequence is num_heads x head_k_dim x head_v_dim, whatever its length.
    """

    name = "gdn"
    block = "GDN"
    layer_type = "linear_attention"
    geometry_class = GDNGeometry

    def __init__(self, config: "HyLoConfig", layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        geometry = config.geometry("gdn")
        assert isinstance(geometry, GDNGeometry)
        self.geometry = geometry
        hidden, heads = config.hidden_size, geometry.num_heads
        self.q_proj = nn.Linear(hidden, geometry.key_size, bias=False)
        self.k_proj = nn.Linear(hidden, geometry.key_size, bias=False)
        self.v_proj = nn.Linear(hidden, geometry.value_size, bias=False)
        self.g_proj = nn.Linear(hidden, geometry.value_size, bias=False)
        self.a_proj = nn.Linear(hidden, heads, bias=False)
        self.b_proj = nn.Linear(hidden, heads, bias=False)
        self.q_conv1d = _convolution(geometry.key_size, geometry.conv_size)
        self.k_conv1d = _convolution(geometry.key_size, geometry.conv_size)
        self.v_conv1d = _convolution(geometry.value_size, geometry.conv_size)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.o_norm = GatedNorm(geometry.head_v_dim)
        self.o_proj = nn.Linear(geometry.value_size, hidden, bias=False)

    def reset_parameters(self) -> None:
        """Decays as in Mamba-2: A uniform in [1, 16], step sizes log-uniform in [0.001, 0.1]."""
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1, 16).log())
        step = torch.empty_like(self.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp().clamp(min=1e-4)
        # The inverse of softplus.
        init.copy_(self.dt_bias, step + torch.log(-torch.expm1(-step)))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        batch, length, _ = hidden_states.shape
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        if attention_mask is not None:
            # A padding token that is zero writes nothing to the convolution or to the state.
            hidden_states = hidden_states * attention_mask[..., None].to(hidden_states.dtype)
        inputs = torch.cat([proj(hidden_states) for proj in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        state = None
        if past_key_values is not None:
            cached = past_key_values.layers[self.layer_idx]
            # Read before the convolution's update, which marks the layer as having seen tokens.
            state = cached.recurrent_states[0] if cached.has_previous_state[0] else None
            # Returns the past inputs with the new ones, and keeps the last conv_size - 1.
            kept = self.geometry.conv_size - 1
            inputs = past_key_values.update_conv_state(
                inputs.transpose(1, 2), self.layer_idx, conv_kernel_size=kept
            ).transpose(1, 2)
        taps = torch.cat([conv.weight[:, 0] for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)])
        mixed = functional.silu(causal_convolution(inputs, taps)[:, -length:])
        q, k, v = mixed.split([self.geometry.key_size, self.geometry.key_size, self.geometry.value_size], dim=-1)
        heads = (batch, length, self.geometry.num_heads, -1)
        q = functional.normalize(q.reshape(heads).to(wide), dim=-1, eps=1e-6)
        k = functional.normalize(k.reshape(heads).to(wide), dim=-1, eps=1e-6)
        g = -self.A_log.to(wide).exp() * functional.softplus(self.a_proj(hidden_states).to(wide) + self.dt_bias)
        beta = self.b_proj(hidden_states).to(wide).sigmoid()

        rule = recurrent_gated_delta_rule if length == 1 else chunk_gated_delta_rule
        output, state = rule(q, k, v.reshape(heads), g, beta, state=state)
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx)
        output = self.o_norm(output, self.g_proj(hidden_states).view(heads))
        return self.o_proj(output.reshape(batch, length, -1))

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
    def cache_elements_per_token(cls, config: "HyLoConfig") -> int:
        return 0

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


def _convolution(channels: int, taps: int) -> nn.Conv1d:
    """A depthwise convolution's weight `[channels, 1, taps]`, named as in flash-linear-attention."""
    return nn.Conv1d(channels, channels, taps, groups=channels, bias=False)
