"""The cache of a hybrid: transformers' own, by the type of each layer, with storage reserved ahead.

Attention layers hold keys and values; MLA layers one head of what they keep of a token (latent and rotary key) as keys,
and no values; linear layers the last inputs of their convolutions and a state of fixed size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hylo.config import HyLoConfig


class ReservedLayer(DynamicLayer):
    """Keys and values that grow in place, inside storage for `capacity` tokens.

    Without room left, storage grows by an eighth: a copy of everything once in a while, where `DynamicLayer` makes one
    for every token.
    """

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self.capacity = capacity
        self._storage: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends `[B, heads, T, size]`; returns all keys and all values."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # What a backward pass will read must not be written over.
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        held = [self.keys, self.values]
        length = self.keys.shape[-2]
        total = length + key_states.shape[-2]
        if not self._has_room(total):
            room = self.capacity if total <= self.capacity else total + total // 8
            self._storage = [new.new_empty(*new.shape[:-2], room, new.shape[-1]) for new in (key_states, value_states)]
            for storage, old in zip(self._storage, held, strict=True):
                storage[..., :length, :] = old
        for storage, new in zip(self._storage, (key_states, value_states), strict=True):
            storage[..., length:total, :] = new
        self.keys, self.values = (storage[..., :total, :] for storage in self._storage)
        return self.keys, self.values

    def _has_room(self, total: int) -> bool:
        """Whether the storage is still what keys view (reordering beams replaces them), and holds `total` tokens."""
        if not self._storage or self._storage[0].shape[-2] < total or self._storage[0].shape[0] != self.keys.shape[0]:
            return False
        return self.keys.data_ptr() == self._storage[0].data_ptr() or self.keys.shape[-2] == 0


class HyLoCache(DynamicCache):
    """A cache for a model of this configuration.

    Args:
        reserve: tokens to make room for; more may come.
    """

    layers: list[Any]

    def __init__(self, config: HyLoConfig, reserve: int = 0) -> None:
        super().__init__(config=config)
        self._made_with = (config, reserve)
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[i] = ReservedLayer(reserve)
        self._attends = any(kind != "linear_attention" for kind in config.layer_types)
        # Counted here where no layer keeps a length.
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) if self._attends else self.seen

    def reset(self) -> None:
        """Empties it: layers are made anew, since some versions of transformers keep the length of those they clear."""
        self.layers = HyLoCache(*self._made_with).layers
        self.seen = 0

    @property
    def is_compileable(self) -> bool:
        return False

    def token_bytes(self) -> int:
        """Bytes in use for keys, values and latents."""
        held = [t for layer in self.layers if isinstance(layer, DynamicLayer) for t in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor))

    def state_bytes(self) -> int:
        """Bytes of convolution inputs and recurrent states."""
        states = [
            state
            for layer in self.layers
            if hasattr(layer, "recurrent_states")
            for state in (*layer.conv_states.values(), *layer.recurrent_states.values())
        ]
        return sum(state.nbytes for state in states if state is not None)


def make_cache(config: HyLoConfig, reserve: int = 0) -> HyLoCache:
    """An empty cache for a model of this configuration, with room for `reserve` tokens."""
    return HyLoCache(config, reserve)
