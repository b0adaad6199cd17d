"""Mamba-2 (arXiv 2405.21060) in the grouped form of "The Mamba in the Llama" (arXiv 2408.15237)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache
from transformers import initialization as init

from hylo.errors import HyLoError
from hylo.mixers.base import Geometry
from hylo.mixers.linear import LinearMixer, check_sizes, depthwise, start_decays, without_padding
from hylo.ops.gated_linear_attention import gated_linear_attention
from hylo.ops.gated_norm import gate_then_norm

if TYPE_CHECKING:
    from hylo.config import HyLoConfig


@dataclass(frozen=True)
class Mamba2Geometry(Geometry):
    """Sizes of a Mamba-2 layer, whose state has head_dim x head_dim values a head.

    Attributes:
        num_heads: heads of C, the state, the gate and the output.
        num_kv_heads: heads of x and B, each of which serves num_heads / num_kv_heads heads.
        head_dim: size of x, B and C a head.
        conv_size: taps of the causal convolution over x, B and C.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    conv_size: int = 4

    def __post_init__(self) -> None:
        check_sizes("mamba2", self)
        if self.num_heads % self.num_kv_heads:
            raise HyLoError(
                f"geometry of mamba2: num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )

    @property
    def inner_size(self) -> int:
        """Of z, C and the output."""
        return self.num_heads * self.head_dim

    @property
    def group_size(self) -> int:
        """Of x and of B."""
        return self.num_kv_heads * self.head_dim

    @property
    def convolved_size(self) -> int:
        return self.inner_size + 2 * self.group_size


class GroupedGatedNorm(nn.Module):
    """RMSNorm(x * SiLU(gate)), one group a head."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """`[B, T, H, D]` each."""
        return gate_then_norm(x, gate, self.weight, self.eps)


class Mamba2(LinearMixer):
    """out_proj(RMSNorm(y * SiLU(z))), y_t = C_t^T h_t + D x_t, h_t = exp(dt A) h_{t-1} + dt B_t x_t^T.

    `in_proj` gives z, x, B, C and dt, in this order. x, B and C pass the convolution and SiLU; dt <- softplus(dt +
    dt_bias), A = -exp(A_log). With q = C, k = B, v = dt x and g = dt A this is linear attention with one decay a head.
    """

    name = "mamba2"
    block = "M2"
    geometry_class = Mamba2Geometry

    def __init__(self, config: "HyLoConfig", layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        geometry = config.geometry("mamba2")
        assert isinstance(geometry, Mamba2Geometry)
        self.geometry = geometry
        heads = geometry.num_heads
        rows = geometry.inner_size + geometry.convolved_size + heads
        self.in_proj = nn.Linear(config.hidden_size, rows, bias=config.attention_bias)
        self.conv1d = depthwise(geometry.convolved_size, geometry.conv_size, bias=True)
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GroupedGatedNorm(geometry.inner_size)
        self.out_proj = nn.Linear(geometry.inner_size, config.hidden_size, bias=config.mixer_output_bias)

    def reset_parameters(self) -> None:
        start_decays(self.A_log, self.dt_bias)
        init.ones_(self.D)

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
        parts = [sizes.group_size, sizes.group_size, sizes.inner_size]
        z, x, B, C, dt = self.in_proj(hidden_states).split([sizes.inner_size, *parts, sizes.num_heads], dim=-1)
        inputs = [without_padding(part, attention_mask) for part in (x, B, C)]
        assert self.conv1d.bias is not None
        taps, biases = self.conv1d.weight[:, 0].split(parts), self.conv1d.bias.split(parts)
        mixed, state = self._convolve(inputs, taps, biases, past_key_values, cu_seqlens)
        # The convolution's bias would write what no token said.
        x, B, C = (without_padding(part, attention_mask) for part in mixed)
        # Heads stand by the KV head that serves them, [B, T, Hkv, H / Hkv, D].
        x, B = (part.unflatten(-1, (sizes.num_kv_heads, 1, -1)) for part in (x, B))
        grouped = (sizes.num_kv_heads, sizes.num_heads // sizes.num_kv_heads)
        dt = functional.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + self.dt_bias)
        y, state = gated_linear_attention(
            C.unflatten(-1, (sizes.num_heads, -1)),
            B.expand(-1, -1, *grouped, -1).flatten(2, 3),
            (x * dt.unflatten(-1, grouped)[..., None]).to(x.dtype).flatten(2, 3),
            -self.A_log.to(dt.dtype).exp() * dt,
            state=state,
            return_state=past_key_values is not None,
            cu_seqlens=cu_seqlens,
        )
        self._keep(state, past_key_values)
        y = torch.addcmul(y.unflatten(2, grouped), x, self.D.view(*grouped, 1)).to(y.dtype).flatten(2, 3)
        return self.out_proj(self.norm(y, z.unflatten(-1, (sizes.num_heads, -1))).flatten(2))

    @property
    def output_projection(self) -> nn.Linear:
        return self.out_proj

    @classmethod
    def default_geometry(
        cls, num_heads: int, num_kv_heads: int, head_dim: int, given: dict[str, Any]
    ) -> dict[str, Any]:
        """As published: the base's heads."""
        return {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}

    @classmethod
    def convolution_elements(cls, config: "HyLoConfig") -> int:
        geometry = config.geometry("mamba2")
        assert isinstance(geometry, Mamba2Geometry)
        return geometry.convolved_size * (geometry.conv_size - 1)

    @classmethod
    def state_elements(cls, config: "HyLoConfig") -> int:
        geometry = config.geometry("mamba2")
        assert isinstance(geometry, Mamba2Geometry)
        return geometry.num_heads * geometry.head_dim**2
