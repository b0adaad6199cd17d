"""The linear mixers from attention: q, k, v and the output carried over, the rest so that they start near attention."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.mixers.gated_deltanet import GDNGeometry
from hylo.mixers.kda import KDAGeometry
from hylo.mixers.mamba2 import Mamba2Geometry
from hylo.upcycle.initialise.rules import Rule, copied, fresh, generator_for, output_bias
from hylo.upcycle.initialise.source import SourceAttention, fold_sources

# Softplus of dt_bias, times A = 1: what a state forgets a token at the start, for a memory of some 6 tokens.
_INITIAL_DECAY = 1 / 6
_MEMORY = fresh("a memory of 6 tokens", lambda shape: torch.full(shape, math.log(math.expm1(_INITIAL_DECAY))))
# Values pass SiLU after their convolution: it is near linear where they are small, and the norm of the heads' outputs
# takes their size away. Attention's values pass nothing.
_VALUE_SCALE = 0.1
_DECAY_RATE = fresh("zero: A = 1", torch.zeros)


def gdn_rules(config: HyLoConfig) -> Mapping[str, Rule]:
    geometry = config.geometry("gdn")
    assert isinstance(geometry, GDNGeometry)
    return {
        **_projections(config, (geometry.num_heads, geometry.head_k_dim, geometry.head_v_dim)),
        "g_proj.weight": _rows(config, "query", "the gate opens by what the query asks"),
        "a_proj.weight": fresh("zero: one decay for all tokens", torch.zeros),
        "b_proj.weight": fresh("zero: half of each write", torch.zeros),
        "A_log": _DECAY_RATE,
        "dt_bias": _MEMORY,
    }


def kda_rules(config: HyLoConfig) -> Mapping[str, Rule]:
    geometry = config.geometry("kda")
    assert isinstance(geometry, KDAGeometry)
    return {
        **_projections(config, (geometry.num_heads, geometry.head_k_dim, geometry.head_v_dim)),
        "f_proj.0.weight": fresh("random, read by zeros", _random),
        "f_proj.1.weight": fresh("zero: one decay for all tokens", torch.zeros),
        "g_proj.0.weight": fresh("random, read by zeros", _random),
        "g_proj.1.weight": fresh("zero: the gate half open", torch.zeros),
        "g_proj.1.bias": fresh("zero: the gate half open", torch.zeros),
        "b_proj.weight": fresh("zero: half of each write", torch.zeros),
        "A_log": _DECAY_RATE,
        "dt_bias": _MEMORY,
    }


def mamba2_rules(config: HyLoConfig) -> Mapping[str, Rule]:
    """As published (arXiv 2408.15237): x from V, B from K, C from Q; z from Q as well, so that the gate starts open."""
    geometry = config.geometry("mamba2")
    assert isinstance(geometry, Mamba2Geometry)
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if (geometry.num_heads, geometry.num_kv_heads, geometry.head_dim) != (heads, kv_heads, head_dim):
        raise HyLoError(
            f"geometry of mamba2: {geometry.num_heads} and {geometry.num_kv_heads} heads of {geometry.head_dim}; "
            f"expected those of the base, {heads} and {kv_heads} of {head_dim}"
        )
    queries, keys = fold_sources(config, "q_proj", "q_norm"), fold_sources(config, "k_proj", "k_norm")
    sources = tuple(dict.fromkeys((*queries, *keys, "v_proj")))

    def in_proj(source: SourceAttention, shape: torch.Size) -> Tensor:
        parts = [source.folded_query, source.value, source.folded_key, source.folded_query]
        dt = torch.zeros(heads, shape[1])
        return torch.cat([*(part.flatten(0, 1) for part in parts), dt])

    def in_proj_bias(source: SourceAttention, _: torch.Size) -> Tensor:
        kv = torch.zeros(2 * kv_heads * head_dim)
        return torch.cat([source.query_bias.flatten(), kv, source.query_bias.flatten(), torch.zeros(heads)])

    rules = {
        "in_proj.weight": Rule("copied", sources, "z from q, x from v, B from k, C from q; dt zero", in_proj),
        "conv1d.weight": fresh(
            f"identity: the newest tap is 1, of x {_VALUE_SCALE}",
            lambda shape: _grouped_taps(shape, geometry.group_size),
        ),
        "conv1d.bias": fresh("zero", torch.zeros),
        "dt_bias": _MEMORY,
        "A_log": _DECAY_RATE,
        "D": fresh("zero: nothing passes by the state", torch.zeros),
        "norm.weight": fresh("one", torch.ones),
        "out_proj.weight": copied("o_proj"),
    }
    if config.attention_bias:
        rules["in_proj.bias"] = Rule("copied", ("q_proj.bias",), "z and C from q", in_proj_bias)
    return rules | output_bias(config, "out_proj.bias")


def _projections(config: HyLoConfig, sizes: tuple[int, int, int]) -> dict[str, Rule]:
    """What Gated DeltaNet and Kimi Delta Attention share: heads of q and k, heads of v, convolutions and the output."""
    aligned = sizes == (config.num_attention_heads, config.head_dim, config.head_dim)
    rules = {
        "q_proj.weight": _rows(config, "query"),
        "k_proj.weight": _rows(config, "key", "KV heads repeated"),
        "v_proj.weight": _rows(config, "value", "KV heads repeated"),
        **{f"{x}_conv1d.weight": fresh("identity: the newest tap is 1", _identity_taps) for x in "qk"},
        "v_conv1d.weight": fresh(f"identity times {_VALUE_SCALE}", _value_taps),
        "o_norm.weight": fresh("one", torch.ones),
        "o_proj.weight": copied("o_proj") if aligned else Rule("copied", ("o_proj",), "overlapping columns", _columns),
    }
    if config.attention_bias:

        def query_bias(source: SourceAttention, shape: torch.Size) -> Tensor:
            return _fitted(source.query_bias.flatten(), shape, torch.zeros)

        rules["q_proj.bias"] = Rule("copied", ("q_proj.bias",), "", query_bias)
    return rules | output_bias(config, "o_proj.bias")


def _rows(config: HyLoConfig, part: str, note: str = "") -> Rule:
    """The rows of q, k or v for all H heads; those that a wider mixer has beyond them start random.

    Norms of q and k are folded in; an L2 norm after it takes away what is only a scale.
    """
    sources = {
        "query": fold_sources(config, "q_proj", "q_norm"),
        "key": fold_sources(config, "k_proj", "k_norm"),
        "value": ("v_proj",),
    }[part]

    def make(source: SourceAttention, shape: torch.Size) -> Tensor:
        if part == "query":
            rows = source.folded_query.flatten(0, 1)
        else:
            rows = source.repeat_kv(source.folded_key if part == "key" else source.value)
        return _fitted(rows, shape, _random)

    return Rule("copied", sources, note, make)


def _fitted(rows: Tensor, shape: torch.Size, rest: Callable[[torch.Size], Tensor]) -> Tensor:
    """`rows` cut to `shape` along the first dim, or followed by `rest`."""
    missing = shape[0] - rows.shape[0]
    if missing <= 0:
        return rows[: shape[0]]
    return torch.cat([rows, rest(torch.Size((missing, *shape[1:])))])


def _columns(source: SourceAttention, shape: torch.Size) -> Tensor:
    """The output's columns that overlap; zeros for values that start random."""
    columns = source.raw("o_proj").float()[:, : shape[1]]
    return torch.nn.functional.pad(columns, (0, shape[1] - columns.shape[1]))


def _random(shape: torch.Size) -> Tensor:
    """Normal, of the scale that keeps a unit input's size; the same for the same shape."""
    return torch.randn(shape, generator=generator_for(shape)) * shape[-1] ** -0.5


def _identity_taps(shape: torch.Size) -> Tensor:
    taps = torch.zeros(shape)
    taps[..., -1] = 1.0
    return taps


def _value_taps(shape: torch.Size) -> Tensor:
    return _VALUE_SCALE * _identity_taps(shape)


def _grouped_taps(shape: torch.Size, values: int) -> Tensor:
    """Those of Mamba-2: its first `values` channels are x."""
    taps = _identity_taps(shape)
    taps[:values] *= _VALUE_SCALE
    return taps
