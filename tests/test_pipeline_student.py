"""A recipe that trains a finished hybrid further."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stages import make_recipe
from tiny import write_base
from typer.testing import CliRunner

from hylo.cli import app
from hylo.distill.recipe import Recipe, parse_recipe
from hylo.errors import HyLoError
from hylo.files import write_json
from hylo.pipeline import UpcycleRun

NEW = ("layout", "geometry", "start", "rope_scaling", "calibration")


@pytest.fixture(scope="module")
def first(base_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid that a first run made."""
    output = tmp_path_factory.mktemp("runs") / "first"
    UpcycleRun(make_recipe(base_folder, text_folder), output).run()
    return output


def further(base: Path, texts: Path, given: Path | str, **changes: Any) -> dict[str, Any]:
    values = json.loads(make_recipe(base, texts).model_dump_json())
    for name in NEW:
        del values[name]
    return values | {"student": str(given)} | changes


def test_it_begins_with_the_students_weights_and_trains_them(
    first: Path, base_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    values = further(base_folder, text_folder, first / "model")
    output = tmp_path / "second"
    UpcycleRun(parse_recipe(values), output).run()
    given, taken = (load_file(folder / "model.safetensors") for folder in (first / "model", output / "student"))
    assert {value.dtype for value in taken.values()} == {torch.float32}
    assert given.keys() == taken.keys()
    assert all(torch.equal(given[name].float(), taken[name]) for name in given)
    trained = load_file(output / "model" / "model.safetensors")
    assert any(not torch.equal(given[name], trained[name]) for name in given)

    report = json.loads((output / "report" / "report.json").read_text())
    before = json.loads((first / "report" / "report.json").read_text())
    assert list(report["scores"]) == ["base", "student", "stage1", "stage2"]
    assert report["parameters"] == before["parameters"]
    assert report["token_mixers"] == before["token_mixers"]
    # The base is what both are compared with, on the same text.
    assert report["scores"]["base"] == before["scores"]["base"]
    assert report["scores"]["student"]["kl"] == pytest.approx(before["scores"]["stage2"]["kl"], rel=1e-3)

    # Another student of that name is noticed.
    (first / "model" / "generation_config.json").touch()
    write_json(first / "model" / "generation_config.json", {"temperature": 0.7, "do_sample": True})
    with pytest.raises(HyLoError, match="student was made by another recipe"):
        UpcycleRun(parse_recipe(values), output).run()


def test_it_is_planned_by_its_own_layout(first: Path, base_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "further.yaml"
    file.write_text(json.dumps(further(base_folder, text_folder, first / "model")))
    report, before = (
        json.loads(CliRunner().invoke(app, ["plan", *options, "--json"]).stdout)
        for options in (["--recipe", str(file)], [str(first / "model")])
    )
    assert report["name"] == before["name"]
    assert [stage["name"] for stage in report["training"]["stages"]] == ["stage1", "stage2"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layout": "MLA"}, "layout is for a new hybrid; student .* has its own"),
        ({"geometry": {"mla": {"kv_lora_rank": 8}}}, "geometry is for a new hybrid"),
        ({"start": "paper"}, "start is for a new hybrid"),
        ({"calibration": {"tokens": 512}}, "calibration is for a new hybrid"),
        ({"student": None}, "layout is missing; expected one such as 8MLA22GDN, or a student"),
    ],
)
def test_what_is_for_new_hybrids_is_refused(
    base_folder: Path, text_folder: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(HyLoError, match=reason):
        parse_recipe(further(base_folder, text_folder, tmp_path, **changes))


def refused(values: dict[str, Any], output: Path) -> str:
    recipe: Recipe = parse_recipe(values)
    with pytest.raises(HyLoError) as told:
        UpcycleRun(recipe, output).run()
    assert not output.exists()
    return str(told.value)


def test_students_that_do_not_fit(first: Path, base_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert "is no hybrid but llama" in refused(further(base_folder, text_folder, base_folder), output)
    missing = refused(further(base_folder, text_folder, tmp_path / "none"), output)
    assert "none does not exist" in missing
    larger = write_base(tmp_path / "larger", vocab_size=640)
    assert "has vocab_size" in refused(further(larger, text_folder, first / "model"), output)
