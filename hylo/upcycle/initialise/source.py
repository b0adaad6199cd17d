"""The attention of one base layer: what the mixers that replace it are made from.

H query heads, Hkv KV heads, hd values a head, d hidden values.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from hylo.config import HyLoConfig

T = TypeVar("T")


def tensor_name(layer_idx: int, source: str) -> str:
    """The base's full name of a source: a projection's weight, a parameter of attention, or `layer.` and one of its
    layer's (`q_proj`, `q_proj.bias`, `layer.input_layernorm`)."""
    inside = source.removeprefix("layer.") if source.startswith("layer.") else f"self_attn.{source}"
    return f"model.layers.{layer_idx}.{inside}" + ("" if inside.endswith((".bias", ".weight")) else ".weight")


class SourceAttention:
    """The attention weights of one base layer, in float32, with what several tensors are made from.

    Args:
        tensor: reads a tensor of the base by its full name.
    """

    def __init__(self, tensor: Callable[[str], Tensor], layer_idx: int, config: HyLoConfig) -> None:
        self._tensor = tensor
        self._layer_idx = layer_idx
        self.config = config
        self._shared: dict[type, Any] = {}

    def shared(self, kind: type[T], make: Callable[[], T]) -> T:
        """What `make` makes, once for this layer."""
        if kind not in self._shared:
            self._shared[kind] = make()
        return self._shared[kind]

    def raw(self, name: str) -> Tensor:
        """A tensor as stored."""
        return self._tensor(tensor_name(self._layer_idx, name))

    def _heads(self, name: str) -> Tensor:
        """`[heads, hd, d]`; of a bias, `[heads, hd]`."""
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

    @property
    def query_bias(self) -> Tensor:
        return self._heads("q_proj.bias")

    @property
    def key_bias(self) -> Tensor:
        return self._heads("k_proj.bias")

    @cached_property
    def folded_query(self) -> Tensor:
        """The query map with its norm, where there is one, as part of it."""
        return self._folded(self.query, "q_norm")

    @cached_property
    def folded_key(self) -> Tensor:
        """The key map with its norm, where there is one, as part of it."""
        return self._folded(self.key, "k_norm")

    def _folded(self, heads: Tensor, norm: str) -> Tensor:
        """`heads` times the norm's weight and its mean scale.

        RMSNorm(W x) is w * W x / rms(W x). The layer's input x is a normed vector times the norm's own weight gamma;
        for normed vectors without a preferred direction, the mean square of W x is |W diag(gamma)|^2 / hd.
        """
        if not self.config.qk_norm:
            return heads
        gamma = self.raw("layer.input_layernorm").float()
        mean_square = (heads * gamma).square().sum((1, 2), keepdim=True) / self.config.head_dim
        scale = torch.rsqrt(mean_square + self.config.rms_norm_eps)
        return heads * self.raw(norm).float()[:, None] * scale

    def repeat_kv(self, heads: Tensor) -> Tensor:
        """`[Hkv, hd, d]` to `[H * hd, d]`: each KV head stands once for each query head it serves."""
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        return heads.repeat_interleave(groups, dim=0).flatten(0, 1)

    @property
    def output_bias(self) -> Tensor:
        """`[d]`: the output's own bias, and what the values' bias is after the output projection.

        Softmax weights sum to one, so that a constant added to all values is added to every output.
        """
        bias = torch.zeros(self.config.hidden_size)
        if self.config.attention_bias:
            values = self.repeat_kv(self._heads("v_proj.bias")[..., None])[:, 0]
            bias = bias + self.raw("o_proj").float() @ values
        if self.config.attention_output_bias:
            bias = bias + self.raw("o_proj.bias").float()
        return bias


def output_bias_sources(config: HyLoConfig) -> tuple[str, ...]:
    """What `SourceAttention.output_bias` is made from."""
    values = ("v_proj.bias", "o_proj") if config.attention_bias else ()
    return values + (("o_proj.bias",) if config.attention_output_bias else ())


def fold_sources(config: HyLoConfig, projection: str, norm: str) -> tuple[str, ...]:
    """What a folded map is made from."""
    return (projection, norm, "layer.input_layernorm") if config.qk_norm else (projection,)
