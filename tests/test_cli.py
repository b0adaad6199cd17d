"""The command line, in process: one line for bad input, nothing left behind; and the good paths."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from tiny import MIXED_LAYOUT

from hylo.cli import main
from hylo.upcycle.bases import load_model, load_tokenizer


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def here(tmp_path: Path, base_folder: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base, broken bases, texts and recipes; temporary files go into it too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    base, texts = tmp_path / "base", tmp_path / "texts"
    shutil.copytree(base_folder, base)
    shutil.copytree(text_folder, texts)
    for name in ("no_config", "pickled", "truncated", "gpt2", "no_weights"):
        shutil.copytree(base, tmp_path / name)
    (tmp_path / "no_config" / "config.json").unlink()
    (tmp_path / "no_weights" / "model.safetensors").unlink()
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    os.truncate(tmp_path / "truncated" / "model.safetensors", 5000)
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "exists").mkdir()
    recipe = {"base": "base", "layout": "2MLA2GDN", "data": {"train": ["texts"]}}
    recipes = {
        "recipe": recipe,
        "bad_key": recipe | {"layuot": "x"},
        "bad_layout": recipe | {"layout": "9MLA"},
        "bad_text": recipe | {"data": {"train": ["nowhere.txt"]}},
        "bad_base": recipe | {"base": "./nowhere"},
    }
    for name, values in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


@pytest.fixture
def run(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["hylo", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        return Result(int(exit_.value.code or 0), *capsys.readouterr())

    return call


def everything(folder: Path) -> dict[str, int]:
    """Every path, and when each file was written."""
    return {str(path): path.stat().st_mtime_ns if path.is_file() else 0 for path in folder.rglob("*")}


BAD_INPUT: dict[str, tuple[str, str]] = {
    "missing base": ("convert ./nowhere out -l 2MLA2GDN", "./nowhere"),
    "unreachable hub id": ("convert nobody/nothing out -l 2MLA2GDN", "nobody/nothing"),
    "no config": ("convert no_config out -l 2MLA2GDN", "config.json"),
    "no weights": ("convert no_weights out -l 2MLA2GDN", "safetensors"),
    "pickled weights": ("convert pickled out -l 2MLA2GDN", "safetensors"),
    "truncated weights": ("convert truncated out -l 2MLA2GDN", "model.safetensors"),
    "other family": ("convert gpt2 out -l 2MLA2GDN", "'gpt2' family is not supported; expected llama"),
    "bad layout": ("convert base out -l 3MLA3GDN", "6 layers"),
    "unknown block": ("convert base out -l 2FOO2GDN", "MLA, GDN"),
    "geometry without a number": ("convert base out -l 2MLA2GDN -g mla.kv_lora_rank", "mla.kv_lora_rank=96"),
    "geometry of no mixer": ("convert base out -l 2MLA2GDN -g kv_lora_rank=8", "mla.kv_lora_rank=96"),
    "geometry that does not fit": ("convert base out -l 2MLA2GDN -g mla.kv_lora_rank=99", "kv_lora_rank is 99"),
    "unknown size": ("convert base out -l 2MLA2GDN -g mla.rank=8", "'rank'"),
    "bad dry run": ("convert base --dry-run -l 2MLA2GDN -g gdn.num_heads=0", "num_heads is 0"),
    "no output": ("convert base -l 2MLA2GDN", "OUTPUT"),
    "existing output": ("convert base exists -l 2MLA2GDN", "already exists"),
    "calibration of no text": ("convert base out -l 2MLA2GDN --calibration-tokens 7", "--calibrate"),
    "a plan of nothing as JSON": ("convert base out -l 2MLA2GDN --json", "--dry-run"),
    "missing calibration text": ("convert base out -l 2MLA2GDN --calibrate nowhere.txt", "nowhere.txt"),
    "missing calibration text of a dry run": (
        "convert base -l 2MLA2GDN --dry-run --calibrate nowhere.txt",
        "nowhere.txt",
    ),
    "short calibration text of a dry run": (
        "convert base -l 2MLA2GDN --dry-run --calibrate texts/text00.txt --calibration-length 9999",
        "no document is long enough for a window of 9999 tokens",
    ),
    "missing recipe": ("upcycle nowhere.yaml -o out", "nowhere.yaml"),
    "bad key": ("upcycle bad_key.yaml -o out", "layuot"),
    "unknown step": ("upcycle recipe.yaml -o out --from stage9", "stage9"),
    "unknown last step": ("upcycle recipe.yaml -o out --until stage9", "stage9"),
    "layout of a recipe": ("upcycle bad_layout.yaml -o out", "9 layers"),
    "text of a recipe": ("upcycle bad_text.yaml -o out", "nowhere.txt"),
    "base of a recipe": ("upcycle bad_base.yaml -o out", "./nowhere"),
    "missing model": ("eval ./nowhere -t texts", "./nowhere"),
    "missing text": ("eval base -t nowhere.txt", "nowhere.txt"),
    "missing teacher": ("eval base -t texts --teacher ./nowhere", "./nowhere"),
    "empty prompt": ("generate base --prompt=", "prompt is empty"),
    "blank prompt": ("generate base --prompt=\t", "prompt is empty"),
    "no chat template": ("generate base --prompt=hi --chat", "chat template"),
    "truncated model": ("generate truncated --prompt=hi", "truncated"),
    # Square brackets are the markup of the library that prints.
    "text with brackets": ("eval base -t [/nowhere]", "[/nowhere]"),
    "base with brackets": ("convert ./[bold]nowhere out -l 2MLA2GDN", "./[bold]nowhere"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(run: Run, here: Path, case: str) -> None:
    line, named = BAD_INPUT[case]
    before = everything(here)
    result = run(*line.split(" "))
    assert result.code == 1
    assert result.out == ""
    assert result.err.startswith("hylo: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    assert named in result.err
    assert "Traceback" not in result.err
    assert everything(here) == before


def test_usage_errors_exit_with_2(run: Run, here: Path) -> None:
    before = everything(here)
    for line in ("convert", "eval base", "nonsense", "generate base", "eval base -t texts --length 1"):
        result = run(*line.split())
        assert result.code == 2, line
        assert result.err.startswith("hylo: ")
        assert result.err.count("\n") == 1
    assert everything(here) == before


def test_overwrite_replaces_hybrids_alone(run: Run, here: Path) -> None:
    before = everything(here)
    for target in ("exists", "base", "."):
        result = run("convert", "base", target, "--layout", "2MLA2GDN", "--overwrite")
        assert result.code == 1
        assert "not a hybrid's checkpoint" in result.err
    assert everything(here) == before


def test_a_folder_of_the_users_own_is_no_run(run: Run, here: Path) -> None:
    before = everything(here)
    for target in (".", "texts", "recipe.yaml"):
        result = run("upcycle", "recipe.yaml", "-o", target)
        assert result.code == 1
        assert result.err.count("\n") == 1
    assert everything(here) == before


def test_convert(run: Run, here: Path) -> None:
    result = run("convert", "base", "out", "--layout", MIXED_LAYOUT, "-g", "mla.kv_lora_rank=6", "--dtype", "bfloat16")
    assert result.code == 0, result.err
    model = load_model(here / "out")
    assert model.config.geometry("mla").kv_lora_rank == 6
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in result.out
    assert not list((here / "scratch").iterdir())
    again = run("convert", "base", "out", "--layout", "4GDN", "--overwrite")
    assert again.code == 0, again.err
    assert set(load_model(here / "out").config.token_mixers) == {"gdn"}


def test_convert_with_calibration(run: Run, here: Path) -> None:
    plain = run("convert", "base", "plain", "--layout", "2MLA2GDN")
    calibration = ["--calibrate", "texts", "--calibration-tokens", "4000"]
    result = run("convert", "base", "out", "--layout", "2MLA2GDN", *calibration)
    assert (plain.code, result.code) == (0, 0), result.err
    kl = {}
    for name in ("plain", "out"):
        scored = run(
            *f"eval {name} --teacher base -t texts --length 128 --tokens 1000 --precision float32 --json".split()
        )
        kl[name] = json.loads(scored.out)["kl"]
    assert kl["out"] < 0.8 * kl["plain"]
    assert not list((here / "scratch").iterdir())


def test_calibration_on_short_texts(run: Run, here: Path) -> None:
    (here / "short.txt").write_text("bado mila " * 20)
    command = ["convert", "base", "out", "--layout", "2MLA2GDN", "--calibrate", "short.txt"]
    assert "choose a smaller length" in run(*command).err
    result = run(*command, "--calibration-length", "16")
    assert result.code == 0, result.err


def test_calibration_text_with_ids_beyond_the_base(run: Run, here: Path) -> None:
    tokenizer = load_tokenizer(here / "base")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(here / "base")
    (here / "new.txt").write_text("bado <new> mila " * 50)
    before = everything(here)
    for target in ("out", "--dry-run"):
        result = run(
            *f"convert base {target} -l 2MLA2GDN --calibrate texts --calibrate new.txt --calibration-length 32".split()
        )
        assert result.code == 1
        assert "new.txt: the tokenizer gives '<new>' the id 300" in result.err
        assert result.err.count("\n") == 1
    assert everything(here) == before


def test_dry_run_writes_nothing(run: Run, here: Path) -> None:
    before = everything(here)
    result = run("convert", "base", "--layout", MIXED_LAYOUT, "--dry-run", "--json")
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert plan["token_mixers"] == ["gdn", "mla", "gdn", "attention"]
    assert sum(tensor["name"].endswith("o_proj.weight") for tensor in plan["tensors"]) == 4
    table = run("convert", "base", "--layout", MIXED_LAYOUT, "--dry-run")
    assert table.code == 0, table.err
    assert "decomposed" in table.out
    assert everything(here) == before


def test_eval_of_a_model_against_itself(run: Run) -> None:
    arguments = [
        "eval",
        "base",
        "--teacher",
        "base",
        "--text",
        "texts",
        "--length",
        "64",
        "--tokens",
        "500",
        "--precision",
        "float32",
    ]
    result = run(*arguments, "--json")
    assert result.code == 0, result.err
    scores = json.loads(result.out)
    assert abs(scores["kl"]) < 1e-6
    assert scores["agreement"] == 1
    shown = run(*arguments)
    assert f"{scores['perplexity']:,.3f}" in shown.out
    assert "100.0%" in shown.out


def test_generate_prints_the_continuation(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("convert", "base", "out", "--layout", "2MLA2GDN").code == 0
    greedy = [run("generate", "out", "--prompt", "bado mila", "-n", "5") for _ in range(2)]
    assert greedy[0].code == 0, greedy[0].err
    assert greedy[0].out.strip()
    assert "bado mila" not in greedy[0].out
    assert greedy[0].out == greedy[1].out
    sampled = [run(*f"generate out -p bado -n 8 --temperature 5 --seed {seed}".split()).out for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_upcycle_until(run: Run, here: Path) -> None:
    result = run("upcycle", "recipe.yaml", "-o", "out", "--until", "convert")
    assert result.code == 0, result.err
    assert "convert" in result.out
    load_model(here / "out" / "convert")
    assert sorted(path.name for path in (here / "out").iterdir()) == ["convert", "run.json"]
