"""Released checkpoints: what their tensors mean, that none changes on the way, and what is refused."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import released
import torch
from released import HEADS, KV_HEADS, MLA_LAYERS, NOPE, RANK, ROPE, base_config, released_tensors, write_released
from safetensors.torch import load_file, save_file
from tiny import SIZES, random_ids
from torch import Tensor
from transformers import AutoConfig

from hylo import HyLoConfig, HyLoForCausalLM
from hylo.errors import HyLoError
from hylo.upcycle.bases import load_model
from hylo.upcycle.interop import export_released, import_released
from hylo.upcycle.interop.configs import hylo_config
from hylo.upcycle.interop.hybrid_config import HybridConfig

KINDS = [("llama", "gdn"), ("llama", "mamba"), ("qwen3", "gdn"), ("qwen3", "mamba")]
# Of our models; what the format can hold but for kda.
GEOMETRY: dict[str, Any] = {
    "mla": {"kv_lora_rank": 10, "q_lora_rank": 12, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 6},
    "gdn": {"num_heads": 3, "head_k_dim": 4, "head_v_dim": 8},
    "mamba2": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "kda": {"num_heads": 4, "head_k_dim": 8, "head_v_dim": 8, "gate_rank": 4},
}


def hybrid(layout: str, changes: dict[str, dict[str, Any]] | None = None, **sizes: Any) -> HyLoForCausalLM:
    """One of ours, random, with GEOMETRY but for the changes."""
    mixers = layout.split()
    geometry = {name: GEOMETRY.get(name, {}) | (changes or {}).get(name, {}) for name in set(mixers) - {"attention"}}
    values = SIZES | {"num_hidden_layers": len(mixers)} | sizes
    return HyLoForCausalLM(HyLoConfig(**values, token_mixers=mixers, mixer_geometry=geometry))


def yarn_frequencies(dim: int, theta: float, factor: float, length: int) -> Tensor:
    """arXiv 2309.00071, equations 17 to 23, with beta 32 and 1."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def pair_that_turns(times: float) -> float:
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair_that_turns(32)), 0), min(math.ceil(pair_that_turns(1)), dim - 1)
    slow = ((torch.arange(dim // 2) - low) / (high - low)).clamp(0, 1)
    return frequencies / factor * slow + frequencies * (1 - slow)


def rotate_pairs(x: Tensor) -> Tensor:
    """Turns the neighbours (2i, 2i + 1) of `[T, heads, rope]` by the released YaRN."""
    yarn = released.YARN
    frequencies = yarn_frequencies(ROPE, 500000.0, yarn["factor"], yarn["original_max_position_embeddings"])
    angles = torch.arange(len(x), dtype=torch.float64)[:, None, None] * frequencies
    turns = torch.polar(torch.tensor(0.1 * math.log(yarn["factor"]) + 1, dtype=torch.float64).expand_as(angles), angles)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def released_mla(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """A released MLA layer in float64, as its description has it: `[T, D]` to `[T, D]`."""
    w = {name: tensor.double() for name, tensor in w.items()}
    query = (x @ w["q_a_proj.weight"].T @ w["q_b_proj.weight"].T).unflatten(-1, (HEADS, -1))
    latent, rotary = (x @ w["kv_a_proj_with_mqa.weight"].T).split([RANK, ROPE], dim=-1)
    expanded = (latent @ w["kv_b_proj.weight"].T).unflatten(-1, (KV_HEADS, -1))
    key = torch.cat([expanded[..., :NOPE], rotary[:, None].expand(-1, KV_HEADS, -1)], dim=-1)
    value = expanded[..., NOPE:]
    if "q_norm.weight" in w:
        query, key = rms_norm(query, w["q_norm.weight"]), rms_norm(key, w["k_norm.weight"])
    query, key = (torch.cat([part[..., :NOPE], rotate_pairs(part[..., NOPE:])], dim=-1) for part in (query, key))
    key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value))
    scores = torch.einsum("thd,shd->hts", query, key) / math.sqrt(NOPE + ROPE)
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hts,shv->thv", weights, value).flatten(1) @ w["out_proj.weight"].T


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_mla_is_the_released_one(tmp_path: Path, family: str) -> None:
    import_released(write_released(tmp_path / "released", family), tmp_path / "ours")
    model = load_model(tmp_path / "ours").double().model
    x = 0.25 * torch.randn(1, 12, released.D, dtype=torch.float64)
    context = model.mixing_context(x)
    for i in MLA_LAYERS:
        prefix = f"model.layers.{i}.mla."
        weights = {
            name.removeprefix(prefix): tensor
            for name, tensor in released_tensors(family, "gdn").items()
            if name.startswith(prefix)
        }
        mixer = model.layers[i].mixer
        mixed = mixer(x, past_key_values=None, **context.arguments(mixer))
        # Angles are float32 in the model.
        torch.testing.assert_close(mixed[0], released_mla(weights, x[0]), rtol=0, atol=1e-6)
        # The order matters: with the released rows as they stand, something else comes out.
        mixer.q_b_proj.weight.copy_(weights["q_b_proj.weight"])
        other = mixer(x, past_key_values=None, **context.arguments(mixer))
        assert (other - mixed).abs().max() > 1e-2


@pytest.mark.parametrize(("family", "linear"), KINDS)
def test_import_moves_values_and_changes_none(tmp_path: Path, family: str, linear: str) -> None:
    import_released(write_released(tmp_path / "released", family, linear), tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    reordered = {"q_b_proj.weight", "kv_a_proj_with_mqa.weight", "q_norm.weight", "k_norm.weight"}
    for name, tensor in released_tensors(family, linear).items():
        renamed = name.replace(".mla.out_proj.", ".mla.o_proj.")
        for module in ("mla", "gdn", "mamba"):
            renamed = renamed.replace(f".{module}.", ".mixer.")
        found = ours.pop(renamed)
        if ".mla." in name and name.split(".mla.")[1] in reordered:
            assert not torch.equal(found, tensor)
            found, tensor = found.flatten().sort().values, tensor.flatten().sort().values
        assert torch.equal(found, tensor), name
    assert not ours


@pytest.mark.parametrize(("family", "linear"), KINDS)
@torch.no_grad()
def test_what_was_imported_loads_and_generates(tmp_path: Path, family: str, linear: str) -> None:
    written = import_released(write_released(tmp_path / "released", family, linear), tmp_path / "ours")
    model = load_model(tmp_path / "ours")
    assert written.parameters == sum(parameter.numel() for parameter in model.parameters())
    ids = random_ids(1, 9)
    assert model(ids).logits.isfinite().all()
    assert model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, 13)
    assert (tmp_path / "ours" / "tokenizer.json").is_file()


def test_config_of_what_was_imported(tmp_path: Path) -> None:
    config = import_released(write_released(tmp_path / "released", "qwen3", "gdn"), tmp_path / "ours").config
    assert config.token_mixers == ["gdn", "mla", "mla", "gdn"]
    assert config.geometry("mla") == config.geometry("mla").parse("mla", GEOMETRY["mla"] | {"key_norm": True})
    assert config.geometry("gdn") == config.geometry("gdn").parse("gdn", GEOMETRY["gdn"])
    assert config.qk_norm
    assert not config.tie_word_embeddings
    # The hybrid's length, not its base's.
    assert config.max_position_embeddings == 65536
    assert config.dtype == torch.float32
    model = load_model(tmp_path / "ours")
    assert math.isclose(model.model.rotary_embeddings["mla"].attention_scaling, 1.3466, abs_tol=1e-4)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("family", "linear"), KINDS)
def test_released_to_ours_and_back(tmp_path: Path, family: str, linear: str) -> None:
    source = write_released(tmp_path / "released", family, linear)
    import_released(source, tmp_path / "ours")
    export_released(tmp_path / "ours", tmp_path / "again")
    before, after = files(source), files(tmp_path / "again")
    assert before.keys() == after.keys()
    for name in before.keys() - {"config.json", "hybrid_config.json"}:
        assert before[name] == after[name], name
    assert json.loads(before["hybrid_config.json"]) == json.loads(after["hybrid_config.json"])
    config = AutoConfig.from_pretrained(tmp_path / "again")
    assert (config.model_type, config.hidden_size, config.tie_word_embeddings) == (family, released.D, False)


@pytest.mark.parametrize("layout", ["mla gdn gdn mla", "mamba2 mla mamba2 mamba2", "mla mla"])
@pytest.mark.parametrize("sizes", [{}, {"tie_word_embeddings": True}, {"qk_norm": True}])
def test_ours_to_released_and_back(tmp_path: Path, layout: str, sizes: dict[str, Any]) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    model = hybrid(layout, {"mla": {"key_norm": "qk_norm" in sizes}}, rope_parameters=yarn, **sizes)
    # Decays are often kept in float32.
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name.endswith("A_log") else torch.bfloat16)
    model.save_pretrained(tmp_path / "ours")
    export_released(tmp_path / "ours", tmp_path / "released")
    import_released(tmp_path / "released", tmp_path / "again")
    assert files(tmp_path / "ours")["model.safetensors"] == files(tmp_path / "again")["model.safetensors"]
    ours, again = (HyLoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("ours", "again"))
    # Sizes that stand at their defaults may be left out.
    for config in (ours, again):
        sizes_of = HyLoConfig(**config).geometry
        config["mixer_geometry"] = {name: sizes_of(name) for name in set(layout.split())}
        del config["base_model"]
    assert ours == again


