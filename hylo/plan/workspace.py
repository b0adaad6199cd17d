"""What a chunk of a prompt needs beside weights and cache, at the peak of one layer.

A layer runs its mixer, then its MLP; neither keeps anything for the other, so the peak is the larger of them. Each term
is one function, which says what it stands for, so that a measurement can correct it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hylo.config import HyLoConfig
from hylo.mixers.softmax import KEY_BLOCK
from hylo.modeling import MLP_CHUNK

# Tokens between two states that the kernels of linear attention keep.
STATE_CHUNK = 64


@dataclass(frozen=True)
class Chunk:
    """One call of the model: `tokens` new tokens of each of `sequences`, the last of a prompt of `context`.

    `element_size` is that of weights and activations.
    """

    config: HyLoConfig
    tokens: int
    sequences: int
    context: int
    element_size: int

    @property
    def rows(self) -> int:
        return self.tokens * self.sequences

    def activation_bytes(self, values_per_token: int) -> int:
        return self.rows * values_per_token * self.element_size


@dataclass(frozen=True)
class HeadSizes:
    """Of a mixer whose heads attend: query heads, KV heads, query and value size, and what a latent is expanded to."""

    heads: int
    kv_heads: int
    qk: int
    v: int
    expanded: int


@dataclass(frozen=True)
class LinearSizes:
    """Of a linear mixer: its heads, and how many values a token each step before the recurrence leaves in memory.

    Attributes:
        projected: what the input projections give, and what is copied of it for the convolution.
        convolved: what the convolution gives.
        head_inputs: q, k and v of every head, contiguous as kernels want them.
        decays: how many log decays.
    """

    heads: int
    head_k: int
    head_v: int
    projected: int
    convolved: int
    head_inputs: int
    decays: int

    @property
    def key_size(self) -> int:
        return self.heads * self.head_k

    @property
    def value_size(self) -> int:
        return self.heads * self.head_v


def head_sizes(config: HyLoConfig, mixer: str) -> HeadSizes:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if mixer == "attention":
        return HeadSizes(heads, kv_heads, config.head_dim, config.head_dim, expanded=0)
    sizes = vars(config.geometry(mixer))
    nope, rope, v = sizes["qk_nope_head_dim"], sizes["qk_rope_head_dim"], sizes["v_head_dim"]
    return HeadSizes(heads, kv_heads, nope + rope, v, expanded=kv_heads * (nope + v))


def linear_sizes(config: HyLoConfig, mixer: str) -> LinearSizes:
    sizes = vars(config.geometry(mixer))
    heads = sizes["num_heads"]
    if mixer == "mamba2":
        size = sizes["head_dim"]
        inner = heads * size
        convolved = inner + 2 * sizes["num_kv_heads"] * size
        # z, x, B, C and dt stay in one matrix, of which x, B and C are copied. x times dt and B are made for
        # all heads, the first in float32 on the way.
        return LinearSizes(heads, size, size, inner + 2 * convolved + heads, convolved, 4 * inner, decays=heads)
    k, v = sizes["head_k_dim"], sizes["head_v_dim"]
    inputs = heads * (2 * k + v)
    # Kimi Delta Attention decays every key channel by itself.
    decays = heads * k if mixer == "kda" else heads
    return LinearSizes(heads, k, v, inputs, inputs, inputs, decays)


# Of every part of a layer.


def residual_stream(chunk: Chunk) -> int:
    """The embeddings, the layer's input, and its sum with the mixer's output."""
    return 3 * chunk.activation_bytes(chunk.config.hidden_size)


def norm_output(chunk: Chunk) -> int:
    """What the mixer or the MLP reads."""
    return chunk.activation_bytes(chunk.config.hidden_size)


# Of the MLP.


def mlp_products(chunk: Chunk) -> int:
    """Gate, up and their product, of the tokens that pass the MLP at a time."""
    at_once = min(chunk.tokens, MLP_CHUNK) * chunk.sequences
    return 3 * at_once * chunk.config.intermediate_size * chunk.element_size


# Of attention and MLA.


def queries(chunk: Chunk, sizes: HeadSizes) -> int:
    """Of the whole chunk."""
    return chunk.activation_bytes(sizes.heads * sizes.qk)


def key_block(chunk: Chunk, sizes: HeadSizes) -> int:
    """Keys and values of one block of the past, and once more: what latents expand to, or padded to one head size."""
    keys = min(chunk.context, KEY_BLOCK) * chunk.sequences
    padded = 2 * sizes.kv_heads * max(sizes.qk, sizes.v)
    return keys * (sizes.kv_heads * (sizes.qk + sizes.v) + max(sizes.expanded, padded)) * chunk.element_size


def attention_output(chunk: Chunk, sizes: HeadSizes) -> int:
    """Of one block, and where there are several two float32 copies to merge them in."""
    values = chunk.rows * sizes.heads * sizes.v
    merging = 2 * 4 if chunk.context > chunk.tokens else 0
    return values * (chunk.element_size + merging)


# Of linear mixers.


def projections(chunk: Chunk, sizes: LinearSizes) -> int:
    """What enters the convolution."""
    return chunk.activation_bytes(sizes.projected)


def convolved(chunk: Chunk, sizes: LinearSizes) -> int:
    """What leaves the convolution."""
    return chunk.activation_bytes(sizes.convolved)


def head_inputs(chunk: Chunk, sizes: LinearSizes) -> int:
    """q, k and v as the recurrence reads them."""
    return chunk.activation_bytes(sizes.head_inputs)


def decays(chunk: Chunk, sizes: LinearSizes) -> int:
    """In float32: of each token, and summed from the start of its chunk."""
    return 2 * chunk.rows * sizes.decays * 4


def normed_keys(chunk: Chunk, sizes: LinearSizes) -> int:
    """q and k of length one, which the delta rule reads."""
    return 2 * chunk.activation_bytes(sizes.key_size)


def wy_factors(chunk: Chunk, sizes: LinearSizes) -> int:
    """w, like k; u and what is written in the end, like v; and the triangular matrix that they come from."""
    return chunk.activation_bytes(sizes.key_size + 2 * sizes.value_size + sizes.heads * STATE_CHUNK)


def chunk_states(chunk: Chunk, sizes: LinearSizes) -> int:
    """The state before every `STATE_CHUNK` tokens."""
    states = -(-chunk.tokens // STATE_CHUNK) * chunk.sequences
    return states * sizes.heads * sizes.head_k * sizes.head_v * chunk.element_size


def linear_output(chunk: Chunk, sizes: LinearSizes) -> int:
    """What the state was read to."""
    return chunk.activation_bytes(sizes.value_size)


SoftmaxTerm = Callable[[Chunk, HeadSizes], int]
LinearTerm = Callable[[Chunk, LinearSizes], int]

_EVERY_PART = (residual_stream, norm_output)
_SOFTMAX: tuple[SoftmaxTerm, ...] = (queries, key_block, attention_output)
_GATED_LINEAR: tuple[LinearTerm, ...] = (projections, convolved, head_inputs, decays, chunk_states, linear_output)
_DELTA_RULE: tuple[LinearTerm, ...] = (*_GATED_LINEAR, normed_keys, wy_factors)
_LINEAR_TERMS = {"gdn": _DELTA_RULE, "kda": _DELTA_RULE, "mamba2": _GATED_LINEAR}
SOFTMAX_MIXERS = ("attention", "mla")


def workspace_by_part(chunk: Chunk) -> dict[str, dict[str, int]]:
    """Bytes of every term, by part of a layer: `mlp`, and each mixer of the layout."""
    shared = {term.__name__: term(chunk) for term in _EVERY_PART}
    parts = {"mlp": shared | {"mlp_products": mlp_products(chunk)}}
    for mixer in sorted(set(chunk.config.token_mixers or [])):
        if mixer in SOFTMAX_MIXERS:
            heads = head_sizes(chunk.config, mixer)
            parts[mixer] = shared | {term.__name__: term(chunk, heads) for term in _SOFTMAX}
        else:
            sizes = linear_sizes(chunk.config, mixer)
            parts[mixer] = shared | {term.__name__: term(chunk, sizes) for term in _LINEAR_TERMS[mixer]}
    return parts


def prefill_workspace(chunk: Chunk) -> int:
    """Bytes of the part that needs most."""
    return max(sum(terms.values()) for terms in workspace_by_part(chunk).values())
