"""Tensor names and rotary rows, between a released checkpoint and this package's.

A released MLA rotates neighbouring values (2i, 2i+1), the DeepSeek layout; this package's rotates halves
(i, i + rope/2). The same angles turn the same pairs once the rotary rows are put in the other order.
"""

import torch
from torch import Tensor

from hylo.config import HyLoConfig
from hylo.mixers.mla import MLAGeometry

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# The module of a released layer that holds each mixer.
MODULES = {"mla": "mla", "gdn": "gdn", "mamba2": "mamba"}


def split_name(name: str) -> tuple[int, str] | None:
    """Layer index and the mixer's own name of a tensor; None for one of no mixer."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"] and parts[3] == "mixer":
        return int(parts[2]), ".".join(parts[4:])
    return None


def released_name(name: str, config: HyLoConfig) -> str:
    """What a released checkpoint calls one of our tensors."""
    located = split_name(name)
    if located is None:
        return name
    layer, suffix = located
    assert config.token_mixers is not None
    mixer = config.token_mixers[layer]
    if mixer == "mla" and suffix == "o_proj.weight":
        suffix = "out_proj.weight"
    return f"model.layers.{layer}.{MODULES[mixer]}.{suffix}"


def halves_from_pairs(name: str, tensor: Tensor, config: HyLoConfig) -> Tensor:
    """A released tensor, by our name, with its rotary rows in our order. No value changes."""
    order = _rotary_order(name, config)
    return tensor if order is None else tensor[order]


def pairs_from_halves(name: str, tensor: Tensor, config: HyLoConfig) -> Tensor:
    """The inverse of `halves_from_pairs`."""
    order = _rotary_order(name, config)
    return tensor if order is None else tensor[order.argsort()]


def _rotary_order(name: str, config: HyLoConfig) -> Tensor | None:
    """For each row of ours, the released row it is; None for tensors without rotary rows."""
    located = split_name(name)
    assert config.token_mixers is not None
    if located is None or config.token_mixers[located[0]] != "mla":
        return None
    sizes = config.geometry("mla")
    assert isinstance(sizes, MLAGeometry)
    pairs = torch.arange(sizes.qk_rope_head_dim).view(-1, 2).T.flatten()
    head = _after(sizes.qk_nope_head_dim, pairs)
    match located[1]:
        case "q_b_proj.weight":
            starts = torch.arange(config.num_attention_heads) * sizes.qk_head_dim
            return (starts[:, None] + head).flatten()
        case "kv_a_proj_with_mqa.weight":
            return _after(sizes.kv_lora_rank, pairs)
        case "q_norm.weight" | "k_norm.weight":
            return head
    return None


def _after(kept: int, order: Tensor) -> Tensor:
    """`kept` rows as they are, then the others in `order`."""
    return torch.cat([torch.arange(kept), kept + order])
