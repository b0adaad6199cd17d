"""`hylo sample --backend vllm`: the engine draws what it is asked for."""

import dataclasses
import json
from pathlib import Path

import pytest
from tiny import write_base

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hylo[serve]'")

from hylo.sample import Sampling, write_samples
from hylo.upcycle.bases import load_tokenizer


def test_an_engine_writes_samples(tmp_path: Path) -> None:
    # Heads as vLLM takes them on a CPU.
    base_folder = write_base(tmp_path / "base", head_dim=32)
    asked = Sampling(length=40, starts=("<s>so", "</s>"), temperature=1.0, seed=1, batch_size=8, backend="vllm")
    assert write_samples(str(base_folder), tmp_path / "samples", 600, asked) == 640
    # A cache makes no other samples: these are there.
    small = dataclasses.replace(asked, cache_bytes=2**28)
    assert write_samples(str(base_folder), tmp_path / "samples", 600, small) == 640
    tokenizer = load_tokenizer(base_folder)
    for number, start in enumerate(asked.starts):
        rows = [json.loads(line)["text"] for line in (tmp_path / "samples" / f"{number:05d}.jsonl").open()]
        assert len(set(rows)) == 8
        for row in rows:
            assert row.startswith(start)
            # To their whole length: the end of a text is no end. Some tokens are merged when they are read again.
            assert len(tokenizer(row, add_special_tokens=False)["input_ids"]) >= 25
