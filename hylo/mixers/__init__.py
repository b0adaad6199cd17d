"""Token mixers, by name. A new one is a file that subclasses `TokenMixer` and an entry here."""

from hylo.errors import HyLoError
from hylo.mixers.attention import Attention
from hylo.mixers.base import Geometry, TokenMixer
from hylo.mixers.gated_deltanet import GatedDeltaNet
from hylo.mixers.kda import KimiDeltaAttention
from hylo.mixers.mamba2 import Mamba2
from hylo.mixers.mla import MultiHeadLatentAttention

MIXERS: dict[str, type[TokenMixer]] = {
    mixer.name: mixer for mixer in (Attention, MultiHeadLatentAttention, GatedDeltaNet, Mamba2, KimiDeltaAttention)
}


def mixer_class(name: str) -> type[TokenMixer]:
    """The class of a mixer. Raises HyLoError with the names there are."""
    try:
        return MIXERS[name]
    except KeyError:
        raise HyLoError(f"unknown token mixer {name!r}; expected one of {', '.join(MIXERS)}") from None


__all__ = ["MIXERS", "Geometry", "TokenMixer", "mixer_class"]
