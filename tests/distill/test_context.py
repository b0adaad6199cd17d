"""Context that grows from stage to stage, and cross-entropy beside KL."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import collated, convert_base, documents_of, random_ids, random_packed, write_base
from transformers import LlamaForCausalLM, TrainingArguments

from hylo import HyLoForCausalLM
from hylo.data.batches import collate
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
    batch = collated(2, 64)
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


@pytest.mark.parametrize("sizes", [{}, {"q_lora_rank": 32}])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_mla_follows_yarn_as_attention_does(tmp_path: Path, family: str, sizes: dict[str, Any]) -> None:
    """MLA of full rank that rotates what turns is attention, at each of the factors that a recipe sets in turn."""
    rope = {"rope_type": "default", "rope_theta": 1e10}
    base = write_base(
        tmp_path / "base", family=family, head_dim=8, num_key_value_heads=1, num_hidden_layers=1, rope_parameters=rope
    )
    if family == "qwen3":
        sizes = sizes | {"key_norm": True}
    # The others hardly turn over so few tokens.
    sizes = sizes | {"rope_pairs": [0, 1]}
    geometry = {"mla": {"kv_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, **sizes}}
    models = []
    for layout, given in (("1ATT", {}), ("1MLA", geometry)):
        convert_base(base, tmp_path / layout, layout, given)
        models.append(load_model(tmp_path / layout, torch.float32))
    ids = random_ids(8, 16)
    for factor in (None, 4, 32, 8):
        if factor is not None:
            for model in models:
                set_context(model, RopeScalingSection(factor=factor, original_max_position_embeddings=128))
        attention, mla = (model(ids).logits for model in models)
        torch.testing.assert_close(mla, attention, rtol=0, atol=2e-3)


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
    """Against whole logits; every token but the first of a document is predicted once, padding never."""
    batch = collated(3, 16)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    plain = DistillationTrainer(model=student, args=arguments, teacher=teacher).compute_loss(student, batch)
    trainer = DistillationTrainer(model=student, args=arguments, teacher=teacher, cross_entropy=0.3)
    loss = trainer.compute_loss(student, batch)
    entropy = whole_entropy(student, batch)
    torch.testing.assert_close(loss, plain + 0.3 * entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trainer.loss_parts, {"kl": plain, "cross_entropy": entropy}, rtol=1e-5, atol=1e-5)
    # The mean over an accumulated batch does not depend on how it is cut.
    windows = random_packed(3, 16)
    count = sum((windows[i]["labels"] != -100).sum() for i in range(3))
    whole, cut = (
        sum(trainer.compute_loss(student, collate(part), num_items_in_batch=count) for part in parts)
        for parts in ([[windows[0], windows[1], windows[2]]], [[windows[0]], [windows[1], windows[2]]])
    )
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-5)


def whole_entropy(student: HyLoForCausalLM, batch: dict[str, Any], beyond: int = 0) -> torch.Tensor:
    """The mean over the batch's labels of the cross-entropy at positions from `beyond` on."""
    total = torch.zeros(())
    for document in documents_of(batch):
        logits, labels = student(document["input_ids"]).logits[0, beyond:-1], document["labels"][0, beyond + 1 :]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return total / (batch["labels"] != -100).sum()


@pytest.mark.parametrize("cross_entropy", [0.0, 0.3])
def test_beyond_the_teacher_tokens_are_learnt_by_cross_entropy(
    student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path, cross_entropy: float
) -> None:
    """The teacher is asked for the first 6 tokens of each document; it never sees the others."""
    batch = collated(3, 16)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    lengths: list[int] = []
    teacher.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    trainer = DistillationTrainer(
        model=student, args=arguments, teacher=teacher, cross_entropy=cross_entropy, teacher_length=6
    )
    loss = trainer.compute_loss(student, batch)
    assert max(lengths) == 6
    kl = torch.zeros(())
    for document in documents_of(batch):
        counted = document["labels"][0, 1:7] != -100
        student_log, teacher_log = (
            model(document["input_ids"]).logits[0, :6][: len(counted)].log_softmax(-1) for model in (student, teacher)
        )
        kl = kl + (teacher_log.exp() * (teacher_log - student_log)).sum(-1)[counted].sum()
    kl = kl / (batch["labels"] != -100).sum()
    beyond = whole_entropy(student, batch, 6)
    inside = whole_entropy(student, batch) - beyond
    torch.testing.assert_close(loss, kl + beyond + cross_entropy * inside, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_both_parts_are_logged(
    student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path, accumulation: int
) -> None:
    stage = StageSection(**STAGE | {"cross_entropy": 0.5, "accumulation": accumulation, "tokens": 16 * 8})
    logs = train_stage(stage, student, teacher, random_packed(8, 16), tmp_path, dtype=torch.float32, seed=0)
    for log in logs:
        assert log["loss"] == pytest.approx(log["kl"] + 0.5 * log["cross_entropy"], rel=1e-5)
        # Random weights: no better than chance over 300 words.
        assert log["cross_entropy"] > 4


def test_parts_are_logged_of_every_step_whatever_its_documents(
    student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path
) -> None:
    """Some windows here hold a document longer than 10 tokens, others do not; they are summed over steps and ranks."""
    stage = StageSection(**STAGE | {"teacher_length": 10, "tokens": 16 * 40, "batch_size": 1})
    logs = train_stage(stage, student, teacher, random_packed(40, 16), tmp_path, dtype=torch.float32, seed=0)
    assert all(log["loss"] == pytest.approx(log["kl"] + log["cross_entropy"], rel=1e-5) for log in logs)
    assert any(log["cross_entropy"] == 0 for log in logs)
    assert any(log["cross_entropy"] > 0 for log in logs)
    # A teacher that reads whole windows makes one part.
    whole = StageSection(**STAGE | {"teacher_length": 16, "tokens": 16 * 4})
    logs = train_stage(whole, student, teacher, random_packed(4, 16), tmp_path / "b", dtype=torch.float32, seed=0)
    assert all("kl" not in log for log in logs)
