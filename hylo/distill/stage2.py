"""Stage 2: end to end, KL(teacher || student) a token (arXiv 2604.24715), by choice with some cross-entropy added."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hylo.data.batches import targets
from hylo.distill.offload import activations_on_cpu
from hylo.distill.teacher import READ, beginnings, hidden_states
from hylo.ops.linear_cross_entropy import IGNORED, linear_cross_entropy
from hylo.ops.linear_kl import fused_linear_kl


class DistillationTrainer(Trainer):
    """A Trainer whose loss is the KL from the final hidden states of both models; neither makes `[T, V]` logits.

    The teacher runs first and keeps nothing but its final hidden states, so that its activations and the student's are
    never there together. `loss_parts` says what the loss is made of, where that is more than the KL.

    Args:
        teacher: frozen.
        cross_entropy: weight of the cross-entropy of the next token, which is added to the KL.
        teacher_length: tokens of a document that the teacher can read; the student learns those beyond by
            cross-entropy alone. None where it reads whole windows.
        offload_activations: see `activations_on_cpu`.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        cross_entropy: float = 0.0,
        teacher_length: int | None = None,
        offload_activations: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.cross_entropy, self.teacher_length = teacher, cross_entropy, teacher_length
        self.offload_activations = offload_activations
        self.loss_parts: dict[str, Tensor] = {}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        batch = {key: inputs[key] for key in READ}
        expected = targets(inputs["labels"])
        counted = expected != IGNORED
        read, inside = batch, None
        if self.teacher_length is not None:
            read, inside = beginnings(batch, self.teacher_length)
        with self.accelerator.autocast():
            teacher_hidden = hidden_states(self.teacher, read)
        student = self.accelerator.unwrap_model(model)
        # The wrapped model's own forward runs; its final hidden states are picked up on the way to one token's logits.
        final: list[Tensor] = []
        handle = student.model.norm.register_forward_hook(lambda _, __, output: final.append(output))
        try:
            with activations_on_cpu() if self.offload_activations else nullcontext():
                model(**batch, use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
        # A batch of chats may hold none of the assistant's tokens.
        count = (counted.sum() if num_items_in_batch is None else num_items_in_batch).clamp(min=1)
        hidden, head = final[0].flatten(0, 1), student.get_output_embeddings().weight
        with self.accelerator.autocast():
            loss = fused_linear_kl(
                hidden if inside is None else hidden[inside.flatten()],
                head,
                teacher_hidden.flatten(0, 1),
                self.teacher.get_output_embeddings().weight,
                counted.flatten() if inside is None else counted[inside],
                count=count,
            )
            parts = {"kl": loss.detach(), "cross_entropy": torch.zeros_like(loss)}
            for weight, where in self._cross_entropies(inside):
                told = expected if where is None else expected.masked_fill(~where, IGNORED)
                entropy = linear_cross_entropy(hidden, head, told.flatten(), count=count)
                parts["cross_entropy"] = parts["cross_entropy"] + entropy.detach()
                loss = loss + weight * entropy
        # The count is that of all ranks, and gradients are averaged over them.
        ranks = 1 if num_items_in_batch is None else self.accelerator.num_processes
        # The same names in every batch and on every rank, whatever its documents.
        mixed = self.cross_entropy > 0 or self.teacher_length is not None
        self.loss_parts = {name: part * ranks for name, part in parts.items()} if mixed else {}
        return loss * ranks

    def _cross_entropies(self, inside: Tensor | None) -> list[tuple[float, Tensor | None]]:
        """Weights of the cross-entropy, and the tokens `[1, T]` that each is for; None for all."""
        if inside is None:
            return [(self.cross_entropy, None)] if self.cross_entropy else []
        return [(self.cross_entropy, inside), (1.0, ~inside)] if self.cross_entropy else [(1.0, ~inside)]
