"""What a stage tells: its status, its metrics, and TensorBoard and W&B by name."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_packed
from transformers import LlamaForCausalLM

from hylo import HyLoForCausalLM
from hylo.distill.checkpoints import Checkpoint
from hylo.distill.guards import Guard
from hylo.distill.progress import Speed, StageMonitor
from hylo.distill.recipe import StageSection, parse_recipe
from hylo.distill.trainer import Carrying, resolve_report_to, train_stage
from hylo.errors import HyLoError
from hylo.progress import Bar

STAGE = StageSection(name="stage2", objective="kl", length=16, tokens=16 * 2 * 3, batch_size=2, learning_rate=1e-3)


def test_a_line_of_metrics(student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    logs = train_stage(STAGE, student, teacher, random_packed(6, 16), tmp_path, dtype=torch.float32, seed=0)
    assert [log["step"] for log in logs] == [1, 2, 3]
    for log in logs:
        # No MFU: nobody knows what this CPU could do.
        assert set(log) == {
            *("step", "tokens", "loss", "grad_norm", "learning_rate", "epoch", "skipped"),
            *("tokens_per_s", "seconds", "memory_bytes"),
        }
        assert log["tokens_per_s"] > 0
        assert log["memory_bytes"] > 50e6
    assert logs[0]["seconds"] < logs[1]["seconds"] < logs[2]["seconds"]


def test_the_last_steps_are_told(
    student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are fewer than a line is for."""
    monkeypatch.setattr("hylo.distill.trainer._LOGGED_STEPS", 2)
    stage = STAGE.model_copy(update={"tokens": 16 * 2 * 5})
    logs = train_stage(stage, student, teacher, random_packed(10, 16), tmp_path, dtype=torch.float32, seed=0)
    assert [log["step"] for log in logs] == [2, 4, 5]
    assert logs[-1]["loss"] > 0


def test_the_status_names_what_there_is(tmp_path: Path) -> None:
    speed = Speed(tokens_per_step=1000.0, flops_per_token=1e9, peak_flops=1e15)
    monitor = StageMonitor(STAGE, Guard("stage2"), speed, tmp_path / "metrics.jsonl", torch.device("cpu"))
    monitor.start(0, 10)
    # Three times as many tokens count in the second step as in the first, and none in the last.
    for value, tokens in ((1.0, 10), (2.0, 30), (0.0, 0)):
        # Two batches a step.
        for _ in range(2):
            parts = {"kl": torch.tensor(value / 2), "cross_entropy": torch.tensor(value)}
            monitor.add(torch.tensor(value), parts, torch.tensor(tokens))
        assert monitor.accepts(1, torch.tensor(3.0 if tokens else 0.0)) == bool(tokens)
        monitor.step_done()
    entry = monitor.summary({"loss": 0.0, "grad_norm": 0.0, "learning_rate": 1e-3})
    monitor.close()
    expected = {"loss": 3.5, "kl": 1.75, "cross_entropy": 3.5, "grad_norm": 3.0, "learning_rate": 1e-3, "skipped": 0}
    assert {key: entry[key] for key in expected} == expected
    # 10^9 FLOPs a token at a peak of 10^15.
    assert entry["mfu"] == pytest.approx(entry["tokens_per_s"] / 1e6, abs=1e-4)
    for part in ("loss 3.500", "KL 1.750", "CE 3.500", "MFU", "GiB"):
        assert part in monitor._status


def test_a_bar_that_goes_on_rates_what_it_did_itself(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar("stage2", 100, "tokens", done=90)
    bar.start -= 10
    bar.advance(5)
    bar.close()
    assert "95/100 tokens, 0/s" in capsys.readouterr().err


def recipe_with(report_to: Any) -> Any:
    return parse_recipe({"base": "x", "layout": "4GDN", "data": {"train": ["x"]}, "report_to": report_to})


def test_where_metrics_go(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert resolve_report_to(recipe_with(None)) == []
    with pytest.raises(HyLoError, match="report_to: wandb is not installed; install it with: pip install wandb"):
        resolve_report_to(recipe_with(["wandb"]))
    installed |= {"tensorboard", "wandb"}
    # W&B by choice alone: it sends what it is given to a server.
    assert resolve_report_to(recipe_with(None)) == ["tensorboard"]
    assert resolve_report_to(recipe_with(["wandb", "tensorboard", "wandb"])) == ["wandb", "tensorboard"]
    assert resolve_report_to(recipe_with([])) == []


def test_tensorboard(student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    carrying = Carrying(report_to=["tensorboard"], logs=tmp_path / "tensorboard")
    windows = random_packed(6, 16)
    train_stage(STAGE, student, teacher, windows, tmp_path / "a", dtype=torch.float32, seed=0, carrying=carrying)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert "train/tokens_per_s" in events.Tags()["scalars"]


def test_what_a_checkpoint_keeps_of_it_is_json(tmp_path: Path) -> None:
    speed = Speed(10.0)
    monitor = StageMonitor(STAGE, Guard("stage2"), speed, tmp_path / "a.jsonl", torch.device("cpu"))
    monitor.start(0, 10)
    monitor.add(torch.tensor(0.1), {}, 8)
    monitor.accepts(1, 0.2)
    monitor.write(1, {"loss": 0.1})
    state = json.loads(json.dumps(monitor.state()))
    other = StageMonitor(STAGE, Guard("stage2"), speed, tmp_path / "b.jsonl", torch.device("cpu"))
    other.restore(Checkpoint(tmp_path, 1, state).state)
    assert (tmp_path / "b.jsonl").read_text() == (tmp_path / "a.jsonl").read_text()
    monitor.close()
    assert other.state() | {"seconds": 0} == monitor.state() | {"seconds": 0}
