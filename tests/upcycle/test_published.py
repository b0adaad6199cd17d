"""Published conversions: geometries, positions, and the recipes of the released models."""

from pathlib import Path
from typing import Any

import pytest
from base_configs import CONFIGS, LLAMA_1B, LLAMA_3B, LLAMA_8B, QWEN
from transformers import AutoConfig, PreTrainedConfig

import hylo
from hylo.distill.recipe import Recipe, load_recipe
from hylo.errors import HyLoError
from hylo.mixers import MIXERS
from hylo.plan.model import plan_model
from hylo.upcycle.families import hybrid_config
from hylo.upcycle.geometry import parse_geometry, resolve_geometry
from hylo.upcycle.layout import format_layout, parse_layout
from hylo.upcycle.published import published_bases, published_for, published_mla_layers

RECIPES = sorted(path for path in (Path(hylo.__file__).parent / "recipes").glob("*.yaml") if path.stem != "demo")


def config_of(base: str, **changes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(**CONFIGS[base] | changes)


def test_every_base_has_geometries_that_parse() -> None:
    assert [published.base for published in published_bases()] == [LLAMA_1B, LLAMA_3B, QWEN]
    for published in published_bases():
        assert published_for(config_of(published.base)) is published
        assert set(published.mixers) == {"mla", "gdn", "mamba2"}
        for name, sizes in published.mixers.items():
            MIXERS[name].geometry_class.parse(name, sizes)


@pytest.mark.parametrize(
    ("layers", "count", "positions"),
    [
        (16, 4, [1, 5, 10, 14]),
        (16, 8, list(range(0, 16, 2))),
        (28, 6, [0, 5, 10, 16, 21, 26]),
        (28, 7, list(range(1, 28, 4))),
        (28, 14, list(range(0, 28, 2))),
        (16, 5, None),
        (30, 8, None),
    ],
)
def test_published_positions(layers: int, count: int, positions: list[int] | None) -> None:
    assert published_mla_layers(layers, count) == positions


def test_paper_gives_the_mixers_of_the_layout() -> None:
    config = config_of(LLAMA_1B)
    sizes = resolve_geometry("paper", ["mla", "kda", "attention"], config)
    assert set(sizes) == {"mla"}
    assert sizes["mla"]["q_lora_rank"] == 1344
    # What is not published keeps what is derived from the base.
    hybrid = hybrid_config(config, ["mla", "kda"] * 8, "paper", LLAMA_1B)
    assert hybrid.geometry("mla").kv_lora_rank == 128
    assert hybrid.geometry("mla").rope_pairs is None
    assert hybrid.geometry("kda").num_heads == 32


def test_own_sizes_on_top_of_the_published() -> None:
    """With the norm of the keys a Qwen3 hybrid has the parameters of the released one: 2 (nope + rope) a layer."""
    config, mixers = config_of(QWEN), parse_layout("7MLA21GDN", 28)
    folded = plan_model(hybrid_config(config, mixers, "paper", QWEN))
    exact = plan_model(hybrid_config(config, mixers, {"paper": {}, "mla": {"key_norm": True}}, QWEN))
    assert exact.parameters - folded.parameters == 7 * 128
    assert exact.config.geometry("mla").kv_lora_rank == 256


def test_other_geometries_pass_through() -> None:
    given = {"mla": {"kv_lora_rank": 3}}
    assert resolve_geometry(given, ["mla"], config_of(LLAMA_8B)) is given


def test_refused() -> None:
    with pytest.raises(HyLoError, match=f"hidden_size 4096.*{LLAMA_1B}, {LLAMA_3B}, {QWEN}"):
        resolve_geometry("paper", ["mla"], config_of(LLAMA_8B))
    with pytest.raises(HyLoError, match="'papr'; expected 'paper'"):
        resolve_geometry("papr", ["mla"], config_of(LLAMA_1B))


def test_geometry_of_the_command_line() -> None:
    assert parse_geometry([]) == {}
    assert parse_geometry(["paper"]) == "paper"
    assert parse_geometry(["mla.kv_lora_rank=96", "gdn.num_heads=6", "mla.key_norm=true"]) == {
        "mla": {"kv_lora_rank": 96, "key_norm": True},
        "gdn": {"num_heads": 6},
    }
    assert parse_geometry(["paper", "mla.key_norm=true"]) == {"paper": {}, "mla": {"key_norm": True}}
    for wrong in (["papr"], ["mla.kv_lora_rank"], ["kv_lora_rank=8"], ["mla.kv_lora_rank=many"]):
        with pytest.raises(HyLoError, match=r"mla\.kv_lora_rank=96, or paper"):
            parse_geometry(wrong)


def test_there_is_a_recipe_for_each_released_model() -> None:
    assert len(RECIPES) == 14


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path) -> None:
    recipe: Recipe = load_recipe(path)
    config = config_of(recipe.base)
    mixers = parse_layout(recipe.layout, config.num_hidden_layers)
    hybrid = hybrid_config(config, mixers, recipe.geometry, recipe.base)
    assert hybrid.geometry("mla").q_lora_rank is not None

    base = recipe.base.split("/")[-1].lower().removesuffix("-instruct")
    length = recipe.stages[1].length
    assert path.stem == f"{base}-{format_layout(mixers).lower()}-{length // 1024}k"
    assert length in (8192, 65536)
    assert recipe.rope_scaling is not None
    assert recipe.rope_scaling.factor * recipe.rope_scaling.original_max_position_embeddings >= length

    first, second = recipe.stages
    assert (first.objective, first.length, first.learning_rate) == ("layerwise", 2048, 2e-4)
    assert (second.objective, second.train) == ("kl", "all")
    assert second.learning_rate == (4e-5 if recipe.base == LLAMA_3B else 6e-5)
    assert first.tokens * 5 == first.tokens + second.tokens == 10_000_000_000
    windows = second.batch_size * second.accumulation
    assert windows == (8 if length == 65536 else 16 if recipe.base == LLAMA_3B else 32)
    assert recipe.teacher == ("Qwen/Qwen3-8B" if recipe.base == QWEN else LLAMA_8B)


