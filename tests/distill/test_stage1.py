"""Stage 1: its loss against a computation by hand, and what it trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import collated, documents_of, random_packed
from torch import Tensor
from transformers import LlamaForCausalLM, TrainingArguments

from hylo import HyLoForCausalLM
from hylo.distill.recipe import StageSection
from hylo.distill.stage1 import LayerwiseTrainer, freeze_all_but_mixers, layerwise_loss
from hylo.distill.teacher import READ, as_hybrid
from hylo.distill.trainer import train_stage
from hylo.errors import HyLoError
from hylo.upcycle.bases import load_model
from hylo.upcycle.trace import trace_layers

STAGE: dict[str, Any] = {
    "name": "stage1",
    "objective": "layerwise",
    "length": 16,
    "tokens": 16 * 2 * 3,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "warmup": 0,
}


def run(
    student: HyLoForCausalLM, teacher: LlamaForCausalLM, folder: Path, **changes: Any
) -> tuple[set[str], list[dict[str, float]]]:
    """Trains, and returns the names of the parameters that moved, and what was logged."""
    before = {name: value.clone() for name, value in student.state_dict().items()}
    torch.manual_seed(0)
    logs = train_stage(
        StageSection(**STAGE | changes),
        student,
        teacher,
        random_packed(6, 16),
        folder,
        dtype=torch.float32,
        seed=0,
    )
    return {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}, logs


def test_exactly_the_replaced_mixers_move(student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    """Every parameter of every replaced mixer gets a gradient: gates and decays as well, from their neutral start."""
    frozen = {name: value.clone() for name, value in teacher.state_dict().items()}
    moved, logs = run(student, teacher, tmp_path)
    names = {name for name, _ in student.named_parameters()}
    assert moved == {name for name in names if any(f"layers.{i}.mixer." in name for i in (0, 1, 2))}
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())
    assert [log["step"] for log in logs] == [1, 2, 3]
    # Padding is no token: 8 of the 96 positions of the six windows.
    assert [log["tokens"] for log in logs] == [29, 59, 88]


def test_the_loss_goes_down(student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    _, logs = run(student, teacher, tmp_path, tokens=16 * 2 * 30, learning_rate=1e-2)
    assert logs[-1]["loss"] < 0.9 * logs[0]["loss"]


def test_one_step_trains(student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    """With the default share of warm-up: a stage never spends its only step at a learning rate of zero."""
    moved, _ = run(student, teacher, tmp_path, tokens=32, warmup=0.01)
    assert moved


def test_accumulation_equals_one_batch(mixed_folder: Path, teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    """Two batches of one make the step that one batch of two makes, though their real tokens differ."""
    students, losses = [], []
    for i, cut in enumerate(({"batch_size": 6}, {"batch_size": 1, "accumulation": 6})):
        students.append(load_model(mixed_folder))
        _, logs = run(students[-1], teacher, tmp_path / str(i), tokens=16 * 6, **cut)
        losses.append(logs[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(mixed_folder: Path, teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    """Layers are fed from outside: what is recomputed in the backward pass must be fed the same."""
    norms = []
    for checkpointing in (False, True):
        student = load_model(mixed_folder)
        _, logs = run(student, teacher, tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        norms.append([log["grad_norm"] for log in logs])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@torch.no_grad()
def loss_by_hand(
    student: HyLoForCausalLM, teacher: LlamaForCausalLM, batch: dict[str, Any], layers: list[int]
) -> Tensor:
    """Each student layer called alone on the teacher's hidden states, document by document, put together here."""
    norms: list[Tensor] = []
    for document in documents_of(batch):
        mask = document["labels"] != -100
        hidden = teacher.model(document["input_ids"], output_hidden_states=True).hidden_states
        rotary = teacher.model.rotary_emb(hidden[0], torch.arange(mask.shape[1])[None])
        context = student.model.mixing_context(hidden[0])
        for i in layers:
            theirs, ours = teacher.model.layers[i], student.model.layers[i]
            normed = theirs.input_layernorm(hidden[i])
            their_mixed, _ = theirs.self_attn(normed, position_embeddings=rotary, attention_mask=None)
            our_mixed = ours.mixer(normed, **context.arguments(ours.mixer), past_key_values=None)
            results = []
            for mixed in (their_mixed, our_mixed):
                middle = hidden[i] + mixed
                results.append(middle + theirs.mlp(theirs.post_attention_layernorm(middle)))
            differences = (results[1] - results[0], our_mixed - their_mixed)
            norms.extend(difference.square().sum(-1).sqrt()[mask] for difference in differences)
    return torch.cat(norms).sum() / (batch["labels"] != -100).sum()


def make_trainer(student: HyLoForCausalLM, teacher: LlamaForCausalLM, folder: Path) -> LayerwiseTrainer:
    arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    return LayerwiseTrainer(model=student, args=arguments, teacher=as_hybrid(teacher))


def test_loss_is_that_of_each_layer_alone(student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    batch = collated(3, 16)
    trainer = make_trainer(student, teacher, tmp_path)
    loss = trainer.compute_loss(student, batch)
    torch.testing.assert_close(loss, loss_by_hand(student, teacher, batch, [0, 1, 2]), rtol=1e-5, atol=1e-5)
    # With a count given, as for an accumulated batch, the same sum is divided by it.
    real = (batch["labels"] != -100).sum()
    scaled = trainer.compute_loss(student, batch, num_items_in_batch=2 * real)
    torch.testing.assert_close(scaled, loss / 2)


def test_zero_where_the_layers_are_the_teachers(to_layout: Callable[..., Any], teacher: LlamaForCausalLM) -> None:
    student = load_model(to_layout("4ATT")[1])
    batch = collated(3, 16)
    mask = batch["labels"] != -100
    inputs = {key: batch[key] for key in READ}
    traces = [trace_layers(model, inputs) for model in (student, as_hybrid(teacher))]
    loss = layerwise_loss(*traces, [0, 1, 2, 3], mask, mask.sum())
    assert loss.item() < 1e-5


def test_gradients_of_a_layer_do_not_depend_on_other_layers(
    student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path
) -> None:
    batch = collated(3, 16)
    trainer = make_trainer(student, teacher, tmp_path)

    def gradients() -> list[Tensor]:
        student.zero_grad()
        trainer.compute_loss(student, batch).backward()
        return [p.grad.clone() for p in student.model.layers[1].mixer.parameters()]

    freeze_all_but_mixers(student)
    before = gradients()
    with torch.no_grad():
        for i in (0, 2):
            for parameter in student.model.layers[i].mixer.parameters():
                parameter.add_(torch.randn_like(parameter))
    after = gradients()
    assert all(gradient.any() for gradient in before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_nothing_to_train_is_refused(to_layout: Callable[..., Any], teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(HyLoError, match="stage1"):
        run(load_model(to_layout("4ATT")[1]), teacher, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_stage(
    student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(HyLoError, match=r"stage1: .*nan.*learning_rate"):
        run(student, teacher, tmp_path, learning_rate=1e30, tokens=16 * 2 * 6)


def test_a_batch_without_tokens_that_count_is_no_loss(
    student: HyLoForCausalLM, teacher: LlamaForCausalLM, tmp_path: Path
) -> None:
    """As where a long chat's part holds none of the assistant's tokens."""
    batch = collated(1, 16)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for count in (None, torch.tensor(0)):
        loss = make_trainer(student, teacher, tmp_path).compute_loss(student, batch, num_items_in_batch=count)
        assert loss == 0
