"""AdamW with moments in 8 bits (torchao): what it keeps, and that going on from a checkpoint changes nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stages import KilledError, Runs, assert_same
from tiny import convert_base, write_base


def test_going_on_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A matrix of fewer than 4,096 values keeps its moments in float32.
    base = write_base(tmp_path / "base", hidden_size=64, intermediate_size=64, num_hidden_layers=2, tokenizer=False)
    convert_base(base, tmp_path / "hybrid", "GDN:0 ATT")
    options = {"optimizer": "adamw_8bit", "weight_decay": 0.1, "tokens": 16 * 2 * 6}
    whole, broken = (
        Runs(tmp_path / "hybrid", base, tmp_path / name, monkeypatch, **options) for name in ("whole", "broken")
    )
    weights, logs = whole(every=10**6)
    with pytest.raises(KilledError):
        broken(killed_at=4, every=3)
    [optimizer] = broken.checkpoints.folder.glob("*/optimizer.pt")
    moments = torch.load(optimizer, weights_only=True)["state"].values()
    assert "OptimState8bit" in {type(state["exp_avg"]).__name__ for state in moments}
    resumed, told = broken(every=3)
    assert_same(weights, resumed)
    assert told == logs
    assert logs[-1]["loss"] < logs[0]["loss"]


def test_the_terminal_is_left_alone() -> None:
    """What torchao has to say of its own kernels is for nobody who runs a command."""
    code = "import hylo, torchao.optim"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
