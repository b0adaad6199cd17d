"""The base's own attention, kept as it is."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache

from hylo.mixers.base import TokenMixer
from hylo.mixers.norm import RMSNorm
from hylo.mixers.rotary import RotaryEmbedding
from hylo.mixers.softmax import attend, attend_in_blocks
from hylo.ops.rotary import rotate

if TYPE_CHECKING:
    from hylo.config import HyLoConfig


class Attention(TokenMixer):
    """Grouped-query attention as in Llama, with the biases of Qwen2, the norms of Qwen3 or the window of Mistral.

    Which of them there are, `HyLoConfig` says: `attention_bias`, `attention_output_bias`, `qk_norm`, `sliding_layers`.
    Parameters and values are those of transformers' classes.
    """

    name = "attention"
    block = "ATT"
    layer_type = "full_attention"
    replaces_attention = False
    is_causal = True

    def __init__(self, config: "HyLoConfig", layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_key_value_groups = heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.sliding_window = config.window_of(layer_idx)
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=bool(config.attention_output_bias))
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        cu_seqlens: Tensor | None = None,
        left_padding: list[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        assert position_embeddings is not None
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(hidden_states).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        length, total = q.shape[2], k.shape[2]
        if attention_mask is None and 1 < length < total and not torch.is_grad_enabled():

            def cached(rows: slice, begin: int, end: int) -> tuple[Tensor, Tensor]:
                return k[rows, :, begin:end], v[rows, :, begin:end]

            heads = attend_in_blocks(self, q, total, cached, left_padding)
        else:
            heads = attend(self, q, k, v, attention_mask, cu_seqlens, **kwargs)
        return self.o_proj(heads.flatten(2))

    @property
    def output_projection(self) -> nn.Linear:
        return self.o_proj

    @classmethod
    def rotary_embedding(cls, config: "HyLoConfig") -> RotaryEmbedding:
        return RotaryEmbedding(config)

    @classmethod
    def cache_elements_per_token(cls, config: "HyLoConfig") -> int:
        return 2 * config.num_key_value_heads * config.head_dim
