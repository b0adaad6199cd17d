"""Context that grows from stage to stage, and cross-entropy beside KL."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_windows
from transformers import LlamaForCausalLM, TrainingArguments

from hylo import HyLoForCausalLM
from hylo.distill.context import set_context
from hylo.distill.recipe import RopeScalingSection, StageSection, parse_recipe
from hylo.distill.stage2 import DistillationTrainer
from hylo.distill.trainer import train_stage
from hylo.pipeline import UpcycleRun
from hylo.upcycle.bases import load_model

STAGE: dict[str, Any] = {
    "name": "stage2",
    "objective": "kl",
    "length": 16,
    "tokens": 16 * 2 * 2,
    "batch_size": 2,
    "learning_rate": 1e-3,
}


def frequencies(model: HyLoForCausalLM) -> dict[str, torch.Tensor]:
    return {name: rotary.inv_freq for name, rotary in model.model.rotary_embeddings.items()}


def test_a_student_set_to_yarn_is_one_loaded_with_it(student: HyLoForCausalLM, tmp_path: Path) -> None:
    """And what is saved carries it: frequencies, the scale of cos and sin, and how far positions reach."""
    batch = random_windows(2, 64).batches(2)[0]
    plain, before = student(batch["input_ids"]).logits, frequencies(student)
    set_context(student, RopeScalingSection(factor=4, original_max_position_embeddings=512))
    assert student.config.max_position_embeddings == 2048
    assert not torch.allclose(student(batch["input_ids"]).logits, plain, atol=1e-3)
    student.save_pretrained(tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", torch.float32)
    assert set(before) == {"attention", "mla"}
    for name, values in frequencies(student).items():
        assert not torch.equal(values, before[name])
        torch.testing.assert_close(frequencies(loaded)[name], values)
    torch.testing.assert_close(loaded(batch["input_ids"]).logits, student(batch["input_ids"]).logits)
    # A later stage's scaling takes its place.
    set_context(student, RopeScalingSection(factor=8, original_max_position_embeddings=512))
    set_context(student, RopeScalingSection(factor=4, original_max_position_embeddings=512))
    torch.testing.assert_close(student(batch["input_ids"]).logits, loaded(batch["input_ids"]).logits)


def test_one_recipe_of_growing_windows(base_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    stage = {"objective": "kl", "tokens": 256, "learning_rate": 1e-3}
    recipe = parse_recipe(
        {
            "base": str(base_folder),
            "layout": "GDN:0,2 MLA:1 ATT",
            "data": {"train": [str(text_folder)], "holdout": 0.2},
            "stages": [
                stage | {"name": "short", "length": 32, "objective": "layerwise"},
                stage
                | {
                    "name": "longer",
                    "length": 64,
                    "rope_scaling": {"factor": 2, "original_max_position_embeddings": 512},
                },
                stage | {"name": "same", "length": 64, "cross_entropy": 0.5},
                stage
                | {
                    "name": "longest",
                    "length": 128,
                    "rope_scaling": {"factor": 8, "original_max_position_embeddings": 512},
                },
            ],
            "precision": "float32",
        }
    )
    UpcycleRun(recipe, tmp_path / "run").run(until="model")
    reach = {}
    for name in ("convert", "short", "longer", "same", "longest", "model"):
        config = json.loads((tmp_path / "run" / name / "config.json").read_text())
        reach[name] = (config["max_position_embeddings"], config["rope_parameters"].get("factor"))
    assert reach == {
        "convert": (512, None),
        "short": (512, None),
        "longer": (1024, 2.0),
        "same": (1024, 2.0),
        "longest": (4096, 8.0),
        "model": (4096, 8.0),
    }


def test_cross_entropy_is_added(student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    """Against whole logits; every token but the first of a window is predicted once, padding never."""
    batch = random_windows(2, 16).batches(2)[0]
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    plain = DistillationTrainer(model=student, args=arguments, teacher=teacher).compute_loss(student, batch)
    trainer = DistillationTrainer(model=student, args=arguments, teacher=teacher, cross_entropy=0.3)
    loss = trainer.compute_loss(student, batch)
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss, plain + 0.3 * entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trainer.loss_parts, {"kl": plain, "cross_entropy": entropy}, rtol=1e-5, atol=1e-5)
    # The mean over an accumulated batch does not depend on how it is cut.
    count = (batch["labels"] != -100).sum()
    parts = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(2)]
    cut = sum(trainer.compute_loss(student, part, num_items_in_batch=count) for part in parts)
    torch.testing.assert_close(cut, loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_both_parts_are_logged(
    student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path, accumulation: int
) -> None:
    stage = StageSection(**STAGE | {"cross_entropy": 0.5, "accumulation": accumulation, "tokens": 16 * 8})
    logs = train_stage(stage, student, teacher, random_windows(8, 16), tmp_path, dtype=torch.float32, seed=0)
    for log in logs:
        assert log["loss"] == pytest.approx(log["kl"] + 0.5 * log["cross_entropy"], rel=1e-5)
        # Random weights: no better than chance over 300 words.
        assert log["cross_entropy"] > 4
