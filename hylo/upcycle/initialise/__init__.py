"""How each tensor of a mixer starts, given the attention layer that it replaces: one table of rules a mixer."""

from collections.abc import Callable, Mapping

from hylo.config import HyLoConfig
from hylo.upcycle.initialise.attention import attention_rules
from hylo.upcycle.initialise.linear import gdn_rules, kda_rules, mamba2_rules
from hylo.upcycle.initialise.mla import mla_rules
from hylo.upcycle.initialise.rules import Action, Rule
from hylo.upcycle.initialise.source import SourceAttention

RULES: dict[str, Callable[[HyLoConfig], Mapping[str, Rule]]] = {
    "attention": attention_rules,
    "mla": mla_rules,
    "gdn": gdn_rules,
    "kda": kda_rules,
    "mamba2": mamba2_rules,
}

__all__ = ["RULES", "Action", "Rule", "SourceAttention"]
