"""The base's own attention, kept as it is."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaAttention

from hylo.mixers.base import TokenMixer
from hylo.mixers.rotary import RotaryEmbedding

if TYPE_CHECKING:
    from hylo.config import HyLoConfig


class Attention(LlamaAttention, TokenMixer):
    """transformers' Llama attention behind the mixer interface; same parameters, same values."""

    name = "attention"
    block = "ATT"
    layer_type = "full_attention"
    replaces_attention = False

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        output, _ = LlamaAttention.forward(
            self,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        return output

    @property
    def output_projection(self) -> nn.Linear:
        projection = self.o_proj
        assert isinstance(projection, nn.Linear)
        return projection

    @classmethod
    def rotary_embedding(cls, config: "HyLoConfig") -> RotaryEmbedding:
        return RotaryEmbedding(config)

    @classmethod
    def cache_elements_per_token(cls, config: "HyLoConfig") -> int:
        return 2 * config.num_key_value_heads * config.head_dim
