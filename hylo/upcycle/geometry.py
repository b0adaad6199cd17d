"""Mixer sizes for a base: derived from its own, with what the user sets on top; or as published."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from hylo.errors import HyLoError
from hylo.mixers import mixer_class
from hylo.upcycle.published import BaseSizes, published_bases, published_for

PAPER = "paper"
_UNREADABLE = object()


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


def resolve_geometry(
    geometry: Mapping[str, Mapping[str, Any]] | str, mixers: Sequence[str], base: PreTrainedConfig
) -> Mapping[str, Mapping[str, Any]]:
    """What `geometry_for` takes as given: a mapping as it is, or for "paper" the published sizes.

    A mapping with a key "paper" has the published sizes, and its own on top.

    Raises HyLoError where no base of these sizes was published, the text is not "paper", or sizes stand under "paper".
    """
    if not isinstance(geometry, str):
        if PAPER not in geometry:
            return geometry
        if geometry[PAPER]:
            under = ", ".join(geometry[PAPER])
            raise HyLoError(f"geometry: {under} under {PAPER!r}, which takes nothing; set sizes of your own beside it")
        published = resolve_geometry(PAPER, mixers, base)
        own = {name: sizes for name, sizes in geometry.items() if name != PAPER}
        return {name: {**published.get(name, {}), **own.get(name, {})} for name in {**published, **own}}
    if geometry != PAPER:
        raise HyLoError(f"geometry {geometry!r}; expected {PAPER!r} or sizes by mixer")
    model = published_for(base)
    if model is None:
        sizes = ", ".join(f"{name} {getattr(base, name, None)}" for name in BaseSizes.model_fields)
        bases = ", ".join(published.base for published in published_bases())
        raise HyLoError(f"no published geometry for a base with {sizes}; there is one for {bases}")
    return {name: sizes for name, sizes in model.mixers.items() if name in mixers}


def parse_geometry(settings: Sequence[str]) -> dict[str, dict[str, Any]] | str:
    """From the command line: `mla.kv_lora_rank=96` to {"mla": {"kv_lora_rank": 96}}; `paper`, alone or with such.

    Raises HyLoError on any other form.
    """
    if list(settings) == [PAPER]:
        return PAPER
    geometry: dict[str, dict[str, Any]] = {}
    for setting in settings:
        if setting == PAPER:
            geometry[PAPER] = {}
            continue
        path, equals, value = setting.partition("=")
        mixer, dot, size = path.partition(".")
        try:
            number = json.loads(value)
        except json.JSONDecodeError:
            # null is a value: that of sizes that may be left out.
            number = _UNREADABLE
        if not (equals and dot and size) or number is _UNREADABLE:
            raise HyLoError(
                f"--geometry {setting!r}; expected MIXER.SIZE=NUMBER such as mla.kv_lora_rank=96, or {PAPER}"
            )
        geometry.setdefault(mixer, {})[size] = number
    return geometry
