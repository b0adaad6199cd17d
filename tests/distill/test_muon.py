"""Muon and AdamW as one optimizer, against torch's own of both, and in a stage that is stopped and gone on with."""

from pathlib import Path

import pytest
import torch
from stages import KilledError, Runs
from torch import nn

from hylo.distill.muon import MOMENTUM, MuonAdamW, muon_for, orthogonal
from hylo.distill.stage1 import freeze_all_but_mixers
from hylo.modeling import HyLoForCausalLM

SHAPES = [(12, 8), (8, 12), (12, 8), (16, 16)]


def parameters(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [*SHAPES, (7,), (5, 3)]]


def test_steps_are_those_of_torch() -> None:
    ours, theirs = parameters(0), parameters(0)
    betas, decay = (0.9, 0.95), 0.1
    split = len(SHAPES)
    groups = [
        {"params": ours[:split], "muon": True, "weight_decay": decay},
        {"params": ours[split:], "weight_decay": decay},
    ]
    optimizer = MuonAdamW(groups, 1e-2, betas)
    expected = [
        torch.optim.Muon(
            theirs[:split], lr=1e-2, weight_decay=decay, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(theirs[split:], lr=1e-2, betas=betas, weight_decay=decay),
    ]
    for step in range(4):
        for one, other, gradient in zip(ours, theirs, parameters(1 + step), strict=True):
            one.grad = other.grad = gradient.detach()
        for each in [optimizer, *expected]:
            each.step()
    for before, one, other in zip(parameters(0), ours, theirs, strict=True):
        # Products are in bfloat16, and rounded at other places.
        assert (one - other).norm() <= 5e-2 * (other - before).norm()


def test_singular_values_are_about_one() -> None:
    for shape in SHAPES:
        values = torch.linalg.svdvals(orthogonal(torch.randn(3, *shape)).float())
        assert values.min() > 0.4 and values.max() < 1.3


def test_what_has_no_gradient_stays(student: HyLoForCausalLM) -> None:
    freeze_all_but_mixers(student)
    optimizer = muon_for(student, 1e-2, 0.1, (0.9, 0.999))
    before = {name: value.clone() for name, value in student.named_parameters()}
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in student.named_parameters())


def test_linear_maps_of_mixers_alone_are_muons(student: HyLoForCausalLM) -> None:
    student.requires_grad_(True)
    optimizer = muon_for(student, 1e-2, 0.1, (0.9, 0.999))
    names = {id(value): name for name, value in student.named_parameters()}
    chosen = {names[id(one)] for group in optimizer.param_groups if group["muon"] for one in group["params"]}
    assert chosen and all(".mixer." in name for name in chosen)
    assert not any("conv" in name or "norm" in name or "A_log" in name for name in chosen)
    everything = [names[id(one)] for group in optimizer.param_groups for one in group["params"]]
    assert sorted(everything) == sorted(names.values())
    for group in optimizer.param_groups:
        assert all((one.ndim > 1) == (group["weight_decay"] > 0) for one in group["params"])


def test_a_stage_learns_and_goes_on_where_it_was_killed(
    mixed_folder: Path, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Runs(mixed_folder, base_folder, tmp_path / "whole", monkeypatch, optimizer="muon")
    weights, logs = whole()
    assert logs[-1]["loss"] < logs[0]["loss"]
    broken = Runs(mixed_folder, base_folder, tmp_path / "broken", monkeypatch, optimizer="muon")
    with pytest.raises(KilledError):
        broken(killed_at=5)
    again, told = broken()
    assert told == logs
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
