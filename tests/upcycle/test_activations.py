"""MLA from what attention does on text: the sums, and the laws of what is made from them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import convert_base, random_ids, statistics_of, write_base
from torch import Tensor
from transformers import LlamaForCausalLM

from hylo.errors import HyLoError
from hylo.evaluate.layers import mixer_errors
from hylo.mixers.mla import MLAGeometry
from hylo.upcycle.activations import AttentionStatistics, AttentionWeights, LagStatistics, as_complex, as_real
from hylo.upcycle.bases import Base, load_model
from hylo.upcycle.calibrate import calibrate
from hylo.upcycle.convert import plan_conversion
from hylo.upcycle.initialise.activation import ActivationDecomposition
from hylo.upcycle.initialise.low_rank import low_rank, symmetric_root
from hylo.upcycle.trace import enter_layers, trace_layers

SUMS = ("cost", "queries", "rotation", "keys", "read", "inputs")
ALL_ROTARY = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 0, "kv_lora_rank": 8, "rope_pairs": [0, 1, 2, 3]}


def batch_of(rows: int, length: int = 24) -> dict[str, Tensor]:
    return {"input_ids": random_ids(rows, length), "attention_mask": torch.ones(rows, length).long()}


def test_streaming_equals_whole(teacher: LlamaForCausalLM) -> None:
    batch = batch_of(4)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    whole, streamed = statistics_of(teacher, batch), statistics_of(teacher, *parts)
    for name in SUMS:
        torch.testing.assert_close(getattr(streamed, name), getattr(whole, name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("window", [None, 5])
def test_queries_in_blocks_equal_all_at_once(
    teacher: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    teacher.config.sliding_window = window
    batch = batch_of(2)
    whole = statistics_of(teacher, batch)
    # Seven of 24 queries at a time.
    monkeypatch.setattr("hylo.upcycle.activations._SCORES_TOGETHER", (7 * 24, 7 * 24))
    blocks = statistics_of(teacher, batch)
    assert whole.weights.window == window
    for name in SUMS:
        expected = getattr(whole, name)
        torch.testing.assert_close(getattr(blocks, name), expected, rtol=0, atol=1e-6 * expected.norm().item())


def test_padding_counts_for_nothing(teacher: LlamaForCausalLM) -> None:
    short = batch_of(2, 16)
    padded = {
        "input_ids": torch.nn.functional.pad(short["input_ids"], (0, 9), value=7),
        "attention_mask": torch.nn.functional.pad(short["attention_mask"], (0, 9)),
    }
    expected, found = statistics_of(teacher, short), statistics_of(teacher, padded)
    for name in SUMS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-6)


def test_cost_is_what_an_error_of_a_score_costs(teacher: LlamaForCausalLM) -> None:
    """By finite differences: the squared change of a head's output, a unit of a score's error, summed over scores."""
    batch = batch_of(1, 6)
    module = teacher.model.layers[1]
    statistics = statistics_of(teacher, batch)
    weights = statistics.weights
    x = module.input_layernorm(trace_layers(teacher, batch).inputs[1])[0].detach()
    cos, sin = enter_layers(teacher, batch)[1][1]["position_embeddings"]
    turn = torch.complex(cos[0, :, :4], sin[0, :, :4])
    head = 3
    query, key = x @ weights.query[head].T, x @ weights.key[1].T
    scores = as_real(as_complex(query) * turn) @ as_real(as_complex(key) * turn).T * 8**-0.5
    scores = scores.double().masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    value = (x @ weights.value[1].T @ weights.output[:, 8 * head : 8 * head + 8].T).double()
    total, step = 0.0, 1e-5
    for t in range(6):
        for j in range(t + 1):
            moved = scores[t].clone()
            moved[j] += step
            change = (moved.softmax(-1) - scores[t].softmax(-1)) @ value / step
            total += change.square().sum().item()
    assert statistics.cost[head].item() == pytest.approx(total, rel=1e-3)


def test_a_complex_factor_commutes_with_the_rotation() -> None:
    """What the queries take up of the shared key is exact at every distance."""
    query, key, factor = (torch.randn(5, dtype=torch.complex128) for _ in range(3))
    for distance in (0, 3, 1000):
        turn = torch.polar(torch.ones(5, dtype=torch.float64), 0.3 * distance * torch.ones(5, dtype=torch.float64))
        expected = (query * turn * (factor * key).conj()).real
        torch.testing.assert_close((query * factor.conj() * turn * key.conj()).real, expected)


def test_whitened_low_rank_is_better_where_it_counts() -> None:
    rows, inputs = torch.randn(20, 12).double(), (torch.randn(500, 12) * torch.logspace(-1, 1, 12)).double()
    root, inverse = symmetric_root(inputs.T @ inputs)
    plain = torch.matmul(*low_rank(rows, 4))
    up, down = low_rank(rows @ root, 4)

    def error(approximation: Tensor) -> float:
        return ((rows - approximation) @ inputs.T).norm().item()

    assert error(up @ down @ inverse) < 0.9 * error(plain)
    singular = torch.linalg.svdvals(rows @ inputs.T)
    assert error(up @ down @ inverse) == pytest.approx(singular[4:].norm().item(), rel=1e-6)


def test_shared_rotary_key_is_the_best_complex_combination(teacher: LlamaForCausalLM) -> None:
    """Other combinations of the heads' keys, and the mean among them, leave more error of the scores."""
    statistics = statistics_of(teacher, batch_of(8))
    geometry = MLAGeometry(8, 0, 8, 8, rope_pairs=(0, 1, 2, 3))
    made = ActivationDecomposition(statistics, geometry)
    energy = statistics.queries.diagonal(dim1=1, dim2=2).unflatten(1, (2, -1)).sum(1).unflatten(0, (2, 2)).sum(1)
    keys = made._key[..., :-1].transpose(0, 1)
    moment = keys @ made._key_moment.to(keys.dtype) @ keys.mH

    def error(pair: int, factors: Tensor) -> float:
        """Of `factors` `[Hkv]`, with the best key for them."""
        root = energy[:, pair].sqrt()
        kept = (root * factors) / (root * factors).abs().square().sum().sqrt()
        weighed = moment[pair] * root[:, None] * root
        return (weighed.diagonal().sum() - kept.conj() @ weighed @ kept).real.item()

    _, beta = made._shared
    for pair in range(4):
        least = error(pair, beta[pair])
        for _ in range(20):
            assert error(pair, torch.randn(2, dtype=torch.complex128)) >= least - 1e-9
        assert error(pair, torch.ones(2, dtype=torch.complex128)) > least


