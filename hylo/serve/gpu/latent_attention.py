"""MLA from its latents: what vLLM caches of a token is r + rope values a layer."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.attention.attention import set_default_quant_scales
from vllm.model_executor.utils import replace_parameter

from hylo.config import HyLoConfig
from hylo.serve.gpu.latent_backend import CONTEXT_TOKENS, LatentBackend, register_prefill
from hylo.serve.mla import ServedMLA
from hylo.serve.parameters import Weight, joined_parameter
from hylo.serve.rotary import Angles, rotate

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class LatentAttention(MLAAttention):
    """vLLM's layer, whose `kv_b_proj` has the KV heads of the base and not one a query head."""

    @property
    def chunked_prefill_workspace_size(self) -> int:
        """What is expanded at a time, for vLLM's measure of memory."""
        return CONTEXT_TOKENS

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Absorption reads both halves of `kv_b_proj` by query head: each stands by the KV head that serves it."""
        weight = self.kv_b_proj.weight.data.to(act_dtype)
        heads = weight.unflatten(0, (-1, self.qk_nope_head_dim + self.v_head_dim))
        heads = heads.repeat_interleave(self.num_heads // heads.shape[0], dim=0)
        up_key, up_value = heads.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        # [H, nope, r] and [H, r, v].
        replace_parameter(self, "W_UK_T", up_key.contiguous(), prefer_copy=True)
        replace_parameter(self, "W_UV", up_value.transpose(1, 2).contiguous(), prefer_copy=True)
        set_default_quant_scales(self, register_buffer=False)


class LatentMLA(ServedMLA):
    """`hylo.mixers.mla.MultiHeadLatentAttention`, its query and KV heads over the ranks; every rank keeps all latents.

    Geometries with `key_norm` are served expanded.
    """

    def __init__(self, vllm_config: "VllmConfig", layer_idx: int, prefix: str) -> None:
        super().__init__(vllm_config, layer_idx, prefix)
        config: HyLoConfig = vllm_config.model_config.hf_config
        sizes = self.geometry
        rows = config.num_key_value_heads * (sizes.qk_nope_head_dim + sizes.v_head_dim)
        # Before the attention, which holds it too: the checkpoint's name is the first.
        self.kv_b_proj = Weight(joined_parameter([rows], sizes.kv_lora_rank))
        # In each process that makes a model: the settings name the backend, and vLLM looks it up here.
        register_prefill()
        self.attention = LatentAttention(
            num_heads=self.num_heads,
            scale=sizes.qk_head_dim**-0.5,
            qk_nope_head_dim=sizes.qk_nope_head_dim,
            qk_rope_head_dim=sizes.qk_rope_head_dim,
            v_head_dim=sizes.v_head_dim,
            q_lora_rank=sizes.q_lora_rank,
            kv_lora_rank=sizes.kv_lora_rank,
            kv_b_proj=self.kv_b_proj,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attention",
            attn_backend=LatentBackend,
        )

    def forward(self, hidden_states: Tensor, angles: Angles) -> Tensor:
        """`[T, D]` to `[T, D]`."""
        query = self.query(hidden_states, angles)
        latent, rope = self.latents(hidden_states)
        size = self.num_heads * self.geometry.v_head_dim
        mixed = self.attention(query, latent, rotate(rope, angles), output_shape=(hidden_states.shape[0], size))
        out, _ = self.o_proj(mixed)
        return out
