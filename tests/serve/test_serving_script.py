"""`benchmarks/serving.py`, as far as it goes without a GPU: what several GPUs refuse, and results that are joined."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HYBRIDS, random_hybrid, random_ids

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hylo[serve]'")

from served_engine import save_hybrid

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving.py"


def test_gpus_that_cannot_share_the_heads_must_be_refused(tmp_path: Path) -> None:
    save_hybrid(tmp_path / "mix", "mix")
    (tmp_path / "asked.json").write_text(json.dumps({"mix": str(tmp_path / "mix")}))
    command = [sys.executable, str(SCRIPT), "answer", str(tmp_path / "asked.json"), "eager", "4"]
    subprocess.run([*command, str(tmp_path / "found.json"), "1,5"], check=True, capture_output=True)
    row = json.loads((tmp_path / "found.json").read_text())["mix"]
    assert "expected one of 1, 2" in row["refused"]


def test_roles_measured_at_once_are_joined(tmp_path: Path) -> None:
    def part(role: str, cache_tokens: int, tokens_per_s: float) -> None:
        load = {"output_tokens_per_s": tokens_per_s}
        measured: dict[str, Any] = {"contexts": [], "cache_tokens": cache_tokens, "load": load}
        text = json.dumps({"command": f"bars of the {role}", "measured": {role: measured}})
        (tmp_path / f"{role}.json").write_text(text)

    part("model", 4100, 60.0)
    part("base", 100, 10.0)
    command = [sys.executable, str(SCRIPT), "join", "model", "base", "--name", "both", "--output", str(tmp_path)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    both = json.loads((tmp_path / "both.json").read_text())
    assert [row["value"] for row in both["bars"]] == [41.0, 6.0] and all(row["holds"] for row in both["bars"])
    assert both["commands"] == ["bars of the model", "bars of the base"]


@pytest.mark.parametrize("tokens", [3, 40, 97])
def test_long_prompts_are_read_in_pieces(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM is compared with is the model's own, of prompts shorter than a piece and longer."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    serving = importlib.import_module("serving")
    monkeypatch.setattr(serving, "PIECE_TOKENS", 16)
    model = random_hybrid(**HYBRIDS["mix_of_all"]).eval()
    ids = random_ids(1, tokens)
    with torch.no_grad():
        whole, pieces = model(ids).logits[0, -3:], serving.last_logits(model, ids, 3)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)
