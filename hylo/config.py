"""The configuration of a hybrid: the base's sizes, the mixer of each layer, and each mixer's geometry."""

from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from hylo.errors import HyLoError
from hylo.mixers import Geometry, TokenMixer, mixer_class
from hylo.remote_code import AUTO_MAP, write_remote_code


class HyLoConfig(LlamaConfig):
    """A Llama configuration whose layers name their token mixers.

    Args:
        token_mixers: the name of each layer's mixer, such as "attention", "mla" or "gdn"; attention everywhere by
            default.
        mixer_geometry: the sizes of each mixer that has some, by mixer name; see the mixer's `Geometry`.
        base_model: where the converted weights came from.
        attention_output_bias: whether kept attention has a bias after its output; that of q, k and v is
            `attention_bias`.
        qk_norm: whether the base norms each query head and each key head (Qwen3).
        sliding_window: how many tokens the layers in `sliding_layers` see, themselves included.
        sliding_layers: layers whose attention, where it is kept, sees a window only.
    """

    model_type = "hylo"
    base_model_tp_plan = None
    base_model_pp_plan = None

    token_mixers: list[str] | None = None
    mixer_geometry: dict[str, dict[str, Any]] | None = None
    base_model: str | None = None
    attention_output_bias: bool | None = None
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Derived from token_mixers; read back from config.json only by other programs.
        kwargs.pop("layer_types", None)
        if self.token_mixers is None:
            self.token_mixers = ["attention"] * self.num_hidden_layers
        if self.mixer_geometry is None:
            self.mixer_geometry = {}
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        super().__post_init__(**kwargs)
        self.check()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As any config, with the files beside it that load the model where nobody imported this package."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)
        write_remote_code(Path(save_directory))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would copy this file beside every checkpoint saved after a remote load."""

    def check(self) -> None:
        """Raises HyLoError where mixers, layers and geometries do not fit together."""
        assert self.token_mixers is not None
        if len(self.token_mixers) != self.num_hidden_layers:
            raise HyLoError(f"{len(self.token_mixers)} token_mixers for {self.num_hidden_layers} layers")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise HyLoError(f"{self.num_attention_heads} heads do not divide over {self.num_key_value_heads} KV heads")
        if self.sliding_layers and self.sliding_window is None:
            raise HyLoError(f"sliding_layers {self.sliding_layers} without a sliding_window")
        if self.sliding_window is not None and self.sliding_window < 2:
            raise HyLoError(f"sliding_window {self.sliding_window}; expected 2 tokens or more")
        if not isinstance(self.mixer_geometry, dict):
            raise HyLoError(f"mixer_geometry is {self.mixer_geometry!r}; expected an object of sizes by mixer")
        for name in sorted(set(self.token_mixers)):
            self.geometry(name)

    def geometry(self, mixer: str) -> Geometry:
        """The sizes of a mixer, checked. Raises HyLoError naming what is wrong."""
        return mixer_class(mixer).geometry_class.parse(mixer, (self.mixer_geometry or {}).get(mixer, {}))

    def mixer_of(self, layer_idx: int) -> type[TokenMixer]:
        assert self.token_mixers is not None
        return mixer_class(self.token_mixers[layer_idx])

    def window_of(self, layer_idx: int) -> int | None:
        """How far the layer sees where its attention is kept; None for all of the past."""
        return self.sliding_window if layer_idx in (self.sliding_layers or []) else None

    @property
    def mixer_output_bias(self) -> bool:
        """Whether mixers in attention's place have an output bias: it carries what the values' bias amounts to."""
        return bool(self.attention_bias or self.attention_output_bias)

    @property
    def layer_types(self) -> list[str]:
        """What transformers builds cache layers and masks by."""
        types: list[str] = []
        for i, name in enumerate(self.token_mixers or []):
            windowed = name == "attention" and self.window_of(i) is not None
            types.append("sliding_attention" if windowed else mixer_class(name).layer_type)
        return types

    @property
    def cache_elements_per_token(self) -> int:
        """Values that all layers together cache for each token."""
        return sum(mixer_class(name).cache_elements_per_token(self) for name in self.token_mixers or [])

    @property
    def base_cache_elements_per_token(self) -> int:
        """The same for the base, all of whose layers are attention."""
        return self.num_hidden_layers * 2 * (self.num_key_value_heads or 0) * (self.head_dim or 0)

    def cache_bytes(self, tokens: int, element_size: int = 2) -> int:
        """Bytes of keys, values and latents after `tokens` tokens of one sequence; a window keeps only its own."""
        elements = 0
        for name, kind in zip(self.token_mixers or [], self.layer_types, strict=True):
            window = self.sliding_window if kind == "sliding_attention" else None
            held = tokens if window is None else min(tokens, window - 1)
            elements += mixer_class(name).cache_elements_per_token(self) * held
        return elements * element_size

    def state_bytes(self, element_size: int = 2) -> int:
        """Bytes of convolution inputs (`element_size` each) and recurrent state (float32) for one sequence."""
        mixers = [mixer_class(name) for name in self.token_mixers or []]
        return sum(m.convolution_elements(self) * element_size + m.state_elements(self) * 4 for m in mixers)
