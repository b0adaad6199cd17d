"""Rope scaling of a GGUF file, which transformers' reader leaves out."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hylo.errors import HyLoError

# Of Llama 3.1 to 3.3: a file holds what they make of each frequency, not the numbers themselves.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_FACTORS = "rope_freqs.weight"
_LONG_ROPE = ("rope_factors_long.weight", "rope_factors_short.weight")


def restore_rope(config: PreTrainedConfig, gguf: Path) -> None:
    """Sets a config that was read from a GGUF file to the file's own rope scaling.

    Raises HyLoError where that is neither none nor Llama 3's.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    scaling = "longrope" if any(name in tensors for name in _LONG_ROPE) else _named_scaling(reader)
    if scaling is not None:
        raise HyLoError(f"{gguf}: rope scaling {scaling!r} is not read from GGUF; expected none, or Llama 3's")
    if _FACTORS in tensors:
        factors = torch.tensor(tensors[_FACTORS].data, dtype=torch.float32).flatten()
        if not bool((factors == 1).all()):
            config.rope_parameters = _llama3(config, factors, gguf)


def _named_scaling(reader: Any) -> str | None:
    """By the metadata; a factor without a type is linear."""
    found = {key.partition(".rope.")[2]: field.contents() for key, field in reader.fields.items() if ".rope." in key}
    factor = found.get("scaling.factor", found.get("scale_linear", 1.0))
    kind = found.get("scaling.type", "none" if factor in (0.0, 1.0) else "linear")
    return None if kind == "none" else str(kind)


def _llama3(config: PreTrainedConfig, factors: Tensor, gguf: Path) -> dict[str, Any]:
    """The rope parameters that divide each frequency by `factors`, `[hd / 2]`. Raises HyLoError where none do."""
    theta = config.rope_parameters["rope_theta"]
    scaled = copy.deepcopy(config)

    def frequencies(factor: float) -> Tensor:
        scaled.rope_parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **_LLAMA3}
        return ROPE_INIT_FUNCTIONS["llama3"](scaled, None)[0]

    whole, divided = frequencies(1.0), frequencies(factors.max().item())
    if factors.shape != whole.shape or not torch.allclose(whole / divided, factors, rtol=1e-3):
        raise HyLoError(f"{gguf}: {_FACTORS} is not Llama 3's rope scaling; no other is read from GGUF")
    return scaled.rope_parameters
