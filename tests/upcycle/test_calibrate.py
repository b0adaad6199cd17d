"""Calibration: the regression itself, and what it does to a model."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny import random_ids
from torch import Tensor
from transformers import LlamaForCausalLM

from hylo import HyLoError, HyLoForCausalLM
from hylo.upcycle.bases import load_model
from hylo.upcycle.calibrate import _with_first_tokens, calibrate
from hylo.upcycle.ridge import RidgeRegression
from hylo.upcycle.trace import mixer_of, trace_layers


def regression_on(*parts: tuple[Tensor, Tensor]) -> RidgeRegression:
    regression = RidgeRegression()
    for features, targets in parts:
        regression.add(features, targets)
    return regression


def test_without_penalty_it_is_least_squares() -> None:
    features, targets = torch.randn(200, 8), torch.randn(200, 3)
    expected, *_ = np.linalg.lstsq(features.double().numpy(), targets.double().numpy(), rcond=None)
    solved = regression_on((features[:70], targets[:70]), (features[70:], targets[70:])).solve(1e-12)
    np.testing.assert_allclose(solved.numpy(), expected.T, atol=1e-5)


@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_penalty_is_relative_to_the_mean_square(penalty: float) -> None:
    """The normal equations with lambda = penalty * mean of the diagonal; the scale of the features cancels."""
    features, targets = 30 * torch.randn(200, 8), torch.randn(200, 3)
    f, t = features.double().numpy(), targets.double().numpy()
    gram = f.T @ f
    expected = np.linalg.solve(gram + penalty * gram.diagonal().mean() * np.eye(8), f.T @ t).T
    solved = regression_on((features, targets)).solve(penalty)
    np.testing.assert_allclose(solved.numpy(), expected, rtol=1e-4, atol=1e-8)


def test_sums_are_not_taken_in_bfloat16() -> None:
    """Inside autocast the same numbers give the same sums, to the last bit."""
    features, targets = 1 + torch.randn(500, 6), torch.randn(500, 2)
    expected = regression_on((features, targets)).solve(1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solved = regression_on((features, targets)).solve(1e-4)
    assert torch.equal(solved, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        from_low = regression_on((features.bfloat16(), targets.bfloat16())).solve(1e-4)
    assert from_low.dtype == torch.float64
    assert (from_low - expected).norm() < 1e-2 * expected.norm()


def make_batches(count: int = 6) -> list[dict[str, Tensor]]:
    """Batches whose second row ends in padding."""
    batches = [{"input_ids": random_ids(2, 32), "attention_mask": torch.ones(2, 32).long()} for _ in range(count)]
    for batch in batches:
        batch["attention_mask"][1, 20:] = 0
    return batches


@torch.no_grad()
def mixer_errors(student: HyLoForCausalLM, teacher: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> list[float]:
    """Of each layer: squared error of the mixer's output on the teacher's input, at real tokens."""
    errors = [0.0] * len(student.model.layers)
    for batch in batches:
        real = batch["attention_mask"].bool()
        trace = trace_layers(teacher, batch)
        for i, layer in enumerate(student.model.layers):
            context = student.model.mixing_context(trace.inputs[i], batch["attention_mask"])
            output = layer.mixer(
                layer.input_layernorm(trace.inputs[i]), **context.arguments(layer.mixer), past_key_values=None
            )
            errors[i] += (output - trace.mixer_outputs[i])[real].square().sum().item()
    return errors


def test_each_replaced_mixer_gets_nearer(student: HyLoForCausalLM, teacher: LlamaForCausalLM) -> None:
    batches = make_batches()
    before = mixer_errors(student, teacher, batches)
    calibrate(student, teacher, batches, ridge=1e-7, sequential=False)
    after = mixer_errors(student, teacher, batches)
    for layer, old, new in zip(student.model.layers, before, after, strict=True):
        if layer.mixer.name == "attention":
            assert old == new < 1e-6
        else:
            assert new < 0.95 * old


@pytest.mark.parametrize("sequential", [False, True])
def test_only_output_projections_of_replaced_mixers_change(
    student: HyLoForCausalLM, teacher: LlamaForCausalLM, sequential: bool
) -> None:
    before = {name: value.clone() for name, value in student.state_dict().items()}
    calibrate(student, teacher, make_batches(2), sequential=sequential)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.{i}.mixer.o_proj.weight" for i in range(3)}


def test_all_attention_changes_nothing(to_layout: Any, teacher: LlamaForCausalLM) -> None:
    student = load_model(to_layout("4ATT")[1])
    before = {name: value.clone() for name, value in student.state_dict().items()}
    calibrate(student, teacher, make_batches(2))
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_sequential_matters_after_the_first_replaced_layer_only(mixed_folder: Any, teacher: LlamaForCausalLM) -> None:
    """Below the first replaced layer student and teacher have the same hidden states."""
    weights = []
    for sequential in (False, True):
        student = load_model(mixed_folder)
        torch.manual_seed(1)
        calibrate(student, teacher, make_batches(2), sequential=sequential)
        weights.append([mixer_of(layer).o_proj.weight for layer in student.model.layers])
    torch.testing.assert_close(weights[0][0], weights[1][0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(weights[0][1], weights[1][1], rtol=1e-2)


@torch.no_grad()
def test_sequential_brings_the_final_states_nearer(student: HyLoForCausalLM, teacher: LlamaForCausalLM) -> None:
    batches = make_batches()

    def error() -> float:
        total = 0.0
        for batch in batches:
            ours, theirs = (model.get_decoder()(**batch).last_hidden_state for model in (student, teacher))
            total += (ours - theirs)[batch["attention_mask"].bool()].square().sum().item()
        return total

    before = error()
    calibrate(student, teacher, batches, ridge=1e-4)
    assert error() < 0.8 * before


def test_padding_tokens_are_ignored(mixed_folder: Any, teacher: LlamaForCausalLM) -> None:
    batches = make_batches(3)
    others = [batch | {"input_ids": batch["input_ids"].clone()} for batch in batches]
    for batch in others:
        batch["input_ids"][1, 20:] = 5
    weights = []
    for text in (batches, others):
        student = load_model(mixed_folder)
        calibrate(student, teacher, text)
        weights.append(student.state_dict())
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-5)


def test_bfloat16_products_give_nearly_the_same_weights(mixed_folder: Any, teacher: LlamaForCausalLM) -> None:
    batches = make_batches(12)
    weights = []
    for enabled in (False, True):
        student = load_model(mixed_folder)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled, cache_enabled=False):
            calibrate(student, teacher, batches, ridge=1e-2, sequential=False)
        assert student.dtype == torch.float32
        weights.append([layer.mixer.o_proj.weight for layer in student.model.layers])
    for expected, low in zip(*weights, strict=True):
        assert (low - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_values_that_cannot_be_regressed_on_are_refused(value: float) -> None:
    regression = RidgeRegression()
    regression.add(torch.full((8, 3), value), torch.randn(8, 2))
    with pytest.raises(HyLoError, match="not finite or all zero"):
        regression.solve(1e-3)


def test_tokens_alone_count_as_a_share_of_the_text() -> None:
    batches = make_batches(100)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    with_first, weights = _with_first_tokens(batches)
    assert with_first[:100] == batches and weights[:100] == [1.0] * 100
    alone = with_first[100:]
    assert len(alone) > 1 and all(batch["input_ids"].shape[1] == 1 for batch in alone)
    rows = sum(len(batch["input_ids"]) for batch in alone)
    assert 2048 <= rows < 2 * 2048
    counted = sum(len(batch["input_ids"]) * weight for batch, weight in zip(alone, weights[100:], strict=True))
    assert counted == pytest.approx(tokens / 16)


def test_a_first_token_that_no_text_begins_with_is_nearer(
    to_layout: Any, teacher: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that all begin alike say nothing of how another token would begin one."""
    batches = make_batches()
    for batch in batches:
        batch["input_ids"][:, 0] = 0
    single = {"input_ids": torch.arange(1, 200)[:, None], "attention_mask": torch.ones(199, 1).long()}
    errors = []
    for share in (1e-9, 1 / 16):
        monkeypatch.setattr("hylo.upcycle.calibrate._FIRST_SHARE", share)
        student = load_model(to_layout("4MLA", {"mla": {"kv_lora_rank": 10}})[1])
        calibrate(student, teacher, batches, ridge=1e-4, sequential=False)
        errors.append(mixer_errors(student, teacher, [single]))
    without, found = errors
    assert all(new < 0.9 * old for new, old in zip(found, without, strict=True)), errors
