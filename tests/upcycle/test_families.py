"""Families: a tiny random checkpoint of each, as transformers saves it, through every conversion."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZES, convert_base, random_ids, write_base
from torch import Tensor
from transformers import LlamaConfig

from hylo import HyLoForCausalLM
from hylo.errors import HyLoError
from hylo.upcycle.bases import Base, load_model
from hylo.upcycle.convert import plan_conversion
from hylo.upcycle.families import hybrid_config

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 16}
# Longer than any window here, and than the length from which llama3's scaling changes a pair.
LENGTH = 40
WINDOW = 12
BASES: dict[str, dict[str, Any]] = {
    "llama2": {"family": "llama", "num_key_value_heads": 4},
    "llama3": {
        "family": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
    "llama_bias": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"family": "mistral", "sliding_window": WINDOW, "head_dim": 16},
    "mistral_no_window": {"family": "mistral", "sliding_window": None},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen2_window": {
        "family": "qwen2",
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
    },
    "qwen3": {"family": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_window": {
        "family": "qwen3",
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 3,
    },
}
MIX = "MLA:0 GDN:1 M2:2 KDA:3 ATT"
LAYOUTS = ["5MLA", "5GDN", "5M2", "5KDA", MIX]


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / request.param
    return write_base(folder, tokenizer=False, num_hidden_layers=5, **BASES[request.param])


@torch.no_grad()
def test_kept_attention_is_the_base(base: Path, tmp_path: Path) -> None:
    convert_base(base, tmp_path / "hybrid", "5ATT")
    theirs, ours = load_model(base), load_model(tmp_path / "hybrid")
    ids = random_ids(2, LENGTH)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    options |= {"pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    expected = theirs.generate(ids, **options)
    for chunk in (None, 7):
        made = ours.generate(ids, **options, prefill_chunk_size=chunk)
        assert torch.equal(made.sequences, expected.sequences)
        torch.testing.assert_close(made.logits, expected.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversion_trains_saves_and_loads(base: Path, tmp_path: Path, layout: str) -> None:
    convert_base(base, tmp_path / "hybrid", layout)
    model = load_model(tmp_path / "hybrid")
    ids = random_ids(2, LENGTH)
    before = model(ids, labels=ids).loss
    before.backward()
    step = torch.optim.SGD(model.parameters(), lr=1e-3)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        # The gates of Kimi Delta Attention start as zeros times these.
        assert parameter.grad.any() != name.endswith(("f_proj.0.weight", "g_proj.0.weight")), name
    step.step()
    with torch.no_grad():
        logits = model(ids).logits
        assert model(ids, labels=ids).loss < before
        model.save_pretrained(tmp_path / "trained")
        trained = load_model(tmp_path / "trained")
        assert torch.equal(trained(ids).logits, logits)
    assert type(trained) is HyLoForCausalLM


@pytest.mark.parametrize("layout", ["5ATT", *LAYOUTS])
def test_plan_reads_what_the_base_has(base: Path, layout: str) -> None:
    with Base.open(base) as opened:
        plan = plan_conversion(opened, layout)
        sources = {source for tensor in plan.tensors for source in tensor.sources}
        assert sources <= set(opened._file_of)
        if layout in ("5ATT", "5MLA"):
            # Nothing of the base is left out.
            assert sources == set(opened._file_of)


def one_kv_head(folder: Path, **values: Any) -> Path:
    return write_base(folder, tokenizer=False, num_key_value_heads=1, num_hidden_layers=2, **values)


@torch.no_grad()
def logits_of(folder: Path, ids: Tensor) -> Tensor:
    return load_model(folder, torch.float32)(ids, use_cache=False).logits


@pytest.mark.parametrize("q_lora_rank", [None, 32])
@pytest.mark.parametrize(
    "sizes",
    [
        {"family": "llama", "attention_bias": True},
        {"family": "mistral"},
        {"family": "qwen2"},
        {"family": "qwen3", "head_dim": 16},
    ],
    ids=lambda sizes: sizes["family"],
)
def test_full_rank_mla_of_one_kv_head_is_the_base(
    tmp_path: Path, sizes: dict[str, Any], q_lora_rank: int | None
) -> None:
    """With its biases, or with its norms of queries and keys; and one rank less loses something."""
    base = one_kv_head(tmp_path / "base", **sizes)
    head_dim = sizes.get("head_dim", 8)
    geometry = {"qk_rope_head_dim": head_dim, "qk_nope_head_dim": 0, "kv_lora_rank": head_dim}
    geometry |= {"key_norm": sizes["family"] == "qwen3", "q_lora_rank": q_lora_rank}
    convert_base(base, tmp_path / "hybrid", "2MLA", {"mla": geometry})
    ids = random_ids(2, LENGTH)
    expected = logits_of(base, ids)
    torch.testing.assert_close(logits_of(tmp_path / "hybrid", ids), expected, rtol=0, atol=1e-4)
    convert_base(base, tmp_path / "lossy", "2MLA", {"mla": geometry | {"kv_lora_rank": head_dim - 1}})
    assert (logits_of(tmp_path / "lossy", ids) - expected).abs().max() > 1e-3


def test_pairs_that_no_query_asks_of_may_be_dropped(tmp_path: Path) -> None:
    """A smaller head has another softmax scale, which the query map and its bias make up for."""
    model = load_model(one_kv_head(tmp_path / "random", family="llama", attention_bias=True))
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.self_attn.q_proj.parameters():
                parameter.unflatten(0, (4, 8))[:, [1, 2, 5, 6]] = 0
    model.save_pretrained(tmp_path / "base")
    geometry = {"qk_rope_head_dim": 4, "rope_pairs": [0, 3], "qk_nope_head_dim": 0, "kv_lora_rank": 8}
    convert_base(tmp_path / "base", tmp_path / "hybrid", "2MLA", {"mla": geometry})
    ids = random_ids(2, LENGTH)
    torch.testing.assert_close(
        logits_of(tmp_path / "hybrid", ids), logits_of(tmp_path / "base", ids), rtol=0, atol=1e-4
    )


@torch.no_grad()
def test_query_norm_makes_up_for_a_smaller_head(tmp_path: Path) -> None:
    """Queries of half a head are as long after their norm as that half was in the whole, on average."""
    base = one_kv_head(tmp_path / "base", family="qwen3", head_dim=16)
    geometry = {"qk_rope_head_dim": 4, "rope_pairs": [7, 2], "qk_nope_head_dim": 4, "key_norm": True}
    convert_base(base, tmp_path / "hybrid", "2MLA", {"mla": geometry})
    attention = load_model(base).model.layers[1].self_attn
    mixer = load_model(tmp_path / "hybrid").model.layers[1].mixer
    # The slowest pairs that are left, then the rotated ones.
    rows = [5, 6, 13, 14, 7, 2, 15, 10]
    torch.testing.assert_close(mixer.q_norm.weight, attention.q_norm.weight[rows] * 0.5**0.5)
    torch.testing.assert_close(mixer.k_norm.weight, attention.k_norm.weight[rows])


@pytest.mark.parametrize("layout", ["2GDN", "2KDA"])
@torch.no_grad()
def test_folded_norms_keep_directions(tmp_path: Path, layout: str) -> None:
    """Queries and keys that an L2 norm follows lose nothing when the base's norms are folded in."""
    base = one_kv_head(tmp_path / "base", family="qwen3", head_dim=16)
    convert_base(base, tmp_path / "hybrid", layout)
    attention = load_model(base).model.layers[1].self_attn
    mixer = load_model(tmp_path / "hybrid").model.layers[1].mixer
    x = torch.randn(20, 32)
    heads = [(attention.q_norm, attention.q_proj, mixer.q_proj), (attention.k_norm, attention.k_proj, mixer.k_proj)]
    for norm, theirs, ours in heads:
        expected = norm(theirs(x).unflatten(-1, (-1, 16))).expand(-1, 4, -1)
        similarity = torch.cosine_similarity(ours(x).unflatten(-1, (4, 16)), expected, dim=-1)
        torch.testing.assert_close(similarity, torch.ones(20, 4), rtol=0, atol=1e-5)


