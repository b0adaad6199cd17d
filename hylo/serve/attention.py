"""Kept attention, on vLLM's own attention layer."""

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from torch.nn import functional
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.v1.attention.backend import AttentionBackend

from hylo.config import HyLoConfig
from hylo.serve.architecture import attention_head_size
from hylo.serve.rotary import Angles, rotate
from hylo.serve.weights import Place

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def build_for_each_group(backend: type[AttentionBackend]) -> None:
    """Has vLLM make a step's metadata for each group of attention layers, not for the first alone.

    Where a model has more attention layers than linear ones of a kind, vLLM caches them in several groups and hands the
    metadata of the first to the others. FlashAttention 3 keeps the schedule of a step in memory of each group, from
    where CUDA graphs read it: those of the others would go by the schedule that they were recorded with.
    """
    backend.get_builder_cls().supports_update_block_table = False


class PaddedAttention(nn.Module):
    """vLLM's attention for heads of any size, keys and values of different sizes too."""

    def __init__(
        self,
        vllm_config: "VllmConfig",
        num_heads: int,
        num_kv_heads: int,
        scale: float,
        prefix: str,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.size = attention_head_size(vllm_config.model_config.hf_config)
        self.attention = Attention(
            num_heads,
            self.size,
            scale,
            num_kv_heads=num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            per_layer_sliding_window=window,
            prefix=prefix,
        )
        self.num_heads = num_heads
        build_for_each_group(self.attention.get_attn_backend())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[T, H, K]`, `[T, Hkv, K]` and `[T, Hkv, V]` to `[T, H * V]`."""
        value_size = v.shape[-1]
        q, k, v = (functional.pad(x, (0, self.size - x.shape[-1])).flatten(1) for x in (q, k, v))
        out = self.attention(q, k, v)
        return out.unflatten(-1, (self.num_heads, self.size))[..., :value_size].flatten(1)


class ServedAttention(nn.Module):
    """`hylo.mixers.attention.Attention`, its heads over the ranks."""

    places: ClassVar[dict[str, Place]] = {
        "q_proj": Place("qkv_proj", "q"),
        "k_proj": Place("qkv_proj", "k"),
        "v_proj": Place("qkv_proj", "v"),
    }

    def __init__(self, vllm_config: "VllmConfig", layer_idx: int, prefix: str) -> None:
        super().__init__()
        config: HyLoConfig = vllm_config.model_config.hf_config
        ranks = get_tensor_model_parallel_world_size()
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads // ranks, config.num_key_value_heads // ranks
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=bool(config.attention_output_bias),
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.attention = PaddedAttention(
            vllm_config,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim**-0.5,
            prefix=f"{prefix}.attention",
            window=config.window_of(layer_idx),
        )

    def forward(self, hidden_states: Tensor, angles: Angles) -> Tensor:
        """`[T, D]` to `[T, D]`; cos and sin are `[T, 1, hd]`."""
        joined, _ = self.qkv_proj(hidden_states)
        heads = joined.unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.qk_norm:
            q, k = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())
        out, _ = self.o_proj(self.attention(rotate(q, angles), rotate(k, angles), v))
        return out
