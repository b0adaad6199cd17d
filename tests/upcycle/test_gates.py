"""Gates and convolutions of linear mixers from what attention does on text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_ids
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from hylo.mixers.base import TokenMixer
from hylo.upcycle.activations import AttentionWeights, LagStatistics
from hylo.upcycle.bases import load_model
from hylo.upcycle.calibrate import calibrate
from hylo.upcycle.initialise.gates import GateStatistics, has_gates, set_value_taps

Convert = Callable[..., tuple[Any, Path]]
HEADS, SIZE, HIDDEN = 4, 8, 32


def mixer_of(to_layout: Convert, block: str, geometry: dict[str, Any] | None = None) -> TokenMixer:
    return load_model(to_layout(f"4{block}", geometry)[1], torch.float32).model.layers[1].mixer


def texts() -> list[dict[str, Tensor]]:
    return [{"input_ids": random_ids(4, 32), "attention_mask": torch.ones(4, 32).long()} for _ in range(3)]


@pytest.mark.parametrize(("block", "activation"), [("GDN", nn.functional.silu), ("KDA", torch.sigmoid)])
@torch.no_grad()
def test_the_gate_follows_the_size_of_what_attention_reads(
    to_layout: Convert, teacher: LlamaForCausalLM, block: str, activation: Callable[[Tensor], Tensor]
) -> None:
    """Where attention reads what the linear head reads, times a linear map of the input, the map is found."""
    mixer = mixer_of(to_layout, block, {"kda": {"gate_rank": 8}} if block == "KDA" else None)
    weights = AttentionWeights.of(teacher.model.layers[1].self_attn)
    statistics = GateStatistics(mixer, weights)
    maps = 0.05 * torch.randn(HEADS, HIDDEN)
    # An input's last value is one, as inputs nearly have.
    maps[:, -1] = torch.tensor([1.0, 2.0, 3.0, -1.0])
    for _ in range(8):
        x, read = torch.randn(500, HIDDEN), 0.3 * torch.randn(500, HEADS, SIZE)
        x[:, -1] = 1
        normed = nn.functional.rms_norm(read, (SIZE,))
        statistics.add(x, normed * (x @ maps.T)[..., None], read)
    statistics.apply()
    factor = x @ maps.T / maps[:, -1]
    expected = activation(2 * factor - (2 if block == "KDA" else 0))
    gate = activation(mixer.g_proj(x)).unflatten(-1, (HEADS, SIZE))
    torch.testing.assert_close(gate, expected[..., None].expand_as(gate), rtol=0.1, atol=0.05)


@torch.no_grad()
def test_text_that_counts_twice_is_text_twice(to_layout: Convert, teacher: LlamaForCausalLM) -> None:
    mixer = mixer_of(to_layout, "GDN")
    parts = [(torch.randn(50, HIDDEN), torch.randn(50, HEADS, SIZE), torch.randn(50, HEADS, SIZE)) for _ in range(2)]
    gates = []
    for weights in ((2.0, 1.0), (1.0, 1.0, 1.0)):
        statistics = GateStatistics(mixer, AttentionWeights.of(teacher.model.layers[1].self_attn))
        for part, weight in zip([parts[0]] * (len(weights) - 1) + [parts[1]], weights, strict=True):
            statistics.add(*part, weight)
        statistics.apply()
        gates.append(mixer.g_proj.weight.clone())
    torch.testing.assert_close(*gates)


@torch.no_grad()
def test_tokens_read_alone_count_as_a_sixteenth(
    to_layout: Convert, teacher: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = load_model(to_layout("4GDN")[1], torch.float32)
    monkeypatch.setattr("hylo.upcycle.calibrate._FIRST_TOKENS", 16)
    counts = {"alone": 0.0, "text": 0.0}
    add = GateStatistics.add

    def count(self: GateStatistics, x: Tensor, attended: Tensor, read: Tensor, weight: float = 1.0) -> None:
        counts["alone" if len(x) <= 16 else "text"] += len(x) * weight
        add(self, x, attended, read, weight)

    monkeypatch.setattr(GateStatistics, "add", count)
    batches = [{"input_ids": random_ids(2, 64), "attention_mask": torch.ones(2, 64).long()} for _ in range(2)]
    calibrate(student, teacher, batches, gates=True)
    assert counts["alone"] == pytest.approx(counts["text"] / 16)


@torch.no_grad()
def test_mamba2_is_held_open(to_layout: Convert, teacher: LlamaForCausalLM) -> None:
    mixer = mixer_of(to_layout, "M2")
    statistics = GateStatistics(mixer, AttentionWeights.of(teacher.model.layers[1].self_attn))
    x = torch.randn(500, HIDDEN)
    x[:, -1] = 1
    statistics.add(x, torch.randn(500, HEADS, SIZE), torch.randn(500, HEADS, SIZE))
    others = mixer.in_proj.weight[HEADS * SIZE :].clone()
    statistics.apply()
    gate = mixer.in_proj(x)[:, : HEADS * SIZE]
    torch.testing.assert_close(gate, torch.full_like(gate, 3), rtol=0.05, atol=0.05)
    assert torch.equal(mixer.in_proj.weight[HEADS * SIZE :], others)


@pytest.mark.parametrize("block", ["GDN", "KDA", "M2"])
@torch.no_grad()
def test_taps_are_half_attention(to_layout: Convert, teacher: LlamaForCausalLM, block: str) -> None:
    mixer = mixer_of(to_layout, block)
    lags = LagStatistics(AttentionWeights.of(teacher.model.layers[1].self_attn), 4)
    # All heads look at the token before last; then at themselves alone.
    for lag, expected in ((2, [0.0, 0.05, 0.0, 0.05]), (0, [0.0, 0.025, 0.0, 0.075])):
        lags.mass.zero_()[:, lag] = 7.0
        set_value_taps(mixer, lags)
        taps = mixer.conv1d.weight[:16, 0] if block == "M2" else mixer.v_conv1d.weight[:, 0]
        torch.testing.assert_close(taps, torch.tensor(expected).expand_as(taps))


@pytest.mark.parametrize("block", ["GDN", "KDA", "M2"])
@torch.no_grad()
def test_calibration_with_gates_changes_gates_values_and_output(
    to_layout: Convert, teacher: LlamaForCausalLM, block: str
) -> None:
    student = load_model(to_layout(f"4{block}")[1], torch.float32)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    calibrate(student, teacher, texts(), sequential=False, gates=True)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    names = {
        "GDN": {"g_proj.weight", "v_conv1d.weight", "o_proj.weight"},
        "KDA": {"g_proj.0.weight", "g_proj.1.weight", "g_proj.1.bias", "v_conv1d.weight", "o_proj.weight"},
        "M2": {"in_proj.weight", "conv1d.weight", "out_proj.weight"},
    }[block]
    assert changed == {f"model.layers.{layer}.mixer.{name}" for layer in range(4) for name in names}
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())


@torch.no_grad()
def test_heads_of_other_sizes_are_left_alone(to_layout: Convert, teacher: LlamaForCausalLM) -> None:
    sizes = {"gdn": {"num_heads": 2, "head_k_dim": 16, "head_v_dim": 16}}
    student = load_model(to_layout("4GDN", sizes)[1], torch.float32)
    assert not has_gates(student.model.layers[0].mixer)
    gate = student.model.layers[0].mixer.g_proj.weight.clone()
    calibrate(student, teacher, texts(), sequential=False, gates=True)
    assert torch.equal(student.model.layers[0].mixer.g_proj.weight, gate)
