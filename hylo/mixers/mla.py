"""Multi-Head Latent Attention (arXiv 2405.04434, section 2.1), with the base's grouped KV heads."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache

from hylo.errors import HyLoError
from hylo.mixers.base import Geometry, TokenMixer, is_whole
from hylo.mixers.norm import RMSNorm
from hylo.mixers.rotary import RotaryEmbedding
from hylo.mixers.softmax import attend, attend_in_blocks
from hylo.ops.attention import shared_head_attention
from hylo.ops.rotary import rotate

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
        key_norm: whether each key head has an RMS norm over its nope and rotary values, before rotation, as released
            Qwen3 checkpoints have. Its scale differs by head and token, so it is cached beside the latent.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    rope_pairs: tuple[int, ...] | None = None
    key_norm: bool = False

    def __post_init__(self) -> None:
        for size, least in (("kv_lora_rank", 1), ("qk_nope_head_dim", 0), ("qk_rope_head_dim", 2), ("v_head_dim", 1)):
            value = getattr(self, size)
            if not is_whole(value, least):
                raise HyLoError(f"geometry of mla: {size} is {value!r}; expected a whole number of at least {least}")
        if self.q_lora_rank is not None and not is_whole(self.q_lora_rank, 1):
            raise HyLoError(f"geometry of mla: q_lora_rank is {self.q_lora_rank!r}; expected a whole number or null")
        if self.qk_rope_head_dim % 2:
            raise HyLoError(f"geometry of mla: qk_rope_head_dim is {self.qk_rope_head_dim}; expected an even number")
        if not isinstance(self.key_norm, bool):
            raise HyLoError(f"geometry of mla: key_norm is {self.key_norm!r}; expected true or false")
        if self.rope_pairs is not None:
            if not isinstance(self.rope_pairs, list | tuple):
                raise HyLoError(
                    f"geometry of mla: rope_pairs is {self.rope_pairs!r}; expected a list of whole numbers, or null"
                )
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
    `kv_b_proj` into the query and the output instead (section 2.1.2), so that decoding reads the latents alone. They
    expand too where an adapter or a quantiser has replaced `kv_b_proj` or its weight.

    Bases with biases (Qwen2) give `q` and the rotary key one; the bias of the other key rows is the same for all keys
    and cancels in the softmax, that of the values passes through it into the output's bias. Bases with norms (Qwen3)
    give query heads theirs, and key heads too where the geometry says `key_norm`.
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

        bias = config.attention_bias
        query_size = self.num_heads * geometry.qk_head_dim
        if geometry.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, geometry.q_lora_rank, bias=False)
            self.q_b_proj = nn.Linear(geometry.q_lora_rank, query_size, bias=bias)
        self.kv_a_proj_with_mqa = nn.Linear(
            config.hidden_size, geometry.kv_lora_rank + geometry.qk_rope_head_dim, bias=bias
        )
        self.kv_b_proj = nn.Linear(
            geometry.kv_lora_rank,
            self.num_key_value_heads * (geometry.qk_nope_head_dim + geometry.v_head_dim),
            bias=False,
        )
        self.o_proj = nn.Linear(self.num_heads * geometry.v_head_dim, config.hidden_size, bias=config.mixer_output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(geometry.qk_head_dim, eps=config.rms_norm_eps)
        if geometry.key_norm:
            self.k_norm = RMSNorm(geometry.qk_head_dim, eps=config.rms_norm_eps)

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
        length = hidden_states.shape[1]
        query = self._query(hidden_states, position_embeddings)
        cached = self._to_cache(hidden_states, position_embeddings)
        if past_key_values is not None:
            # One head of everything that is cached, as keys; there are no values.
            cached, _ = past_key_values.update(cached[:, None], cached[:, None, :, :0], self.layer_idx)
            cached = cached[:, 0]
        total = cached.shape[1]
        if past_key_values is not None and length == 1 and self._can_absorb():
            heads = self._absorbed(query, cached, attention_mask)
        elif attention_mask is None and length < total and not torch.is_grad_enabled():

            def expanded(rows: slice, begin: int, end: int) -> tuple[Tensor, Tensor]:
                return self._expanded(cached[rows, begin:end])

            heads = attend_in_blocks(self, query, total, expanded, left_padding)
        else:
            heads = attend(self, query, *self._expanded(cached), attention_mask, cu_seqlens, **kwargs)
        return self.o_proj(heads.flatten(2))

    def _query(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """`[B, H, T, nope + rope]`, normed and rotated."""
        sizes = self.geometry
        query = self.q_proj(hidden_states) if sizes.q_lora_rank is None else self.q_b_proj(self.q_a_proj(hidden_states))
        query = query.unflatten(-1, (self.num_heads, -1))
        if self.config.qk_norm:
            query = self.q_norm(query)
        return rotate(query, *position_embeddings).transpose(1, 2)

    def _to_cache(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """What is kept of each token: its latent, its rotated rotary key, and with `key_norm` its scales.

        `[B, T, r + rope]`, or `[B, T, r + rope + 2 Hkv]`: each scale as the sum of two values, so that bfloat16 keeps
        16 bits of it. A scale multiplies a whole score, where rounding does not average out.
        """
        sizes = self.geometry
        joined = self.kv_a_proj_with_mqa(hidden_states)
        if not sizes.key_norm:
            # One head, of which the last values are turned.
            return rotate(joined[:, :, None], *position_embeddings)[:, :, 0]
        latent, rope = joined.split([sizes.kv_lora_rank, sizes.qk_rope_head_dim], dim=-1)
        nope = self.kv_b_proj(latent).unflatten(-1, (self.num_key_value_heads, -1))[..., : sizes.qk_nope_head_dim]
        wide = torch.promote_types(latent.dtype, torch.float32)
        squares = nope.to(wide).square().sum(-1) + rope.to(wide).square().sum(-1, keepdim=True)
        scale = torch.rsqrt(squares / sizes.qk_head_dim + self.k_norm.variance_epsilon)
        coarse = scale.to(latent.dtype)
        weighted = (rope * self.k_norm.weight[sizes.qk_nope_head_dim :]).to(latent.dtype)
        weighted = rotate(weighted[:, :, None], *position_embeddings)[:, :, 0]
        return torch.cat([latent, weighted.to(latent.dtype), coarse, (scale - coarse).to(latent.dtype)], dim=-1)

    def _scales(self, cached: Tensor) -> Tensor:
        """The cached scales of the key heads, `[B, S, Hkv]`, in float32 or wider."""
        coarse, fine = cached[..., self.geometry.kv_lora_rank + self.geometry.qk_rope_head_dim :].chunk(2, dim=-1)
        wide = torch.promote_types(cached.dtype, torch.float32)
        return coarse.to(wide) + fine.to(wide)

    def _expanded(self, cached: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of cached tokens, `[B, Hkv, S, nope + rope]` and `[B, Hkv, S, v]`."""
        sizes = self.geometry
        latent, rope = cached[..., : sizes.kv_lora_rank + sizes.qk_rope_head_dim].split(
            [sizes.kv_lora_rank, sizes.qk_rope_head_dim], dim=-1
        )
        expanded = self.kv_b_proj(latent).unflatten(-1, (self.num_key_value_heads, -1)).transpose(1, 2)
        nope, value = expanded.split([sizes.qk_nope_head_dim, sizes.v_head_dim], dim=-1)
        if sizes.key_norm:
            nope = nope * self.k_norm.weight[: sizes.qk_nope_head_dim]
        key = torch.cat([nope, rope[:, None].expand(-1, self.num_key_value_heads, -1, -1).to(nope.dtype)], dim=-1)
        if sizes.key_norm:
            key = (key * self._scales(cached).transpose(1, 2)[..., None]).to(value.dtype)
        # A slice may start where no 16 bytes do, and bfloat16 attention kernels have read such values wrongly.
        return key, value.contiguous()

    def _can_absorb(self) -> bool:
        """Whether the weight of `kv_b_proj` is all that it does to a latent."""
        return type(self.kv_b_proj) is nn.Linear and type(self.kv_b_proj.weight.data) is Tensor

    def _absorbed(self, query: Tensor, cached: Tensor, mask: Tensor | None) -> Tensor:
        """Scores (q_nope W_k) . latent + q_rope . k_rope, output (weights . latent) W_v, for one token (T = 1).

        Returns `[B, 1, H, v]`.
        """
        sizes = self.geometry
        q_nope, q_rope = query[:, :, 0].split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], dim=-1)
        factor = None
        if sizes.key_norm:
            q_nope = (q_nope * self.k_norm.weight[: sizes.qk_nope_head_dim]).to(q_nope.dtype)
            factor = self._scales(cached).transpose(1, 2).repeat_interleave(self.num_key_value_groups, dim=1)
        # [Hkv, nope + v, r]; query heads stand by their KV heads, [B, Hkv, H / Hkv, ...].
        up_key, up_value = self.kv_b_proj.weight.unflatten(0, (self.num_key_value_heads, -1)).split(
            [sizes.qk_nope_head_dim, sizes.v_head_dim], dim=1
        )
        grouped = q_nope.unflatten(1, (self.num_key_value_heads, -1))
        absorbed = torch.einsum("bkgn,knr->bkgr", grouped, up_key.to(query.dtype)).flatten(1, 2)
        read = shared_head_attention(
            torch.cat([absorbed, q_rope], dim=-1),
            cached,
            sizes.kv_lora_rank,
            scale=self.scaling,
            mask=None if mask is None else mask[:, 0],
            factor=factor,
        )
        grouped = read.unflatten(1, (self.num_key_value_heads, -1))
        return torch.einsum("bkgr,kvr->bkgv", grouped, up_value.to(read.dtype)).flatten(1, 2)[:, None]

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
        rope = given.get("qk_rope_head_dim", max(2, head_dim // 4 * 2))
        if not is_whole(rope, 2) or rope > head_dim:
            raise HyLoError(f"geometry of mla: qk_rope_head_dim is {rope!r}; expected 2 to the head size, {head_dim}")
        return {
            "kv_lora_rank": min(max(8, num_kv_heads * head_dim // 4), num_kv_heads * (2 * head_dim - rope)),
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
        scales = 2 * config.num_key_value_heads if geometry.key_norm else 0
        return geometry.kv_lora_rank + geometry.qk_rope_head_dim + scales
