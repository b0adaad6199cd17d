"""Loads a hybrid's own checkpoint into the served model: every tensor of it, and none but those."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.modeling import HyLoForCausalLM


@dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint goes.

    Attributes:
        name: of the parameter, or of the module whose weight and bias it is.
        shard: which part of a joined parameter; None for all of it.
        split: the tensor is cut into pieces of these rows, which are shards 0, 1, ...
    """

    name: str
    shard: int | str | None = None
    split: tuple[int, ...] | None = None


def expected_shapes(config: HyLoConfig) -> dict[str, torch.Size]:
    """Every tensor of a checkpoint, by name."""
    with torch.device("meta"):
        state = HyLoForCausalLM(config).state_dict()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {name: tensor.shape for name, tensor in state.items() if name not in tied}


def load_checkpoint(model: nn.Module, config: HyLoConfig, tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Fills the model's parameters.

    Returns:
        The names of the parameters that were filled, all of them.

    Raises:
        HyLoError: names a tensor that is missing, unknown, or of another shape than the config says.
    """
    expected = expected_shapes(config)
    parameters = dict(model.named_parameters())
    seen: set[str] = set()
    filled: set[str] = set()
    for name, tensor in tensors:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name not in expected:
            raise HyLoError(f"checkpoint: {name} is no tensor of this model")
        if tensor.shape != expected[name]:
            raise HyLoError(f"checkpoint: {name} is {list(tensor.shape)}; expected {list(expected[name])}")
        place = _place(model, name)
        if place.name not in parameters:
            raise HyLoError(f"checkpoint: {name} has no place ({place.name}) in the served model")
        parameter = parameters[place.name]
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        if place.split is not None:
            for shard, piece in enumerate(tensor.split(place.split)):
                loader(parameter, piece, shard)
        elif place.shard is not None:
            loader(parameter, tensor, place.shard)
        else:
            loader(parameter, tensor)
        seen.add(name)
        filled.add(place.name)
    missing = sorted(set(expected) - seen)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise HyLoError(f"checkpoint: {missing[0]} is missing{more}")
    return filled


def _place(model: nn.Module, name: str) -> Place:
    """Asks the modules on the way, the innermost first.

    One whose parameters are laid out otherwise has `places`, by the name inside it of a parameter or of a module.
    """
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        prefix = ".".join(parts[:depth])
        try:
            module = model.get_submodule(prefix)
        except AttributeError:
            continue
        inside = ".".join(parts[depth:])
        for key, place in getattr(module, "places", {}).items():
            if inside == key or inside.startswith(f"{key}."):
                return Place(f"{prefix}.{place.name}{inside[len(key) :]}", place.shard, place.split)
    return Place(name)
