"""The hybrid as vLLM runs it: flat batches of tokens, heads over the ranks, caches that vLLM owns."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import maybe_prefix

from hylo.config import HyLoConfig
from hylo.mixers import mixer_class
from hylo.serve.architecture import keeps_latents
from hylo.serve.attention import ServedAttention
from hylo.serve.compilation import tell
from hylo.serve.delta import ServedGDN, ServedKDA
from hylo.serve.mamba2 import ServedMamba2
from hylo.serve.mla import ExpandedMLA
from hylo.serve.rotary import Angles, RotaryAngles
from hylo.serve.states import largest_state
from hylo.serve.weights import Place, load_checkpoint

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def served_mixer(config: HyLoConfig, name: str) -> type[nn.Module]:
    """The class that serves a mixer on this device."""
    if name == "mla" and keeps_latents(config):
        from hylo.serve.gpu.latent_attention import LatentMLA

        return LatentMLA
    served: dict[str, type[nn.Module]] = {
        "attention": ServedAttention,
        "mla": ExpandedMLA,
        "gdn": ServedGDN,
        "kda": ServedKDA,
        "mamba2": ServedMamba2,
    }
    return served[name]


class ServedMLP(nn.Module):
    """Llama's, its rows over the ranks."""

    places: ClassVar[dict[str, Place]] = {"gate_proj": Place("gate_up_proj", 0), "up_proj": Place("gate_up_proj", 1)}

    def __init__(self, vllm_config: "VllmConfig", prefix: str) -> None:
        super().__init__()
        config: HyLoConfig = vllm_config.model_config.hf_config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [config.intermediate_size] * 2,
            bias=config.mlp_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=config.mlp_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.activation = get_act_fn(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        out, _ = self.down_proj(self.activation(gate) * up)
        return out


class ServedLayer(nn.Module):
    """Norm, token mixer, residual; norm, MLP, residual."""

    def __init__(self, vllm_config: "VllmConfig", layer_idx: int, prefix: str) -> None:
        super().__init__()
        config: HyLoConfig = vllm_config.model_config.hf_config
        assert config.token_mixers is not None
        self.mixer_name = config.token_mixers[layer_idx]
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = served_mixer(config, self.mixer_name)(vllm_config, layer_idx, f"{prefix}.mixer")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = ServedMLP(vllm_config, f"{prefix}.mlp")

    def forward(self, added: Tensor, stream: Tensor | None, angles: dict[str, Angles]) -> tuple[Tensor, Tensor]:
        """What the layer before adds to the stream, and the stream; returns the same for the layer after."""
        if stream is None:
            stream = added
            normed = self.input_layernorm(added)
        else:
            normed, stream = self.input_layernorm(added, stream)
        mixed = self.mixer(normed, angles.get(self.mixer_name))
        normed, stream = self.post_attention_layernorm(mixed, stream)
        return self.mlp(normed), stream


@support_torch_compile
class ServedModel(nn.Module):
    """Embedding, layers, norm."""

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__()
        config: HyLoConfig = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [ServedLayer(vllm_config, i, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.angles = nn.ModuleDict()
        for name in sorted(set(config.token_mixers or [])):
            rotary = mixer_class(name).rotary_embedding(config)
            if rotary is not None:
                self.angles[name] = RotaryAngles(rotary)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        added = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        angles = {name: each(positions, added.dtype) for name, each in self.angles.items()}
        stream = None
        for layer in self.layers:
            added, stream = layer(added, stream, angles)
        normed, _ = self.norm(added, stream)
        return normed


class ServedHyLo(nn.Module):
    """What vLLM looks up by the architecture's name."""

    is_hybrid: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__()
        self.config: HyLoConfig = vllm_config.model_config.hf_config
        tell(vllm_config)
        self.model = ServedModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Token ids or embeddings, and positions, `[T]` each, to hidden states `[T, D]`."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return load_checkpoint(self, self.config, weights)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: "VllmConfig") -> tuple[tuple[int, ...], ...]:
        """Of the largest linear mixer; of none, where the model has none."""
        model = vllm_config.model_config
        ranks = vllm_config.parallel_config.tensor_parallel_size
        shapes = largest_state(model.hf_config, ranks, model.dtype)
        return shapes.both if shapes is not None else ()

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: "VllmConfig") -> tuple[torch.dtype, ...]:
        return vllm_config.model_config.dtype, torch.float32

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        """How a request's states move to another slot: both as whole slots."""
        return MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()
