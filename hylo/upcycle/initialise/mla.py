"""MLA from attention: joint low rank of keys and values."""

import math
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.mixers.mla import MLAGeometry, MultiHeadLatentAttention
from hylo.upcycle.initialise.low_rank import low_rank
from hylo.upcycle.initialise.rules import Rule, copied, output_bias
from hylo.upcycle.initialise.source import SourceAttention, fold_sources


class LatentDecomposition:
    """MLA's matrices from attention's (arXiv 2503.11132, section 3).

    Let K_n be the rows of W_k without rotation; [K_n; V] = U S R^T truncated to rank r gives kv_b = U S^1/2 and the
    latent rows S^1/2 R^T. The shared rotary key is the mean of the KV heads' rotary rows.

    Args:
        nope_rows, rope_rows: which rows of each query and key head lose their rotation, and which are rotary values.
        nope_scale: of the scores of the former.
    """

    def __init__(
        self,
        source: SourceAttention,
        geometry: MLAGeometry,
        nope_rows: list[int],
        rope_rows: list[int],
        nope_scale: float = 1.0,
    ) -> None:
        self.source, self.geometry = source, geometry
        self.nope_rows, self.rope_rows, self.nope_scale = nope_rows, rope_rows, nope_scale

    @classmethod
    def of_whole_pairs(cls, source: SourceAttention, geometry: MLAGeometry) -> "LatentDecomposition":
        """The rotary values are the pairs (i, i + hd/2) for i in `rope_pairs`, the others lose their rotation.

        They keep what a rotation is scaled by: YaRN scales cos and sin (arXiv 2309.00071, section 3.4).
        """
        head_dim = source.config.head_dim
        pairs = list(geometry.rope_pairs or range(0, head_dim // 2, head_dim // geometry.qk_rope_head_dim))
        # Slow pairs turn least over a context, so they are the ones to keep where not all fit.
        rest = [pair for pair in reversed(range(head_dim // 2)) if pair not in pairs][: geometry.qk_nope_head_dim // 2]
        rest = sorted(rest)
        nope, rope = (half + [pair + head_dim // 2 for pair in half] for half in (rest, pairs))
        scaling = MultiHeadLatentAttention.rotary_embedding(source.config).attention_scaling
        return cls(source, geometry, nope, rope, scaling**2)

    @cached_property
    def query(self) -> Tensor:
        """`[H * (nope + rope), d]`, so scaled that the softmax scale of the new head size gives the base's scores.

        A norm after it would take a scale away: it then stands in the norm's weight.
        """
        rows = self.source.query[:, self.nope_rows + self.rope_rows]
        return (rows if self.source.config.qk_norm else rows * self._score_scale[:, None]).flatten(0, 1)

    @property
    def query_bias(self) -> Tensor:
        """`[H * (nope + rope)]`."""
        return (self.source.query_bias[:, self.nope_rows + self.rope_rows] * self._score_scale).flatten()

    @property
    def query_norm(self) -> Tensor:
        """`[nope + rope]`."""
        return self.source.raw("q_norm").float()[self.nope_rows + self.rope_rows] * self._score_scale

    @property
    def key_norm(self) -> Tensor:
        """`[nope + rope]`."""
        return self.source.raw("k_norm").float()[self.nope_rows + self.rope_rows]

    @property
    def _score_scale(self) -> Tensor:
        """`[nope + rope]`."""
        scales = torch.tensor([self.nope_scale] * len(self.nope_rows) + [1.0] * len(self.rope_rows))
        return scales * math.sqrt(self.geometry.qk_head_dim / self.source.config.head_dim)

    @property
    def key(self) -> Tensor:
        """`[Hkv, hd, d]`, a norm of the base folded in unless the mixer has it too."""
        return self.source.key if self.geometry.key_norm else self.source.folded_key

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
        rows = torch.cat([self.key[:, self.nope_rows], self.source.value], dim=1).flatten(0, 1)
        return low_rank(rows, self.geometry.kv_lora_rank)

    @property
    def latent_up(self) -> Tensor:
        """kv_b, `[Hkv * (nope + v), r]`."""
        return self._latent_factors[0]

    @property
    def latent_down_and_rotary_key(self) -> Tensor:
        """kv_a, `[r + rope, d]`."""
        return torch.cat([self._latent_factors[1], self.key[:, self.rope_rows].mean(0)])

    @property
    def rotary_key_bias(self) -> Tensor:
        """kv_a's, `[r + rope]`: the latent needs none."""
        rotary = self.source.key_bias[:, self.rope_rows].mean(0)
        return torch.cat([torch.zeros(self.geometry.kv_lora_rank), rotary])


def mla_rules(config: HyLoConfig) -> Mapping[str, Rule]:
    return decomposed_rules(config, LatentDecomposition.of_whole_pairs, "pairs whole")


def decomposed_rules(
    config: HyLoConfig, decompose: Callable[[SourceAttention, MLAGeometry], LatentDecomposition], pairs: str
) -> Mapping[str, Rule]:
    """The rules of MLA for a decomposition; `pairs` says in the plan what it does to rotary pairs."""
    geometry = config.geometry("mla")
    assert isinstance(geometry, MLAGeometry)
    _check(geometry, config)
    rank = geometry.kv_lora_rank
    key_sources = ("k_proj",) if geometry.key_norm else fold_sources(config, "k_proj", "k_norm")

    def latent(source: SourceAttention) -> LatentDecomposition:
        """Made once for the tensors of a layer that share it."""
        return source.shared(LatentDecomposition, lambda: decompose(source, geometry))

    folded = "; key norm folded in" if len(key_sources) > 1 else ""
    last = "q_proj" if geometry.q_lora_rank is None else "q_b_proj"
    regrouped = "rows regrouped: nope, rope"
    if geometry.q_lora_rank is None:
        rules = {"q_proj.weight": Rule("copied", ("q_proj",), regrouped, lambda s, _: latent(s).query)}
    else:
        note = f"low rank, {geometry.q_lora_rank}"
        rules = {
            "q_a_proj.weight": Rule("decomposed", ("q_proj",), note, lambda s, _: latent(s).query_down),
            "q_b_proj.weight": Rule("decomposed", ("q_proj",), note, lambda s, _: latent(s).query_up),
        }
    rules |= {
        "kv_a_proj_with_mqa.weight": Rule(
            "decomposed",
            (*key_sources, "v_proj"),
            f"joint low rank, {rank}; rotary key: mean over KV heads, {pairs}{folded}",
            lambda s, _: latent(s).latent_down_and_rotary_key,
        ),
        "kv_b_proj.weight": Rule(
            "decomposed",
            (*key_sources, "v_proj"),
            f"joint low rank, {rank}{folded}",
            lambda s, _: latent(s).latent_up,
        ),
        "o_proj.weight": copied("o_proj"),
    }
    if config.attention_bias:
        rules |= {
            f"{last}.bias": Rule("copied", ("q_proj.bias",), regrouped, lambda s, _: latent(s).query_bias),
            "kv_a_proj_with_mqa.bias": Rule(
                "copied",
                ("k_proj.bias",),
                "of the rotary key, mean over KV heads; that of the others cancels in the softmax",
                lambda s, _: latent(s).rotary_key_bias,
            ),
        }
    if config.qk_norm:
        rules["q_norm.weight"] = Rule("copied", ("q_norm",), regrouped, lambda s, _: latent(s).query_norm)
    if geometry.key_norm:
        rules["k_norm.weight"] = Rule("copied", ("k_norm",), regrouped, lambda s, _: latent(s).key_norm)
    return rules | output_bias(config, "o_proj.bias")


def _check(geometry: MLAGeometry, config: HyLoConfig) -> None:
    if geometry.key_norm and not config.qk_norm:
        raise HyLoError("geometry of mla: key_norm is true; the base has no norm of its keys")
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
