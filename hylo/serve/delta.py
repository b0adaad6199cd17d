"""Gated DeltaNet and Kimi Delta Attention, served."""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from hylo.config import HyLoConfig
from hylo.mixers.delta import DeltaGeometry
from hylo.mixers.kda import KDAGeometry
from hylo.ops.gated_delta_rule import gated_delta_net
from hylo.ops.gated_norm import rms_norm
from hylo.ops.kimi_delta_rule import kimi_delta_attention
from hylo.ops.short_convolution import short_convolution
from hylo.serve.linear import LinearLayer, by_kernels, last_inputs
from hylo.serve.parameters import Weight, in_whole_tiles, joined_parameter
from hylo.serve.states import state_shapes
from hylo.serve.weights import Place

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Of the norm after the recurrence.
NORM_EPS = 1e-5


class ServedDelta(LinearLayer):
    """What both share: q, k and v through one convolution, a delta rule, a gated norm."""

    mixer: str

    def __init__(self, vllm_config: "VllmConfig", prefix: str) -> None:
        config: HyLoConfig = vllm_config.model_config.hf_config
        ranks = get_tensor_model_parallel_world_size()
        super().__init__(vllm_config, state_shapes(config, self.mixer, ranks), prefix)
        geometry = config.geometry(self.mixer)
        assert isinstance(geometry, DeltaGeometry)
        self.geometry = geometry
        self.num_heads = geometry.num_heads // ranks
        self.key_size, self.value_size = geometry.key_size // ranks, geometry.value_size // ranks
        parts = (geometry.key_size, geometry.key_size, geometry.value_size)
        self.conv_weight = joined_parameter(parts, geometry.conv_size)
        # As in training: decays are exact to more digits than the model's dtype may have.
        self.A_log = joined_parameter([geometry.num_heads], dtype=torch.float32)
        self.dt_bias = joined_parameter([self._decay_size()], dtype=torch.float32)
        self.o_norm = Weight(nn.Parameter(torch.ones(geometry.head_v_dim), requires_grad=False))
        self.o_proj = RowParallelLinear(
            geometry.value_size,
            config.hidden_size,
            bias=config.mixer_output_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.o_proj",
        )

    def _decay_size(self) -> int:
        return self.geometry.num_heads

    def _joined(self, vllm_config: "VllmConfig", sizes: list[int], prefix: str) -> MergedColumnParallelLinear:
        """One map for several of the checkpoint's, of which q's alone may have a bias."""
        config: HyLoConfig = vllm_config.model_config.hf_config
        joined = MergedColumnParallelLinear(
            config.hidden_size,
            in_whole_tiles(sizes),
            bias=config.attention_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.in_proj",
        )
        for parameter in joined.parameters():
            parameter.data.zero_()
        return joined

    @property
    def convolved_size(self) -> int:
        return 2 * self.key_size + self.value_size

    def heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v by heads, `[..., H, K or V]`, of what the convolution made of them."""
        parts = mixed.split([self.key_size, self.key_size, self.value_size], dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).contiguous() for part in parts)
        return q, k, v

    def convolved(self, rows: Tensor, past: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """q, k and v by heads, `[B, T, H, K or V]`, and the convolution's next state."""
        inputs = rows[..., : self.convolved_size]
        return self.heads(short_convolution(inputs, self.conv_weight, past=past)), last_inputs(past, inputs)

    @abstractmethod
    def gates(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Decays, `[..., H]` or `[..., H, K]`, and write strengths `[..., H]`, neither through its activation yet."""

    def decode(self, rows: Tensor, output: Tensor, slots: Tensor) -> None:
        if not by_kernels(rows):
            super().decode(rows, output, slots)
            return
        from hylo.serve.gpu import delta

        past, state = self.kv_cache
        mixed = delta.convolve_one(rows[:, : self.convolved_size], self.conv_weight, None, past, slots)
        made = delta.decode(*self.heads(mixed), *self.gates(rows), self.A_log, self.dt_bias, state, slots)
        output.copy_(made.flatten(1))

    def prefill(self, rows: Tensor, output: Tensor, metadata: Any) -> None:
        if not by_kernels(rows):
            super().prefill(rows, output, metadata)
            return
        from hylo.serve.gpu import delta

        past, state = self.kv_cache
        mixed = delta.convolve_many(rows[:, : self.convolved_size], self.conv_weight, None, past, metadata)
        made = delta.prefill(*self.heads(mixed), *self.gates(rows), self.A_log, self.dt_bias, state, metadata)
        output.copy_(made.flatten(1))

    def warm_up(self, rows: Tensor) -> None:
        from hylo.serve.gpu import delta, groups

        state = torch.zeros(2, *self.shapes.recurrent, device=rows.device)
        parts = self.heads(rows[:, : self.convolved_size])
        for count in (1, groups.most_prompts(self.shapes.recurrent)):
            prompts = groups.short_prompts(rows.shape[0], min(count, self.most_requests), rows.device)
            delta.prefill(*parts, *self.gates(rows), self.A_log, self.dt_bias, state, prompts)

    def gated(self, mixed: Tensor, gate: Tensor) -> Tensor:
        """The output: norm, gate, projection; `[T, H * V]` each to `[T, D]`."""
        wide = mixed.unflatten(-1, (self.num_heads, -1)).float()
        normed = rms_norm(wide, NORM_EPS) * self.o_norm.weight
        opened = normed * self._open(gate.unflatten(-1, (self.num_heads, -1)).float())
        out, _ = self.o_proj(opened.to(mixed.dtype).flatten(1))
        return out

    def _open(self, gate: Tensor) -> Tensor:
        return functional.silu(gate)


class ServedGDN(ServedDelta):
    """`hylo.mixers.gated_deltanet.GatedDeltaNet`."""

    mixer = "gdn"
    places: ClassVar[dict[str, Place]] = {
        **{f"{name}_proj": Place("in_proj", i) for i, name in enumerate("qkvabg")},
        **{f"{name}_conv1d.weight": Place("conv_weight", i) for i, name in enumerate("qkv")},
    }

    def __init__(self, vllm_config: "VllmConfig", layer_idx: int, prefix: str) -> None:
        super().__init__(vllm_config, prefix)
        sizes = self.geometry
        parts = [sizes.key_size, sizes.key_size, sizes.value_size, sizes.num_heads, sizes.num_heads, sizes.value_size]
        self.in_proj = self._joined(vllm_config, parts, prefix)

    def forward(self, hidden_states: Tensor, angles: Any) -> Tensor:
        """`[T, D]` to `[T, D]`."""
        joined, _ = self.in_proj(hidden_states)
        begin = self.convolved_size + 2 * self.num_heads
        rows, gate = joined[:, :begin], joined[:, begin : begin + self.value_size]
        return self.gated(self.mix(rows, self.value_size), gate)

    def gates(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        a, b = rows[..., self.convolved_size :].chunk(2, dim=-1)
        return a, b

    def step(self, rows: Tensor, past: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        (q, k, v), past = self.convolved(rows, past)
        before = None if state is None else state.transpose(-1, -2)
        out, after = gated_delta_net(q, k, v, *self.gates(rows), self.A_log, self.dt_bias, state=before)
        assert after is not None
        return out.flatten(2), past, after.transpose(-1, -2)


class ServedKDA(ServedDelta):
    """`hylo.mixers.kda.KimiDeltaAttention`."""

    mixer = "kda"
    places: ClassVar[dict[str, Place]] = {
        **{f"{name}_proj": Place("in_proj", i) for i, name in enumerate("qkvb")},
        **{f"{name}_conv1d.weight": Place("conv_weight", i) for i, name in enumerate("qkv")},
        **{f"{name}_proj.{i}": Place(f"{name}_proj_{i}") for name in "fg" for i in range(2)},
    }

    def __init__(self, vllm_config: "VllmConfig", layer_idx: int, prefix: str) -> None:
        super().__init__(vllm_config, prefix)
        config: HyLoConfig = vllm_config.model_config.hf_config
        sizes, quant = self.geometry, vllm_config.quant_config
        assert isinstance(sizes, KDAGeometry)
        self.in_proj = self._joined(
            vllm_config, [sizes.key_size, sizes.key_size, sizes.value_size, sizes.num_heads], prefix
        )
        rank = sizes.gate_rank
        self.f_proj_0 = ReplicatedLinear(config.hidden_size, rank, bias=False, quant_config=quant)
        self.f_proj_1 = ColumnParallelLinear(rank, sizes.key_size, bias=False, quant_config=quant)
        self.g_proj_0 = ReplicatedLinear(config.hidden_size, rank, bias=False, quant_config=quant)
        self.g_proj_1 = ColumnParallelLinear(rank, sizes.value_size, bias=True, quant_config=quant)

    def _decay_size(self) -> int:
        return self.geometry.key_size

    def forward(self, hidden_states: Tensor, angles: Any) -> Tensor:
        """`[T, D]` to `[T, D]`."""
        joined, _ = self.in_proj(hidden_states)
        joined = joined[:, : self.convolved_size + self.num_heads]
        decays, _ = self.f_proj_1(self.f_proj_0(hidden_states)[0])
        gate, _ = self.g_proj_1(self.g_proj_0(hidden_states)[0])
        return self.gated(self.mix(torch.cat([joined, decays], dim=-1), self.value_size), gate)

    def _open(self, gate: Tensor) -> Tensor:
        return gate.sigmoid()

    def gates(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        b, decays = rows[..., self.convolved_size :].split([self.num_heads, self.key_size], dim=-1)
        return decays.unflatten(-1, (self.num_heads, -1)), b

    def step(self, rows: Tensor, past: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        (q, k, v), past = self.convolved(rows, past)
        before = None if state is None else state.transpose(-1, -2)
        out, after = kimi_delta_attention(q, k, v, *self.gates(rows), self.A_log, self.dt_bias, state=before)
        assert after is not None
        return out.flatten(2), past, after.transpose(-1, -2)
