"""Stage 2: end to end, KL(teacher || student) a token, no cross-entropy (arXiv 2604.24715)."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hylo.evaluate.agreement import final_hidden
from hylo.ops.linear_kl import linear_kl


class DistillationTrainer(Trainer):
    """A Trainer whose loss is the KL from the final hidden states of both models; neither makes `[T, V]` logits."""

    def __init__(self, *args: Any, teacher: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher

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
            return linear_kl(
                final[0].flatten(0, 1),
                student.get_output_embeddings().weight,
                teacher_hidden.flatten(0, 1),
                self.teacher.get_output_embeddings().weight,
                mask.flatten(),
                count=num_items_in_batch,
            )
