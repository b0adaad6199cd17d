"""Multi-Head Latent Attention (arXiv 2405.04434, section 2.1), with the base's grouped KV heads."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from hylo.errors import HyLoError
from hylo.mixers.base import Geometry, TokenMixer, is_whole
from hylo.mixers.rotary import RotaryEmbedding

if TYPE_CHECKING:
    from hylo.config import HyLoConfig


@dataclass(frozen=True)
class MLAGeometry(Geometry):
    """Sizes of an MLA layer.

    Attributes:
        kv_lora_rank: values of the latent that keys and values are read from.
        qk_nope_head_dim: key values a head without rotary embedding, read from the latent.
        qk_rope_head_dim: values of the one rotary key that all heads share.
        v_head_dim: value size a head.
        q_lora_rank: rank of the query map; a full matrix where None.
        rope_pairs: which rotary pairs of the base's heads the rotary values are, for their frequencies; the standard
            frequencies for qk_rope_head_dim where None.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    rope_pairs: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for size, least in (("kv_lora_rank", 1), ("qk_nope_head_dim", 0), ("qk_rope_head_dim", 2), ("v_head_dim", 1)):
            value = getattr(self, size)
            if not is_whole(value, least):
                raise HyLoError(f"geometry of mla: {size} is {value!r}; expected a whole number of at least {least}")
        if self.q_lora_rank is not None and not is_whole(self.q_lora_rank, 1):
            raise HyLoError(f"geometry of mla: q_lora_rank is {self.q_lora_rank!r}; expected a whole number or null")
        if self.qk_rope_head_dim % 2:
            raise HyLoError(f"geometry of mla: qk_rope_head_dim is {self.qk_rope_head_dim}; expected an even number")
        if self.rope_pairs is not None:
            object.__setattr__(self, "rope_pairs", tuple(self.rope_pairs))
            if not all(is_whole(pair, 0) for pair in self.rope_pairs) or len(set(self.rope_pairs)) < len(
                self.rope_pairs
            ):
                raise HyLoError(
                    f"geometry of mla: rope_pairs {list(self.rope_pairs)}; expected whole numbers that differ"
                )
            if len(self.rope_pairs) != self.qk_rope_head_dim // 2:
                raise HyLoError(
                    f"geometry of mla: {len(self.rope_pairs)} rope_pairs for qk_rope_head_dim "
                    f"{self.qk_rope_head_dim}; expected {self.qk_rope_head_dim // 2}"
                )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


