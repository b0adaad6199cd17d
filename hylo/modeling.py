"""HyLoForCausalLM: a Llama whose layers each name their token mixer. Single device, Hugging Face native."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hylo.cache import LinearCache, make_cache
from hylo.config import HyLoConfig
from hylo.mixers import TokenMixer, mixer_class
from hylo.mixers.rotary import RotaryEmbedding


class HyLoDecoderLayer(GradientCheckpointingLayer):
    """Norm, token mixer, residual; norm, MLP, residual."""

    def __init__(self, config: HyLoConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = config.mixer_of(layer_idx)(config, layer_idx)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        mixed = self.mixer(
            self.input_layernorm(hidden_states), position_embeddings, attention_mask, past_key_values, **kwargs
        )
        return self.after_mixing(hidden_states, mixed)

    def after_mixing(self, hidden_states: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the layer, given its input and what its mixer made of it, `[B, T, D]` each."""
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HyLoPreTrainedModel(PreTrainedModel):
    config: HyLoConfig
    config_class = HyLoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["HyLoDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": HyLoDecoderLayer}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RotaryEmbedding):
            frequencies = module.initial_frequencies()
            init.copy_(module.inv_freq, frequencies)
            init.copy_(module.original_inv_freq, frequencies)
            return
        super()._init_weights(module)
        if isinstance(module, TokenMixer):
            module.reset_parameters()


@dataclass(frozen=True)
class MixingContext:
    """What the layers of one call share: masks by layer type, cos and sin by mixer."""

    masks: dict[str, Tensor | None]
    positions: dict[str, tuple[Tensor, Tensor]]

    def arguments(self, mixer: TokenMixer) -> dict[str, Any]:
        """The keyword arguments for one mixer (or the layer that holds it)."""
        return {
            "position_embeddings": self.positions.get(mixer.name),
            "attention_mask": self.masks[mixer.layer_type],
        }


class HyLoModel(HyLoPreTrainedModel):
    def __init__(self, config: HyLoConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([HyLoDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # One for each mixer that rotates: a mixer may rotate fewer values a head than the base.
        self.rotary_embeddings = nn.ModuleDict()
        for name in sorted(set(config.token_mixers or [])):
            rotary = mixer_class(name).rotary_embedding(config)
            if rotary is not None:
                self.rotary_embeddings[name] = rotary
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def decoder_layers(self) -> list[HyLoDecoderLayer]:
        return cast(list[HyLoDecoderLayer], list(self.layers))

    def mixing_context(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> MixingContext:
        """Masks and rotary angles for one call, each made once for all layers of a mixer.

        Args:
            inputs_embeds: `[B, T, D]`, for its shape, dtype and device.
            attention_mask: `[B, S]` over cached and new tokens, zero where padding; or None.
            position_ids: `[B or 1, T]`; the positions after the cached tokens by default.
        """
        # A cache of linear layers alone has no length, and such a model needs neither positions nor a causal mask.
        attends = "full_attention" in self.config.layer_types
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None and attends else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]
        causal = None
        if attends:
            causal = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        return MixingContext(
            masks={
                "full_attention": causal,
                "linear_attention": _padding_mask(attention_mask, inputs_embeds.shape[1]),
            },
            positions={name: rotary(inputs_embeds, position_ids) for name, rotary in self.rotary_embeddings.items()},
        )

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = make_cache(self.config)

        context = self.mixing_context(inputs_embeds, attention_mask, position_ids, past_key_values)
        hidden_states = inputs_embeds
        for layer in self.decoder_layers:
            hidden_states = layer(
                hidden_states, **context.arguments(layer.mixer), past_key_values=past_key_values, **kwargs
            )
        if isinstance(past_key_values, LinearCache):
            past_key_values.seen += inputs_embeds.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def _padding_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """The `[B, T]` mask of this call's tokens, or None where all are real."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    mask = attention_mask[:, -length:]
    return None if length == 1 or bool(mask.all()) else mask


class HyLoForCausalLM(HyLoPreTrainedModel, GenerationMixin):
    """The language model: loads, saves and generates as any transformers model."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HyLoConfig) -> None:
        super().__init__(config)
        self.model = HyLoModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, which makes the right cache wherever a layer attends."""
        if "full_attention" not in self.config.layer_types and kwargs.get(
            "use_cache", self.generation_config.use_cache
        ):
            kwargs.setdefault("past_key_values", make_cache(self.config))
        return super().generate(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
