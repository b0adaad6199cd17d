"""Linear heads that read averages of values."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_ids
from torch import Tensor
from transformers import LlamaForCausalLM

from hylo.mixers.base import TokenMixer
from hylo.mixers.mamba2 import Mamba2
from hylo.upcycle import calibrate as calibration
from hylo.upcycle.activations import AttentionWeights
from hylo.upcycle.bases import load_model
from hylo.upcycle.calibrate import calibrate
from hylo.upcycle.initialise.averages import AverageStatistics
from hylo.upcycle.initialise.gates import has_gates
from hylo.upcycle.ridge import RidgeRegression

Convert = Callable[..., tuple[Any, Path]]
BLOCKS = ["GDN", "KDA", "M2"]


@torch.no_grad()
def mixer_of(to_layout: Convert, block: str) -> TokenMixer:
    """One whose queries are its keys: each token reads itself with a positive weight."""
    mixer = load_model(to_layout(f"4{block}")[1], torch.float32).model.layers[1].mixer
    if isinstance(mixer, Mamba2):
        _, _, keys, queries, _ = mixer.in_proj.weight.split([32, 16, 16, 32, 4])
        queries.copy_(keys.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1))
    else:
        mixer.q_proj.weight.copy_(mixer.k_proj.weight)
    return mixer


def with_averages(to_layout: Convert, teacher: LlamaForCausalLM, block: str) -> tuple[TokenMixer, AttentionWeights]:
    mixer, weights = mixer_of(to_layout, block), AttentionWeights.of(teacher.model.layers[1].self_attn)
    statistics = AverageStatistics(mixer, weights)
    statistics.add(inputs(64, 32).flatten(0, 1))
    statistics.apply()
    return mixer, weights


def inputs(*shape: int) -> Tensor:
    """An input's last value is one, as inputs nearly have."""
    x = torch.randn(*shape, 32)
    x[..., -1] = 1
    return x


def features(mixer: TokenMixer, x: Tensor) -> Tensor:
    """By heads, `[B, T, H, hd]`."""
    reached: list[Tensor] = []
    handle = mixer.output_projection.register_forward_pre_hook(lambda _, args: reached.append(args[0]))
    mixer(x, None, None, None)
    handle.remove()
    return reached[0].unflatten(-1, (4, -1))


@pytest.mark.parametrize("block", BLOCKS)
@torch.no_grad()
def test_a_token_read_twice_reads_as_once(to_layout: Convert, teacher: LlamaForCausalLM, block: str) -> None:
    """An average of equal values is the value, however many there are: sums would have grown."""
    mixer, _ = with_averages(to_layout, teacher, block)
    x = inputs(8, 1)
    once, often = features(mixer, x)[:, 0], features(mixer, x.expand(-1, 9, -1))
    torch.testing.assert_close(often[:, -1], once, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block", BLOCKS)
@torch.no_grad()
def test_a_first_token_reads_its_value(to_layout: Convert, teacher: LlamaForCausalLM, block: str) -> None:
    """What a head reads of a text's first token is near linear in the token, so that attention's own can be had."""
    mixer, weights = with_averages(to_layout, teacher, block)
    x = inputs(2000, 1)
    read = features(mixer, x)[:, 0].flatten(1)
    value = torch.einsum("nd,hvd->nhv", x[:, 0], weights.value.repeat_interleave(weights.groups, 0))
    wanted = value.flatten(1) @ weights.output.T
    plain = features(mixer_of(to_layout, block), x)[:, 0].flatten(1)
    errors = []
    for have in (read, plain):
        regression = RidgeRegression()
        regression.add(have, wanted)
        errors.append(regression.error(regression.solve(1e-6)))
    assert errors[0] < 0.7 * errors[1], errors


@torch.no_grad()
def test_the_constant_is_constant_and_larger_than_the_rest(to_layout: Convert, teacher: LlamaForCausalLM) -> None:
    mixer, _ = with_averages(to_layout, teacher, "GDN")
    read = features(mixer, inputs(4, 16))
    assert (read[..., -1].square() > 4 * read[..., :-1].square().sum(-1)).float().mean() > 0.8


@pytest.mark.parametrize("block", BLOCKS)
@torch.no_grad()
def test_calibration_keeps_the_start_that_leaves_less(
    to_layout: Convert, teacher: LlamaForCausalLM, block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = [{"input_ids": random_ids(4, 32), "attention_mask": torch.ones(4, 32).long()} for _ in range(3)]
    errors: list[float] = []
    measure = calibration.RidgeRegression.error

    def recorded(self: calibration.RidgeRegression, solution: Tensor) -> float:
        errors.append(measure(self, solution))
        return errors[-1]

    monkeypatch.setattr(calibration.RidgeRegression, "error", recorded)
    student = load_model(to_layout(f"4{block}")[1], torch.float32)
    calibrate(student, teacher, text, sequential=False, gates=True, averages=True)
    assert len(errors) == 8 and all(has_gates(layer.mixer) for layer in student.model.layers)
    for layer, (gates, averages) in enumerate(zip(errors[::2], errors[1::2], strict=True)):
        mixer = student.model.layers[layer].mixer
        taps = mixer.conv1d.weight[:16, 0] if isinstance(mixer, Mamba2) else mixer.v_conv1d.weight[:, 0]
        # Those of averages are the identity.
        assert bool((taps[:, -1] == 1).all()) == (averages < gates)
