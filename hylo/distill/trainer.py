"""Runs one stage of a recipe on transformers.Trainer."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hylo.distill.recipe import StageSection
from hylo.distill.stage1 import LayerwiseTrainer, freeze_all_but_mixers, replaced_layers
from hylo.distill.stage2 import DistillationTrainer
from hylo.errors import HyLoError
from hylo.modeling import HyLoForCausalLM
from hylo.progress import Bar
from hylo.text import Windows


class StageProgress(TrainerCallback):
    """A bar over real tokens with the loss beside it; logged steps as lines of JSON; a loss not finite stops it."""

    def __init__(self, stage: StageSection, tokens_per_step: float, metrics: Path) -> None:
        self.stage, self.tokens_per_step, self.metrics = stage, tokens_per_step, metrics
        self.bar: Bar | None = None
        self.status = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = Bar(self.stage.name, state.max_steps * self.tokens_per_step, "tokens")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.bar is not None
        self.bar.advance(self.tokens_per_step, self.status)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        loss, norm = logs["loss"], logs.get("grad_norm", 0.0)
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.close()
            raise HyLoError(
                f"{self.stage.name}: loss {loss}, gradient norm {norm} at step {state.global_step}; "
                "expected finite numbers (a lower learning_rate may help)"
            )
        self.status = f"loss {loss:.3f}"
        entry = {"step": state.global_step, "tokens": round(state.global_step * self.tokens_per_step), **logs}
        with self.metrics.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()


def train_stage(
    stage: StageSection,
    student: HyLoForCausalLM,
    teacher: PreTrainedModel,
    data: Windows,
    output: Path,
    *,
    dtype: torch.dtype,
    seed: int,
) -> list[dict[str, float]]:
    """Trains the student in place. Returns what was logged: step, tokens, loss, gradient norm, learning rate.

    Args:
        teacher: frozen; for a layerwise stage it has the student's layers.
        data: windows of `stage.length`; gone over again where the stage has more tokens.
        output: a folder for `metrics.jsonl`.
        dtype: of matrix products.

    Raises:
        HyLoError: where loss or gradients stop being finite.
    """
    trainer_class: type[LayerwiseTrainer] | type[DistillationTrainer]
    freeze_all_but_mixers(student)
    if not replaced_layers(student):
        raise HyLoError(f"{stage.name}: every layer of the layout is attention; there is nothing to train")
    trainer_class = LayerwiseTrainer if stage.objective == "layerwise" else DistillationTrainer
    if stage.train == "all":
        student.requires_grad_(True)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.accumulation,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(math.ceil(stage.warmup * stage.steps), stage.steps - 1),
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.clip_norm,
        gradient_checkpointing=stage.gradient_checkpointing,
        bf16=dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=max(1, stage.steps // 100),
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
    )
    if arguments.n_gpu > 1 or arguments.world_size > 1:
        raise HyLoError(f"{stage.name}: training runs on one device; set CUDA_VISIBLE_DEVICES to one GPU")
    teacher.requires_grad_(False).eval().to(arguments.device)
    output.mkdir(parents=True, exist_ok=True)
    progress = StageProgress(stage, stage.tokens_per_step * data.fill, output / "metrics.jsonl")
    trainer: Trainer = trainer_class(
        model=student, args=arguments, train_dataset=data, callbacks=[progress], teacher=teacher
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    try:
        trainer.train()
    finally:
        progress.close()
    student.requires_grad_(True)
    student.eval()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
