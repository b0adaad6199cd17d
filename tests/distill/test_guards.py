"""Steps that must not be taken: told, left out or stopped at, and never silent."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stages import KilledError, Runs, assert_same

from hylo.data.batches import PackedWindows
from hylo.distill.engine import StageTrainer
from hylo.distill.guards import Guard
from hylo.errors import HyLoError


def fed(guard: Guard, count: int = 30) -> Guard:
    for step in range(count):
        assert guard.accepts(step, 2.0 + 0.1 * (step % 3), 1.0 + 0.1 * (step % 5), 8)
    return guard


@pytest.mark.parametrize(
    ("loss", "norm"),
    [(math.nan, 1.0), (2.0, math.nan), (math.inf, 1.0), (2.0, math.inf), (100.0, 1.0), (2.0, 50.0)],
)
def test_stops_with_one_line(loss: float, norm: float) -> None:
    with pytest.raises(HyLoError, match=r"stage2: loss .*gradient norm .*step 30; expected .*learning_rate") as error:
        fed(Guard("stage2")).accepts(30, loss, norm, 8)
    assert "\n" not in str(error.value)


def test_leaps_are_told_by_recent_steps() -> None:
    # The first steps are far apart, and nothing to tell by.
    early = Guard("stage2")
    assert all(early.accepts(step, 100.0 if step == 5 else 1.0, 1.0, 8) for step in range(10))
    # Half of a leap is none, and neither is a loss that drops.
    assert fed(Guard("stage2")).accepts(30, 20.0, 10.0, 8)
    assert fed(Guard("stage2")).accepts(30, 0.001, 0.0, 8)
    assert fed(Guard("stage2", spike_factor=None)).accepts(30, 1e9, 1e9, 8)


def test_a_norm_that_is_clipped_may_leap() -> None:
    guard = fed(Guard("stage2", clipped=True))
    assert guard.accepts(30, 2.0, 1e6, 8)
    for loss, norm in [(100.0, 1.0), (2.0, math.inf), (math.nan, 1.0)]:
        with pytest.raises(HyLoError, match="step 31"):
            guard.accepts(31, loss, norm, 8)


def test_steps_without_a_token_say_nothing() -> None:
    """Most steps of long chats may hold prompts alone: their zeros are no measure of the others."""
    guard = Guard("stage2")
    for step in range(60):
        assert guard.accepts(step, 2.0, 1.0, 8) if step % 3 == 0 else not guard.accepts(step, 0.0, 0.0, 0)
    assert guard.skipped == 0
    with pytest.raises(HyLoError, match="median of late, 2"):
        guard.accepts(60, 100.0, 1.0, 8)
    # What is not finite is refused whatever it is a mean over.
    with pytest.raises(HyLoError, match="expected finite numbers"):
        guard.accepts(60, math.nan, 1.0, 0)


def test_skips_and_says_so_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    guard = fed(Guard("stage2", "skip"))
    for i, step in enumerate((30, 32), 1):
        assert not guard.accepts(step, math.nan, 1.0, 8)
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert f"step {step}: skipped" in told
        assert guard.accepts(step + 1, 2.0, 1.0, 8)
        assert guard.skipped == i


def test_several_in_a_row_stop() -> None:
    guard = fed(Guard("stage2", "skip"))
    for step in range(30, 34):
        assert not guard.accepts(step, math.nan, 1.0, 8)
    with pytest.raises(HyLoError, match="step 34, the 5th in a row"):
        guard.accepts(34, math.nan, 1.0, 8)


def test_a_restored_guard_judges_alike() -> None:
    guard = fed(Guard("stage2", "skip"))
    assert not guard.accepts(30, math.nan, 1.0, 8)
    other = Guard("stage2", "skip")
    other.restore(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state()
    assert not other.accepts(31, 100.0, 1.0, 8)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the gradients of some steps not finite, as they come out of the backward pass."""

    def poison(*steps: int, value: float = math.nan) -> None:
        training_step = StageTrainer.training_step

        def spoiled(self: StageTrainer, model: torch.nn.Module, *args: Any) -> torch.Tensor:
            loss = training_step(self, model, *args)
            if self.state.global_step + 1 in steps:
                next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = value
            return loss

        monkeypatch.setattr(StageTrainer, "training_step", spoiled)

    return poison


