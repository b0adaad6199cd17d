"""Stages of a few steps on a tiny student, stopped and gone on with; and a whole recipe of such stages."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_packed
from torch import Tensor

from hylo.distill.checkpoints import Checkpoint, Checkpoints
from hylo.distill.progress import StageMonitor
from hylo.distill.recipe import CheckpointsSection, Recipe, StageSection, parse_recipe
from hylo.distill.trainer import Carrying, train_stage
from hylo.upcycle.bases import load_model

STAGE: dict[str, Any] = {
    "name": "stage2",
    "objective": "kl",
    "length": 16,
    "tokens": 16 * 2 * 12,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "warmup": 0.2,
    "train": "all",
}
# What differs between two runs of the same steps.
MEASURED = {"seconds", "tokens_per_s", "memory_bytes"}


class KilledError(Exception):
    """Stands for the end of the process."""


class Runs:
    """Runs a stage from the same start, in folders of its own.

    Attributes:
        checkpoints: of the stage; each run finds those of the last.
    """

    def __init__(self, student: Path, teacher: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **stage: Any):
        self.student, self.teacher, self.folder, self.monkeypatch = student, teacher, folder, monkeypatch
        self.stage = StageSection(**STAGE | stage)
        self.checkpoints = Checkpoints(self.stage.name, folder / "checkpoints", "0123456789abcdef0123")
        self.count = 0

    def __call__(
        self, *, killed_at: int | None = None, every: int = 2, carrying: dict[str, Any] | None = None, **options: Any
    ) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """The weights at the end, and the metrics without what is measured.

        Args:
            killed_at: ends the run after this step, before its checkpoint.
            every: steps between checkpoints.
        """
        resume: Checkpoint | None = self.checkpoints.latest()
        self.count += 1
        section = CheckpointsSection(steps=every, keep=self.checkpoints.keep)
        student = load_model(self.student, torch.float32)
        torch.manual_seed(0)
        with self.monkeypatch.context() as patch:
            if killed_at is not None:
                at_step(patch, killed_at, lambda: (_ for _ in ()).throw(KilledError))
            logs = train_stage(
                self.stage,
                student,
                load_model(self.teacher, torch.float32),
                random_packed(10, 16),
                self.folder / str(self.count),
                dtype=torch.float32,
                seed=0,
                carrying=Carrying(checkpoints=self.checkpoints, when=section, **(carrying or {})),
                resume=resume,
                **options,
            )
        weights = {name: value.clone() for name, value in student.state_dict().items()}
        return weights, [{key: value for key, value in log.items() if key not in MEASURED} for log in logs]

    def steps(self) -> list[int]:
        """The checkpoints there are."""
        return sorted(int(path.name.removeprefix("checkpoint-")) for path in self.checkpoints.folder.glob("*"))


def at_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], Any]) -> None:
    """Does something when a step of a stage is done, before it is logged and saved."""
    step_done, start = StageMonitor.step_done, StageMonitor.start
    done = 0

    def count_from(self: StageMonitor, begin: int, total: int) -> None:
        nonlocal done
        done = begin
        start(self, begin, total)

    def count(self: StageMonitor) -> None:
        nonlocal done
        done += 1
        if done == step:
            act()
        step_done(self)

    patch.setattr(StageMonitor, "start", count_from)
    patch.setattr(StageMonitor, "step_done", count)


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: signal.raise_signal(number)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    different = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert not different


def make_recipe(base: Path, texts: Path, **stage2: Any) -> Recipe:
    """Calibration and both stages, of a tiny base; `stage2` changes the second."""
    stage = {"length": 32, "tokens": 32 * 2 * 4, "batch_size": 2, "learning_rate": 1e-3}
    return parse_recipe(
        {
            "base": str(base),
            "layout": "GDN:0,2 MLA:1 ATT",
            "geometry": {"mla": {"kv_lora_rank": 10}},
            "data": {"train": [str(texts)], "holdout": 0.2},
            "calibration": {"tokens": 1024, "length": 32},
            "stages": [
                stage | {"name": "stage1", "objective": "layerwise"},
                stage | {"name": "stage2", "objective": "kl", "train": "all"} | stage2,
            ],
            "evaluation": {"tokens": 256, "length": 32, "prompt": "bado mila", "new_tokens": 5},
            "precision": "float32",
        }
    )
