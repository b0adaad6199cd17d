"""`hylo plan`, in process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from base_configs import LLAMA_1B, LLAMA_8B, write_config
from typer.testing import CliRunner

import hylo
from hylo.commands.plan import register
from hylo.errors import HyLoError
from hylo.modeling import PREFILL_CHUNK

RECIPE = Path(hylo.__file__).parent / "recipes" / "llama-3.2-1b-4mla12gdn-8k.yaml"

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `plan` in a folder with 1b.json, 8b.json, a tiny base and a recipe for it."""
    write_config(tmp_path, LLAMA_1B).rename(tmp_path / "1b.json")
    write_config(tmp_path, LLAMA_8B).rename(tmp_path / "8b.json")
    (tmp_path / "base").symlink_to(base_folder)
    stage = {"name": "stage1", "objective": "layerwise", "length": 64, "tokens": 640, "learning_rate": 1e-3}
    recipe: dict[str, Any] = {"base": "base", "layout": "1MLA3GDN", "data": {"train": ["./text"]}, "stages": [stage]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    # Of two commands each is called by its name, as in `hylo`.
    app.command()(lambda: None)
    register(app)

    def call(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["plan", *arguments])

    return call


def test_json_has_what_programs_read(run: Run) -> None:
    result = run("--config", "1b.json", "--layout", "4MLA12GDN", "--geometry", "paper", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    assert plan["parameters"] == 1_411_129_488
    assert plan["parameters_untied"] == 1_673_797_776
    assert plan["layers"].count("mla") == 4
    assert (plan["kv_cache_bytes_per_token"], plan["base_kv_cache_bytes_per_token"]) == (1280, 32768)
    assert plan["kv_cache_ratio"] == 0.0390625
    assert plan["state_bytes_per_sequence"] == 38_191_104
    assert [entry["context"] for entry in plan["inference"]["contexts"]] == [8192, 65536, 2**20]
    assert plan["inference"]["contexts"][0]["hybrid"]["fits"] is None
    assert plan["inference"]["prefill_chunk"] == PREFILL_CHUNK
    assert "training" not in plan


def test_what_fits(run: Run) -> None:
    options = ["-l", "4MLA12GDN", "-g", "paper", "--context=64K,4M", "--batch=2", "--gpu-memory=24GiB", "--json"]
    result = run("1b.json", *options)
    assert result.exit_code == 0, result.output
    serving = json.loads(result.output)["inference"]
    for entry in serving["contexts"]:
        for model in ("hybrid", "base"):
            estimate = entry[model]
            assert estimate["total_bytes"] == sum(estimate["bytes"].values())
            assert estimate["fits"] == (entry["context"] <= serving["longest_context"][model])
            assert bool(estimate["change"]) != estimate["fits"]
    longer = json.loads(run("1b.json", *options, "--gpus", "2").output)["inference"]["longest_context"]
    assert longer["hybrid"] > serving["longest_context"]["hybrid"]


def test_derived_geometry_of_a_tiny_base(run: Run) -> None:
    plan = json.loads(run("base", "-l", "4ATT", "--json").output)
    assert plan["parameters"] == plan["base_parameters"]
    assert plan["kv_cache_ratio"] == 1
    given = json.loads(run("base", "-l", "1MLA3GDN", "-g", "mla.kv_lora_rank=6", "--dtype", "float32", "--json").output)
    assert given["kv_cache_bytes_per_token"] == (6 + 4) * 4


def test_a_recipe(run: Run) -> None:
    options = ["--recipe", str(RECIPE), "--config", "1b.json", "--teacher", "8b.json"]
    result = run(*options, "--gpu-memory", "80", "--json")
    assert result.exit_code == 0, result.output
    training = json.loads(result.output)["training"]
    assert [stage["name"] for stage in training["stages"]] == ["stage1", "stage2"]
    assert set(training["stages"][0]["bytes"]) == {
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "teacher",
        "loss",
        "gathered",
    }
    assert all(stage["fits"] for stage in training["stages"])
    # Its own base and teacher, where none is given; and another layout in place of its own.
    own = json.loads(run("--recipe", "recipe.yaml", "--json").output)
    assert own["layers"] == ["gdn", "mla", "gdn", "gdn"]
    other = json.loads(run("--recipe", "recipe.yaml", "-l", "4GDN", "--json").output)
    assert other["layers"] == ["gdn"] * 4


def test_a_recipe_that_scales_the_rotation(run: Run, tmp_path: Path) -> None:
    """As upcycle does, whatever the base's own scaling is."""
    base = json.loads((tmp_path / "1b.json").read_text())
    base["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
    (tmp_path / "1b.json").write_text(json.dumps(base))
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text()) | {"layout": "4MLA12GDN"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    refused = run("--recipe", "recipe.yaml", "--config", "1b.json")
    assert "convert with YaRN" in str(refused.exception)
    recipe["rope_scaling"] = {"factor": 4.0, "original_max_position_embeddings": 8192}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = run("--recipe", "recipe.yaml", "--config", "1b.json", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["layers"].count("mla") == 4


def test_tables(run: Run) -> None:
    options = ["--recipe", str(RECIPE), "--config", "1b.json", "--teacher", "8b.json", "--gpus", "2"]
    result = run(*options, "--gpu-memory", "24")
    assert result.exit_code == 0, result.output
    for shown in ("1,673,797,776", "3.9%", "M  4 MLA", "64K, base", "stage2", "assumes full sharding"):
        assert shown in result.output
    assert "longest context that fits" in result.output
    assert "does not fit; any of these would do:" in result.output


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("", "BASE"),
        ("base", "--layout"),
        ("base --config 1b.json -l 4GDN", "not both"),
        ("./nowhere -l 4GDN", "./nowhere"),
        ("nobody/nothing -l 4GDN", "nobody/nothing"),
        ("--recipe nowhere.yaml", "nowhere.yaml"),
        ("--config nowhere.json -l 4GDN", "nowhere.json"),
        ("base -l 3GDN", "3 layers"),
        ("base -l 4GDN -g paper", "no published geometry"),
        ("base -l 4GDN -g gdn.num_heads", "mla.kv_lora_rank=96"),
        ("base -l 4GDN -g mla.kv_lora_rank=8", "'mla'"),
        ("base -l 4GDN --context 8Q", "'8Q'"),
        ("base -l 4GDN --gpu-memory 80TB", "'80TB'"),
        ("base -l 4GDN --teacher 8b.json", "--recipe"),
        ("--recipe recipe.yaml --gpu H9000", "'H9000'"),
        ("base -l 4GDN --gpu A100", "--gpu A100 is for the training that a --recipe tells of"),
        ("base -l 4GDN --mfu 0.4", "--mfu 0.4 is for the training that a --recipe tells of"),
    ],
)
def test_bad_input_is_one_line(run: Run, line: str, named: str) -> None:
    result = run(*line.split())
    assert isinstance(result.exception, HyLoError)
    assert named in str(result.exception)
    assert "\n" not in str(result.exception)
    assert result.output == ""
