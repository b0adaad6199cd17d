"""Multi-Head Latent Attention, served: from its latents, or expanded to ordinary attention."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear

from hylo.config import HyLoConfig
from hylo.serve.architecture import mla_geometry
from hylo.serve.attention import PaddedAttention
from hylo.serve.rotary import Angles, rotate

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ServedMLA(nn.Module):
    """What both forms of `hylo.mixers.mla.MultiHeadLatentAttention` share: all but the attention itself."""

    def __init__(self, vllm_config: "VllmConfig", layer_idx: int, prefix: str) -> None:
        super().__init__()
        config: HyLoConfig = vllm_config.model_config.hf_config
        quant = vllm_config.quant_config
        ranks = get_tensor_model_parallel_world_size()
        self.geometry = sizes = mla_geometry(config)
        self.num_heads, self.num_kv_heads = config.num_attention_heads // ranks, config.num_key_value_heads // ranks
        query_size = config.num_attention_heads * sizes.qk_head_dim
        if sizes.q_lora_rank is None:
            self.q_proj = ColumnParallelLinear(
                config.hidden_size,
                query_size,
                bias=config.attention_bias,
                quant_config=quant,
                prefix=f"{prefix}.q_proj",
            )
        else:
            self.q_a_proj = ReplicatedLinear(
                config.hidden_size, sizes.q_lora_rank, bias=False, quant_config=quant, prefix=f"{prefix}.q_a_proj"
            )
            self.q_b_proj = ColumnParallelLinear(
                sizes.q_lora_rank,
                query_size,
                bias=config.attention_bias,
                quant_config=quant,
                prefix=f"{prefix}.q_b_proj",
            )
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            config.hidden_size,
            sizes.kv_lora_rank + sizes.qk_rope_head_dim,
            bias=config.attention_bias,
            quant_config=quant,
            prefix=f"{prefix}.kv_a_proj_with_mqa",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * sizes.v_head_dim,
            config.hidden_size,
            bias=config.mixer_output_bias,
            quant_config=quant,
            prefix=f"{prefix}.o_proj",
        )
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(sizes.qk_head_dim, eps=config.rms_norm_eps)

    def query(self, hidden_states: Tensor, angles: Angles) -> Tensor:
        """`[T, H, nope + rope]`, normed and rotated."""
        sizes = self.geometry
        if sizes.q_lora_rank is None:
            query, _ = self.q_proj(hidden_states)
        else:
            query, _ = self.q_b_proj(self.q_a_proj(hidden_states)[0])
        query = query.unflatten(-1, (self.num_heads, -1))
        if self.qk_norm:
            query = self.q_norm(query.contiguous())
        return self.rotated(query, angles)

    def latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Latents `[T, r]` and the shared rotary keys `[T, 1, rope]`, not rotated yet."""
        sizes = self.geometry
        joined, _ = self.kv_a_proj_with_mqa(hidden_states)
        latent, rope = joined.split([sizes.kv_lora_rank, sizes.qk_rope_head_dim], dim=-1)
        return latent.contiguous(), rope[:, None]

    def rotated(self, heads: Tensor, angles: Angles) -> Tensor:
        """Rotates the last rope of nope + rope values."""
        nope, rope = heads.split([self.geometry.qk_nope_head_dim, self.geometry.qk_rope_head_dim], dim=-1)
        return torch.cat([nope, rotate(rope, angles)], dim=-1)


class ExpandedMLA(ServedMLA):
    """Keys and values of each KV head are made from the latents and cached: ordinary attention, on every device."""

    def __init__(self, vllm_config: "VllmConfig", layer_idx: int, prefix: str) -> None:
        super().__init__(vllm_config, layer_idx, prefix)
        config: HyLoConfig = vllm_config.model_config.hf_config
        sizes = self.geometry
        self.kv_b_proj = ColumnParallelLinear(
            sizes.kv_lora_rank,
            config.num_key_value_heads * (sizes.qk_nope_head_dim + sizes.v_head_dim),
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.kv_b_proj",
        )
        if sizes.key_norm:
            self.k_norm = RMSNorm(sizes.qk_head_dim, eps=config.rms_norm_eps)
        self.attention = PaddedAttention(
            vllm_config, self.num_heads, self.num_kv_heads, sizes.qk_head_dim**-0.5, prefix=f"{prefix}.attention"
        )

    def forward(self, hidden_states: Tensor, angles: Angles) -> Tensor:
        """`[T, D]` to `[T, D]`."""
        sizes = self.geometry
        latent, rope = self.latents(hidden_states)
        heads = self.kv_b_proj(latent)[0].unflatten(-1, (self.num_kv_heads, -1))
        nope, value = heads.split([sizes.qk_nope_head_dim, sizes.v_head_dim], dim=-1)
        key = torch.cat([nope, rope.expand(-1, self.num_kv_heads, -1)], dim=-1)
        if sizes.key_norm:
            key = self.k_norm(key)
        mixed = self.attention(self.query(hidden_states, angles), self.rotated(key, angles), value)
        out, _ = self.o_proj(mixed)
        return out