@pytest.mark.parametrize("sizes", [{}, {"attention_bias": True}])
@pytest.mark.parametrize("q_lora_rank", [None, 32])
@torch.no_grad()
def test_full_rank_of_one_kv_head_is_the_base(tmp_path: Path, q_lora_rank: int | None, sizes: dict[str, Any]) -> None:
    base = write_base(tmp_path / "base", num_key_value_heads=1, num_hidden_layers=2, **sizes)
    convert_base(base, tmp_path / "hybrid", "2MLA", {"mla": ALL_ROTARY | {"q_lora_rank": q_lora_rank}})
    student, teacher = load_model(tmp_path / "hybrid", torch.float32), load_model(base, torch.float32)
    output = student.model.layers[1].mixer.o_proj.weight.clone()
    calibrate(student, teacher, [batch_of(4) for _ in range(4)], ridge=1e-9, sequential=False, latents=True)
    ids = random_ids(2, 40)
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=0, atol=2e-3)
    torch.testing.assert_close(student.model.layers[1].mixer.o_proj.weight, output, rtol=0, atol=2e-3)


YARN = {"rope_type": "yarn", "rope_theta": 1e7, "factor": 32.0, "original_max_position_embeddings": 128}
HALF_ROTARY = {"mla": {"kv_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}}


@torch.no_grad()
def test_yarn_scales_what_is_not_rotated_too(tmp_path: Path) -> None:
    """Pairs that hardly turn may lose their rotation, but not the factor on cos and sin."""
    base = write_base(tmp_path / "base", num_key_value_heads=1, num_hidden_layers=2, rope_parameters=YARN)
    convert_base(base, tmp_path / "hybrid", "2MLA", HALF_ROTARY)
    student, teacher = load_model(tmp_path / "hybrid", torch.float32), load_model(base, torch.float32)
    ids = random_ids(4, 16)
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=0, atol=2e-3)
    calibrate(student, teacher, [batch_of(8, 16) for _ in range(4)], ridge=1e-9, sequential=False, latents=True)
    torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=0, atol=1e-2)


