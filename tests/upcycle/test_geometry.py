"""Mixer sizes: what is derived from a base, and what is refused."""

from typing import Any, get_type_hints

import pytest
from transformers import LlamaConfig

from hylo.errors import HyLoError
from hylo.mixers import mixer_class
from hylo.upcycle.geometry import geometry_for, parse_geometry, resolve_geometry

SMOLLM2 = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64}


def sizes(mixer: str, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """One mixer's sizes for SmolLM2's heads."""
    return geometry_for([mixer], {mixer: given} if given else None, **SMOLLM2).get(mixer, {})


def test_derived_sizes() -> None:
    assert sizes("mla") == {
        # An eighth of the 2 x 3 x 64 keys and values.
        "kv_lora_rank": 48,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        # The fastest half of the 32 pairs.
        "rope_pairs": list(range(16)),
    }
    assert sizes("gdn") == {"num_heads": 9, "head_k_dim": 64, "head_v_dim": 64}
    assert sizes("attention") == {}


def test_given_sizes_win_and_nope_follows_rope() -> None:
    geometry = sizes("mla", {"qk_rope_head_dim": 16, "kv_lora_rank": 7})
    assert (geometry["qk_rope_head_dim"], geometry["qk_nope_head_dim"], geometry["kv_lora_rank"]) == (16, 48, 7)


def test_null_is_a_value() -> None:
    given = parse_geometry(["mla.rope_pairs=null", "mla.kv_lora_rank=7"])
    assert given == {"mla": {"rope_pairs": None, "kv_lora_rank": 7}}
    assert sizes("mla", given["mla"])["rope_pairs"] is None
    for setting in ("mla.rope_pairs=", "mla.rope_pairs", "mla.rope_pairs=none", "mla=null"):
        with pytest.raises(HyLoError, match=r"expected MIXER\.SIZE=NUMBER"):
            parse_geometry([setting])


@pytest.mark.parametrize("mixer", ["mla", "gdn", "mamba2", "kda"])
def test_null_where_a_number_is_needed(mixer: str) -> None:
    needed = {name for name, hint in get_type_hints(mixer_class(mixer).geometry_class).items() if hint is int}
    assert needed
    for name in needed:
        with pytest.raises(HyLoError, match=f"geometry of {mixer}: .*{name}"):
            sizes(mixer, {name: None})


def test_paper_takes_no_sizes_itself() -> None:
    with pytest.raises(HyLoError, match="mla under 'paper'"):
        resolve_geometry({"paper": {"mla": {"kv_lora_rank": 8}}}, ["mla"], LlamaConfig())


def test_only_mixers_of_the_layout() -> None:
    assert geometry_for(["gdn", "attention", "gdn"], **SMOLLM2) == {"gdn": sizes("gdn")}
    with pytest.raises(HyLoError, match="'mla'"):
        geometry_for(["gdn"], {"mla": {"kv_lora_rank": 8}}, **SMOLLM2)


@pytest.mark.parametrize(
    ("mixer", "given", "named"),
    [
        ("mla", {"kv_rank": 8}, "kv_rank"),
        ("mla", {"kv_lora_rank": 0}, "kv_lora_rank"),
        ("mla", {"kv_lora_rank": 8.0}, "kv_lora_rank"),
        ("mla", {"kv_lora_rank": "8"}, "kv_lora_rank"),
        ("mla", {"kv_lora_rank": True}, "kv_lora_rank"),
        ("mla", {"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
        ("mla", {"qk_rope_head_dim": 66}, "qk_rope_head_dim"),
        ("mla", {"qk_rope_head_dim": "32"}, "qk_rope_head_dim"),
        ("mla", {"qk_nope_head_dim": -2}, "qk_nope_head_dim"),
        ("mla", {"q_lora_rank": 0}, "q_lora_rank"),
        ("mla", {"q_lora_rank": 1.5}, "q_lora_rank"),
        ("mla", {"rope_pairs": [0, 1]}, "rope_pairs"),
        ("mla", {"rope_pairs": 3}, "geometry of mla: rope_pairs is 3; expected a list of whole numbers, or null"),
        ("mla", {"rope_pairs": "all"}, "rope_pairs is 'all'; expected a list"),
        ("mla", {"rope_pairs": [*range(15), "x"]}, "rope_pairs"),
        ("mla", {"rope_pairs": [0] * 16}, "rope_pairs"),
        ("gdn", {"num_heads": 0}, "num_heads"),
        ("gdn", {"conv_size": 1}, "conv_size"),
        ("gdn", {"head_dim": 64}, "head_dim"),
        ("attention", {"heads": 2}, "heads"),
    ],
)
def test_refused(mixer: str, given: dict[str, Any], named: str) -> None:
    with pytest.raises(HyLoError, match=named):
        sizes(mixer, given)
