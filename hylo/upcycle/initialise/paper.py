"""The start as published, for comparison: rotary pairs cut in two, and random whatever attention has no counterpart of.

MLA (arXiv 2503.11132) takes of each query and key head the first `nope` rows as they are, and the last `rope` rows as
its rotary values. Llama stores a pair as the rows i and i + hd/2, so that both parts hold halves of pairs. Linear
mixers (arXiv 2408.15237) copy q, k, v and the output; convolutions, gates, write strengths and decays are those of a
new layer, as flash-linear-attention and Mamba-2 make it.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.mixers.linear import start_decays
from hylo.mixers.mla import MLAGeometry
from hylo.upcycle.initialise.linear import gdn_rules, mamba2_rules
from hylo.upcycle.initialise.mla import LatentDecomposition, decomposed_rules
from hylo.upcycle.initialise.rules import Rule, fresh, generator_for
from hylo.upcycle.initialise.source import SourceAttention

# Of the decays, which are drawn in pairs.
_DECAY_SEED = 0


def paper_mla_rules(config: HyLoConfig) -> Mapping[str, Rule]:
    geometry = config.geometry("mla")
    assert isinstance(geometry, MLAGeometry)
    if geometry.rope_pairs is not None:
        raise HyLoError("start 'paper': rotary values have the standard frequencies; set mla's rope_pairs to null")
    return decomposed_rules(config, _cut_pairs, "pairs cut")


def _cut_pairs(source: SourceAttention, geometry: MLAGeometry) -> LatentDecomposition:
    head_dim = source.config.head_dim
    rope, nope = geometry.qk_rope_head_dim, geometry.qk_nope_head_dim
    return LatentDecomposition(source, geometry, list(range(nope)), list(range(head_dim - rope, head_dim)))


def paper_gdn_rules(config: HyLoConfig) -> Mapping[str, Rule]:
    return {
        **gdn_rules(config),
        **{f"{x}_conv1d.weight": fresh("random", _random_taps) for x in "qkv"},
        **{f"{x}_proj.weight": fresh("random", _xavier) for x in "gab"},
        **_decays(),
    }


def paper_mamba2_rules(config: HyLoConfig) -> Mapping[str, Rule]:
    rules = mamba2_rules(config)
    carried = rules["in_proj.weight"]
    heads = config.num_attention_heads
    inner = heads * config.head_dim

    def in_proj(source: SourceAttention, shape: torch.Size) -> Tensor:
        rows = carried.make(source, shape)
        new = _xavier(torch.Size((inner + heads, shape[1])))
        return torch.cat([new[:inner], rows[inner:-heads], new[inner:]])

    return {
        **rules,
        "in_proj.weight": Rule("copied", carried.sources, "x from v, B from k, C from q; z and dt random", in_proj),
        "conv1d.weight": fresh("random", _random_taps),
        "D": fresh("one", torch.ones),
        **_decays(),
    }


def paper_kda_rules(config: HyLoConfig) -> Mapping[str, Rule]:
    raise HyLoError("start 'paper': no start of KDA was published; choose GDN or M2 for the linear layers")


def _decays() -> dict[str, Rule]:
    """Rates in [1, 16] and steps log-uniform in [0.001, 0.1]."""

    def both(shape: torch.Size) -> tuple[Tensor, Tensor]:
        rate, step = torch.empty(shape), torch.empty(shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_DECAY_SEED)
            start_decays(rate, step)
        return rate, step

    return {
        "A_log": fresh("random, rates 1 to 16", lambda shape: both(shape)[0]),
        "dt_bias": fresh("random, steps 0.001 to 0.1", lambda shape: both(shape)[1]),
    }


def _random_taps(shape: torch.Size) -> Tensor:
    """Uniform within 1 / sqrt(taps), as torch makes convolutions."""
    return _uniform(shape, shape[-1] ** -0.5)


def _xavier(shape: torch.Size) -> Tensor:
    """Xavier's, with the gain 2^-2.5 of flash-linear-attention."""
    return _uniform(shape, 2**-2.5 * math.sqrt(6 / sum(shape)))


def _uniform(shape: torch.Size, bound: float) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=generator_for(shape))
