"""Conversion: what it keeps exactly, what its plan says, and what it refuses."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import MIXED_LAYOUT, convert_base, random_ids, write_base
from torch import Tensor

import hylo.upcycle.convert
from hylo.errors import HyLoError
from hylo.upcycle.bases import Base, load_model
from hylo.upcycle.convert import convert, plan_conversion, plan_json, plan_table
from hylo.upcycle.families import FAMILIES
from hylo.upcycle.initialise.low_rank import low_rank

Convert = Callable[..., tuple[hylo.upcycle.convert.ConversionPlan, Path]]
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("4ATT", {}),
    "mla": ("4MLA", {}),
    "mla_low_rank_query": ("4MLA", {"mla": {"q_lora_rank": 12, "rope_pairs": [0, 2], "qk_rope_head_dim": 4}}),
    "gdn": ("4GDN", {}),
    "gdn_wide": ("4GDN", {"gdn": {"num_heads": 3, "head_k_dim": 16, "head_v_dim": 32}}),
    "mamba2": ("4M2", {}),
    "kda": ("4KDA", {}),
    "mix": (MIXED_LAYOUT, {}),
}


@torch.no_grad()
def logits_of(folder: Path, ids: Tensor) -> Tensor:
    return load_model(folder, torch.float32)(ids, use_cache=False).logits


@pytest.mark.parametrize("sizes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}])
def test_kept_attention_is_the_base(tmp_path: Path, sizes: dict[str, Any]) -> None:
    base = write_base(tmp_path / "base", tokenizer=False, **sizes)
    convert_base(base, tmp_path / "hybrid", "4ATT")
    ids = random_ids(2, 40)
    torch.testing.assert_close(logits_of(tmp_path / "hybrid", ids), logits_of(base, ids), rtol=0, atol=1e-5)


def test_kept_attention_is_the_base_with_scaled_rope(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 64}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    base = write_base(tmp_path / "base", tokenizer=False, rope_parameters=rope)
    convert_base(base, tmp_path / "hybrid", "4ATT")
    ids = random_ids(1, 100)
    torch.testing.assert_close(logits_of(tmp_path / "hybrid", ids), logits_of(base, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("q_lora_rank", [None, 32])
def test_full_rank_mla_of_one_kv_head_is_the_base(one_kv_folder: Path, tmp_path: Path, q_lora_rank: int | None) -> None:
    """With one KV head the shared rotary key is its key, and a latent of full rank holds its value: nothing is lost."""
    geometry = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 0, "kv_lora_rank": 8, "q_lora_rank": q_lora_rank}
    convert_base(one_kv_folder, tmp_path / "hybrid", "2MLA", {"mla": geometry})
    ids = random_ids(2, 40)
    expected = logits_of(one_kv_folder, ids)
    torch.testing.assert_close(logits_of(tmp_path / "hybrid", ids), expected, rtol=0, atol=1e-4)
    # One rank less loses something: the law above is no accident of a weak test.
    convert_base(one_kv_folder, tmp_path / "lossy", "2MLA", {"mla": geometry | {"kv_lora_rank": 7}})
    assert (logits_of(tmp_path / "lossy", ids) - expected).abs().max() > 1e-3


def test_low_rank_is_the_best_approximation() -> None:
    matrix = torch.randn(12, 9, dtype=torch.float64)
    singular = torch.linalg.svdvals(matrix)
    for rank in (1, 4, 9):
        up, down = low_rank(matrix, rank)
        assert (up.shape, down.shape) == ((12, rank), (rank, 9))
        torch.testing.assert_close((matrix - up @ down).norm(), singular[rank:].norm(), rtol=0, atol=1e-10)
        # Balanced, so that neither factor's gradients dwarf the other's.
        torch.testing.assert_close(up.norm(), down.norm())


@torch.no_grad()
def test_mla_rotary_pairs_are_kept_whole(to_layout: Convert, base_folder: Path) -> None:
    """The rotary rows of query and key are pairs (i, i + hd/2) of the base, the key's mean over the KV heads."""
    _, folder = to_layout("4MLA", {"mla": {"qk_rope_head_dim": 4, "rope_pairs": [3, 0]}})
    mixer = load_model(folder).model.layers[2].mixer
    attention = load_model(base_folder).model.layers[2].self_attn
    rows = [3, 0, 7, 4]
    key = attention.k_proj.weight.unflatten(0, (2, 8))[:, rows].mean(0)
    torch.testing.assert_close(mixer.kv_a_proj_with_mqa.weight[-4:], key)
    query = attention.q_proj.weight.unflatten(0, (4, 8))
    torch.testing.assert_close(mixer.q_proj.weight.unflatten(0, (4, 8))[:, 4:], query[:, rows])
    torch.testing.assert_close(mixer.q_proj.weight.unflatten(0, (4, 8))[:, :4], query[:, [1, 2, 5, 6]])


