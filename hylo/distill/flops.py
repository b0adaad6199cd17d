"""How much of a GPU a stage uses: model FLOPs a token, over what the GPU could multiply in that time (MFU).

A matrix of N values costs 2 N to apply to a token, 2 N more where a gradient passes back through it, and 2 N more where
it trains. Softmax attention of H heads costs 2 H (d_qk + d_v) for each key that a token sees, half of its document on
average, and twice that on the way back. The teacher's forward pass counts: without it there is no target. What is
computed again to save memory does not count, nor do convolutions and recurrences of linear mixers (about 1%).
"""

import re

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hylo.config import HyLoConfig
from hylo.distill.recipe import StageSection
from hylo.mixers.mla import MLAGeometry
from hylo.modeling import HyLoForCausalLM
from hylo.upcycle.families import FAMILIES, head_dim
from hylo.upcycle.trace import layers_of

# Dense bfloat16 products accumulated in float32, TFLOP/s, from the makers' data sheets; the first that matches.
_PEAKS = (
    (r"\bH100 PCIe", 756.0),
    (r"\bH[12]00 NVL", 835.0),
    (r"\bG?H[12]00\b|\bH800\b", 989.4),
    (r"\bB200\b", 2250.0),
    (r"\bA100\b|\bA800\b", 312.0),
    (r"\bL40S\b", 362.0),
    (r"\bL4\b", 121.0),
    (r"\bA40\b", 149.7),
    (r"\bA10\b", 125.0),
    (r"\bRTX A6000\b", 154.8),
    (r"\bRTX 5090$", 209.5),
    (r"\bRTX 4090$", 165.2),
    (r"\bRTX 3090$", 71.0),
    (r"\bMI300X\b", 1307.4),
)


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a GPU in bfloat16, by the name that it gives itself; None where it is not known here."""
    for pattern, teraflops in _PEAKS:
        if re.search(pattern, device_name):
            return teraflops * 1e12
    return None


def flops_per_token(
    stage: StageSection, student: HyLoForCausalLM, teacher: PreTrainedModel, attended: float | None = None
) -> float:
    """Model FLOPs for each token of a stage, as above. What trains is read from `requires_grad` of the student.

    Args:
        attended: the length that tokens attend over, where windows are packed with shorter documents
            (`PackedWindows.attended`); the whole window by default.
    """
    length = stage.length if attended is None else attended
    layerwise = stage.objective == "layerwise"
    total = 0.0
    # End to end, gradients pass back through everything above what trains first.
    reached = not layerwise and _trained(student.model.embed_tokens) > 0
    for i, layer in enumerate(student.model.decoder_layers):
        trained = _trained(layer)
        reached = trained > 0 if layerwise else reached or trained > 0
        matrices, attention = 2.0 * _size(layer), attention_flops(student.config, i, length)
        total += matrices + attention
        if reached:
            total += matrices + 2.0 * trained + 2.0 * attention
    if not layerwise:
        head = student.get_output_embeddings()
        total += 4.0 * _size(head) + 2.0 * _trained(head)
    return total + _teacher_flops(teacher, length, with_head=not layerwise)


def _teacher_flops(teacher: PreTrainedModel, length: float, with_head: bool) -> float:
    """Of its forward pass, for each token. What other families are made of is not known: their parameters count."""
    if not isinstance(teacher, HyLoForCausalLM) and teacher.config.model_type not in FAMILIES:
        return 2.0 * _size(teacher)
    layers = enumerate(layers_of(teacher))
    total = sum(2.0 * _size(layer) + attention_flops(teacher.config, i, length) for i, layer in layers)
    return total + 2.0 * _size(teacher.get_output_embeddings()) * with_head


def attention_flops(config: PreTrainedConfig, layer: int, length: float) -> float:
    """Of one layer's softmax attention, forward, for each token of a window of `length`; 0 for linear mixers."""
    sizes, window = 2 * head_dim(config), None
    if isinstance(config, HyLoConfig):
        mixer = config.mixer_of(layer)
        if mixer.layer_type == "linear_attention":
            return 0.0
        geometry = config.geometry(mixer.name)
        if isinstance(geometry, MLAGeometry):
            sizes = geometry.qk_head_dim + geometry.v_head_dim
        else:
            window = config.window_of(layer)
    else:
        # Families without a list of kinds, such as Mistral, have one kind: a window where the config names one.
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        window = getattr(config, "sliding_window", None) if kinds[layer] == "sliding_attention" else None
    return 2.0 * config.num_attention_heads * sizes * _mean_keys(length, window)


def _mean_keys(length: float, window: int | None) -> float:
    """How many keys a token sees on average, itself included."""
    seen = length if window is None else min(window, length)
    return seen - seen * (seen - 1) / (2 * length)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Of a device; None where it is no GPU known here, or products are not in bfloat16."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_flops(torch.cuda.get_device_name(device))