@torch.no_grad()
def test_latents_follow_the_students_own_yarn(tmp_path: Path) -> None:
    """Where only the hybrid has one: MLA then asks as attention with it does."""
    plain = {"rope_type": "default", "rope_theta": 1e7}
    base = write_base(tmp_path / "base", num_key_value_heads=1, num_hidden_layers=1, rope_parameters=plain)
    scaling = {"factor": 32.0, "original_max_position_embeddings": 128}
    models = []
    for layout, geometry in (("1MLA", HALF_ROTARY), ("1ATT", {})):
        convert_base(base, tmp_path / layout, layout, geometry, rope_scaling=scaling)
        models.append(load_model(tmp_path / layout, torch.float32))
    mla, attention = models
    output = mla.model.layers[0].mixer.o_proj.weight.clone()
    calibrate(mla, load_model(base, torch.float32), [batch_of(8, 16) for _ in range(4)], latents=True)
    mla.model.layers[0].mixer.o_proj.weight.copy_(output)
    ids = random_ids(4, 16)
    torch.testing.assert_close(mla(ids).logits, attention(ids).logits, rtol=0, atol=1e-2)


@torch.no_grad()
def test_a_kv_head_that_is_all_zero(tmp_path: Path) -> None:
    """The latent has more values than there is to keep."""
    base = write_base(tmp_path / "base", num_hidden_layers=1)
    tensors = load_file(base / "model.safetensors")
    for name in ("k_proj", "v_proj"):
        tensors[f"model.layers.0.self_attn.{name}.weight"][:8] = 0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    sizes = {"kv_lora_rank": 24, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
    convert_base(base, tmp_path / "hybrid", "1MLA", {"mla": sizes})
    student, teacher = load_model(tmp_path / "hybrid", torch.float32), load_model(base, torch.float32)
    calibrate(student, teacher, [batch_of(8) for _ in range(4)], latents=True)
    assert mixer_errors(student, teacher, [batch_of(4)])[0] < 0.5


def test_yarn_leaves_the_gains_of_pairs_as_they_are(teacher: LlamaForCausalLM) -> None:
    """A factor on all scores is no coherence."""
    geometry = MLAGeometry(8, 4, 4, 8)
    statistics = statistics_of(teacher, batch_of(8))
    gains = ActivationDecomposition(statistics, geometry).pair_gains
    statistics.rotation *= 1.3**2
    statistics.attention_factor = 1.3
    torch.testing.assert_close(ActivationDecomposition(statistics, geometry).pair_gains, gains)


@pytest.mark.parametrize("rank", [2, 6, 10])
def test_latent_of_values_is_nearer_where_it_is_read(teacher: LlamaForCausalLM, rank: int) -> None:
    """Than the low rank of the weights: in the size of what reaches the layer's output."""
    statistics = statistics_of(teacher, *(batch_of(8) for _ in range(4)))
    made = ActivationDecomposition(statistics, MLAGeometry(rank, 0, 8, 8, rope_pairs=(0, 1, 2, 3)))
    values = statistics.weights.value.double()
    metrics = statistics.weights.output_metric.double().unflatten(0, (2, 2)).sum(1)

    def error(approximation: Tensor) -> float:
        rest = values - approximation.unflatten(0, (2, -1))
        return torch.einsum("gij,gjd,de,gie->", metrics, rest, statistics.read, rest).item()

    solved = torch.cat([made._from_latent(value, made._read_moment) for value in values]) @ made._latent
    plain = torch.matmul(*low_rank(values.flatten(0, 1), rank))
    assert error(solved) < 0.9 * error(plain)


@pytest.mark.parametrize(
    "geometry",
    [{"rope_pairs": None}, {"rope_pairs": [0, 2], "kv_lora_rank": 2}, {"qk_nope_head_dim": 4, "kv_lora_rank": 3}],
)
@torch.no_grad()
def test_sizes_of_every_kind_are_filled(base_folder: Path, tmp_path: Path, geometry: dict[str, Any]) -> None:
    """Also more nope values than the latent has."""
    sizes = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "kv_lora_rank": 10}
    convert_base(base_folder, tmp_path / "hybrid", "4MLA", {"mla": sizes | geometry})
    student, teacher = load_model(tmp_path / "hybrid", torch.float32), load_model(base_folder, torch.float32)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    calibrate(student, teacher, [batch_of(4)], latents=True)
    for name, value in student.state_dict().items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, before[name]) == (".mixer." not in name), name


