"""Mixer sizes for a base: derived from its own, with what the user sets on top."""

from collections.abc import Mapping, Sequence
from typing import Any

from hylo.errors import HyLoError
from hylo.mixers import mixer_class


def default_geometry(
    mixer: str, *, num_heads: int, num_kv_heads: int, head_dim: int, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Sizes of one mixer for a base, as config.json stores them.

    MLA keeps query and value heads as they are and rotates half of each head, the fastest pairs: the slow ones hardly
    turn within a context. Its latent holds an eighth of the base's keys and values. GDN is head-aligned: one head for
    each attention head, of the same size.
    """
    given = dict(given or {})
    if mixer == "mla":
        rope = given.get("qk_rope_head_dim", head_dim // 2)
        if isinstance(rope, int) and not 2 <= rope <= head_dim:
            raise HyLoError(f"geometry of mla: qk_rope_head_dim is {rope}; the base's heads have {head_dim}")
        derived: dict[str, Any] = {
            "kv_lora_rank": max(8, num_kv_heads * head_dim // 4),
            "qk_nope_head_dim": head_dim - rope if isinstance(rope, int) else 0,
            "qk_rope_head_dim": rope,
            "v_head_dim": head_dim,
            "rope_pairs": list(range(rope // 2)) if isinstance(rope, int) else None,
        }
    elif mixer == "gdn":
        derived = {"num_heads": num_heads, "head_k_dim": head_dim, "head_v_dim": head_dim}
    else:
        derived = {}
    values = derived | given
    mixer_class(mixer).geometry_class.parse(mixer, values)
    return values


def geometry_for(
    mixers: Sequence[str], given: Mapping[str, Mapping[str, Any]] | None = None, **base_sizes: int
) -> dict[str, dict[str, Any]]:
    """Sizes of every mixer in a layout. Raises HyLoError where `given` names a mixer that the layout lacks."""
    given = given or {}
    absent = sorted(set(given) - set(mixers))
    if absent:
        raise HyLoError(f"geometry for {absent[0]!r}, which the layout does not use; it uses {', '.join(set(mixers))}")
    names = sorted(set(mixers))
    geometry = {name: default_geometry(name, given=given.get(name), **base_sizes) for name in names}
    return {name: values for name, values in geometry.items() if values}