@torch.no_grad()
def test_gdn_starts_from_attention(to_layout: Convert, base_folder: Path) -> None:
    plan, folder = to_layout("4GDN")
    mixer = load_model(folder).model.layers[1].mixer
    attention = load_model(base_folder).model.layers[1].self_attn
    assert torch.equal(mixer.q_proj.weight, attention.q_proj.weight)
    assert torch.equal(mixer.o_proj.weight, attention.o_proj.weight)
    # Query heads 0, 1 read KV head 0; query heads 2, 3 read KV head 1.
    for ours, theirs in ((mixer.k_proj, attention.k_proj), (mixer.v_proj, attention.v_proj)):
        expected = theirs.weight.unflatten(0, (2, 8))[[0, 0, 1, 1]].flatten(0, 1)
        assert torch.equal(ours.weight, expected)
    taps = torch.stack([conv.weight[:, 0] for conv in (mixer.q_conv1d, mixer.k_conv1d, mixer.v_conv1d)])
    # Values are small, where SiLU is near linear.
    sizes = torch.tensor([1.0, 1.0, 0.1])[:, None, None]
    assert torch.equal(taps, sizes * torch.tensor([0.0, 0, 0, 1]).expand_as(taps))
    # The decay is the one that the plan names.
    (note,) = {tensor.note for tensor in plan.tensors if tensor.name.endswith("dt_bias")}
    memory = int(re.search(r"memory of (\d+) tokens", note)[1])
    forgets = mixer.A_log.exp() * torch.nn.functional.softplus(mixer.dt_bias)
    torch.testing.assert_close(forgets, torch.full((4,), 1 / memory))
    assert not mixer.a_proj.weight.any()


@pytest.mark.parametrize(("heads", "k", "v"), [(3, 16, 32), (2, 4, 5)])
@torch.no_grad()
def test_gdn_of_other_sizes_takes_what_overlaps(
    to_layout: Convert, base_folder: Path, heads: int, k: int, v: int
) -> None:
    """Rows of q, k and v, columns of o; what reads values that start random is zero."""
    _, folder = to_layout("4GDN", {"gdn": {"num_heads": heads, "head_k_dim": k, "head_v_dim": v}})
    mixer = load_model(folder).model.layers[1].mixer
    attention = load_model(base_folder).model.layers[1].self_attn
    repeated = [p.weight.unflatten(0, (2, 8))[[0, 0, 1, 1]].flatten(0, 1) for p in (attention.k_proj, attention.v_proj)]
    theirs = [attention.q_proj.weight, *repeated, attention.q_proj.weight, attention.o_proj.weight.T]
    ours = [p.weight for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj)] + [mixer.o_proj.weight.T]
    for made, source, size in zip(ours, theirs, [k, k, v, v, v], strict=True):
        rows = min(32, heads * size)
        assert made.shape == (heads * size, 32)
        assert torch.equal(made[:rows], source[:rows])
    assert not ours[-1][32:].any()
    assert all(row.any() for row in ours[0])


