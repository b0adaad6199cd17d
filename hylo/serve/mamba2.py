"""Mamba-2 with grouped x and B, served."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from hylo.config import HyLoConfig
from hylo.mixers.mamba2 import Mamba2Geometry
from hylo.ops.gated_linear_attention import gated_linear_attention
from hylo.ops.gated_norm import rms_norm
from hylo.ops.short_convolution import short_convolution
from hylo.serve.architecture import MAMBA2_CHUNK
from hylo.serve.linear import LinearLayer, by_kernels, last_inputs
from hylo.serve.metadata import ChunkedBackend
from hylo.serve.parameters import Weight, in_whole_tiles, joined_parameter
from hylo.serve.states import state_shapes
from hylo.serve.weights import Place

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Of the norm after the recurrence.
NORM_EPS = 1e-5


class ServedMamba2(LinearLayer):
    """`hylo.mixers.mamba2.Mamba2`, its KV heads and the heads that they serve over the ranks."""

    def __init__(self, vllm_config: "VllmConfig", layer_idx: int, prefix: str) -> None:
        config: HyLoConfig = vllm_config.model_config.hf_config
        ranks = get_tensor_model_parallel_world_size()
        super().__init__(vllm_config, state_shapes(config, "mamba2", ranks), prefix)
        geometry = config.geometry("mamba2")
        assert isinstance(geometry, Mamba2Geometry)
        self.num_heads, self.num_kv_heads = geometry.num_heads // ranks, geometry.num_kv_heads // ranks
        self.inner_size, self.group_size = geometry.inner_size // ranks, geometry.group_size // ranks
        convolved = (geometry.group_size, geometry.group_size, geometry.inner_size)
        rows = (geometry.inner_size, *convolved, geometry.num_heads)
        self.in_proj = MergedColumnParallelLinear(
            config.hidden_size,
            in_whole_tiles(rows),
            bias=config.attention_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.in_proj",
        )
        for parameter in self.in_proj.parameters():
            parameter.data.zero_()
        self.conv_weight = joined_parameter(convolved, geometry.conv_size)
        self.conv_bias = joined_parameter(convolved)
        self.A_log = joined_parameter([geometry.num_heads], dtype=torch.float32)
        self.dt_bias = joined_parameter([geometry.num_heads], dtype=torch.float32)
        self.D = joined_parameter([geometry.num_heads], dtype=torch.float32)
        self.norm = Weight(joined_parameter([geometry.inner_size]))
        self.out_proj = RowParallelLinear(
            geometry.inner_size,
            config.hidden_size,
            bias=config.mixer_output_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.out_proj",
        )
        self.places = {
            "in_proj": Place("in_proj", split=rows),
            "conv1d.weight": Place("conv_weight", split=convolved),
            "conv1d.bias": Place("conv_bias", split=convolved),
        }

    @property
    def convolved_size(self) -> int:
        return 2 * self.group_size + self.inner_size

    def forward(self, hidden_states: Tensor, angles: Any) -> Tensor:
        """`[T, D]` to `[T, D]`."""
        joined, _ = self.in_proj(hidden_states)
        joined = joined[:, : self.inner_size + self.convolved_size + self.num_heads]
        z, rows = joined.split([self.inner_size, self.convolved_size + self.num_heads], dim=-1)
        y = self.mix(rows, self.inner_size)
        gated = (y.float() * functional.silu(z.float())).unflatten(-1, (self.num_heads, -1))
        normed = rms_norm(gated, NORM_EPS).flatten(1) * self.norm.weight
        out, _ = self.out_proj(normed.to(y.dtype))
        return out

    def heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, B and C by heads, `[..., H, hd]`: x and B stand by the heads that they serve."""
        x, B, C = mixed.split([self.group_size, self.group_size, self.inner_size], dim=-1)
        served = self.num_heads // self.num_kv_heads
        x, B = (part.unflatten(-1, (self.num_kv_heads, -1)).repeat_interleave(served, dim=-2) for part in (x, B))
        return x, B, C.unflatten(-1, (self.num_heads, -1)).contiguous()

    def decode(self, rows: Tensor, output: Tensor, slots: Tensor) -> None:
        if not by_kernels(rows):
            super().decode(rows, output, slots)
            return
        from hylo.serve.gpu import delta, mamba2

        past, state = self.kv_cache
        inputs, dt = rows.split([self.convolved_size, self.num_heads], dim=-1)
        x, B, C = self.heads(delta.convolve_one(inputs, self.conv_weight, self.conv_bias, past, slots))
        made = output.unflatten(-1, (self.num_heads, -1))
        mamba2.decode(x, dt, -self.A_log.exp(), B, C, self.D, self.dt_bias, state, slots, made)

    def prefill(self, rows: Tensor, output: Tensor, metadata: Any) -> None:
        if not by_kernels(rows):
            super().prefill(rows, output, metadata)
            return
        from hylo.serve.gpu import delta, mamba2

        past, state = self.kv_cache
        inputs, dt = rows.split([self.convolved_size, self.num_heads], dim=-1)
        x, B, C = self.heads(delta.convolve_many(inputs, self.conv_weight, self.conv_bias, past, metadata))
        made = output.unflatten(-1, (self.num_heads, -1))
        mamba2.prefill(x, dt.contiguous(), -self.A_log.exp(), B, C, self.D, self.dt_bias, state, metadata, made)

    def warm_up(self, rows: Tensor) -> None:
        from hylo.serve.gpu import groups, mamba2

        inputs, dt = rows.split([self.convolved_size, self.num_heads], dim=-1)
        state = torch.zeros(2, *self.shapes.recurrent, device=rows.device)
        x, B, C = self.heads(inputs)
        made = torch.empty_like(C)
        for count in (1, groups.most_prompts(self.shapes.recurrent)):
            prompts = groups.short_prompts(rows.shape[0], min(count, self.most_requests), rows.device, MAMBA2_CHUNK)
            mamba2.prefill(x, dt.contiguous(), -self.A_log.exp(), B, C, self.D, self.dt_bias, state, prompts, made)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.MAMBA2

    def get_attn_backend(self) -> type[AttentionBackend]:
        return ChunkedBackend

    def step(self, rows: Tensor, past: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        inputs, dt = rows.split([self.convolved_size, self.num_heads], dim=-1)
        mixed = short_convolution(inputs, self.conv_weight, self.conv_bias, past=past)
        x, B, C = self.heads(mixed)
        dt = functional.softplus(dt.float() + self.dt_bias)
        y, after = gated_linear_attention(
            C,
            B,
            (x * dt[..., None]).to(x.dtype),
            -self.A_log.exp() * dt,
            state=None if state is None else state.transpose(-1, -2),
        )
        assert after is not None
        y = (y + x * self.D[:, None]).to(x.dtype)
        return y.flatten(2), last_inputs(past, inputs), after.transpose(-1, -2)
