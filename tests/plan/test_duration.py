"""How long a stage takes, by the arithmetic of docs/recipes.md done here."""

from dataclasses import replace

import pytest
from test_training import published

from hylo.errors import HyLoError
from hylo.plan.duration import Pace, stage_flops
from hylo.plan.inference import Serving
from hylo.plan.report import training_report


def test_a_stage_end_to_end() -> None:
    """6 N for the student, 2 N for the teacher, attention over half of the window: backward twice as much."""
    recipe, training = published()
    stage = recipe.stages[1]
    words, length = 128_256, 65_536
    embedding = words * 2048
    keys = (length + 1) / 2
    student = 6 * (training.student.parameters - embedding) + 6 * embedding
    student += 4 * 3 * 2 * 32 * (64 + 64) * keys
    # The teacher's embedding is looked up.
    teacher = 2 * (training.teacher.parameters - words * 4096) + 32 * 2 * 32 * (128 + 128) * keys
    tokens = stage.steps * stage.tokens_per_step
    assert stage_flops(training, stage) == pytest.approx(tokens * (student + teacher), rel=1e-4)


def test_mixers_alone_cost_less() -> None:
    recipe, training = published()
    stage = recipe.stages[1]
    mixers = stage.model_copy(update={"train": "mixers"})
    assert stage_flops(training, mixers) < stage_flops(training, stage)


def test_hours() -> None:
    recipe, training = published()
    models = training.student, training.base, training.teacher
    one, eight = (
        training_report(recipe, *models, Serving(gpus=gpus), Pace("A100", 0.5))["stages"][1] for gpus in (1, 8)
    )
    assert one["hours"] == pytest.approx(one["flops"] / 312e12 / 0.5 / 3600)
    assert one["hours"] == pytest.approx(8 * eight["hours"])
    assert one["tokens"] == 8_000_110_592
    faster = replace(Pace("A100", 0.5), gpu="H100")
    assert faster.flops_per_s > 3 * Pace("A100", 0.5).flops_per_s


def test_an_unknown_gpu_is_named() -> None:
    with pytest.raises(HyLoError, match="'Abacus' is not known here; expected a name such as H100"):
        _ = Pace("Abacus").flops_per_s
