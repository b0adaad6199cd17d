"""Tiny checkpoints in the released format, written by hand from its description: no exporter is asked."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import VOCABULARY, make_tokenizer
from torch import Tensor

D, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 32, 4, 4, 2, 8, 48
# Four rotary pairs: with two, the order of the rows would be its own inverse.
NOPE, ROPE, V, RANK, Q_RANK = 4, 8, 6, 10, 12
GDN_HEADS, GDN_DIM = 3, 4
MLA_LAYERS = [1, 2]
YARN = {"factor": 32.0, "original_max_position_embeddings": 2048, "rope_type": "yarn"}

# The base's own scaling, which the hybrid's takes the place of.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hybrid_config(linear: str, **changes: Any) -> dict[str, Any]:
    """Every key of a released hybrid_config.json."""
    values: dict[str, Any] = {
        "hidden_size": D,
        "intermediate_size": MLP,
        "hidden_act": "silu",
        "n_layer": LAYERS,
        "mla_layers": MLA_LAYERS,
        "rms_norm_eps": 1e-5,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "kv_lora_rank": RANK,
        "q_lora_rank": Q_RANK,
        "use_lora_layer_norm": False,
        "use_full_kv_head": False,
        "qk_rope_head_dim": ROPE,
        "qk_nope_head_dim": NOPE,
        "v_head_dim": V,
        "qkv_rank_divisor": 8,
        "max_position_embeddings": 65536,
        "rope_theta": 500000.0,
        "rope_scaling": YARN,
        "rope_type": "yarn",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "d_model": D,
        "ssm_cfg": {"expand": 1, "ngroups": HEADS, "d_state": HEAD_DIM, "repeat_kv_before_conv": False},
        "d_inner": HEADS * HEAD_DIM,
        "d_xb": KV_HEADS * HEAD_DIM,
    }
    if linear == "gdn":
        values |= {"gdn_num_heads": GDN_HEADS, "gdn_head_dim": GDN_DIM}
    return values | changes


def base_config(family: str, **changes: Any) -> dict[str, Any]:
    """The base's config.json, whose length and scaling are not the hybrid's, as transformers 4 wrote it."""
    return {
        "architectures": ["LlamaForCausalLM" if family == "llama" else "Qwen3ForCausalLM"],
        "model_type": family,
        "vocab_size": VOCABULARY,
        "hidden_size": D,
        "intermediate_size": MLP,
        "hidden_act": "silu",
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3 if family == "llama" else None,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    } | changes


def released_shapes(family: str, linear: str) -> dict[str, tuple[int, ...]]:
    key, value, channels = GDN_HEADS * GDN_DIM, 2 * GDN_HEADS * GDN_DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM
    mixers: dict[str, dict[str, tuple[int, ...]]] = {
        "mla": {
            "q_a_proj.weight": (Q_RANK, D),
            "q_b_proj.weight": (HEADS * (NOPE + ROPE), Q_RANK),
            "kv_a_proj_with_mqa.weight": (RANK + ROPE, D),
            "kv_b_proj.weight": (KV_HEADS * (NOPE + V), RANK),
            "out_proj.weight": (D, HEADS * V),
        },
        "gdn": {
            "q_proj.weight": (key, D),
            "k_proj.weight": (key, D),
            "v_proj.weight": (value, D),
            "g_proj.weight": (value, D),
            "a_proj.weight": (GDN_HEADS, D),
            "b_proj.weight": (GDN_HEADS, D),
            "q_conv1d.weight": (key, 1, 4),
            "k_conv1d.weight": (key, 1, 4),
            "v_conv1d.weight": (value, 1, 4),
            "A_log": (GDN_HEADS,),
            "dt_bias": (GDN_HEADS,),
            "o_norm.weight": (2 * GDN_DIM,),
            "o_proj.weight": (D, value),
        },
        "mamba": {
            "in_proj.weight": (HEADS * HEAD_DIM + channels + HEADS, D),
            "conv1d.weight": (channels, 1, 4),
            "conv1d.bias": (channels,),
            "dt_bias": (HEADS,),
            "A_log": (HEADS,),
            "D": (HEADS,),
            "norm.weight": (HEADS * HEAD_DIM,),
            "out_proj.weight": (D, HEADS * HEAD_DIM),
        },
    }
    if family == "qwen3":
        mixers["mla"] |= {"q_norm.weight": (NOPE + ROPE,), "k_norm.weight": (NOPE + ROPE,)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (VOCABULARY, D),
    }
    for i in range(LAYERS):
        mixer = "mla" if i in MLA_LAYERS else linear
        layer = {f"{mixer}.{name}": shape for name, shape in mixers[mixer].items()}
        layer |= {f"mlp.{name}_proj.weight": (MLP, D) for name in ("gate", "up")}
        layer |= {"mlp.down_proj.weight": (D, MLP), "input_layernorm.weight": (D,)}
        layer["post_attention_layernorm.weight"] = (D,)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def released_tensors(family: str, linear: str) -> dict[str, Tensor]:
    """Random float32 values, every one of which matters."""
    generator = torch.Generator().manual_seed(11)
    return {
        name: 0.4 * torch.randn(shape, generator=generator) + ("norm" in name)
        for name, shape in released_shapes(family, linear).items()
    }


def write_released(
    folder: Path,
    family: str = "llama",
    linear: str = "gdn",
    *,
    tensors: dict[str, Tensor] | None = None,
    base: dict[str, Any] | None = None,
    hybrid: dict[str, Any] | None = None,
) -> Path:
    """A whole checkpoint; `linear` is gdn or mamba. What is given stands in place of what belongs there."""
    folder.mkdir(parents=True)
    save_file(tensors or released_tensors(family, linear), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(base or base_config(family)))
    (folder / "hybrid_config.json").write_text(json.dumps(hybrid or hybrid_config(linear)))
    make_tokenizer().save_pretrained(folder)
    return folder