def test_gains_of_pairs_are_shares(teacher: LlamaForCausalLM) -> None:
    """A pair that turns with every token loses more by standing still than one that hardly turns."""
    gains = ActivationDecomposition(statistics_of(teacher, batch_of(8)), MLAGeometry(8, 4, 4, 8)).pair_gains
    assert gains.shape == (4,)
    assert (gains >= 0).all()
    assert gains.sum() < 1
    assert gains[0] > 10 * gains[3]


def test_plan_says_what_is_solved(base_folder: Path) -> None:
    with Base.open(base_folder) as base:
        plan = plan_conversion(base, "2MLA2GDN", solve_output=True, solve_latents=True)
    mixers = plan.config.token_mixers
    for tensor in plan.tensors:
        if ".mixer." in tensor.name:
            of_mla = mixers[int(tensor.name.split(".")[2])] == "mla"
            assert (tensor.action == "solved") == (of_mla or tensor.name.endswith("o_proj.weight"))


def test_norms_of_queries_are_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", family="qwen3", head_dim=8)
    convert_base(base, tmp_path / "hybrid", "4MLA")
    with pytest.raises(HyLoError, match="norms"):
        calibrate(load_model(tmp_path / "hybrid"), load_model(base), [batch_of(2)], latents=True)


@torch.no_grad()
def test_tokens_alone_are_texts_of_one_token(teacher: LlamaForCausalLM) -> None:
    single = {"input_ids": random_ids(5, 1), "attention_mask": torch.ones(5, 1).long()}
    expected = statistics_of(teacher, single)
    module = teacher.model.layers[1]
    found = AttentionStatistics(AttentionWeights.of(module.self_attn))
    found.add_alone(module.input_layernorm(trace_layers(teacher, single).inputs[1])[:, 0], weight=3.0)
    assert not expected.cost.any() and not expected.keys.any()
    for name in ("read", "inputs"):
        torch.testing.assert_close(getattr(found, name), 3 * getattr(expected, name), rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_lags_are_the_means_of_attention(base_folder: Path) -> None:
    teacher = load_model(base_folder, torch.float32)
    teacher.set_attn_implementation("eager")
    batch = batch_of(2)
    batch["attention_mask"][1, 18:] = 0
    module = teacher.model.layers[1]
    lags = LagStatistics(AttentionWeights.of(module.self_attn), 4)
    inputs = module.input_layernorm(trace_layers(teacher, batch).inputs[1])
    lags.add(inputs, batch["attention_mask"].bool(), enter_layers(teacher, batch)[1][1]["position_embeddings"])
    attention = teacher(**batch, output_attentions=True).attentions[1].double()
    mass = torch.zeros(4, 4, dtype=torch.float64)
    for row, length in enumerate((24, 18)):
        for t in range(4, length):
            mass += attention[row, :, t, [t, t - 1, t - 2, t - 3]]
    torch.testing.assert_close(lags.mass, mass, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(lags.shares, mass / mass.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
