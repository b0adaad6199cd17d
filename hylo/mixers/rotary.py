"""Rotary embedding over all of a head, or over some of its pairs."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

if TYPE_CHECKING:
    from hylo.config import HyLoConfig


class RotaryEmbedding(LlamaRotaryEmbedding):
    """The base's rotary embedding for heads of `dim`, or for chosen pairs of the base's own heads.

    Pair i of a head of size hd is the values i and i + hd/2, turned at the i-th frequency (Llama's layout). Rotating a
    subset of the pairs at their own frequencies is exact for those pairs; the standard frequencies for a smaller head
    are those of the pairs 0, hd/dim, 2 hd/dim, ... of the larger.

    Args:
        config: carries head_dim and rope_parameters.
        dim: rotary values a head; the whole head by default.
        pairs: which of the base's pairs, as many as dim / 2; the standard frequencies for `dim` by default.
    """

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: "HyLoConfig", dim: int | None = None, pairs: Sequence[int] | None = None) -> None:
        if dim is not None and pairs is None and dim != config.head_dim:
            config = copy.deepcopy(config)
            config.head_dim = dim
        super().__init__(config)
        self.pairs = list(pairs) if pairs is not None else None
        if self.pairs is not None:
            self.inv_freq = self.inv_freq[self.pairs]
            self.original_inv_freq = self.original_inv_freq[self.pairs]

    def initial_frequencies(self) -> Tensor:
        """What `inv_freq` starts as; models loaded through the meta device ask for it again."""
        return type(self)(self.config, pairs=self.pairs).inv_freq
