"""Attention that is kept."""

from collections.abc import Mapping

from hylo.config import HyLoConfig
from hylo.upcycle.initialise.rules import Rule, copied


def attention_rules(config: HyLoConfig) -> Mapping[str, Rule]:
    names = [f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    if config.attention_bias:
        names += [f"{name}.bias" for name in ("q_proj", "k_proj", "v_proj")]
    if config.attention_output_bias:
        names.append("o_proj.bias")
    if config.qk_norm:
        names += ["q_norm.weight", "k_norm.weight"]
    return {name: copied(name, "as it is") for name in names}
