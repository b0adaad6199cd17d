"""HyLoForCausalLM: a Llama whose layers each name their token mixer. Single device, Hugging Face native."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import SiLUActivation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hylo.cache import HyLoCache, make_cache
from hylo.config import HyLoConfig
from hylo.mixers import TokenMixer, mixer_class
from hylo.mixers.norm import RMSNorm
from hylo.mixers.rotary import RotaryEmbedding
from hylo.ops.packing import document_offsets, left_padding, offsets_of
from hylo.ops.swiglu import swiglu

# Tokens of a long sequence that pass an MLP at a time, where no gradients are wanted.
MLP_CHUNK = 16384


class MLP(LlamaMLP):
    """Llama's MLP, some tokens at a time: its values inside are several times as wide as the stream.

    Attributes:
        chunk_size: tokens at a time in a training step too, each chunk made again in the backward pass; None for all at
            once. Without gradients sequences pass in chunks anyway, at no cost.
    """

    chunk_size: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        training = torch.is_grad_enabled()
        size = self.chunk_size if training else MLP_CHUNK
        if size is None or x.shape[-2] <= size:
            return self._whole(x)
        if training:
            parts = [checkpoint(self._whole, part, use_reentrant=False) for part in x.split(size, dim=-2)]
        else:
            parts = [self._whole(part) for part in x.split(size, dim=-2)]
        return torch.cat(parts, dim=-2)

    def _whole(self, x: Tensor) -> Tensor:
        if not isinstance(self.act_fn, SiLUActivation | nn.SiLU):
            return super().forward(x)
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class HyLoDecoderLayer(GradientCheckpointingLayer):
    """Norm, token mixer, residual; norm, MLP, residual."""

    def __init__(self, config: HyLoConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = config.mixer_of(layer_idx)(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states, _products_dtype(hidden_states))
        mixed = self.mixer(normed, position_embeddings, attention_mask, past_key_values, **kwargs)
        return self.after_mixing(hidden_states, mixed)

    def after_mixing(self, hidden_states: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the layer, given its input and what its mixer made of it, `[B, T, D]` each."""
        normed, hidden_states = self.post_attention_layernorm(
            mixed, _products_dtype(hidden_states), residual=hidden_states
        )
        return hidden_states + self.mlp(normed)


