"""What a model is made of: parameters, cache and state, counted on the meta device."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from hylo.config import HyLoConfig
from hylo.modeling import HyLoForCausalLM


@dataclass(frozen=True)
class ModelPlan:
    """The counts of a hybrid, or of a base, which is a hybrid whose layers are all attention.

    Attributes:
        config: of the model.
        parameters: as saved: a tied head is not counted apart from the embedding.
        parameters_untied: with the head counted apart, as published counts do.
        replaced_parameters: of the mixers that replace attention, which layerwise stages train.
    """

    config: HyLoConfig
    parameters: int
    parameters_untied: int
    replaced_parameters: int

    @cached_property
    def layers(self) -> list[str]:
        return list(self.config.token_mixers or [])

    @property
    def head_parameters(self) -> int:
        """Of the matrix from hidden states to the vocabulary, and of the embedding."""
        return self.config.vocab_size * self.config.hidden_size


def plan_model(config: HyLoConfig) -> ModelPlan:
    """Counts the parameters of a model that is never filled."""
    with torch.device("meta"):
        model = HyLoForCausalLM(config)
    untied = sum(tensor.numel() for tensor in model.state_dict().values())
    tied = model.lm_head.weight.numel() if config.tie_word_embeddings else 0
    mixers = [layer.mixer for layer in model.model.decoder_layers if layer.mixer.replaces_attention]
    replaced = sum(parameter.numel() for mixer in mixers for parameter in mixer.parameters())
    return ModelPlan(config, untied - tied, untied, replaced)


def counts(model: ModelPlan, base: ModelPlan, element_size: int = 2) -> dict[str, Any]:
    """The sizes of a hybrid beside its base's, as JSON holds them; cache and convolution inputs of `element_size`."""
    cached, base_cached = model.config.cache_bytes(1, element_size), base.config.cache_bytes(1, element_size)
    return {
        "base": model.config.base_model,
        "parameters": model.parameters,
        "parameters_untied": model.parameters_untied,
        "base_parameters": base.parameters,
        "layers": model.layers,
        "geometry": model.config.mixer_geometry,
        "kv_cache_bytes_per_token": cached,
        "base_kv_cache_bytes_per_token": base_cached,
        "kv_cache_ratio": cached / base_cached,
        "state_bytes_per_sequence": model.config.state_bytes(element_size),
    }
