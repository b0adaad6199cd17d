"""What the linear mixers share: a convolution before, a state of fixed size after, and how both are cached."""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from hylo.errors import HyLoError
from hylo.mixers.base import Geometry, TokenMixer, is_whole
from hylo.ops.short_convolution import short_convolution

if TYPE_CHECKING:
    from hylo.config import HyLoConfig


class LinearMixer(TokenMixer):
    """Base of the mixers whose memory is a matrix a head, whatever the length of the sequence."""

    layer_type = "linear_attention"

    def _convolve(
        self,
        inputs: Sequence[Tensor],
        taps: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        past_key_values: Cache | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """The short convolution with SiLU of each input, the cache's inputs before it; and the state to go on from.

        Args:
            inputs: of q, k and v, say: `[B, T, C]` each.
            taps, biases: `[C, W]` and `[C]` each.
        """
        if past_key_values is None:
            parts = zip(inputs, taps, biases, strict=True)
            return [short_convolution(x, w, b, cu_seqlens=cu_seqlens) for x, w, b in parts], None
        if cu_seqlens is not None:
            raise ValueError("packed documents cannot be cached; generate from one document a row")
        cached = past_key_values.layers[self.layer_idx]
        # Read before the convolution's update, which marks the layer as having seen tokens.
        state, past = None, None
        if cached.has_previous_state[0]:
            state, past = cached.recurrent_states[0], cached.conv_states[0].transpose(1, 2).clone()
            if torch.is_grad_enabled():
                # What a backward pass will read must not be written over.
                state = state.clone()
        # The cache holds one row of inputs a token, and a single call decodes it.
        joined, width = torch.cat(list(inputs), dim=-1), taps[0].shape[-1]
        past_key_values.update_conv_state(joined.transpose(1, 2), self.layer_idx, conv_kernel_size=width - 1)
        bias = None
        if any(part is not None for part in biases):
            bias = torch.cat([part for part in biases if part is not None])
        mixed = short_convolution(joined, torch.cat(list(taps)), bias, past=past)
        return list(mixed.split([x.shape[-1] for x in inputs], dim=-1)), state

    def _keep(self, state: Tensor | None, past_key_values: Cache | None) -> None:
        """Caches the state after the last token."""
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx)

    @classmethod
    def cache_elements_per_token(cls, config: "HyLoConfig") -> int:
        return 0


def without_padding(hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros for padding, `[B, T, D]` and `[B, T]`: such tokens write nothing to a state that has seen none."""
    return hidden_states if mask is None else hidden_states * mask[..., None].to(hidden_states.dtype)


def depthwise(channels: int, taps: int, bias: bool = False) -> nn.Conv1d:
    """A depthwise convolution's weight `[channels, 1, taps]`, named as in flash-linear-attention."""
    return nn.Conv1d(channels, channels, taps, groups=channels, bias=bias)


def check_sizes(mixer: str, geometry: Geometry) -> None:
    """Raises HyLoError where a size is no whole number of at least 1; a convolution has at least 2 taps."""
    for field in fields(geometry):
        value, least = getattr(geometry, field.name), 2 if field.name == "conv_size" else 1
        if not is_whole(value, least):
            raise HyLoError(
                f"geometry of {mixer}: {field.name} is {value!r}; expected a whole number of at least {least}"
            )


def start_decays(A_log: Tensor, dt_bias: Tensor) -> None:
    """As in Mamba-2: A uniform in [1, 16], step sizes log-uniform in [0.001, 0.1]."""
    init.copy_(A_log, torch.empty_like(A_log).uniform_(1, 16).log())
    step = torch.empty_like(dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp().clamp(min=1e-4)
    # The inverse of softplus.
    init.copy_(dt_bias, step + torch.log(-torch.expm1(-step)))