@pytest.fixture
def runs(mixed_folder: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runs]:
    return lambda name, **stage: Runs(
        mixed_folder, base_folder, tmp_path / name, monkeypatch, weight_decay=0.1, **stage
    )


SKIP = {"on_anomaly": "skip"}


def test_a_skipped_step_changes_no_weight(runs: Callable[..., Runs], poisoned: Callable[..., None]) -> None:
    """Neither weights nor moments, weight decay included: the last step skipped is as if it were not there."""
    poisoned(12)
    run = runs("skipped")
    weights, logs = run(every=11, carrying=SKIP)
    assert run.steps() == [11]
    from safetensors.torch import load_file

    assert_same(load_file(run.checkpoints.folder / "checkpoint-11" / "model.safetensors"), weights)
    assert [log["step"] for log in logs] == list(range(1, 13))
    assert [log["skipped"] for log in logs] == [0] * 11 + [1]
    # Valid JSON: null where there is no number.
    assert (logs[-1]["loss"], logs[-1]["grad_norm"]) == (None, None)


def test_a_skipped_step_is_skipped_again_after_going_on(
    runs: Callable[..., Runs], poisoned: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(3, 7, value=math.inf)
    whole, broken = runs("whole"), runs("broken")
    weights, logs = whole(every=10**6, carrying=SKIP)
    assert capsys.readouterr().err.count("skipped; expected finite numbers") == 2
    with pytest.raises(KilledError):
        broken(killed_at=6, every=4, carrying=SKIP)
    resumed, told = broken(every=4, carrying=SKIP)
    assert_same(weights, resumed)
    assert told == logs
    assert told[-1]["skipped"] == 2
    assert all(torch.isfinite(value).all() for value in resumed.values())


def test_a_leap_of_the_norm_stops_where_nothing_bounds_it(
    runs: Callable[..., Runs], poisoned: Callable[..., None]
) -> None:
    poisoned(30, value=1e4)
    # Stages of KL are clipped by default.
    _, logs = runs("clipped", tokens=16 * 2 * 33)(every=100)
    assert logs[29]["grad_norm"] > 100 * logs[28]["grad_norm"]
    assert {log["skipped"] for log in logs} == {0}
    with pytest.raises(HyLoError, match="at step 30; expected at most 20 times the gradient norm's median"):
        runs("layers", tokens=16 * 2 * 33, objective="layerwise", train="mixers")(every=100)


def test_a_stage_of_many_windows_without_a_token(runs: Callable[..., Runs], monkeypatch: pytest.MonkeyPatch) -> None:
    """They change no weight, tell no loss, and stop nothing."""
    item = PackedWindows.__getitem__

    def prompts(self: PackedWindows, index: int) -> dict[str, torch.Tensor]:
        window = item(self, index)
        return window | {"labels": torch.full_like(window["labels"], -100)} if index >= 4 else window

    monkeypatch.setattr(PackedWindows, "__getitem__", prompts)
    run = runs("prompts", tokens=16 * 2 * 33)
    run.checkpoints.keep = 100
    _, logs = run(every=1)
    # Ten windows, two a step.
    assert [log["step"] for log in logs if log["loss"] is not None] == [s for s in range(1, 34) if s % 5 in (1, 2)]
    assert {log["skipped"] for log in logs} == {0}
    from safetensors.torch import load_file

    steps = [load_file(run.checkpoints.folder / f"checkpoint-{step}" / "model.safetensors") for step in (7, 10, 11)]
    assert_same(steps[0], steps[1])
    assert any(not torch.equal(steps[1][name], value) for name, value in steps[2].items())


def test_stopping_keeps_the_last_checkpoint(runs: Callable[..., Runs], poisoned: Callable[..., None]) -> None:
    poisoned(7)
    run = runs("stopped")
    with pytest.raises(HyLoError, match=r"stage2: .*gradient norm nan at step 7"):
        run(every=2)
    assert run.steps() == [6]
    # The same run goes on once it is told to leave such steps out.
    _, logs = run(every=2, carrying=SKIP)
    assert [log["step"] for log in logs] == list(range(1, 13))
