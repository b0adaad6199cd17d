"""What waits in the CPU's memory changes no value."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import collated, random_packed
from transformers import LlamaForCausalLM

from hylo import HyLoForCausalLM
from hylo.distill.offload import activations_on_cpu, stream_from_cpu
from hylo.distill.recipe import StageSection
from hylo.distill.teacher import READ, as_hybrid, hidden_states
from hylo.distill.trainer import train_stage
from hylo.upcycle.bases import load_model


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_teacher_that_streams(base_folder: Path, hybrid: bool) -> None:
    batch: dict[str, Any] = collated(2, 16)
    teacher = load_model(base_folder)
    if hybrid:
        teacher = as_hybrid(teacher)
    expected = hidden_states(teacher, batch)
    stream_from_cpu(teacher, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in teacher.get_decoder().layers.parameters())
    torch.testing.assert_close(hidden_states(teacher, batch), expected, rtol=0, atol=0)


def test_activations(student: HyLoForCausalLM) -> None:
    """On the CPU nothing is moved; what is kept is given back."""
    batch = collated(2, 16)
    gradients = []
    for offloaded in (False, True):
        student.zero_grad()
        inputs = {key: batch[key] for key in READ}
        if offloaded:
            with activations_on_cpu():
                loss = student(**inputs).logits.square().mean()
        else:
            loss = student(**inputs).logits.square().mean()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    assert all(torch.equal(gradients[0][name], value) for name, value in gradients[1].items())


def test_a_stage_with_both(mixed_folder: Path, teacher: LlamaForCausalLM, tmp_path: Path) -> None:
    logs = []
    values = {"name": "stage2", "objective": "kl", "length": 16, "tokens": 96, "batch_size": 2, "learning_rate": 1e-3}
    for offload in ([], ["activations", "teacher"]):
        stage = StageSection(**values, offload=offload)
        torch.manual_seed(0)
        windows, student = random_packed(6, 16), load_model(mixed_folder)
        done = train_stage(stage, student, teacher, windows, tmp_path / str(len(offload)), dtype=torch.float32, seed=0)
        logs.append([log["loss"] for log in done])
    assert logs[0] == logs[1]
