"""The two config files of a released checkpoint, to and from `HyLoConfig`."""

from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.upcycle.interop.hybrid_config import HybridConfig

# The families of released checkpoints.
FAMILIES = ("llama", "qwen3")
# Values of a head's value and output gate, for each of its key, in a released Gated DeltaNet.
_GDN_EXPAND_V = 2
# Of config.json, and of hybrid_config.json: sizes that both state.
_STATED_TWICE = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "rms_norm_eps": "rms_norm_eps",
}
# No part of the model: what wrote it, and where it came from.
_BOOKKEEPING = {"architectures", "dtype", "transformers_version", "base_model"}
# Of kept attention, which released checkpoints have none of.
_OF_ATTENTION = {"sliding_window", "sliding_layers"}


def hylo_config(base: PreTrainedConfig, hybrid: HybridConfig, *, tied: bool, where: str) -> HyLoConfig:
    """The config of a released checkpoint's model.

    Args:
        base: its config.json.
        hybrid: its hybrid_config.json.
        tied: whether the head is the embedding.
        where: names the checkpoint in errors.

    Raises:
        HyLoError: where the files contradict each other, or a size is impossible.
    """
    for ours, theirs in _STATED_TWICE.items():
        stated, planned = getattr(base, ours), getattr(hybrid, theirs)
        if stated != planned:
            raise HyLoError(f"{where}: {ours} is {stated} in config.json, but {theirs} {planned} in hybrid_config.json")
    mixers, geometry = _mixers(hybrid, base.model_type, where)
    copied = {field.name for field in fields(LlamaConfig)} - _BOOKKEEPING
    values = {key: value for key, value in base.to_dict().items() if key in copied}
    # Released layers have no biases, whatever the base's config says.
    values |= {"attention_bias": False, "mlp_bias": False, "attention_dropout": hybrid.attention_dropout}
    # The base's own length and scaling are not what the hybrid was trained with.
    values |= {
        "max_position_embeddings": hybrid.max_position_embeddings,
        "rope_parameters": {"rope_theta": hybrid.rope_theta} | _rope(hybrid),
        "tie_word_embeddings": tied,
    }
    values |= {"qk_norm": base.model_type == "qwen3", "token_mixers": mixers, "mixer_geometry": geometry}
    try:
        return HyLoConfig(**values)
    except HyLoError as error:
        raise HyLoError(f"{where}: hybrid_config.json: {error}") from None


def _rope(hybrid: HybridConfig) -> dict[str, Any]:
    return {"rope_type": "default"} if hybrid.rope_scaling is None else hybrid.rope_scaling.model_dump()


