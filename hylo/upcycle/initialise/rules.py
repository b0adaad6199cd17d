"""Rules: what is done to make a tensor, from which tensors, and how. The plan prints them; the conversion runs them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hylo.config import HyLoConfig
from hylo.upcycle.initialise.source import SourceAttention, output_bias_sources

Action = Literal["copied", "decomposed", "solved", "fresh"]


@dataclass(frozen=True)
class Rule:
    """How one tensor of a mixer is made.

    Attributes:
        action: what is done.
        sources: what of the base layer it is made from; see `source.tensor_name`.
        note: how, in a few words.
        make: makes it, given the source layer and the shape to fill.
    """

    action: Action
    sources: tuple[str, ...]
    note: str
    make: Callable[[SourceAttention, torch.Size], Tensor]


def copied(name: str, note: str = "") -> Rule:
    return Rule("copied", (name,), note, lambda source, _: source.raw(name))


def fresh(note: str, make: Callable[[torch.Size], Tensor]) -> Rule:
    return Rule("fresh", (), note, lambda _, shape: make(shape))


def generator_for(shape: torch.Size) -> torch.Generator:
    """For random values of a shape, the same for the same shape."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(str(tuple(shape)).encode()).digest()[:4]))


def output_bias(config: HyLoConfig, name: str) -> dict[str, Rule]:
    """The output bias of a mixer in attention's place, where it has one."""
    if not config.mixer_output_bias:
        return {}
    note = "what the values' bias becomes" if config.attention_bias else "as it is"
    return {name: Rule("copied", output_bias_sources(config), note, lambda s, _: s.output_bias)}