def test_folded_key_norm_is_exact_where_keys_have_one_length(tmp_path: Path) -> None:
    """W_k diag(gamma) a multiple of an orthogonal matrix: each key is as long as the mean that is folded in."""
    base = one_kv_head(tmp_path / "base", family="qwen3", hidden_size=16, head_dim=16, rms_norm_eps=1e-9)
    geometry = {"mla": {"qk_rope_head_dim": 16, "qk_nope_head_dim": 0, "kv_lora_rank": 16}}
    ids = random_ids(2, LENGTH)
    model = load_model(base)
    with torch.no_grad():
        for layer in model.model.layers:
            orthogonal = torch.linalg.qr(torch.randn(16, 16)).Q
            layer.self_attn.k_proj.weight.copy_(0.7 * orthogonal / layer.input_layernorm.weight)
    model.save_pretrained(tmp_path / "orthogonal")
    errors = {}
    for name in ("base", "orthogonal"):
        convert_base(tmp_path / name, tmp_path / f"{name}_hybrid", "2MLA", geometry)
        errors[name] = (logits_of(tmp_path / f"{name}_hybrid", ids) - logits_of(tmp_path / name, ids)).abs().max()
    assert errors["orthogonal"] < 1e-4
    assert errors["base"] > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "gemma", "gemma2", "phi3", "qwen2_moe", "mixtral"])
