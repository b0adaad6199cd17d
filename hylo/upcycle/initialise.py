"""How each tensor of a mixer starts, given the attention layer that it replaces.

A rule says what is done (`copied`, `decomposed`, `fresh`), from which tensors, and how. The plan prints rules; the
conversion runs them. Attention sizes below: H query heads, Hkv KV heads, hd values a head, d hidden values.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.mixers.gated_deltanet import GDNGeometry
from hylo.mixers.mla import MLAGeometry

Action = Literal["copied", "decomposed", "solved", "fresh"]


def parameter(name: str) -> str:
    """A projection's weight, or the bias that is asked for by name."""
    return name if name.endswith(".bias") else f"{name}.weight"


class SourceAttention:
    """The attention weights of one base layer, in float32, with what several tensors are made from."""

    def __init__(self, tensor: Callable[[str], Tensor], layer_idx: int, config: HyLoConfig) -> None:
        self._tensor = tensor
        self._prefix = f"model.layers.{layer_idx}.self_attn."
        self.config = config

    def raw(self, name: str) -> Tensor:
        """A tensor as stored."""
        return self._tensor(self._prefix + parameter(name))

    def _heads(self, name: str) -> Tensor:
        """`[heads, hd, d]`."""
        return self.raw(name).float().unflatten(0, (-1, self.config.head_dim))

    @cached_property
    def query(self) -> Tensor:
        return self._heads("q_proj")

    @cached_property
    def key(self) -> Tensor:
        return self._heads("k_proj")

    @cached_property
    def value(self) -> Tensor:
        return self._heads("v_proj")

    @cached_property
    def mla(self) -> "LatentDecomposition":
        geometry = self.config.geometry("mla")
        assert isinstance(geometry, MLAGeometry)
        return LatentDecomposition(self, geometry)

    def repeat_kv(self, heads: Tensor) -> Tensor:
        """`[Hkv, hd, d]` to `[H * hd, d]`: each KV head stands once for each query head it serves."""
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        return heads.repeat_interleave(groups, dim=0).flatten(0, 1)


