"""The configuration of a hybrid: the base's sizes, the mixer of each layer, and each mixer's geometry."""

from typing import Any

from transformers import LlamaConfig

from hylo.errors import HyLoError
from hylo.mixers import Geometry, TokenMixer, mixer_class


class HyLoConfig(LlamaConfig):
    """A Llama configuration whose layers name their token mixers.

    Args:
        token_mixers: the name of each layer's mixer, such as "attention", "mla" or "gdn"; attention everywhere by
            default.
        mixer_geometry: the sizes of each mixer that has some, by mixer name; see the mixer's `Geometry`.
        base_model: where the converted weights came from.
    """

    model_type = "hylo"
    base_model_tp_plan = None
    base_model_pp_plan = None

    token_mixers: list[str] | None = None
    mixer_geometry: dict[str, dict[str, Any]] | None = None
    base_model: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Derived from token_mixers; read back from config.json only by other programs.
        kwargs.pop("layer_types", None)
        if self.token_mixers is None:
            self.token_mixers = ["attention"] * self.num_hidden_layers
        if self.mixer_geometry is None:
            self.mixer_geometry = {}
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raises HyLoError where mixers, layers and geometries do not fit together."""
        assert self.token_mixers is not None
        if len(self.token_mixers) != self.num_hidden_layers:
            raise HyLoError(f"{len(self.token_mixers)} token_mixers for {self.num_hidden_layers} layers")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise HyLoError(f"{self.num_attention_heads} heads do not divide over {self.num_key_value_heads} KV heads")
        for name in sorted(set(self.token_mixers)):
            self.geometry(name)

    def geometry(self, mixer: str) -> Geometry:
        """The sizes of a mixer, checked. Raises HyLoError naming what is wrong."""
        return mixer_class(mixer).geometry_class.parse(mixer, (self.mixer_geometry or {}).get(mixer, {}))

    def mixer_of(self, layer_idx: int) -> type[TokenMixer]:
        assert self.token_mixers is not None
        return mixer_class(self.token_mixers[layer_idx])

    @property
    def layer_types(self) -> list[str]:
        """What transformers builds cache layers and masks by."""
        return [mixer_class(name).layer_type for name in self.token_mixers or []]

    @property
    def cache_elements_per_token(self) -> int:
        """Values that all layers together cache for each token."""
        return sum(mixer_class(name).cache_elements_per_token(self) for name in self.token_mixers or [])

    @property
    def base_cache_elements_per_token(self) -> int:
        """The same for the base, all of whose layers are attention."""
        return self.num_hidden_layers * 2 * (self.num_key_value_heads or 0) * (self.head_dim or 0)

    def cache_bytes(self, tokens: int, element_size: int = 2) -> int:
        """Bytes of keys, values and latents for `tokens` cached tokens of one sequence."""
        return self.cache_elements_per_token * tokens * element_size

    def state_bytes(self, element_size: int = 2) -> int:
        """Bytes of convolution inputs (`element_size` each) and recurrent state (float32) for one sequence."""
        mixers = [mixer_class(name) for name in self.token_mixers or []]
        return sum(m.convolution_elements(self) * element_size + m.state_elements(self) * 4 for m in mixers)
