"""Samples are drawn from the model's own distribution, and a run that was stopped goes on."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, make_tokenizer, write_base
from typer.testing import CliRunner

from hylo.cli import app
from hylo.data.sources import read_documents
from hylo.errors import HyLoError
from hylo.sample import Sampling, write_samples
from hylo.upcycle.bases import load_model

SAMPLING = Sampling(length=12, starts=(), temperature=1.0, seed=3, batch_size=4, backend="hf")


def texts(folder: Path) -> dict[str, list[str]]:
    return {
        file.name: [json.loads(line)["text"] for line in file.read_text().splitlines()]
        for file in sorted(folder.glob("*.jsonl"))
    }


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_have_the_models_own_distribution(base_folder: Path, tmp_path: Path, temperature: float) -> None:
    """All of it: what the base's folder says of answers, such as top_k, does not hold."""
    from hylo.progress import Bar
    from hylo.sample import _with_transformers

    asked = dataclasses.replace(SAMPLING, length=2, batch_size=20_000, temperature=temperature)
    with _with_transformers(base_folder, asked, 0, Bar("", 1, "")) as write:
        drawn = torch.tensor([row[1] for row in write([5], 0)]).bincount(minlength=VOCABULARY) / 20_000
    with torch.no_grad():
        logits = load_model(base_folder, torch.float32)(torch.tensor([[5]])).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    noise = (expected * (1 - expected) / 20_000).sqrt().sum()
    assert (drawn - expected).abs().sum() < 1.3 * noise
    # As generation is by default, the fifty likeliest alone.
    kept = expected.topk(50)
    fifty = torch.zeros_like(expected).scatter(0, kept.indices, kept.values / kept.values.sum())
    assert (fifty - expected).abs().sum() > 2 * noise


def test_a_run_that_was_stopped_goes_on(base_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "samples"
    assert write_samples(str(base_folder), output, 97, SAMPLING) == 144
    whole = texts(output)
    assert [len(rows) for rows in whole.values()] == [4, 4, 4]
    assert len({row for rows in whole.values() for row in rows}) == 12
    (output / "00001.jsonl").unlink()
    before = (output / "00000.jsonl").stat().st_mtime_ns
    write_samples(str(base_folder), output, 97, SAMPLING)
    assert texts(output) == whole
    assert (output / "00000.jsonl").stat().st_mtime_ns == before
    # More of them: what is there is kept.
    write_samples(str(base_folder), output, 145, SAMPLING)
    assert len(texts(output)) == 4 and texts(output)["00002.jsonl"] == whole["00002.jsonl"]
    with pytest.raises(HyLoError, match="drawn with other temperature; choose"):
        write_samples(str(base_folder), output, 97, dataclasses.replace(SAMPLING, temperature=0.9))


def test_samples_start_as_asked_and_are_a_source(base_folder: Path, tmp_path: Path) -> None:
    starts = ("<s>user: ", "</s>")
    result = CliRunner().invoke(
        app,
        [
            "sample",
            str(base_folder),
            "-o",
            str(tmp_path / "own"),
            "--tokens",
            "96",
            "--length",
            "12",
            "--batch-size",
            "4",
        ]
        + [part for start in starts for part in ("--start", start)],
    )
    assert result.exit_code == 0, result.output
    for rows, start in zip(texts(tmp_path / "own").values(), starts, strict=True):
        assert all(row.startswith(start) for row in rows)
    documents = read_documents([str(tmp_path / "own")])
    assert len(documents) == 8
    # A special token is one token to the tokenizer that reads it again.
    assert make_tokenizer()(documents[0].text, add_special_tokens=False)["input_ids"][0] == 0


def test_a_cache_is_for_vllm(base_folder: Path, tmp_path: Path) -> None:
    asked = ["sample", str(base_folder), "-o", str(tmp_path / "new"), "--cache-memory", "1"]
    result = CliRunner().invoke(app, asked)
    assert isinstance(result.exception, HyLoError), result.output
    assert "--cache-memory is for --backend vllm" in str(result.exception)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"length": 513}, "made for 512 tokens"),
        ({"starts": ("<s>" * 12,)}, "no more than the 12 tokens"),
    ],
)
def test_bad_settings_are_one_line(base_folder: Path, tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(HyLoError, match=named):
        write_samples(str(base_folder), tmp_path / "new", 10, dataclasses.replace(SAMPLING, **changes))
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_left_alone(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HyLoError, match="holds no samples"):
        write_samples(str(base_folder), tmp_path, 10, SAMPLING)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_is_missing_is_told_before_anything_is_written(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find(name, *more))
    with pytest.raises(HyLoError, match="needs vllm"):
        write_samples(str(base_folder), tmp_path / "new", 10, dataclasses.replace(SAMPLING, backend="vllm"))
    monkeypatch.undo()
    small = write_base(tmp_path / "small", vocab_size=200)
    with pytest.raises(HyLoError, match=r"vocab_size is 200"):
        write_samples(str(small), tmp_path / "new", 10, dataclasses.replace(SAMPLING, starts=("The sentences of",)))
    assert not (tmp_path / "new").exists()
