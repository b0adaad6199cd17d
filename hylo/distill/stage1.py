"""Stage 1, Enhanced-ILD (arXiv 2604.24715): every layer learns its teacher layer's outputs on the teacher's input.

loss = sum over replaced layers of  mean_t |h_s - h_t|_2 + mean_t |a_s - a_t|_2

h is a layer's output, a its mixer's output before the residual; norms over the hidden axis, not squared. No layer sees
another student layer, so one pass over the mixers of the layout trains each as it would be trained alone.
"""

from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hylo.distill.offload import activations_on_cpu
from hylo.distill.teacher import READ
from hylo.modeling import HyLoForCausalLM
from hylo.ops.linear_cross_entropy import IGNORED
from hylo.ops.row_distance import row_distances
from hylo.upcycle.trace import LayerTrace, fed_with, recorded, trace_layers


def layerwise_loss(student: LayerTrace, teacher: LayerTrace, layers: list[int], mask: Tensor, count: Tensor) -> Tensor:
    """The loss above over `layers`, summed over tokens where `mask` `[B, T]` is true and divided by `count`."""
    total = torch.zeros((), device=mask.device)
    for i in layers:
        for ours, theirs in ((student.outputs, teacher.outputs), (student.mixer_outputs, teacher.mixer_outputs)):
            total = total + row_distances(ours[i], theirs[i]).masked_fill(~mask, 0).sum() / count
    return total


def replaced_layers(student: HyLoForCausalLM) -> list[int]:
    """The layers whose attention a conversion replaced."""
    return [i for i, layer in enumerate(student.model.decoder_layers) if layer.mixer.replaces_attention]


def freeze_all_but_mixers(student: HyLoForCausalLM) -> None:
    """Lets only the parameters of replaced mixers train."""
    student.requires_grad_(False)
    for i in replaced_layers(student):
        student.model.layers[i].mixer.requires_grad_(True)


class LayerwiseTrainer(Trainer):
    """A Trainer whose loss is `layerwise_loss`. The student runs as a whole model, each layer fed by the teacher.

    The model's own forward is called, so wrappers for several devices see an ordinary pass.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, offload_activations: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.offload_activations = teacher, offload_activations
        # Open from a batch's forward pass to the next one's: gradient checkpointing runs layers again in between.
        self._feeding = ExitStack()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._feeding.close()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        batch = {key: inputs[key] for key in READ}
        # As many as the positions that predict them; the first of a document, which has seen nothing, does not count.
        mask = inputs["labels"] != IGNORED
        # The teacher's weights and residual stream stay in float32: the loss is a small difference of large values.
        with self.accelerator.autocast():
            teacher = trace_layers(self.teacher, batch)
        student = self.accelerator.unwrap_model(model)
        self._feeding.close()
        self._feeding.enter_context(fed_with(student, teacher.inputs))
        offloaded = activations_on_cpu() if self.offload_activations else nullcontext()
        with recorded(student) as trace, offloaded:
            model(**batch, use_cache=False, logits_to_keep=1)
        # A batch of chats may hold none of the assistant's tokens.
        count = (mask.sum() if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        # The count is that of all ranks, and gradients are averaged over them.
        ranks = 1 if num_items_in_batch is None else self.accelerator.num_processes
        return ranks * layerwise_loss(trace, teacher, replaced_layers(student), mask, count)
