"""Which rotary pairs of the base's heads MLA keeps, by what its attention gains from each on text.

A pair of a layer gains the score energy that one rotary key, shared by all KV heads, carries of it, times what it would
lose by the mean rotation in place of its own (`ActivationDecomposition.pair_gains`). All MLA layers share their
frequencies, so gains are summed over them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hylo.mixers.mla import MLAGeometry, MultiHeadLatentAttention
from hylo.modeling import HyLoForCausalLM
from hylo.progress import bar
from hylo.upcycle.activations import AttentionStatistics, AttentionWeights
from hylo.upcycle.initialise.activation import ActivationDecomposition
from hylo.upcycle.trace import enter_layers, layers_of, mixer_of, step_layer

# As much as gains need to settle.
_TOKENS = 16384


@torch.no_grad()
def pairs_by_gain(
    teacher: PreTrainedModel, batches: Sequence[dict[str, Tensor]], geometry: MLAGeometry, layers: Sequence[int]
) -> list[int]:
    """As many pairs as the geometry has rotary values for, in order.

    Args:
        batches: input_ids and attention_mask, `[B, T]` each; as many are read as it takes.
        layers: which are to be MLA.

    Raises HyLoError where values are not finite.
    """
    read: list[dict[str, Tensor]] = []
    for batch in batches:
        if sum(each["input_ids"].numel() for each in read) < _TOKENS:
            read.append(batch)
    entered = [enter_layers(teacher, batch) for batch in read]
    hidden = [states for states, _ in entered]
    gains: Tensor | None = None
    depth = max(layers) + 1
    with bar("choose rotary pairs", depth, "layers") as shown:
        for i, layer in enumerate(layers_of(teacher)[:depth]):
            if i in layers:
                statistics = AttentionStatistics(AttentionWeights.of(mixer_of(layer)))
                norm = layer.get_submodule("input_layernorm")
                for states, batch, (_, arguments) in zip(hidden, read, entered, strict=True):
                    mask = batch["attention_mask"].bool()
                    statistics.add(norm(states), mask, arguments[i]["position_embeddings"])
                statistics.check()
                found = ActivationDecomposition(statistics, geometry).pair_gains
                gains = found if gains is None else gains + found
            hidden = [step_layer(layer, states, args[i])[1] for states, (_, args) in zip(hidden, entered, strict=True)]
            shown.advance(1)
    assert gains is not None
    return sorted(gains.topk(geometry.qk_rope_head_dim // 2).indices.tolist())


def set_pairs(student: HyLoForCausalLM, pairs: Sequence[int]) -> None:
    """Gives the rotary values of all MLA layers the frequencies of these pairs. Their weights are to be made anew."""
    config = student.config
    sizes = dict(config.mixer_geometry or {})
    sizes["mla"] = {**sizes["mla"], "rope_pairs": list(pairs)}
    config.mixer_geometry = sizes
    geometry = config.geometry("mla")
    assert isinstance(geometry, MLAGeometry)
    for layer in student.model.decoder_layers:
        if isinstance(layer.mixer, MultiHeadLatentAttention):
            layer.mixer.geometry = geometry
    rotary = MultiHeadLatentAttention.rotary_embedding(config)
    student.model.rotary_embeddings["mla"] = rotary.to(student.device)
