"""What an ablation compares: changes to a recipe, its tokens, and how many of them a KL took."""

from typing import Any

import pytest
import yaml
from ablation import TABLE, compared, curve_of, read_table, tokens_to_reach, trailing
from variants import changed, shared_out

from hylo.distill.recipe import parse_recipe
from hylo.errors import HyLoError

RECIPE: dict[str, Any] = {
    "base": "somewhere",
    "layout": "2MLA2GDN",
    "geometry": {"mla": {"kv_lora_rank": 8}},
    "stages": [
        {"name": "one", "objective": "layerwise", "tokens": 100, "learning_rate": 1e-3},
        {"name": "two", "objective": "kl", "tokens": 200},
        {"name": "three", "objective": "kl", "tokens": 100},
    ],
}


def test_changes_reach_sections_and_items() -> None:
    values = changed(
        RECIPE,
        [
            "start=paper",
            "stages.one.learning_rate=3e-4",
            "stages.2.tokens=7",
            "calibration.latents=true",
            "layout=MLA:1,3 GDN",
            "evaluation={tokens: 5}",
        ],
    )
    assert values["start"] == "paper"
    assert float(values["stages"][0]["learning_rate"]) == 3e-4
    assert values["stages"][2]["tokens"] == 7
    assert values["calibration"] == {"latents": True}
    assert values["layout"] == "MLA:1,3 GDN"
    assert values["evaluation"] == {"tokens": 5}
    # What was given stays as it was.
    assert "start" not in RECIPE and RECIPE["stages"][2]["tokens"] == 100


def test_null_takes_away() -> None:
    values = changed(RECIPE, ["stages.one=null", "geometry.mla.kv_lora_rank=null", "calibration=null"])
    assert [stage["name"] for stage in values["stages"]] == ["two", "three"]
    assert values["geometry"] == {"mla": {}}
    assert "calibration" not in values


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("start", "expected KEY=VALUE"),
        ("stages..tokens=1", "expected KEY=VALUE"),
        ("stages.four.tokens=1", "there is no 'four'; expected one, two, three"),
        ("stages.3.tokens=1", "there is no '3'"),
        ("base.name=1", "'name' is a key of no section"),
    ],
)
def test_changes_that_fit_nothing_are_refused(change: str, expected: str) -> None:
    with pytest.raises(HyLoError, match=expected):
        changed(RECIPE, [change])


def test_tokens_are_shared_out() -> None:
    def tokens(**options: Any) -> list[int]:
        return [stage["tokens"] for stage in shared_out(RECIPE, 1200, **options)["stages"]]

    assert tokens() == [300, 600, 300]
    assert tokens(layerwise=0.1) == [120, 720, 360]
    without = shared_out(changed(RECIPE, ["stages.one=null"]), 1200, 0.1)
    assert [stage["tokens"] for stage in without["stages"]] == [800, 400]
    with pytest.raises(HyLoError, match="no curve"):
        shared_out(changed(RECIPE, ["stages.2=null", "stages.1=null"]), 1200)


def test_a_curve_counts_what_was_seen_before() -> None:
    first = [{"tokens": 10, "loss": 4.0}, {"tokens": 20, "loss": None}, {"tokens": 30, "loss": 3.0}]
    # Where cross-entropy is in the loss, the KL is told apart.
    second = [{"tokens": 5, "loss": 9.0, "kl": 2.0}]
    assert curve_of(100, [first, second]) == [(110, 4.0), (130, 3.0), (135, 2.0)]


def test_a_kl_is_reached_by_means_and_not_by_one_lucky_value() -> None:
    curve = [(tokens, kl) for tokens, kl in zip(range(1, 8), [5.0, 1.0, 4.0, 2.0, 2.0, 1.0, 1.5], strict=True)]
    assert trailing(curve, 2)[:3] == [(1, 5.0), (2, 3.0), (3, 2.5)]
    assert tokens_to_reach(curve, 2.0, 2) == 5
    assert tokens_to_reach(curve, 2.0, 1) == 2
    assert tokens_to_reach(curve, 0.5, 2) is None
    # Fewer values than a mean is over: what there is.
    assert tokens_to_reach(curve[:1], 5.0, 5) == 1


def test_variants_are_measured_by_the_control() -> None:
    def result(*curve: tuple[int, float]) -> dict[str, Any]:
        return {"curve": [list(point) for point in curve], "last_kl": curve[-1][1]}

    flat = [(tokens, 2.0) for tokens in range(10, 110, 10)]
    results = {
        "paper": result(*flat),
        "hybrid": result(*[(tokens + 5, kl - 1) for tokens, kl in flat]),
        "worse": result(*[(tokens, kl + 1) for tokens, kl in flat]),
        "broken": {"failed": "exit code 1"},
    }
    told = compared({"control": "paper"}, results)
    # The first mean is over five values.
    assert told["hybrid"]["reached_control"] == {"tokens": 55, "share_of_control": 0.55}
    assert told["worse"]["reached_control"] == {"tokens": None, "share_of_control": None}
    assert told["broken"] == {"failed": "exit code 1"}
    assert compared({"control": "missing"}, results) == results


def test_every_variant_of_the_table_is_a_recipe_with_the_same_tokens() -> None:
    table, variants = read_table(TABLE, 12_000_000, [])
    named = {variant.name: variant for variant in variants}
    assert table["control"] in named and table["reference"] in named
    for variant in variants:
        recipe = parse_recipe(variant.recipe, variant.name)
        assert yaml.safe_load(yaml.safe_dump(variant.recipe)) == variant.recipe
        tokens = sum(stage.tokens for stage in recipe.stages)
        assert tokens == pytest.approx(12_000_000 * variant.says.get("scale", 1), abs=2), variant.name
    recipes = [yaml.safe_dump(variant.recipe) for variant in variants]
    assert len(set(recipes)) == len(recipes)
    assert named["paper"].recipe["start"] == "paper" and "calibration" not in named["paper"].recipe
