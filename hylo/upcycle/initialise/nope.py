"""What YaRN's factor on cos and sin means for scores without rotation: they are scaled alike."""

import torch

from hylo.mixers.mla import MultiHeadLatentAttention


@torch.no_grad()
def scale_nope(mixer: MultiHeadLatentAttention, factor: float) -> None:
    """Multiplies the scores of what MLA does not rotate: by its queries, or their norm where they have one."""
    nope = mixer.geometry.qk_nope_head_dim
    if mixer.config.qk_norm:
        mixer.get_parameter("q_norm.weight")[:nope] *= factor
        return
    last = mixer.get_submodule("q_proj" if mixer.geometry.q_lora_rank is None else "q_b_proj")
    for parameter in last.parameters():
        parameter.unflatten(0, (mixer.num_heads, -1))[:, :nope] *= factor
