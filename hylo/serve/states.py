"""The shapes of linear layers' states, as vLLM's cache holds them."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from hylo.config import HyLoConfig


@dataclass(frozen=True)
class StateShapes:
    """Of one layer and one request, on one rank.

    Attributes:
        convolution: the last inputs, `(W - 1, channels)`.
        recurrent: `(H, V, K)`.
    """

    convolution: tuple[int, int]
    recurrent: tuple[int, int, int]

    @property
    def both(self) -> tuple[tuple[int, ...], ...]:
        return self.convolution, self.recurrent

    def nbytes(self, dtype: torch.dtype) -> int:
        """With the convolution's state in `dtype` and the recurrent one in float32."""
        return prod(self.convolution) * dtype.itemsize + prod(self.recurrent) * 4


def state_shapes(config: HyLoConfig, mixer: str, ranks: int) -> StateShapes:
    """Of a linear mixer's layers where `ranks` ranks share the heads."""
    sizes: Any = config.geometry(mixer)
    if mixer == "mamba2":
        channels, key, value = sizes.convolved_size, sizes.head_dim, sizes.head_dim
    else:
        channels, key, value = 2 * sizes.key_size + sizes.value_size, sizes.head_k_dim, sizes.head_v_dim
    return StateShapes((sizes.conv_size - 1, channels // ranks), (sizes.num_heads // ranks, value, key))


def linear_mixers(config: HyLoConfig) -> list[str]:
    """Those of the model's mixers that keep states."""
    return sorted(set(config.token_mixers or []) - {"attention", "mla"})


def page_tokens_of_a_state(config: HyLoConfig, ranks: int, dtype: torch.dtype) -> int | None:
    """Tokens of latents that take as much as the largest state: what a page of the cache has at least.

    None where no mixer keeps states.
    """
    state = largest_state(config, ranks, dtype)
    latents: Any = config.geometry("mla")
    token_bytes = (latents.kv_lora_rank + latents.qk_rope_head_dim) * dtype.itemsize
    return None if state is None else -(-state.nbytes(dtype) // token_bytes)


def largest_state(config: HyLoConfig, ranks: int, dtype: torch.dtype) -> StateShapes | None:
    """Of the mixer with the largest states: vLLM gives every layer as much. None where no mixer has any."""
    shapes = [state_shapes(config, mixer, ranks) for mixer in linear_mixers(config)]
    return max(shapes, key=lambda each: each.nbytes(dtype), default=None)