def counted_by_hand(base: str, mla_layers: int, linear: str) -> int:
    """Parameters of a released model, from the shapes in its card and paper; the head apart from the embedding."""
    llama = {"words": 128256, "ffn": 8192, "kv_heads": 8, "query_norm": False}
    d, layers, heads, size, rank, q_rank, gdn_heads, rest = {
        LLAMA_1B: (2048, 16, 32, 64, 128, 1344, 6, llama),
        LLAMA_3B: (3072, 28, 24, 128, 128, 1536, 9, llama),
        QWEN: (2048, 28, 16, 128, 256, 1344, 6, {"words": 151936, "ffn": 6144, "kv_heads": 8, "query_norm": True}),
    }[base]
    kv, nope, rope = rest["kv_heads"], size // 2, size // 2
    mla = q_rank * d + heads * (nope + rope) * q_rank + (rank + rope) * d + kv * (nope + size) * rank + d * heads * size
    mla += (nope + rope) * rest["query_norm"]
    keys, values = gdn_heads * 256, gdn_heads * 512
    gdn = d * (2 * keys + 2 * values + 2 * gdn_heads) + values * d + 4 * (2 * keys + values) + 2 * gdn_heads + 512
    inner, grouped = heads * size, kv * size
    mamba2 = d * (2 * inner + 2 * grouped + heads) + 5 * (inner + 2 * grouped) + 3 * heads + inner + inner * d
    mixers = mla_layers * mla + (layers - mla_layers) * {"GDN": gdn, "M2": mamba2}[linear]
    return mixers + layers * (3 * d * rest["ffn"] + 2 * d) + d + 2 * rest["words"] * d


def test_the_count_by_hand_is_the_published_one() -> None:
    assert counted_by_hand(LLAMA_1B, 4, "GDN") == 1_673_797_776
    assert counted_by_hand(LLAMA_3B, 14, "GDN") == 3_971_381_500


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_the_parameters_of_its_shapes(path: Path) -> None:
    recipe = load_recipe(path)
    config = config_of(recipe.base)
    mixers = parse_layout(recipe.layout, config.num_hidden_layers)
    expected = counted_by_hand(recipe.base, mixers.count("mla"), "M2" if "mamba2" in mixers else "GDN")
    assert plan_model(hybrid_config(config, mixers, recipe.geometry, recipe.base)).parameters_untied == expected


def test_key_norm_as_released_adds_its_weights() -> None:
    """Folded by default; the released Qwen3 checkpoints keep it."""
    config = config_of(QWEN)
    mixers = parse_layout("7MLA21GDN", 28)
    folded, kept = (
        plan_model(hybrid_config(config, mixers, geometry, QWEN)).parameters_untied
        for geometry in ("paper", {"paper": {}, "mla": {"key_norm": True}})
    )
    assert kept - folded == 7 * (64 + 64)
