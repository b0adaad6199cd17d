"""How each tensor of a mixer starts, given the attention layer that it replaces: one table of rules a mixer.

A start is a table for every mixer: `aligned`, in which all that attention has a counterpart of begins near it, or
`paper`, as published.
"""

from collections.abc import Callable, Mapping
from typing import Literal

from hylo.config import HyLoConfig
from hylo.upcycle.initialise.attention import attention_rules
from hylo.upcycle.initialise.linear import gdn_rules, kda_rules, mamba2_rules
from hylo.upcycle.initialise.mla import mla_rules
from hylo.upcycle.initialise.paper import paper_gdn_rules, paper_kda_rules, paper_mamba2_rules, paper_mla_rules
from hylo.upcycle.initialise.rules import Action, Rule
from hylo.upcycle.initialise.source import SourceAttention

Start = Literal["aligned", "paper"]

RULES: Mapping[Start, Mapping[str, Callable[[HyLoConfig], Mapping[str, Rule]]]] = {
    "aligned": {
        "attention": attention_rules,
        "mla": mla_rules,
        "gdn": gdn_rules,
        "kda": kda_rules,
        "mamba2": mamba2_rules,
    },
    "paper": {
        "attention": attention_rules,
        "mla": paper_mla_rules,
        "gdn": paper_gdn_rules,
        "kda": paper_kda_rules,
        "mamba2": paper_mamba2_rules,
    },
}

__all__ = ["RULES", "Action", "Rule", "SourceAttention", "Start"]