def _mixers(hybrid: HybridConfig, family: str, where: str) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The mixer of each layer, and the sizes of those there are."""
    mla = set(hybrid.mla_layers)
    if len(mla) < len(hybrid.mla_layers) or max(mla) >= hybrid.n_layer:
        raise HyLoError(
            f"{where}: mla_layers {hybrid.mla_layers} in hybrid_config.json; "
            f"expected some of the {hybrid.n_layer} layers from 0, each once"
        )
    linear = "mamba2" if hybrid.gdn_num_heads is None else "gdn"
    mixers = ["mla" if layer in mla else linear for layer in range(hybrid.n_layer)]
    geometry: dict[str, dict[str, Any]] = {
        "mla": {
            "kv_lora_rank": hybrid.kv_lora_rank,
            "q_lora_rank": hybrid.q_lora_rank,
            "qk_nope_head_dim": hybrid.qk_nope_head_dim,
            "qk_rope_head_dim": hybrid.qk_rope_head_dim,
            "v_head_dim": hybrid.v_head_dim,
            "rope_pairs": None,
            "key_norm": family == "qwen3",
        }
    }
    if "gdn" in mixers:
        geometry["gdn"] = _gdn_sizes(hybrid, where)
    if "mamba2" in mixers:
        geometry["mamba2"] = _mamba2_sizes(hybrid, where)
    return mixers, geometry


def _gdn_sizes(hybrid: HybridConfig, where: str) -> dict[str, Any]:
    if hybrid.gdn_head_dim is None:
        raise HyLoError(f"{where}: gdn_head_dim is missing in hybrid_config.json")
    return {
        "num_heads": hybrid.gdn_num_heads,
        "head_k_dim": hybrid.gdn_head_dim,
        "head_v_dim": _GDN_EXPAND_V * hybrid.gdn_head_dim,
    }


def _mamba2_sizes(hybrid: HybridConfig, where: str) -> dict[str, Any]:
    sizes, d_inner, d_xb = hybrid.ssm_cfg, hybrid.d_inner, hybrid.d_xb
    if sizes is None or d_inner is None or d_xb is None:
        raise HyLoError(f"{where}: hybrid_config.json needs ssm_cfg, d_inner and d_xb for Mamba-2, or gdn_num_heads")
    if d_inner != sizes.ngroups * sizes.d_state or d_xb % sizes.d_state:
        raise HyLoError(
            f"{where}: d_inner {d_inner} and d_xb {d_xb} in hybrid_config.json do not fit "
            f"{sizes.ngroups} heads of {sizes.d_state} values"
        )
    return {"num_heads": sizes.ngroups, "num_kv_heads": d_xb // sizes.d_state, "head_dim": sizes.d_state}


def released_configs(config: HyLoConfig, where: str) -> tuple[PreTrainedConfig, HybridConfig]:
    """config.json and hybrid_config.json for one of our models: the inverse of `hylo_config`.

    Raises:
        HyLoError: naming the first thing that the format cannot hold.
    """
    assert config.token_mixers is not None
    kinds = sorted(set(config.token_mixers) - {"mla"})
    if len(kinds) > 1 or set(kinds) - {"gdn", "mamba2"} or "mla" not in config.token_mixers:
        raise HyLoError(
            f"{where} has layers of {', '.join(sorted(set(config.token_mixers)))}; "
            "the released format holds mla with one of gdn and mamba2"
        )
    family = "qwen3" if config.qk_norm else "llama"
    base = AutoConfig.for_model(family)
    kept = {field.name for field in fields(base)} - _BOOKKEEPING - {"model_type"}
    base = AutoConfig.for_model(family, **{key: value for key, value in config.to_dict().items() if key in kept})
    base.architectures = ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"]
    base.dtype = config.dtype
    hybrid = HybridConfig.parse(_hybrid_values(config), f"{where}: the released format cannot hold it")
    again = hylo_config(base, hybrid, tied=config.tie_word_embeddings, where=where)
    for name, ours, theirs in _differences(config, again):
        raise HyLoError(f"{where}: the released format cannot hold {name} {ours!r}, only {theirs!r}")
    return base, hybrid


def _hybrid_values(config: HyLoConfig) -> dict[str, Any]:
    """The file's keys; an impossible value stands as it is, to be named when parsed."""
    assert config.token_mixers is not None
    mla = asdict(config.geometry("mla"))
    rope = dict(config.rope_parameters or {})
    theta = rope.pop("rope_theta", None)
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if "mamba2" in config.token_mixers:
        sizes = asdict(config.geometry("mamba2"))
        heads, kv_heads, head_dim = sizes["num_heads"], sizes["num_kv_heads"], sizes["head_dim"]
    values = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "hidden_act": config.hidden_act,
        "n_layer": config.num_hidden_layers,
        "mla_layers": [layer for layer, mixer in enumerate(config.token_mixers) if mixer == "mla"],
        "rms_norm_eps": config.rms_norm_eps,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        **{key: mla[key] for key in ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim")},
        "v_head_dim": mla["v_head_dim"],
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": theta,
        "rope_scaling": None if rope == {"rope_type": "default"} else rope,
        "rope_type": "default" if rope == {"rope_type": "default"} else "yarn",
        "attention_bias": config.attention_bias,
        "attention_dropout": config.attention_dropout,
        "d_model": config.hidden_size,
        "ssm_cfg": {"ngroups": heads, "d_state": head_dim},
        "d_inner": heads * head_dim,
        "d_xb": kv_heads * head_dim,
    }
    if "gdn" in config.token_mixers:
        sizes = asdict(config.geometry("gdn"))
        values |= {"gdn_num_heads": sizes["num_heads"], "gdn_head_dim": sizes["head_k_dim"]}
    return values


def _differences(config: HyLoConfig, again: HyLoConfig) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of everything in which a config differs from what its released form means."""
    for mixer in sorted(set(config.token_mixers or [])):
        ours, theirs = asdict(config.geometry(mixer)), asdict(again.geometry(mixer))
        yield from ((f"{mixer}.{size}", ours[size], theirs[size]) for size in ours if ours[size] != theirs[size])
    for name in sorted({field.name for field in fields(config)} - _BOOKKEEPING - _OF_ATTENTION - {"mixer_geometry"}):
        if getattr(config, name) != getattr(again, name):
            yield name, getattr(config, name), getattr(again, name)
