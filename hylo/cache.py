"""The cache of a hybrid: transformers' own, by the type of each layer.

MLA layers hold latents as keys and rotary keys as values, `[B, 1, S, r]` and `[B, 1, S, rope]`; attention layers keys
and values; linear layers the last inputs of their convolutions and a state of fixed size.
"""

from transformers import DynamicCache

from hylo.config import HyLoConfig


class LinearCache(DynamicCache):
    """The cache of a model whose layers are all linear and keep no length: it counts the tokens it has seen."""

    def __init__(self, config: HyLoConfig) -> None:
        super().__init__(config=config)
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    @property
    def is_compileable(self) -> bool:
        return False


def make_cache(config: HyLoConfig) -> DynamicCache:
    """An empty cache for a model of this configuration."""
    if "full_attention" in config.layer_types:
        return DynamicCache(config=config)
    return LinearCache(config)
