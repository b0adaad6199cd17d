"""Stage 2: end to end, KL(teacher || student) a token (arXiv 2604.24715), by choice with some cross-entropy added."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hylo.evaluate.agreement import final_hidden
from hylo.ops.linear_cross_entropy import IGNORED, linear_cross_entropy
from hylo.ops.linear_kl import fused_linear_kl


class DistillationTrainer(Trainer):
    """A Trainer whose loss is the KL from the final hidden states of both models; neither makes `[T, V]` logits.

    With `cross_entropy` the loss is KL + cross_entropy * CE of the next token, and `loss_parts` says what each is.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, cross_entropy: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.cross_entropy = teacher, cross_entropy
        self.loss_parts: dict[str, Tensor] = {}

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        batch = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        mask = inputs["labels"] != -100
        with self.accelerator.autocast():
            teacher_hidden = final_hidden(self.teacher, batch)
        student = self.accelerator.unwrap_model(model)
        # The wrapped model's own forward runs; its final hidden states are picked up on the way to one token's logits.
        final: list[Tensor] = []
        handle = student.model.norm.register_forward_hook(lambda _, __, output: final.append(output))
        try:
            model(**batch, use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
        with self.accelerator.autocast():
            loss = fused_linear_kl(
                final[0].flatten(0, 1),
                student.get_output_embeddings().weight,
                teacher_hidden.flatten(0, 1),
                self.teacher.get_output_embeddings().weight,
                mask.flatten(),
                count=num_items_in_batch,
            )
            if self.cross_entropy:
                entropy = linear_cross_entropy(
                    final[0].flatten(0, 1),
                    student.get_output_embeddings().weight,
                    _next_tokens(inputs["labels"]).flatten(),
                    count=num_items_in_batch,
                )
                self.loss_parts = {"kl": loss.detach(), "cross_entropy": entropy.detach()}
                loss = loss + self.cross_entropy * entropy
        if num_items_in_batch is None or not self.args.average_tokens_across_devices:
            return loss
        # The count is that of all ranks, and gradients are averaged over them.
        return loss * self.accelerator.num_processes


def _next_tokens(labels: Tensor) -> Tensor:
    """What follows each token, `[B, T]`; -100 where it does not count. They are as many as labels that count.

    The first position of a window has no label, so that no label is without a position that predicts it.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
