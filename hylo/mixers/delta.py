"""What the delta-rule mixers share: heads of q, k and v, their convolutions, the write strength, and a gated norm."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache

from hylo.mixers.base import Geometry
from hylo.mixers.linear import LinearMixer, check_sizes, depthwise, start_decays, without_padding
from hylo.ops.gated_norm import Activation, norm_then_gate

if TYPE_CHECKING:
    from hylo.config import HyLoConfig


@dataclass(frozen=True)
class DeltaGeometry(Geometry):
    """Sizes of a delta-rule layer.

    Attributes:
        num_heads: heads of q, k and v alike.
        head_k_dim: size of q and k a head.
        head_v_dim: size of v, the output gate and the output norm a head.
        conv_size: taps of the causal convolutions over q, k and v.
    """

    mixer: ClassVar[str]

    num_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_size: int = 4

    def __post_init__(self) -> None:
        check_sizes(self.mixer, self)

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


class DeltaNet(LinearMixer):
    """y = W_o (RMSNorm(o) * gate(x)), o from a delta rule over convolved q, k and v.

    q and k pass SiLU and an L2 norm, v passes SiLU; beta = sigmoid(W_b x). A mixer adds its decays and its gate, named
    as in flash-linear-attention. The state a sequence is num_heads x head_k_dim x head_v_dim, whatever its length.
    """

    gate: ClassVar[Activation] = "silu"

    geometry: DeltaGeometry
    g_proj: nn.Module

    def __init__(self, config: "HyLoConfig", layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.geometry = geometry = self._sizes(config)
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, geometry.key_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(hidden, geometry.key_size, bias=False)
        self.v_proj = nn.Linear(hidden, geometry.value_size, bias=False)
        self.b_proj = nn.Linear(hidden, geometry.num_heads, bias=False)
        self.q_conv1d = depthwise(geometry.key_size, geometry.conv_size)
        self.k_conv1d = depthwise(geometry.key_size, geometry.conv_size)
        self.v_conv1d = depthwise(geometry.value_size, geometry.conv_size)
        self.A_log = nn.Parameter(torch.zeros(geometry.num_heads))
        self.o_norm = GatedNorm(geometry.head_v_dim, activation=self.gate)
        self.o_proj = nn.Linear(geometry.value_size, hidden, bias=config.mixer_output_bias)
        self.dt_bias = self._add_decays_and_gate(hidden)

    @abstractmethod
    def _add_decays_and_gate(self, hidden: int) -> nn.Parameter:
        """Adds `g_proj` and the map to the decays; returns the decays' `dt_bias`."""

    @abstractmethod
    def _recur(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """The rule: `[B, T, D]`, and q, k and v by heads, `[B, T, H, K or V]`, to `[B, T, H, V]` and the last state."""

    @classmethod
    def _sizes(cls, config: "HyLoConfig") -> DeltaGeometry:
        geometry = config.geometry(cls.name)
        assert isinstance(geometry, DeltaGeometry)
        return geometry

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
        x = without_padding(hidden_states, attention_mask)
        # Once more after the projections: that of q may have a bias.
        inputs = [without_padding(proj(x), attention_mask) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        taps = [conv.weight[:, 0] for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)]
        mixed, state = self._convolve(inputs, taps, [None] * 3, past_key_values, cu_seqlens)
        q, k, v = (part.unflatten(-1, (self.geometry.num_heads, -1)) for part in mixed)
        keep = past_key_values is not None
        output, state = self._recur(x, q, k, v, state=state, return_state=keep, cu_seqlens=cu_seqlens)
        self._keep(state, past_key_values)
        output = self.o_norm(output, self.g_proj(x).unflatten(-1, (self.geometry.num_heads, -1)))
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
        geometry = cls._sizes(config)
        return (2 * geometry.key_size + geometry.value_size) * (geometry.conv_size - 1)

    @classmethod
    def state_elements(cls, config: "HyLoConfig") -> int:
        geometry = cls._sizes(config)
        return geometry.num_heads * geometry.head_k_dim * geometry.head_v_dim