def test_other_families_are_refused_with_the_list(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    expected = f"the '{family}' family is not supported; expected llama, mistral, qwen2, qwen3"
    with pytest.raises(HyLoError, match=expected):
        Base.open(tmp_path)


BAD_CONFIGS = {
    "unknown to transformers": ({"model_type": "nonesuch"}, "'nonesuch' family is not supported"),
    "without a family": ({"model_type": None}, "family is not supported"),
    "activation": ({"hidden_act": "foo"}, "hidden_act 'foo'"),
    "rope": ({"rope_scaling": {"rope_type": "nonsense"}}, "nonsense"),
    "rope that moves": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "'dynamic' is not supported in hybrids",
    ),
    "size": ({"intermediate_size": -5}, "intermediate_size is -5"),
    "words": ({"vocab_size": 0}, "vocab_size is 0"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_makes_no_base_is_refused_in_one_line(case: str, base_folder: Path, tmp_path: Path) -> None:
    changes, named = BAD_CONFIGS[case]
    folder = tmp_path / "base"
    shutil.copytree(base_folder, folder)
    values = json.loads((folder / "config.json").read_text()) | changes
    if "rope_scaling" in changes:
        values.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(HyLoError, match=re.escape(named)) as raised, Base.open(folder) as base:
        plan_conversion(base, "4MLA")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("layout", ["4GDN", "2ATT2GDN", "2MLA2M2"])
def test_rope_that_moves_is_refused_beside_any_mixer(layout: str, base_folder: Path, tmp_path: Path) -> None:
    """Documents packed into one row would depend on each other; with attention alone it is the base."""
    folder = Path(shutil.copytree(base_folder, tmp_path / "base"))
    values = json.loads((folder / "config.json").read_text())
    values["rope_parameters"] |= {"rope_type": "dynamic", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(values))
    geometry = {"mla": {"kv_lora_rank": 8}} if "MLA" in layout else {}
    with Base.open(folder) as base:
        with pytest.raises(HyLoError, match="'dynamic' is not supported in hybrids"):
            plan_conversion(base, layout, geometry)
        plan_conversion(base, "4ATT")
        plan_conversion(base, layout, geometry, rope_scaling={"factor": 2.0, "original_max_position_embeddings": 512})


@pytest.mark.parametrize("head_dim", [2, 6, 8, 10])
def test_sizes_are_derived_for_any_head(head_dim: int) -> None:
    config = LlamaConfig(**SIZES | {"head_dim": head_dim})
    for layout in (["mla"] * 4, ["gdn"] * 4, ["mamba2"] * 4, ["kda"] * 4):
        assert hybrid_config(config, layout, {}, "base").token_mixers == layout
