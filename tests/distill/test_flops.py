"""Model FLOPs: the formula against a count by hand, and against what torch counts."""

from typing import Any

import pytest
import torch
from tiny import SIZES, hybrid_config, random_ids
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, MistralConfig

from hylo import HyLoForCausalLM
from hylo.distill.flops import attention_flops, device_peak_flops, flops_per_token, peak_flops
from hylo.distill.recipe import StageSection
from hylo.distill.stage1 import freeze_all_but_mixers
from hylo.upcycle.bases import load_model

T = 64
STAGE: dict[str, Any] = {"name": "stage", "length": T, "tokens": T, "learning_rate": 1e-3}
HEAD = SIZES["vocab_size"] * SIZES["hidden_size"]
# Four heads of 8, keys and values; a causal token sees half of the window.
ATTENTION = 2 * 4 * (8 + 8) * (T + 1) / 2


def size(*modules: torch.nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_end_to_end_by_hand(to_layout: Any, teacher: LlamaForCausalLM) -> None:
    """A student of one kind of layer, all of which trains: 6 N a token, the teacher's 2 N, and attention."""
    student = load_model(to_layout("4ATT")[1])
    layers = size(*student.model.layers)
    assert layers == size(*teacher.model.layers)
    stage = StageSection(objective="kl", train="all", **STAGE)
    assert flops_per_token(stage, student, teacher) == pytest.approx(8 * (layers + HEAD) + 4 * (3 + 1) * ATTENTION)


def test_gradients_stop_below_what_trains_first(student: HyLoForCausalLM, teacher: LlamaForCausalLM) -> None:
    """Of the layout GDN, MLA, GDN, ATT with only the third layer's mixer training."""
    student.requires_grad_(False)
    mixer = student.model.layers[2].mixer.requires_grad_(True)
    layers = student.model.layers
    mla = 2 * 4 * (4 + 4 + 8) * (T + 1) / 2
    assert attention_flops(student.config, 1, T) == mla
    forward = 2 * size(*layers) + mla + ATTENTION + 2 * HEAD
    backward = 2 * size(layers[2], layers[3]) + 2 * ATTENTION + 2 * size(mixer) + 2 * HEAD
    of_teacher = 2 * size(*teacher.model.layers) + 4 * ATTENTION + 2 * HEAD
    stage = StageSection(objective="kl", **STAGE)
    assert flops_per_token(stage, student, teacher) == pytest.approx(forward + backward + of_teacher)


def test_layerwise_goes_back_through_replaced_layers_alone(student: HyLoForCausalLM, teacher: LlamaForCausalLM) -> None:
    freeze_all_but_mixers(student)
    layers = student.model.layers
    mla = attention_flops(student.config, 1, T)
    forward = 2 * size(*layers) + mla + ATTENTION
    backward = 2 * size(*layers[:3]) + 2 * mla + 2 * size(*(layer.mixer for layer in layers[:3]))
    of_teacher = 2 * size(*teacher.model.layers) + 4 * ATTENTION
    stage = StageSection(objective="layerwise", **STAGE)
    assert flops_per_token(stage, student, teacher) == pytest.approx(forward + backward + of_teacher)


def test_a_teacher_of_unknown_shape_counts_by_parameters(student: HyLoForCausalLM, teacher: LlamaForCausalLM) -> None:
    other = GPT2LMHeadModel(GPT2Config(vocab_size=SIZES["vocab_size"], n_embd=32, n_layer=2, n_head=4))
    of_teacher = 2 * size(*teacher.model.layers) + 4 * ATTENTION + 2 * HEAD
    stage = StageSection(objective="kl", **STAGE)
    expected = flops_per_token(stage, student, teacher) - of_teacher + 2 * size(other)
    assert flops_per_token(stage, student, other) == pytest.approx(expected)


def test_torch_counts_the_same(to_layout: Any, teacher: LlamaForCausalLM) -> None:
    """Its counter takes attention over the whole window, masked or not, and norms are no products."""
    student = load_model(to_layout("4ATT")[1])
    # Attention as products that the counter knows.
    student.set_attn_implementation("eager")
    teacher.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        student(random_ids(1, T)).logits.sum().backward()
        with torch.no_grad():
            teacher(random_ids(1, T))
    stage = StageSection(objective="kl", train="all", **STAGE)
    ours = flops_per_token(stage, student, teacher) + 4 * (3 + 1) * ATTENTION * ((T - 1) / (T + 1))
    assert counter.get_total_flops() / T == pytest.approx(ours, rel=0.03)


def test_windows_see_less() -> None:
    # 1, 2, 3 keys, then 4 for each token.
    seen = (1 + 2 + 3 + 4 * (T - 3)) / T
    config = MistralConfig(**SIZES | {"sliding_window": 4})
    assert attention_flops(config, 0, T) == pytest.approx(2 * 4 * 16 * seen)
    assert attention_flops(MistralConfig(**SIZES | {"sliding_window": None}), 0, T) == pytest.approx(ATTENTION)
    config = hybrid_config(["attention", "attention"], sliding_window=4, sliding_layers=[1])
    assert [attention_flops(config, i, T) for i in (0, 1)] == pytest.approx([ATTENTION, 2 * 4 * 16 * seen])


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H20", None),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_peaks(name: str, teraflops: float | None) -> None:
    assert peak_flops(name) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_no_peak_without_a_gpu() -> None:
    assert device_peak_flops(torch.device("cpu"), torch.bfloat16) is None