class LatentDecomposition:
    """MLA's matrices from attention's (arXiv 2503.11132, section 3), rotary pairs kept whole.

    The rotary values of a head are the pairs (i, i + hd/2) for i in `rope_pairs`, the others lose their rotation. Let
    K_n be the rows of W_k without rotation; [K_n; V] = U S R^T truncated to rank r gives kv_b = U S^1/2 and the latent
    rows S^1/2 R^T. The shared rotary key is the mean of the KV heads' rotary rows.
    """

    def __init__(self, source: SourceAttention, geometry: MLAGeometry) -> None:
        self.source = source
        self.geometry = geometry
        head_dim = source.config.head_dim
        pairs = list(geometry.rope_pairs or range(0, head_dim // 2, head_dim // geometry.qk_rope_head_dim))
        # Slow pairs turn least over a context, so they are the ones to keep where not all fit.
        rest = [pair for pair in reversed(range(head_dim // 2)) if pair not in pairs][: geometry.qk_nope_head_dim // 2]
        rest = sorted(rest)
        self.rope_rows = pairs + [pair + head_dim // 2 for pair in pairs]
        self.nope_rows = rest + [pair + head_dim // 2 for pair in rest]

    @cached_property
    def query(self) -> Tensor:
        """`[H * (nope + rope), d]`, scaled so that the softmax scale of the new head size gives the base's scores."""
        factor = math.sqrt(self.geometry.qk_head_dim / self.source.config.head_dim)
        return (self.source.query[:, self.nope_rows + self.rope_rows] * factor).flatten(0, 1)

    @cached_property
    def _query_factors(self) -> tuple[Tensor, Tensor]:
        assert self.geometry.q_lora_rank is not None
        return low_rank(self.query, self.geometry.q_lora_rank)

    @property
    def query_up(self) -> Tensor:
        return self._query_factors[0]

    @property
    def query_down(self) -> Tensor:
        return self._query_factors[1]

    @cached_property
    def _latent_factors(self) -> tuple[Tensor, Tensor]:
        rows = torch.cat([self.source.key[:, self.nope_rows], self.source.value], dim=1).flatten(0, 1)
        return low_rank(rows, self.geometry.kv_lora_rank)

    @property
    def latent_up(self) -> Tensor:
        """kv_b, `[Hkv * (nope + v), r]`."""
        return self._latent_factors[0]

    @property
    def latent_down_and_rotary_key(self) -> Tensor:
        """kv_a, `[r + rope, d]`."""
        return torch.cat([self._latent_factors[1], self.source.key[:, self.rope_rows].mean(0)])


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors (up `[m, rank]`, down `[rank, n]`) in the Frobenius norm, balanced in scale."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


@dataclass(frozen=True)
class Rule:
    """How one tensor of a mixer is made.

    Attributes:
        action: what is done.
        sources: the base's projections it is made from.
        note: how, in a few words.
        make: makes it, given the source layer and the shape to fill.
    """

    action: Action
    sources: tuple[str, ...]
    note: str
    make: Callable[[SourceAttention, torch.Size], Tensor]


def _copy(name: str, note: str = "") -> Rule:
    return Rule("copied", (name,), note, lambda source, _: source.raw(name))


def _fresh(note: str, make: Callable[[torch.Size], Tensor]) -> Rule:
    return Rule("fresh", (), note, lambda _, shape: make(shape))


def _identity_taps(shape: torch.Size) -> Tensor:
    taps = torch.zeros(shape)
    taps[..., -1] = 1.0
    return taps


def _attention_rules(config: HyLoConfig) -> Mapping[str, Rule]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    rules = {f"{name}.weight": _copy(name, "as it is") for name in names}
    if config.attention_bias:
        rules |= {f"{name}.bias": _copy(f"{name}.bias", "as it is") for name in names}
    return rules


def _mla_rules(config: HyLoConfig) -> Mapping[str, Rule]:
    geometry = config.geometry("mla")
    assert isinstance(geometry, MLAGeometry)
    _check_mla(geometry, config)
    rank = geometry.kv_lora_rank
    if geometry.q_lora_rank is None:
        query = {
            "q_proj.weight": Rule("copied", ("q_proj",), "rows regrouped: nope, rope", lambda s, _: s.mla.query),
        }
    else:
        note = f"SVD of rank {geometry.q_lora_rank}"
        query = {
            "q_a_proj.weight": Rule("decomposed", ("q_proj",), note, lambda s, _: s.mla.query_down),
            "q_b_proj.weight": Rule("decomposed", ("q_proj",), note, lambda s, _: s.mla.query_up),
        }
    return query | {
        "kv_a_proj_with_mqa.weight": Rule(
            "decomposed",
            ("k_proj", "v_proj"),
            f"joint SVD of rank {rank}; rotary key: mean over KV heads, pairs whole",
            lambda s, _: s.mla.latent_down_and_rotary_key,
        ),
        "kv_b_proj.weight": Rule(
            "decomposed", ("k_proj", "v_proj"), f"joint SVD of rank {rank}", lambda s, _: s.mla.latent_up
        ),
        "o_proj.weight": _copy("o_proj"),
    }


def _check_mla(geometry: MLAGeometry, config: HyLoConfig) -> None:
    head_dim, heads = config.head_dim, config.num_key_value_heads
    if geometry.v_head_dim != head_dim:
        raise HyLoError(f"geometry of mla: v_head_dim is {geometry.v_head_dim}; the base's heads have {head_dim}")
    if geometry.qk_head_dim > head_dim or geometry.qk_nope_head_dim % 2:
        raise HyLoError(
            f"geometry of mla: nope {geometry.qk_nope_head_dim} and rope {geometry.qk_rope_head_dim}; expected even "
            f"sizes that together are at most the base's head size, {head_dim}"
        )
    if geometry.rope_pairs is None and head_dim % geometry.qk_rope_head_dim:
        raise HyLoError(f"geometry of mla: rope {geometry.qk_rope_head_dim} does not divide the head size, {head_dim}")
    if geometry.rope_pairs is not None and not all(0 <= pair < head_dim // 2 for pair in geometry.rope_pairs):
        raise HyLoError(f"geometry of mla: rope_pairs {geometry.rope_pairs}; expected 0 to {head_dim // 2 - 1}")
    full = min(heads * (geometry.qk_nope_head_dim + head_dim), config.hidden_size)
    if geometry.kv_lora_rank > full:
        raise HyLoError(f"geometry of mla: kv_lora_rank is {geometry.kv_lora_rank}; keys and values have rank {full}")
    query = min(config.num_attention_heads * geometry.qk_head_dim, config.hidden_size)
    if geometry.q_lora_rank is not None and geometry.q_lora_rank > query:
        raise HyLoError(f"geometry of mla: q_lora_rank is {geometry.q_lora_rank}; the query map has rank {query}")


# Softplus of dt_bias, times A = 1: what a state forgets a token at the start, for a memory of some 16 tokens.
_INITIAL_DECAY = 1 / 16


def _gdn_rules(config: HyLoConfig) -> Mapping[str, Rule]:
    geometry = config.geometry("gdn")
    assert isinstance(geometry, GDNGeometry)
    heads, head_dim = config.num_attention_heads, config.head_dim
    if (geometry.num_heads, geometry.head_k_dim, geometry.head_v_dim) != (heads, head_dim, head_dim):
        raise HyLoError(
            f"geometry of gdn: {geometry.num_heads} heads of {geometry.head_k_dim} and {geometry.head_v_dim}; expected "
            f"one for each attention head, {heads} of {head_dim} and {head_dim}"
        )
    return {
        "q_proj.weight": _copy("q_proj"),
        "k_proj.weight": Rule("copied", ("k_proj",), "KV heads repeated", lambda s, _: s.repeat_kv(s.key)),
        "v_proj.weight": Rule("copied", ("v_proj",), "KV heads repeated", lambda s, _: s.repeat_kv(s.value)),
        "g_proj.weight": _copy("q_proj", "the gate opens by what the query asks"),
        "a_proj.weight": _fresh("zero: one decay for all tokens", torch.zeros),
        "b_proj.weight": _fresh("zero: half of each write", torch.zeros),
        **{f"{x}_conv1d.weight": _fresh("identity: the newest tap is 1", _identity_taps) for x in "qkv"},
        "A_log": _fresh("zero: A = 1", torch.zeros),
        "dt_bias": _fresh(
            "a memory of 16 tokens", lambda shape: torch.full(shape, math.log(math.expm1(_INITIAL_DECAY)))
        ),
        "o_norm.weight": _fresh("one", torch.ones),
        "o_proj.weight": _copy("o_proj"),
    }


RULES: dict[str, Callable[[HyLoConfig], Mapping[str, Rule]]] = {
    "attention": _attention_rules,
    "mla": _mla_rules,
    "gdn": _gdn_rules,
}