def _products_dtype(hidden_states: Tensor) -> torch.dtype | None:
    """What matrix products read under autocast: norms feed nothing else, and a layer has many that read the same."""
    kind = hidden_states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class HyLoPreTrainedModel(PreTrainedModel):
    config: HyLoConfig
    config_class = HyLoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["HyLoDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    # None but our own: vLLM's --model-impl transformers would keep no state from step to step.
    _supports_attention_backend = False
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
    """What the layers of one call share: masks by layer type, cos and sin by mixer, offsets of documents, padding."""

    layer_types: list[str]
    masks: dict[str, Tensor | None]
    positions: dict[str, tuple[Tensor, Tensor]]
    cu_seqlens: Tensor | None = None
    left_padding: list[int] | None = None

    def arguments(self, mixer: TokenMixer) -> dict[str, Any]:
        """The keyword arguments for one mixer (or the layer that holds it)."""
        return {
            "position_embeddings": self.positions.get(mixer.name),
            "attention_mask": self.masks[self.layer_types[mixer.layer_idx]],
            "cu_seqlens": self.cu_seqlens,
            "left_padding": self.left_padding,
        }


class HyLoModel(HyLoPreTrainedModel):
    def __init__(self, config: HyLoConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([HyLoDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # One for each mixer that rotates: a mixer may rotate fewer values a head than the base.
        self.rotary_embeddings = nn.ModuleDict()
        for name in sorted(set(config.token_mixers or [])):
            rotary = mixer_class(name).rotary_embedding(config)
            if rotary is not None:
                self.rotary_embeddings[name] = rotary
        self.gradient_checkpointing = False
        # Under autocast: float32, as the embedding gives it, or less where a training step is to be fast.
        self.stream_dtype: torch.dtype | None = None
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
        cu_seqlens: Tensor | None = None,
    ) -> MixingContext:
        """Masks and rotary angles for one call, each made once for all layers of a mixer.

        Args:
            inputs_embeds: `[B, T, D]`, for its shape, dtype and device.
            attention_mask: `[B, S]` over cached and new tokens, zero where padding; or None.
            position_ids: `[B or 1, T]`; the positions after the cached tokens by default.
            cu_seqlens: `[N + 1]` offsets of documents packed into one row; position_ids then begin anew in each.
        """
        length, device = inputs_embeds.shape[1], inputs_embeds.device
        layer_types = self.config.layer_types
        attends = {"full_attention", "sliding_attention"} & set(layer_types)
        # A cache of linear layers alone has no length, and such a model needs neither positions nor a causal mask.
        seen = past_key_values.get_seq_length() if past_key_values is not None and attends else 0
        if position_ids is None:
            position_ids = (torch.arange(length, device=device) + seen)[None]
            if cu_seqlens is not None:
                begins = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=length)
                position_ids = position_ids - begins
        if attention_mask is not None and attention_mask.dim() == 2 and bool(attention_mask.all()):
            attention_mask = None
        masks: dict[str, Tensor | None] = {
            "full_attention": None,
            "sliding_attention": None,
            "linear_attention": None,
        }
        if attention_mask is not None and attention_mask.dim() == 2:
            new = attention_mask[:, -length:]
            masks["linear_attention"] = None if bool(new.all()) else new
        # A mask over a long past is large: it is made where it says more than that the past is seen.
        sdpa = self.config._attn_implementation == "sdpa"
        continued = seen > 0 and length > 1 and torch.is_grad_enabled()
        arguments = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        # Left padding of a continued prompt is a number a row: no mask over the past is needed to tell it.
        padding = left_padding(attention_mask) if sdpa and seen > 0 and length > 1 and not continued else None
        told = attention_mask is None or padding is not None
        if cu_seqlens is None and "full_attention" in attends and (not told or continued or not sdpa):
            masks["full_attention"] = create_causal_mask(**arguments, layer_idx=layer_types.index("full_attention"))
        if cu_seqlens is None and "sliding_attention" in attends:
            masks["sliding_attention"] = create_sliding_window_causal_mask(
                **arguments, layer_idx=layer_types.index("sliding_attention")
            )
        return MixingContext(
            layer_types=layer_types,
            masks=masks,
            positions={name: rotary(inputs_embeds, position_ids) for name, rotary in self.rotary_embeddings.items()},
            cu_seqlens=cu_seqlens,
            left_padding=padding,
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
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As any transformers decoder's, packed documents included.

        Args:
            cu_seqlens: `[N + 1]` int32, from 0 to B * T: where each document begins in the rows laid end to end. No
                document sees another, whatever the mixer. Found from `position_ids` that begin anew within a row,
                where there is neither a cache nor a mask.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.stream_dtype is not None:
            inputs_embeds = inputs_embeds.to(self.stream_dtype)
        shape = inputs_embeds.shape
        # transformers' collators name the offsets so, beside others that follow from them.
        cu_seqlens = kwargs.pop("cu_seq_lens_q", cu_seqlens)
        for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
            kwargs.pop(name, None)
        packed = cu_seqlens is not None or position_ids is not None
        if packed and past_key_values is None and attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if cu_seqlens is None and position_ids is not None and attention_mask is None and past_key_values is None:
            offsets = document_offsets(position_ids.expand(shape[:2]))
            cu_seqlens = offsets if len(offsets) > shape[0] + 1 else None
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(inputs_embeds.device, torch.int32)
            _check_packed(cu_seqlens, shape, attention_mask, past_key_values)
            use_cache = False
            inputs_embeds = inputs_embeds.reshape(1, -1, shape[-1])
            if position_ids is not None:
                position_ids = cast(torch.LongTensor, position_ids.expand(shape[:2]).reshape(1, -1))
        if use_cache and past_key_values is None:
            past_key_values = make_cache(self.config)
        if past_key_values is not None and len(past_key_values.layers) != self.config.num_hidden_layers:
            raise ValueError("expected a cache of this model, such as hylo.cache.make_cache(config) makes")

        context = self.mixing_context(inputs_embeds, attention_mask, position_ids, past_key_values, cu_seqlens)
        hidden_states = inputs_embeds
        for layer in self.decoder_layers:
            hidden_states = layer(
                hidden_states, **context.arguments(layer.mixer), past_key_values=past_key_values, **kwargs
            )
        if isinstance(past_key_values, HyLoCache):
            past_key_values.seen += shape[1]
        hidden_states = self.norm(hidden_states).view(shape)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


def _check_packed(
    cu_seqlens: Tensor, shape: torch.Size, attention_mask: Tensor | None, past_key_values: Cache | None
) -> None:
    """Raises ValueError where offsets do not fit the batch `[B, T, D]`."""
    if attention_mask is not None or past_key_values is not None:
        raise ValueError("packed documents (cu_seqlens) take neither attention_mask nor past_key_values")
    tokens = shape[0] * shape[1]
    offsets = offsets_of(cu_seqlens) if cu_seqlens.dim() == 1 else []
    rises = len(offsets) > 1 and all(end >= begin for begin, end in pairwise(offsets))
    if not rises or offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(f"cu_seqlens: expected offsets that rise from 0 to {tokens}, the tokens of the batch")


# Tokens of a prompt that pass the model at a time, so that memory stays flat however long the prompt is.
PREFILL_CHUNK = 8192


class HyLoForCausalLM(HyLoPreTrainedModel, GenerationMixin):
    """The language model: loads, saves and generates as any transformers model."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: HyLoConfig) -> None:
        super().__init__(config)
        self.model = HyLoModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # A state cannot be taken back: transformers then refuses to generate from guesses.
        self._is_stateful = "linear_attention" in config.layer_types
        self.post_init()

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """As transformers' own, with a cache that has room for all new tokens, and prompts longer than
        `prefill_chunk_size` (8,192 by default; None for the whole prompt at once) read in chunks. `inputs_embeds` are
        read at once."""
        input_ids: Tensor | None = inputs if inputs is not None else kwargs.get("input_ids")
        prompt = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        settings = generation_config if generation_config is not None else self.generation_config

        def setting(name: str) -> Any:
            return kwargs[name] if name in kwargs else getattr(settings, name, None)

        if setting("cache_implementation") is not None:
            raise ValueError("cache_implementation: a hybrid has a cache of its own; leave it out")
        own_cache = setting("use_cache") is not False and kwargs.get("past_key_values") is None
        if own_cache:
            # Without a prompt, generation begins with one token.
            length = 1 if prompt is None else prompt.shape[1]
            new_tokens = setting("max_new_tokens") or max(0, (setting("max_length") or 0) - length)
            # The last new token is not read again.
            cache = make_cache(self.config, reserve=length + max(0, new_tokens - 1))
            if setting("is_assistant"):
                if self._is_stateful:
                    raise ValueError("assisted generation: a state cannot be taken back; the draft has linear layers")
                # Guesses will be taken back, from windows too.
                cache.activate_past_recording()
            kwargs["past_key_values"] = cache
            told = "prefill_chunk_size" in kwargs or setting("prefill_chunk_size") is not None
            if input_ids is not None and not told and length > PREFILL_CHUNK:
                kwargs["prefill_chunk_size"] = PREFILL_CHUNK
        return super().generate(inputs, generation_config=generation_config, **kwargs)

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
        cu_seqlens: Tensor | None = None,
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
            cu_seqlens=cu_seqlens,
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
