"""The recipes of SmolLM2: what they cost, and that the control differs in nothing but what is compared."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import hylo
from hylo.distill.parallel import share_of_rank
from hylo.distill.recipe import Recipe, load_recipe
from hylo.upcycle.families import hybrid_config, yarn
from hylo.upcycle.layout import parse_layout

FOLDER = Path(hylo.__file__).parent / "recipes" / "smollm2-135m"
BASE = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    tie_word_embeddings=True,
)


def recipe_of(name: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("name", ["hybrid", "hybrid-8mla", "paper"])
def test_the_hybrid_has_7_percent_of_the_cache_and_reads_32k(name: str) -> None:
    recipe = recipe_of(name)
    assert isinstance(recipe.layout, str)
    config = hybrid_config(BASE, parse_layout(recipe.layout, 30), recipe.geometry, recipe.base)
    assert config.cache_elements_per_token <= 0.07 * config.base_cache_elements_per_token
    lengths = [stage.length for stage in recipe.stages]
    assert lengths == sorted(lengths) and lengths[-1] == 32768
    scaling = recipe.stages[-1].rope_scaling
    assert scaling is not None and scaling.original_max_position_embeddings == BASE.max_position_embeddings
    assert yarn(config, scaling.model_dump())["max_position_embeddings"] == 32768


@pytest.mark.parametrize("name", ["hybrid", "hybrid-8mla", "paper"])
def test_steps_divide_over_one_two_and_four_gpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in recipe_of(name).stages:
        for ranks in (1, 2, 4):
            monkeypatch.setattr("hylo.distill.parallel.world_size", lambda ranks=ranks: ranks)
            batch, accumulation = share_of_rank(stage)
            assert ranks * batch * accumulation * stage.length == stage.tokens_per_step
            # What fits a GPU with 80 GB.
            assert batch * stage.length <= 65536


def test_the_control_differs_in_what_is_compared_alone() -> None:
    def shared(recipe: Recipe) -> dict[str, Any]:
        values = recipe.model_dump(exclude={"start", "calibration", "layout", "geometry"})
        values["stages"] = [stage for stage in values["stages"] if stage["objective"] == "kl"]
        for stage in values["stages"]:
            del stage["learning_rate"], stage["warmup"], stage["tokens"], stage["cross_entropy"]
        return values | {"tokens": sum(stage.tokens for stage in recipe.stages)}

    def cache(recipe: Recipe) -> float:
        config = hybrid_config(BASE, parse_layout(str(recipe.layout), 30), recipe.geometry, recipe.base)
        return config.cache_elements_per_token / config.base_cache_elements_per_token

    hybrid, paper = recipe_of("hybrid"), recipe_of("paper")
    assert shared(hybrid) == shared(paper)
    blocks = [set(parse_layout(str(recipe.layout), 30)) for recipe in (hybrid, paper)]
    assert blocks[0] == blocks[1] and 1 <= cache(hybrid) / cache(paper) < 1.05
    assert (hybrid.start, paper.start, paper.calibration) == ("aligned", "paper", None)
    assert hybrid.calibration is not None and hybrid.calibration.latents and not hybrid.calibration.sequential
    # As published.
    assert [stage.learning_rate for stage in paper.stages] == [2e-4, 6e-5, 6e-5, 6e-5]
    assert not any(stage.cross_entropy for stage in paper.stages)
    assert paper.stages[0].tokens == 0.2 * sum(stage.tokens for stage in paper.stages)
