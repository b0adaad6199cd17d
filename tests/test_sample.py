"""Samples are drawn from the model's own distribution, and a run that was stopped goes on."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny import SIZES, VOCABULARY, make_tokenizer, sentences, write_base
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, Gemma3Config
from typer.testing import CliRunner

from hylo import sample
from hylo.cli import app
from hylo.data.sources import read_documents
from hylo.errors import HyLoError
from hylo.evaluate.agreement import score_checkpoint
from hylo.lock import locked
from hylo.sample import Sampling, _start_ids, _text, write_samples
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


def test_samples_start_as_the_tokenizer_starts_texts(base_folder: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    asked = dataclasses.replace(SAMPLING, starts=("so", "<s>so"))
    one, same = _start_ids(tokenizer, asked, VOCABULARY)
    assert one == same == tokenizer("so")["input_ids"] and one[0] == 0
    # What comes of itself is not written.
    assert _text(tokenizer, one) == "so"


def test_seeds_near_each_other_share_no_batch(base_folder: Path, tmp_path: Path) -> None:
    drawn = []
    for seed in (0, 1):
        write_samples(str(base_folder), tmp_path / str(seed), 97, dataclasses.replace(SAMPLING, seed=seed))
        drawn.append({row for rows in texts(tmp_path / str(seed)).values() for row in rows})
    assert not drawn[0] & drawn[1]


def test_a_batch_beyond_memory_is_told_and_another_may_follow(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError("of memory")

    with monkeypatch.context() as patched:
        patched.setitem(sample._WRITERS, "hf", too_much)
        with pytest.raises(HyLoError, match="--batch-size 4 of --length 12: more than memory holds"):
            write_samples(str(base_folder), tmp_path / "new", 10, SAMPLING)
    # A kill leaves part of a file, too.
    (tmp_path / "new" / ".sample.json.partial").write_text("{")
    write_samples(str(base_folder), tmp_path / "new", 10, dataclasses.replace(SAMPLING, batch_size=2))
    assert [len(rows) for rows in texts(tmp_path / "new").values()] == [2]


def test_one_process_at_a_time(base_folder: Path, tmp_path: Path) -> None:
    write_samples(str(base_folder), tmp_path / "own", 10, SAMPLING)
    with locked(tmp_path / "own"), pytest.raises(HyLoError, match="another run is at work"):
        write_samples(str(base_folder), tmp_path / "own", 100, SAMPLING)


def test_a_model_of_several_parts_writes_and_is_scored(tmp_path: Path) -> None:
    """What is asked of a config is asked of the part that writes."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Gemma3Config(
        text_config=SIZES | {"query_pre_attn_scalar": 8},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    assert write_samples(str(tmp_path / "base"), tmp_path / "own", 10, SAMPLING) == 48
    (tmp_path / "text.txt").write_text(sentences(3))
    assert score_checkpoint(str(tmp_path / "base"), [str(tmp_path / "text.txt")], length=32).tokens > 32