@torch.no_grad()
def test_mamba2_starts_from_attention(to_layout: Convert, base_folder: Path) -> None:
    """Rows of z, x, B, C and dt are those of q, v, k, q and zeros, as published but for z."""
    _, folder = to_layout("4M2")
    mixer = load_model(folder).model.layers[1].mixer
    attention = load_model(base_folder).model.layers[1].self_attn
    q, k, v = (proj.weight for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
    assert torch.equal(mixer.in_proj.weight, torch.cat([q, v, k, q, torch.zeros(4, 32)]))
    assert torch.equal(mixer.out_proj.weight, attention.o_proj.weight)
    sizes = torch.ones(64, 1)
    sizes[:16] = 0.1
    assert torch.equal(mixer.conv1d.weight[:, 0], sizes * torch.tensor([0.0, 0, 0, 1]))
    assert not torch.cat([mixer.conv1d.bias, mixer.D]).any()


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("solve_output", [False, True])
def test_plan_names_every_tensor_once(to_layout: Convert, case: str, solve_output: bool) -> None:
    layout, geometry = LAYOUTS[case]
    plan, folder = to_layout(layout, geometry, solve_output=solve_output)
    planned = {tensor.name: tensor.shape for tensor in plan.tensors}
    assert len(planned) == len(plan.tensors)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        saved = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert planned == saved
    model = load_model(folder)
    assert planned == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert plan.parameters == sum(p.numel() for p in model.parameters())


def expected_action(name: str, mixers: list[str], solve_output: bool) -> str:
    if ".mixer." not in name:
        return "copied"
    mixer, suffix = mixers[int(name.split(".")[2])], name.split(".mixer.")[1].removesuffix(".weight")
    if mixer == "attention":
        return "copied"
    if suffix in ("o_proj", "out_proj"):
        return "solved" if solve_output else "copied"
    if mixer == "mla":
        return "copied" if suffix == "q_proj" else "decomposed"
    copied = {"gdn": ["q_proj", "k_proj", "v_proj", "g_proj"], "kda": ["q_proj", "k_proj", "v_proj"]}
    return "copied" if suffix in copied.get(mixer, ["in_proj"]) else "fresh"


@pytest.mark.parametrize("case", LAYOUTS)
@pytest.mark.parametrize("solve_output", [False, True])
def test_plan_actions(base_folder: Path, case: str, solve_output: bool) -> None:
    layout, geometry = LAYOUTS[case]
    with Base.open(base_folder) as base:
        plan = plan_conversion(base, layout, geometry, solve_output=solve_output)
        for tensor in plan.tensors:
            action = expected_action(tensor.name, plan.config.token_mixers, solve_output)
            assert tensor.action == action, tensor.name
            assert all(source in base for source in tensor.sources)
            assert bool(tensor.sources) == (action != "fresh")
    shown = json.loads(plan_json(plan))
    assert [t["name"] for t in shown["tensors"]] == [t.name for t in plan.tensors]
    assert shown["parameters"] == plan.parameters
    assert plan_table(plan).row_count == len(plan.tensors)


def test_tied_head_is_planned_and_saved_once(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tokenizer=False, tie_word_embeddings=True)
    plan = convert_base(base, tmp_path / "hybrid", "2MLA2GDN")
    assert "lm_head.weight" not in {tensor.name for tensor in plan.tensors}
    model = load_model(tmp_path / "hybrid")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert plan.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("layout", "geometry", "named"),
    [
        ("4MLA", {"mla": {"kv_lora_rank": 25}}, "kv_lora_rank is 25"),
        ("4MLA", {"mla": {"q_lora_rank": 33}}, "q_lora_rank is 33"),
        ("4MLA", {"mla": {"q_lora_rank": 0}}, "q_lora_rank"),
        ("4MLA", {"mla": {"qk_rope_head_dim": 3}}, "qk_rope_head_dim"),
        ("4MLA", {"mla": {"qk_rope_head_dim": 6, "rope_pairs": None}}, "does not divide"),
        ("4MLA", {"mla": {"qk_rope_head_dim": 10}}, "qk_rope_head_dim"),
        ("4MLA", {"mla": {"qk_nope_head_dim": 3}}, "nope 3"),
        ("4MLA", {"mla": {"qk_nope_head_dim": 6}}, "at most"),
        ("4MLA", {"mla": {"v_head_dim": 4}}, "v_head_dim is 4"),
        ("4MLA", {"mla": {"rope_pairs": [0, 4]}}, "rope_pairs"),
        ("4MLA", {"mla": {"rope_pairs": [0, -1]}}, "rope_pairs"),
        ("4MLA", {"mla": {"rope_pairs": [0, 0]}}, "rope_pairs"),
        ("4MLA", {"mla": {"rope_pairs": [0, "x"]}}, "rope_pairs"),
        ("4MLA", {"mla": {"rank": 8}}, "'rank'"),
        ("4GDN", {"mla": {"kv_lora_rank": 8}}, "'mla'"),
        ("4MLA", {"mla": {"key_norm": True}}, "no norm of its keys"),
        ("4MLA", {"mla": {"key_norm": 1}}, "key_norm is 1"),
        ("4GDN", {"gdn": {"num_heads": 0}}, "num_heads is 0"),
        ("4GDN", {"gdn": {"head_v_dim": 1.5}}, "head_v_dim is 1.5"),
        ("4GDN", {"gdn": {"conv_size": 1}}, "conv_size is 1"),
        ("4KDA", {"kda": {"gate_rank": 0}}, "gate_rank is 0"),
        ("4M2", {"mamba2": {"num_kv_heads": 3}}, "no multiple of num_kv_heads 3"),
        ("4M2", {"mamba2": {"num_kv_heads": 4}}, "expected those of the base, 4 and 2 of 8"),
        ("4ATT", {"attention": {"heads": 2}}, "heads"),
        ("4ATT", {"hyena": {"heads": 2}}, "'hyena'"),
    ],
)
def test_geometry_that_does_not_fit(base_folder: Path, layout: str, geometry: dict[str, Any], named: str) -> None:
    with Base.open(base_folder) as base, pytest.raises(HyLoError) as error:
        plan_conversion(base, layout, geometry)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_dtype(base_folder: Path) -> None:
    with Base.open(base_folder) as base, pytest.raises(HyLoError, match="'int8'"):
        plan_conversion(base, "4GDN", dtype="int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_of_the_weights(to_layout: Convert, dtype: str) -> None:
    _, folder = to_layout(MIXED_LAYOUT, dtype=dtype)
    model = load_model(folder)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_values_that_are_not_finite_are_refused(base_folder: Path, tmp_path: Path) -> None:
    model = load_model(base_folder)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(HyLoError, match="not finite"):
        convert_base(tmp_path / "base", tmp_path / "hybrid", "4GDN")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_values_beyond_the_dtype_are_refused(base_folder: Path, tmp_path: Path) -> None:
    model = load_model(base_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = -1e5
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(HyLoError, match=r"layers\.1\.mlp\.up_proj\.weight holds 100000, and float16 reaches to 65504;"):
        convert_base(tmp_path / "base", tmp_path / "hybrid", "4GDN", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    # In what it can be held in it is kept.
    convert_base(tmp_path / "base", tmp_path / "hybrid", "4GDN", dtype="float32")


def test_sharded_saving_loads_the_same_values(
    base_folder: Path, mixed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hylo.upcycle.convert, "_SHARD_BYTES", 20_000)
    convert_base(base_folder, tmp_path / "sharded", MIXED_LAYOUT)
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    whole = load_model(mixed_folder).state_dict()
    sharded = load_model(tmp_path / "sharded").state_dict()
    assert whole.keys() == sharded.keys()
    for name in whole:
        assert torch.equal(whole[name], sharded[name]), name


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"num_hidden_layers": 3}, r": 9, first model\.layers\.3\.input_layernorm\.weight"),
        ({"attention_bias": False}, r": 16, first model\.layers\.0\.self_attn\.k_proj\.bias"),
    ],
)
def test_tensors_that_the_config_does_not_call_for_are_refused(
    tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    base = write_base(tmp_path / "base", tokenizer=False, attention_bias="attention_bias" in changed)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(HyLoError, match=f"does not call for{named}; expected"):
        convert_base(base, tmp_path / "hybrid", f"{changed.get('num_hidden_layers', 4)}GDN")
    assert not (tmp_path / "hybrid").exists()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_file_may_hold_besides(tmp_path: Path, family: str, tied: bool) -> None:
    """A head beside a tied embedding, and the frequencies that older files store."""
    base = write_base(tmp_path / "base", family=family, tokenizer=False, tie_word_embeddings=tied)
    tensors = load_file(base / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert convert_base(base, tmp_path / "hybrid", "4ATT").config.tie_word_embeddings == tied


def test_existing_output_is_kept(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(HyLoError, match="already exists"):
        convert_base(base_folder, tmp_path / "out", "4GDN")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize("config", ["[]", '"hylo"', '{"model_type": "llama"}'])
def test_overwrite_replaces_hybrids_alone(base_folder: Path, tmp_path: Path, config: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(config)
    with Base.open(base_folder) as base, pytest.raises(HyLoError, match="not a hybrid's checkpoint"):
        convert(plan_conversion(base, "4GDN"), base, tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_config_of_the_hybrid(to_layout: Convert) -> None:
    plan, folder = to_layout("1MLA3GDN", {"mla": {"kv_lora_rank": 6}}, source_name="some/base")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "hylo"
    assert config["architectures"] == ["HyLoForCausalLM"]
    assert config["base_model"] == "some/base"
    assert config["token_mixers"] == ["gdn", "mla", "gdn", "gdn"]
    # One MLA layer of 6 + 4 values, against 4 layers of 2 x 2 x 8.
    assert plan.config.cache_elements_per_token == 10
    assert plan.config.base_cache_elements_per_token == 128
