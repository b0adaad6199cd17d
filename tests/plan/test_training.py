"""Memory to train: what each part is made of, and remedies that hold."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from base_configs import CONFIGS, LLAMA_1B, LLAMA_8B, QWEN
from transformers import AutoConfig

import hylo
from hylo.distill.recipe import Recipe, StageSection, load_recipe
from hylo.errors import HyLoError
from hylo.plan.inference import RESERVED_BYTES, Serving
from hylo.plan.quantities import GIB
from hylo.plan.report import plan_dense, plan_pair, training_report
from hylo.plan.training import Training, fits, remedies, training_memory

RECIPE = Path(hylo.__file__).parent / "recipes" / "llama-3.2-1b-4mla12gdn-64k.yaml"


@cache
def published() -> tuple[Recipe, Training]:
    """Llama 4MLA12GDN at 64K with the 8B teacher."""
    recipe = load_recipe(RECIPE)
    hybrid, base = plan_pair(AutoConfig.for_model(**CONFIGS[LLAMA_1B]), recipe.layout, recipe.geometry, recipe.base)
    return recipe, Training(hybrid, base, plan_dense(AutoConfig.for_model(**CONFIGS[LLAMA_8B]), LLAMA_8B))


def changed(stage: StageSection, **values: object) -> StageSection:
    return stage.model_copy(update=values)


def test_what_does_not_depend_on_text() -> None:
    recipe, training = published()
    first, second = (training_memory(training, stage) for stage in recipe.stages)
    parameters, mixers = training.student.parameters, training.student.replaced_parameters
    assert second["weights"] == first["weights"] == parameters * (4 + 2)
    assert (first["gradients"], first["optimizer"]) == (mixers * 4, mixers * 8)
    assert (second["gradients"], second["optimizer"]) == (parameters * 4, parameters * 8)
    assert training.teacher.parameters == 8_030_261_248
    # The 8B teacher in bfloat16, and its final hidden states.
    assert second["teacher"] == 8_030_261_248 * 2 + 65536 * 4096 * 2
    in_float32 = training_memory(replace(training, compute_size=4), recipe.stages[1])
    assert in_float32["weights"] == parameters * 4
    # Stage 1 is taught by the base, in float32.
    assert first["teacher"] > training.base.parameters * 4


def test_checkpointing_saves_activations() -> None:
    recipe, training = published()
    stage = recipe.stages[1]
    kept, whole = (
        training_memory(training, changed(stage, gradient_checkpointing=on))["activations"] for on in (True, False)
    )
    assert 16 * 65536 * 2048 * 2 < kept < whole / 3


def test_what_waits_elsewhere_takes_no_memory() -> None:
    recipe, training = published()
    stage = recipe.stages[1]
    plain = training_memory(training, stage)
    offloaded = training_memory(training, changed(stage, offload=["activations", "teacher"]))
    assert plain["activations"] - offloaded["activations"] == 16 * 65536 * 2048 * 2
    assert offloaded["teacher"] < plain["teacher"] / 5
    small = training_memory(training, changed(stage, optimizer="adamw_8bit"))
    assert 3.8 < plain["optimizer"] / small["optimizer"] < 4
    # An MLP of 8,192, three values each in bfloat16, for fewer tokens at a time.
    chunked = training_memory(training, changed(stage, mlp_chunk=8192))
    saved = plain["activations"] - chunked["activations"]
    assert saved == pytest.approx(2 * 3 * 8192 * 2 * (65536 - 8192), rel=1e-6)


def test_loss_has_no_whole_logits() -> None:
    recipe, training = published()
    assert training_memory(training, recipe.stages[1])["loss"] < 65536 * 128256 * 2 / 3


def test_sharding_divides_what_does_not_depend_on_text() -> None:
    recipe, training = published()
    one, eight = (training_memory(replace(training, gpus=gpus), recipe.stages[1]) for gpus in (1, 8))
    for part in ("weights", "gradients", "optimizer"):
        assert eight[part] == -(-one[part] // 8)
    assert one["teacher"] - eight["teacher"] == training.teacher.parameters * 2 * 7 // 8
    assert (one["activations"], one["loss"]) == (eight["activations"], eight["loss"])
    # Embedding and head of the student with their gradient, a head of the teacher, and two layers.
    assert one["gathered"] == 0
    assert eight["gathered"] > 128256 * 2048 * 8 + 128256 * 4096 * 2
    offloaded = changed(recipe.stages[1], offload=["teacher"])
    eight_offloaded = training_memory(replace(training, gpus=8), offloaded)
    assert eight_offloaded["teacher"] == eight["teacher"]


def test_remedies_make_it_fit() -> None:
    recipe, training = published()
    on_80 = replace(training, gpu_memory=80 * GIB)
    stage = recipe.stages[1]
    assert fits(on_80, stage)
    assert sum(training_memory(on_80, stage).values()) <= 80 * GIB - RESERVED_BYTES
    assert remedies(on_80, stage) == []
    assert remedies(on_80, changed(stage, gradient_checkpointing=False))[0] == "gradient_checkpointing: true"

    wide = changed(stage, batch_size=4, accumulation=2)
    assert remedies(on_80, wide)[0] == "batch_size: 2, accumulation: 4"
    on_48 = replace(training, gpu_memory=48 * GIB)
    offload, gpus, length = remedies(on_48, stage)
    assert offload == "offload: [activations, teacher]"
    assert fits(on_48, changed(stage, offload=["activations", "teacher"]))
    assert not fits(on_48, changed(stage, optimizer="adamw_8bit"))
    assert fits(replace(on_48, gpus=int(gpus.removeprefix("--gpus "))), stage)
    assert length == "length: at most 16K"
    assert fits(on_48, changed(stage, length=16384))
    assert not fits(on_48, changed(stage, length=32768))


def test_a_teacher_with_another_vocabulary() -> None:
    recipe, training = published()
    teacher = plan_dense(AutoConfig.for_model(**CONFIGS[QWEN]), QWEN)
    with pytest.raises(HyLoError, match="151936 words, the base one of 128256"):
        training_report(recipe, training.student, training.base, teacher, Serving())
