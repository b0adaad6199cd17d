"""The families of bases, and what each adds to Llama: from a base's config to the hybrid's.

All of them are Llama's decoder with the same tensor names. What differs is told to `HyLoConfig`:

- `llama` (2, 3.x): as it is; rope scaling, tied or untied heads, and biases where the config says so.
- `mistral`: a sliding window in every layer, where the config has one.
- `qwen2` (2, 2.5): biases of q, k and v; windows in some layers, where the config says so.
- `qwen3`: RMS norms of query and key heads; windows likewise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.upcycle.geometry import geometry_for, resolve_geometry
from hylo.upcycle.initialise import RULES

# transformers' model types whose attention layers this package knows how to convert.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
# What transformers takes apart before it looks at its type.
_KINDS: tuple[tuple[str, type, str], ...] = (
    ("model_type", str, "a name"),
    ("quantization_config", dict, "an object"),
    ("layer_types", list, "a list with one for each layer"),
    ("id2label", dict, "an object"),
)
# Their frequencies follow the longest document of the input, for whole heads only: documents packed into one row would
# depend on each other.
_MOVING_ROPE = ("dynamic", "longrope")


def check_family(config: PreTrainedConfig, where: object) -> None:
    """Raises HyLoError, with the families there are, where the config is of another, or its sizes make no model."""
    if config.model_type not in FAMILIES:
        raise HyLoError(f"{where}: the {config.model_type!r} family is not supported; expected {', '.join(FAMILIES)}")
    if getattr(config, "quantization_config", None):
        raise HyLoError(f"{where}: the weights are quantised (quantization_config); expected a base in 16 or 32 bits")
    if config.hidden_act not in ACT2FN:
        raise HyLoError(f"{where}: unknown hidden_act {config.hidden_act!r}")
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in (*ROPE_INIT_FUNCTIONS, "default"):
        raise HyLoError(f"{where}: unknown rope_type {rope_type!r}; expected one of {', '.join(ROPE_INIT_FUNCTIONS)}")
    for size in _SIZES:
        if getattr(config, size) < 1:
            raise HyLoError(f"{where}: {size} is {getattr(config, size)}; expected at least 1")
    if head_dim(config) < 1:
        raise HyLoError(f"{where}: head_dim is {head_dim(config)}; expected at least 1")
    if (config.pad_token_id or 0) >= config.vocab_size:
        raise HyLoError(f"{where}: pad_token_id is {config.pad_token_id}; expected one of {config.vocab_size} words")


def check_values(values: Any, where: object) -> None:
    """Raises HyLoError on what transformers would stumble over as it reads a config.json, whatever its family."""
    if not isinstance(values, dict):
        raise HyLoError(f"{where}: expected a JSON object")
    for key, kind, expected in _KINDS:
        value = values.get(key)
        if value is not None and not isinstance(value, kind):
            raise HyLoError(f"{where}: {key} is {value!r}; expected {expected}")
    for key in ("dtype", "torch_dtype"):
        name = values.get(key)
        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        # Models of several parts name one for each.
        if not isinstance(name, dict | None) and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise HyLoError(f"{where}: {key} is {name!r}; expected one such as bfloat16, float16 or float32")
    for size in _SIZES if values.get("model_type") in (*FAMILIES, HyLoConfig.model_type) else ():
        if isinstance(values.get(size), int) and values[size] < 1:
            raise HyLoError(f"{where}: {size} is {values[size]}; expected at least 1")


def check_named_family(values: Any, where: object, *also: str) -> None:
    """The same of a config.json as it is read, before transformers is asked, which may not know the family."""
    if not isinstance(values, dict):
        raise HyLoError(f"{where}: expected a JSON object")
    family = values.get("model_type")
    if family not in (*FAMILIES, *also):
        raise HyLoError(f"{where}: the {family!r} family is not supported; expected {', '.join(FAMILIES)}")


def head_dim(config: PreTrainedConfig) -> int:
    """Not every family's config names it."""
    size = getattr(config, "head_dim", None)
    return config.hidden_size // config.num_attention_heads if size is None else size


def hybrid_config(
    base: PreTrainedConfig,
    mixers: Sequence[str],
    geometry: Mapping[str, Mapping[str, Any]] | str,
    source_name: str,
    rope_scaling: Mapping[str, Any] | None = None,
) -> HyLoConfig:
    """The config of a base converted to one mixer a layer.

    Args:
        geometry: sizes by mixer, or "paper".
        source_name: what it names as its base.
        rope_scaling: YaRN's factor and original_max_position_embeddings, in place of the base's own scaling.

    Raises:
        HyLoError: where base, mixers and geometry do not fit together.
    """
    known = {field.name for field in fields(LlamaConfig)}
    values = {key: value for key, value in base.to_dict().items() if key in known}
    for key in ("architectures", "dtype", "transformers_version"):
        values.pop(key, None)
    values |= {"head_dim": head_dim(base)} | _differences(base)
    if rope_scaling is not None:
        values |= yarn(base, rope_scaling)
    given = resolve_geometry(geometry, mixers, base)
    sizes = geometry_for(
        mixers,
        given,
        num_heads=base.num_attention_heads,
        num_kv_heads=base.num_key_value_heads,
        head_dim=head_dim(base),
    )
    config = HyLoConfig(**values, token_mixers=list(mixers), mixer_geometry=sizes, base_model=source_name)
    config.architectures = ["HyLoForCausalLM"]
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    # With attention everywhere it is the base, as teachers are read.
    if rope_type in _MOVING_ROPE and set(mixers) != {"attention"}:
        raise HyLoError(
            f"rope_type {rope_type!r} is not supported in hybrids; convert with YaRN (rope_scaling) instead"
        )
    for name in sorted(set(mixers)):
        # Every mixer can be made from this base: so says the table of its rules.
        RULES["aligned"][name](config)
    return config


def _differences(base: PreTrainedConfig) -> dict[str, Any]:
    """What the family adds to Llama, as `HyLoConfig` names it."""
    bias = base.model_type == "qwen2" or bool(getattr(base, "attention_bias", False))
    qk_norm = base.model_type == "qwen3"
    if qk_norm and bias:
        raise HyLoError("attention biases with norms of q and k (Qwen3 with attention_bias) are not supported")
    window = getattr(base, "sliding_window", None)
    if base.model_type == "mistral":
        layer_types = ["sliding_attention"] * base.num_hidden_layers
    else:
        layer_types = getattr(base, "layer_types", None) or []
    windowed = [i for i, kind in enumerate(layer_types) if kind == "sliding_attention"] if window else []
    return {
        "attention_bias": bias,
        "attention_output_bias": bias and base.model_type != "qwen2",
        "qk_norm": qk_norm,
        "sliding_window": window if windowed else None,
        "sliding_layers": windowed or None,
    }


def yarn(base: PreTrainedConfig, rope_scaling: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN (arXiv 2309.00071), and the length that it reaches."""
    theta = (base.rope_parameters or {}).get("rope_theta", 10_000.0)
    factor, original = rope_scaling["factor"], rope_scaling["original_max_position_embeddings"]
    parameters = {"rope_type": "yarn", "rope_theta": theta, "factor": float(factor)}
    return {
        "rope_parameters": parameters | {"original_max_position_embeddings": original},
        "max_position_embeddings": int(factor * original),
    }
