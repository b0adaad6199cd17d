"""Memory of the CPU in place of the GPU's: what layers keep for the backward pass, and the teacher's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Smaller tensors are not worth the way.
_LEAST_BYTES = 2**20


@contextmanager
def activations_on_cpu() -> Iterator[None]:
    """Inside the block, what a forward pass on a GPU keeps for the backward pass waits in pinned memory of the CPU.

    With gradient checkpointing that is the input of each layer, `[B, T, D]`. Without it the copies of weights that
    autocast makes go as well, and what several products read goes once for each.
    """

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        small = tensor.numel() * tensor.element_size() < _LEAST_BYTES
        # A weight, or a view of one: it takes no memory of its own.
        weight = isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)
        if not tensor.is_cuda or small or weight:
            return tensor
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        kept.copy_(tensor, non_blocking=True)
        return tensor.device, kept

    def unpack(kept: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[1].to(kept[0], non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def stream_from_cpu(model: PreTrainedModel, device: torch.device) -> None:
    """Keeps a frozen model's weights on the CPU; each module's go to the device while it computes."""
    from accelerate import cpu_offload

    head = model.get_output_embeddings().weight
    cpu_offload(model.get_decoder(), execution_device=device)
    # Read by the loss, outside of any module.
    if not head.is_meta:
        model.get_output_embeddings().to(device)
