"""Mixer sizes for a base: derived from its own, with what the user sets on top."""

from collections.abc import Mapping, Sequence
from typing import Any

from hylo.errors import HyLoError
from hylo.mixers import mixer_class


def geometry_for(
    mixers: Sequence[str],
    given: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> dict[str, dict[str, Any]]:
    """Sizes of every mixer in a layout that has some, as config.json stores them.

    Raises HyLoError where `given` names a mixer that the layout lacks, or a size that does not fit.
    """
    given = given or {}
    names = sorted(set(mixers))
    for name in given:
        if name not in names:
            raise HyLoError(f"geometry for {name!r}, which the layout does not use; it uses {', '.join(names)}")
    geometry = {}
    for name in names:
        mixer, chosen = mixer_class(name), dict(given.get(name, {}))
        values = mixer.default_geometry(num_heads, num_kv_heads, head_dim, chosen) | chosen
        mixer.geometry_class.parse(name, values)
        if values:
            geometry[name] = values
    return geometry
