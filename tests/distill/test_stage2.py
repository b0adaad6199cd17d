"""Stage 2: its loss, and what it trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import collated, convert_base, documents_of, random_packed, write_base
from transformers import LlamaForCausalLM, TrainingArguments

from hylo import HyLoForCausalLM
from hylo.distill.engine import StageTrainer
from hylo.distill.recipe import StageSection
from hylo.distill.stage2 import DistillationTrainer
from hylo.distill.teacher import as_hybrid
from hylo.distill.trainer import train_stage
from hylo.upcycle.bases import load_model

STAGE: dict[str, Any] = {
    "name": "stage2",
    "objective": "kl",
    "length": 16,
    "tokens": 16 * 2 * 3,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "warmup": 0,
}


def run(
    student: HyLoForCausalLM, teacher: LlamaForCausalLM, folder: Path, **changes: Any
) -> tuple[set[str], list[dict[str, float]]]:
    before = {name: value.clone() for name, value in student.named_parameters()}
    torch.manual_seed(0)
    windows = random_packed(6, 16)
    stage = StageSection(**STAGE | changes)
    logs = train_stage(stage, student, teacher, windows, folder, dtype=torch.float32, seed=0)
    return {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}, logs


def test_mixers_alone(student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    moved, _ = run(student, teacher, tmp_path, train="mixers")
    names = {name for name, _ in student.named_parameters()}
    assert moved == {name for name in names if any(f"layers.{i}.mixer." in name for i in (0, 1, 2))}


def test_all(student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    frozen = {name: value.clone() for name, value in teacher.state_dict().items()}
    moved, _ = run(student, teacher, tmp_path, train="all")
    assert moved == {name for name, _ in student.named_parameters()}
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_no_matrix_does_not_decay(
    to_layout: Any, teacher: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Norms, biases, and the decays and skips of linear mixers."""
    decays: dict[int, bool] = {}
    create = StageTrainer.create_optimizer

    def seen(self: StageTrainer, *args: Any) -> Any:
        made = create(self, *args)
        decays.update((id(one), group["weight_decay"] > 0) for group in made.param_groups for one in group["params"])
        return made

    monkeypatch.setattr(StageTrainer, "create_optimizer", seen)
    student = load_model(to_layout("GDN:0 M2:1 KDA:2 MLA:3")[1])
    run(student, teacher, tmp_path, train="all", weight_decay=0.1, optimizer=optimizer)
    wrong = [name for name, value in student.named_parameters() if decays[id(value)] != (value.ndim > 1)]
    assert not wrong


def test_tied_head_stays_tied(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tokenizer=False, tie_word_embeddings=True)
    convert_base(base, tmp_path / "hybrid", "2MLA2GDN")
    student = load_model(tmp_path / "hybrid")
    moved, _ = run(student, load_model(base), tmp_path / "run", train="all")
    assert "model.embed_tokens.weight" in moved
    assert student.lm_head.weight is student.model.embed_tokens.weight


@pytest.mark.parametrize("as_student", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_whole_logits(
    student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path, checkpointing: bool, as_student: bool
) -> None:
    """Whether the teacher is read as a hybrid, packed as the student is, or is a model that knows no packing."""
    batch = collated(3, 16)
    total = torch.zeros(())
    for document in documents_of(batch):
        # The positions that predict what counts.
        mask = document["labels"][:, 1:] != -100
        q = student(document["input_ids"]).logits[:, :-1].log_softmax(-1)[mask]
        with torch.no_grad():
            p = teacher(document["input_ids"]).logits[:, :-1].log_softmax(-1)[mask]
        total = total + torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    expected = total / (batch["labels"] != -100).sum()
    parameters = dict(student.named_parameters())
    gradients = torch.autograd.grad(expected, list(parameters.values()))

    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = DistillationTrainer(model=student, args=arguments, teacher=as_hybrid(teacher) if as_student else teacher)
    student.train()
    if checkpointing:
        student.gradient_checkpointing_enable()
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name


def test_the_loss_goes_down(student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    _, logs = run(student, teacher, tmp_path, tokens=16 * 2 * 30, learning_rate=1e-2)
    assert logs[-1]["loss"] < 0.9 * logs[0]["loss"]


def test_bfloat16_products_train_float32_weights(student: HyLoForCausalLM, base_folder: Path, tmp_path: Path) -> None:
    """As on hardware with bfloat16: the teacher is kept in what it computes in."""
    stage = StageSection(**STAGE)
    teacher = load_model(base_folder, torch.bfloat16)
    windows = random_packed(6, 16)
    logs = train_stage(stage, student, teacher, windows, tmp_path, dtype=torch.bfloat16, seed=0)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert all(0 < log["loss"] < 100 for log in logs)
