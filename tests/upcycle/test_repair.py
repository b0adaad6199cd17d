"""MLPs that make up for what new mixers lack."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_ids
from torch import Tensor
from transformers import LlamaForCausalLM

from hylo import HyLoForCausalLM
from hylo.upcycle.bases import load_model
from hylo.upcycle.calibrate import calibrate
from hylo.upcycle.repair import repair_mlp
from hylo.upcycle.trace import fed_with, recorded, trace_layers

Convert = Callable[..., tuple[Any, Path]]


def texts(count: int = 12) -> list[dict[str, Tensor]]:
    return [{"input_ids": random_ids(4, 32), "attention_mask": torch.ones(4, 32).long()} for _ in range(count)]


@torch.no_grad()
def test_a_linear_map_of_the_mlps_values_is_found(student: HyLoForCausalLM) -> None:
    """What is lacking is D m: D is found, also where tokens that are not real lack something else."""
    layer = student.model.layers[0]
    down = layer.mlp.down_proj
    before, missing = down.weight.clone(), 0.1 * torch.randn_like(down.weight)
    batches = []
    for _ in range(6):
        hidden, mixed, real = torch.randn(4, 50, 32), 0.1 * torch.randn(4, 50, 32), torch.rand(4, 50) < 0.9
        down.weight.copy_(before + missing)
        added = layer.after_mixing(hidden, mixed) - hidden
        added[~real] = 100.0
        batches.append((hidden, mixed, added, real, 1.0))
    down.weight.copy_(before)
    repair_mlp(layer, batches, 1e-9)
    torch.testing.assert_close(down.weight, before + missing, rtol=1e-2, atol=1e-3)


def output_errors(student: HyLoForCausalLM, teacher: LlamaForCausalLM, batch: dict[str, Tensor]) -> list[float]:
    """Of each layer's output, on the teacher's input."""
    wanted = trace_layers(teacher, batch)
    with torch.no_grad(), fed_with(student, wanted.inputs), recorded(student) as trace:
        student.model(**batch, use_cache=False)
    return [(a - b).square().mean().item() for a, b in zip(trace.outputs, wanted.outputs, strict=True)]


@pytest.mark.parametrize("layout", ["4GDN", "4MLA"])
def test_layers_come_nearer_to_the_teachers(to_layout: Convert, teacher: LlamaForCausalLM, layout: str) -> None:
    text = texts()
    errors = []
    for mlp in (False, True):
        student = load_model(to_layout(layout)[1], torch.float32)
        assert isinstance(student, HyLoForCausalLM)
        calibrate(student, teacher, text, sequential=False, mlp=mlp)
        errors.append(output_errors(student, teacher, text[0]))
    assert all(repaired < alone for alone, repaired in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("sequential", [False, True])
def test_only_mlps_of_new_mixers_change(to_layout: Convert, teacher: LlamaForCausalLM, sequential: bool) -> None:
    student = load_model(to_layout("MLA:1 GDN:2 ATT")[1], torch.float32)
    assert isinstance(student, HyLoForCausalLM)
    calibrate(student, teacher, texts(4), sequential=sequential, mlp=True)
    for i, (layer, base) in enumerate(zip(student.model.layers, teacher.model.layers, strict=True)):
        for name, value in layer.mlp.state_dict().items():
            same = torch.equal(value, base.mlp.state_dict()[name])
            assert same == (name != "down_proj.weight" or i not in (1, 2)), (i, name)
        assert torch.isfinite(layer.mlp.down_proj.weight).all()