class MultiHeadLatentAttention(TokenMixer):
    """Softmax attention over a latent of `kv_lora_rank` values and one shared rotary key a token.

    `kv_b_proj` holds the base's KV heads, each of which serves its group of query heads. The latents have no norm, the
    softmax scale is (nope + rope) ** -0.5. Sequences expand the latents to keys and values; single tokens absorb
    `kv_b_proj` into the query and the output instead (section 2.1.2), so that decoding reads the latents alone.
    """

    name = "mla"
    block = "MLA"
    layer_type = "full_attention"
    geometry_class = MLAGeometry
    is_causal = True

    def __init__(self, config: "HyLoConfig", layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        geometry = config.geometry("mla")
        assert isinstance(geometry, MLAGeometry)
        self.geometry = geometry
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = geometry.qk_head_dim**-0.5

        query_size = self.num_heads * geometry.qk_head_dim
        if geometry.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, geometry.q_lora_rank, bias=False)
            self.q_b_proj = nn.Linear(geometry.q_lora_rank, query_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            config.hidden_size, geometry.kv_lora_rank + geometry.qk_rope_head_dim, bias=False
        )
        self.kv_b_proj = nn.Linear(
            geometry.kv_lora_rank,
            self.num_key_value_heads * (geometry.qk_nope_head_dim + geometry.v_head_dim),
            bias=False,
        )
        self.o_proj = nn.Linear(self.num_heads * geometry.v_head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        assert position_embeddings is not None
        batch, length, _ = hidden_states.shape
        sizes = self.geometry
        query = self.q_proj(hidden_states) if sizes.q_lora_rank is None else self.q_b_proj(self.q_a_proj(hidden_states))
        query = query.view(batch, length, self.num_heads, -1).transpose(1, 2)
        q_nope, q_rope = query.split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], dim=-1)
        # One head: [B, 1, T, r] and [B, 1, T, rope].
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states)[:, None].split(
            [sizes.kv_lora_rank, sizes.qk_rope_head_dim], dim=-1
        )
        q_rope, k_rope = apply_rotary_pos_emb(q_rope, k_rope, *position_embeddings)
        if past_key_values is not None:
            latent, k_rope = past_key_values.update(latent, k_rope, self.layer_idx)
        attend = self._absorbed if past_key_values is not None and length == 1 else self._expanded
        heads = attend(q_nope, q_rope, latent, k_rope, attention_mask, **kwargs)
        return self.o_proj(heads.reshape(batch, length, -1))

    def _expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Keys and values of every cached token, then ordinary attention. Returns `[B, T, H, v]`."""
        sizes = self.geometry
        expanded = self.kv_b_proj(latent[:, 0]).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        k_nope, value = expanded.split([sizes.qk_nope_head_dim, sizes.v_head_dim], dim=-1)
        # A slice may start where no 16 bytes do, and bfloat16 attention kernels have read such values wrongly.
        value = value.contiguous()
        key = torch.cat([k_nope, k_rope.expand(-1, self.num_key_value_heads, -1, -1)], dim=-1)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, _ = attention(
            self, torch.cat([q_nope, q_rope], dim=-1), key, value, mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return output

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Scores (q_nope W_k) . latent + q_rope . k_rope, output (weights . latent) W_v, for one token (T = 1).

        Returns `[B, 1, H, v]`.
        """
        sizes = self.geometry
        # [Hkv, nope + v, r], each repeated to the query heads of its group.
        up = self.kv_b_proj.weight.unflatten(0, (self.num_key_value_heads, -1))
        up = up.repeat_interleave(self.num_key_value_groups, dim=0)
        up_key, up_value = up.split([sizes.qk_nope_head_dim, sizes.v_head_dim], dim=1)
        # The heads stand where queries do, [B, 1, H, r + rope]: they share one key and one value, which stay as cached.
        query = torch.cat([torch.einsum("bhtn,hnr->bthr", q_nope, up_key), q_rope.transpose(1, 2)], dim=-1)
        key = torch.cat([latent, k_rope], dim=-1)
        read = functional.scaled_dot_product_attention(query, key, latent, attn_mask=mask, scale=self.scaling)
        return torch.einsum("bthr,hvr->bthv", read, up_value)

    @property
    def output_projection(self) -> nn.Linear:
        return self.o_proj

    @classmethod
    def default_geometry(
        cls, num_heads: int, num_kv_heads: int, head_dim: int, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Query and value heads of the base's size, half of each rotated: the pairs that turn fastest.

        The latent holds an eighth of the base's keys and values.
        """
        rope = given.get("qk_rope_head_dim", head_dim // 2)
        if not is_whole(rope, 2) or rope > head_dim:
            raise HyLoError(f"geometry of mla: qk_rope_head_dim is {rope!r}; expected 2 to the head size, {head_dim}")
        return {
            "kv_lora_rank": max(8, num_kv_heads * head_dim // 4),
            "qk_nope_head_dim": head_dim - rope,
            "qk_rope_head_dim": rope,
            "v_head_dim": head_dim,
            "rope_pairs": list(range(rope // 2)),
        }

    @classmethod
    def rotary_embedding(cls, config: "HyLoConfig") -> RotaryEmbedding:
        geometry = config.geometry("mla")
        assert isinstance(geometry, MLAGeometry)
        return RotaryEmbedding(config, dim=geometry.qk_rope_head_dim, pairs=geometry.rope_pairs)

    @classmethod
    def cache_elements_per_token(cls, config: "HyLoConfig") -> int:
        geometry = config.geometry("mla")
        assert isinstance(geometry, MLAGeometry)
        return geometry.kv_lora_rank + geometry.qk_rope_head_dim
