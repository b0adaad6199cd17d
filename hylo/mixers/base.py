"""What a token mixer is: the one interface between a layer and whatever mixes its tokens."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from torch import Tensor, nn
from transformers import Cache

from hylo.errors import HyLoError
from hylo.mixers.rotary import RotaryEmbedding

if TYPE_CHECKING:
    from hylo.config import HyLoConfig


def is_whole(value: object, least: int) -> bool:
    """Whether it is an integer (True is none) of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class Geometry:
    """Base of the sizes that a mixer adds to the base model's own: a frozen dataclass, stored in config.json."""

    @classmethod
    def parse(cls, mixer: str, values: Any) -> Self:
        """From a JSON object. Raises HyLoError on anything else, or naming an unknown, missing or mistyped size."""
        if not isinstance(values, dict):
            raise HyLoError(f"geometry of {mixer} is {values!r}; expected an object of sizes")
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise HyLoError(f"geometry of {mixer}: unknown {unknown[0]!r}; expected {', '.join(known) or 'nothing'}")
        try:
            return cls(**values)
        except TypeError as error:
            raise HyLoError(f"geometry of {mixer}: {str(error).split('__init__() ')[-1]}") from None


class TokenMixer(nn.Module, ABC):
    """Maps the normed hidden states of a layer to what is added to its residual stream.

    A mixer is one file: its sizes (`Geometry`), its module, and what it keeps between tokens.
    """

    name: ClassVar[str]
    # How it is written in layouts such as 8MLA22GDN.
    block: ClassVar[str]
    # The kind of cache layer transformers makes for it: keys and values that grow, or a state of fixed size.
    layer_type: ClassVar[Literal["full_attention", "linear_attention"]]
    geometry_class: ClassVar[type[Geometry]] = Geometry
    # Whether a conversion puts it in attention's place, to be calibrated and trained.
    replaces_attention: ClassVar[bool] = True

    # Set by each mixer's `__init__(config, layer_idx)`.
    config: "HyLoConfig"
    layer_idx: int

    @abstractmethod
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`.

        Args:
            position_embeddings: cos and sin for `rotary_embedding`, each `[B or 1, T, rotary dims]`.
            attention_mask: what `layer_type` calls for: the causal mask for full attention, else `[B, T]` with zeros
                where a token is padding, or None.
            past_key_values: the cache to read and to extend.
            cu_seqlens: `[N + 1]` offsets of documents packed into one row, none of which sees another.
        """

    @property
    @abstractmethod
    def output_projection(self) -> nn.Linear:
        """The last linear map, the one whose input calibration regresses on."""

    @classmethod
    def default_geometry(
        cls, num_heads: int, num_kv_heads: int, head_dim: int, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Sizes for a base's heads, where the user `given` some of them: all but those that depend on no other."""
        return {}

    @classmethod
    def rotary_embedding(cls, config: "HyLoConfig") -> RotaryEmbedding | None:
        """The rotary embedding that all layers of this mixer share, or None."""
        return None

    def reset_parameters(self) -> None:
        """Starts what is not a linear map or a norm; called for models that are not loaded from a checkpoint."""

    @classmethod
    @abstractmethod
    def cache_elements_per_token(cls, config: "HyLoConfig") -> int:
        """How many values a layer caches for each token."""

    @classmethod
    def convolution_elements(cls, config: "HyLoConfig") -> int:
        """How many past convolution inputs a layer keeps for each sequence, in the model's dtype."""
        return 0

    @classmethod
    def state_elements(cls, config: "HyLoConfig") -> int:
        """How many values of recurrent state a layer keeps for each sequence, in float32."""
        return 0
