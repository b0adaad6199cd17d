"""What the tests of single mixers share: a mixer as a layer has it, and the plain pieces of their formulas."""

from typing import Any

import torch
from tiny import HYBRIDS, random_hybrid
from torch import Tensor
from torch.nn import functional
from transformers import Cache

from hylo import HyLoConfig, HyLoModel
from hylo.mixers import TokenMixer


def one_layer(name: str, **changes: Any) -> HyLoModel:
    """A model of one layer, without neutral parameters, in float64."""
    values = HYBRIDS[name] | changes
    values["token_mixers"] = values["token_mixers"][:1]
    return random_hybrid(**values).double().model


def mix(model: HyLoModel, x: Tensor, cache: Cache | None = None) -> Tensor:
    """What the first layer's mixer makes of `[B, T, D]`, after the cached tokens."""
    mixer = model.layers[0].mixer
    context = model.mixing_context(x, past_key_values=cache)
    return mixer(x, **context.arguments(mixer), past_key_values=cache)


def weights(model: HyLoModel) -> dict[str, Tensor]:
    """The first mixer's parameters; weights of linear maps and convolutions without their suffix."""
    return {name.removesuffix(".weight"): p for name, p in model.layers[0].mixer.named_parameters()}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def convolved(x: Tensor, taps: Tensor, bias: Tensor | None = None) -> Tensor:
    """Causal, a channel alone, then SiLU: `[B, T, C]` and `[C, 1, W]`."""
    padded = functional.pad(x.mT, (taps.shape[-1] - 1, 0))
    return functional.silu(functional.conv1d(padded, taps, bias, groups=x.shape[-1])).mT


def delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """S_t = (I - beta k k^T) Diag(decay) S + beta k v^T, o_t = S_t^T q / sqrt(K), for unit q and k.

    Args:
        q, k, decay: `[B, T, H, K]`, the decay itself and not its logarithm; or one a head, `[B, T, H, 1]`.
        v: `[B, T, H, V]`.
        beta: `[B, T, H]`.
    """
    batch, length, heads, size = q.shape
    # The length is kept from zero by 1e-6 under the root.
    q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    out = torch.zeros_like(v)
    for b in range(batch):
        for h in range(heads):
            S = q.new_zeros(size, v.shape[-1])
            for t in range(length):
                key = k[b, t, h]
                erase = torch.eye(size, dtype=q.dtype) - beta[b, t, h] * torch.outer(key, key)
                S = erase @ (decay[b, t, h][:, None] * S) + beta[b, t, h] * torch.outer(key, v[b, t, h])
                out[b, t, h] = S.T @ q[b, t, h] / size**0.5
    return out


def parameters_of(mixer: str, geometry: dict[str, Any], **sizes: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a mixer's parameters at any size, without memory for them."""
    config = HyLoConfig(num_hidden_layers=1, token_mixers=[mixer], mixer_geometry={mixer: geometry}, **sizes)
    with torch.device("meta"):
        layer: TokenMixer = config.mixer_of(0)(config, 0)
    return {name: tuple(p.shape) for name, p in layer.named_parameters()}


LLAMA_1B = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
LLAMA_3B = {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}
QWEN = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "qk_norm": True}