def test_a_tied_head_is_stored_apart_and_known_again(tmp_path: Path) -> None:
    """Released files hold the head even where it is the embedding."""
    tensors = released_tensors("llama", "gdn")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    source = write_released(tmp_path / "released", tensors=tensors)
    config = import_released(source, tmp_path / "ours").config
    assert config.tie_word_embeddings
    assert "lm_head.weight" not in load_file(tmp_path / "ours" / "model.safetensors")
    export_released(tmp_path / "ours", tmp_path / "again")
    assert files(source)["model.safetensors"] == files(tmp_path / "again")["model.safetensors"]
    # Alike by chance: config.json says that they are two.
    untied = write_released(tmp_path / "untied", tensors=tensors, base=base_config("llama", tie_word_embeddings=False))
    assert not import_released(untied, tmp_path / "ours2").config.tie_word_embeddings
    # Not stored at all.
    del tensors["lm_head.weight"]
    bare = write_released(tmp_path / "bare", tensors=tensors)
    assert import_released(bare, tmp_path / "ours3").config.tie_word_embeddings


# Sizes of config.json and hybrid_config.json that differ between the two, and the count.
PUBLISHED: list[tuple[dict[str, int], list[int], dict[str, int], int]] = [
    (
        {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64},
        [1, 5, 10, 14],
        {"q_lora_rank": 1344, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64, "gdn_num_heads": 6},
        1_673_797_776,
    ),
    (
        {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
        list(range(0, 28, 2)),
        {"q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 128, "gdn_num_heads": 9},
        3_971_381_500,
    ),
]


@pytest.mark.parametrize(("sizes", "mla_layers", "mixers", "parameters"), PUBLISHED)
def test_published_parameter_counts(
    sizes: dict[str, int], mla_layers: list[int], mixers: dict[str, int], parameters: int
) -> None:
    shared = {"intermediate_size": 8192, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
    base = AutoConfig.for_model("llama", vocab_size=128256, **sizes, **shared)
    plan = shared | mixers | {key: sizes[key] for key in ("hidden_size", "num_attention_heads")}
    plan |= {"n_layer": sizes["num_hidden_layers"], "mla_layers": mla_layers, "kv_lora_rank": 128, "gdn_head_dim": 256}
    values = HybridConfig.parse(released.hybrid_config("gdn", **plan), "here")
    with torch.device("meta"):
        model = HyLoForCausalLM(hylo_config(base, values, tied=False, where="here"))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _tensors(**changes: Tensor | None) -> dict[str, Tensor]:
    """The released tensors with some replaced, or left out where None."""
    tensors = released_tensors("llama", "gdn") | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


GDN, MAMBA = released.hybrid_config("gdn"), released.hybrid_config("mamba")
Q_B = "model__layers__1__mla__q_b_proj__weight"
BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "missing tensor": ({"tensors": _tensors(**{Q_B: None})}, "no tensor model.layers.1.mla.q_b_proj.weight"),
    "unexpected tensor": ({"tensors": _tensors(extra=torch.ones(2))}, "tensor extra"),
    "other shape": ({"tensors": _tensors(**{Q_B: torch.ones(4, 12)})}, "q_b_proj.weight is [4, 12]; expected [48, 12]"),
    "tensors of another family": ({"base": base_config("qwen3")}, "no tensor model.layers.1.mla.q_norm.weight"),
    "whole numbers": ({"tensors": _tensors(**{Q_B: torch.ones(48, 12, dtype=torch.int8)})}, "q_b_proj.weight is I8"),
    "missing key": ({"hybrid": _without(GDN, "kv_lora_rank")}, "hybrid_config.json: kv_lora_rank: missing"),
    "text for a number": ({"hybrid": GDN | {"n_layer": "four"}}, "n_layer: 'four'"),
    "no MLA layer": ({"hybrid": GDN | {"mla_layers": []}}, "mla_layers"),
    "layer that is none": ({"hybrid": GDN | {"mla_layers": [1, 4]}}, "mla_layers [1, 4]"),
    "layer named twice": ({"hybrid": GDN | {"mla_layers": [1, 1]}}, "mla_layers [1, 1]"),
    "normed latents": ({"hybrid": GDN | {"use_lora_layer_norm": True}}, "use_lora_layer_norm: True"),
    "biases": ({"hybrid": GDN | {"attention_bias": True}}, "attention_bias: True"),
    "other scaling": ({"hybrid": GDN | {"rope_scaling": released.YARN | {"rope_type": "linear"}}}, "'linear'"),
    "scaled softmax": ({"hybrid": GDN | {"rope_scaling": released.YARN | {"mscale": 0.7}}}, "rope_scaling.mscale"),
    "odd rotary size": ({"hybrid": GDN | {"qk_rope_head_dim": 7}}, "qk_rope_head_dim is 7"),
    "Mamba-2 heads that do not divide": ({"hybrid": MAMBA | {"d_xb": 24}, "linear": "mamba"}, "num_kv_heads 3"),
    "a list": ({"hybrid": [1]}, "hybrid_config.json"),
    "no GDN head size": ({"hybrid": _without(GDN, "gdn_head_dim")}, "gdn_head_dim"),
    "no Mamba-2 size": ({"hybrid": _without(MAMBA, "d_xb"), "linear": "mamba"}, "d_xb"),
    "Mamba-2 sizes that do not fit": ({"hybrid": MAMBA | {"d_inner": 24}, "linear": "mamba"}, "d_inner 24"),
    "other hidden size": ({"base": base_config("llama", hidden_size=64)}, "hidden_size is 64 in config.json"),
    "other depth": ({"base": base_config("llama", num_hidden_layers=5)}, "num_hidden_layers is 5 in config.json"),
    "other heads": ({"base": base_config("llama", num_key_value_heads=4)}, "num_key_value_heads is 4"),
    "other family": ({"base": {"model_type": "gpt2"}}, "'gpt2' family; expected llama or qwen3"),
    "dtype that is none": ({"base": base_config("llama") | {"dtype": "bf16"}}, "dtype is 'bf16'; expected"),
    "no heads": ({"base": base_config("llama") | {"num_attention_heads": 0}}, "num_attention_heads is 0"),
    "no family": ({"base": {"hidden_size": 32}}, "config.json"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_do_not_fit_are_named(tmp_path: Path, case: str) -> None:
    parts, named = BAD_FILES[case]
    source = write_released(tmp_path / "released", **parts)
    with pytest.raises(HyLoError) as error:
        import_released(source, tmp_path / "ours")
    assert named in str(error.value)
    assert str(source) in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "hybrid_config.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    source = write_released(tmp_path / "released")
    if damage == "missing":
        (source / name).unlink()
    else:
        os.truncate(source / name, (source / name).stat().st_size - 9)
    with pytest.raises(HyLoError) as error:
        import_released(source, tmp_path / "ours")
    assert name.removeprefix("model") in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "kept attention": ("mla attention", {}, {}, "attention, mla"),
    "Kimi Delta Attention": ("mla kda", {}, {}, "kda, mla"),
    "two linear kinds": ("mla gdn mamba2", {}, {}, "gdn, mamba2, mla"),
    "no MLA": ("gdn gdn", {}, {}, "layers of gdn"),
    "full query": ("mla gdn", {"mla": {"q_lora_rank": None}}, {}, "q_lora_rank: None"),
    "chosen pairs": ("mla gdn", {"mla": {"rope_pairs": [0, 1, 2, 3]}}, {}, "mla.rope_pairs (0, 1, 2, 3)"),
    "head-aligned GDN": ("mla gdn", {"gdn": {"head_v_dim": 4}}, {}, "gdn.head_v_dim 4, only 8"),
    "wider convolution": ("mla gdn", {"gdn": {"conv_size": 3}}, {}, "gdn.conv_size 3, only 4"),
    "wider convolution of Mamba-2": ("mla mamba2", {"mamba2": {"conv_size": 3}}, {}, "mamba2.conv_size 3, only 4"),
    "folded key norm": ("mla gdn", {}, {"qk_norm": True}, "mla.key_norm False, only True"),
    "biases": ("mla gdn", {}, {"attention_bias": True}, "attention_bias: True"),
    "output bias": ("mla gdn", {}, {"attention_output_bias": True}, "attention_output_bias True"),
    "MLP biases": ("mla gdn", {}, {"mlp_bias": True}, "mlp_bias True"),
    "other scaling": (
        "mla gdn",
        {},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        "'linear'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, case: str) -> None:
    layout, changes, sizes, named = REFUSED[case]
    hybrid(layout, changes, **sizes).save_pretrained(tmp_path / "ours")
    with pytest.raises(HyLoError) as error:
        export_released(tmp_path / "ours", tmp_path / "released")
    assert named in str(error.value)
    assert "the released format" in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_damaged_checkpoint_of_ours_is_not_exported(tmp_path: Path) -> None:
    import_released(write_released(tmp_path / "released"), tmp_path / "ours")
    weights = tmp_path / "ours" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mixer.o_proj.weight"] = torch.ones(3, 3)
    save_file(tensors, weights)
    with pytest.raises(HyLoError, match=r"o_proj.weight is \[3, 3\]; expected \[32, 24\]"):
        export_released(tmp_path / "ours", tmp_path / "again")
    os.truncate(weights, 5000)
    with pytest.raises(HyLoError, match=r"model\.safetensors is not a whole"):
        export_released(tmp_path / "ours", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "released"]


def test_overwriting_replaces_checkpoints_alone(tmp_path: Path) -> None:
    source = write_released(tmp_path / "released")
    import_released(source, tmp_path / "ours")
    (tmp_path / "precious").mkdir()
    for command, origin, target in (
        (import_released, source, tmp_path / "precious"),
        (import_released, source, source),
        (export_released, tmp_path / "ours", tmp_path / "precious"),
        (export_released, tmp_path / "ours", tmp_path / "ours"),
    ):
        with pytest.raises(HyLoError, match="--overwrite"):
            command(origin, target)
        with pytest.raises(HyLoError, match="replaces nothing else"):
            command(origin, target, overwrite=True)
    import_released(source, tmp_path / "ours", overwrite=True)
    export_released(tmp_path / "ours", source, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "precious", "released"]
