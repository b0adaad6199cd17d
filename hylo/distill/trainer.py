"""Runs one stage of a recipe on transformers.Trainer."""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from hylo.data.batches import PackedWindows, collate
from hylo.distill import parallel
from hylo.distill.checkpoints import Checkpoint, Checkpoints
from hylo.distill.context import set_context
from hylo.distill.engine import StageCallback, StageTrainer
from hylo.distill.flops import device_peak_flops, flops_per_token
from hylo.distill.guards import Guard
from hylo.distill.muon import muon_for
from hylo.distill.offload import stream_from_cpu
from hylo.distill.progress import Speed, StageMonitor, read_metrics
from hylo.distill.recipe import CheckpointsSection, Recipe, StageSection
from hylo.distill.shards import has_shards
from hylo.distill.signals import StopRequest, deferred_signals
from hylo.distill.stage1 import LayerwiseTrainer, freeze_all_but_mixers, replaced_layers
from hylo.distill.stage2 import DistillationTrainer
from hylo.distill.teacher import as_hybrid, check_head
from hylo.errors import HyLoError
from hylo.modeling import HyLoForCausalLM
from hylo.progress import console
from hylo.upcycle.families import FAMILIES

# By transformers' names; `muon` is our own, and takes the place of the one named here.
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_torch_8bit", "muon": "adamw_torch_fused"}
# Of a stage, evenly.
_LOGGED_STEPS = 100


class _Layerwise(StageTrainer, LayerwiseTrainer):
    pass


class _Distillation(StageTrainer, DistillationTrainer):
    pass


@dataclass(frozen=True)
class Carrying:
    """How a stage is carried out; nothing of it changes what a stage computes, as long as no step is refused.

    Attributes:
        checkpoints: where they lie; without, none are written, and signals end the process where it is.
        when: they are due.
        on_anomaly, spike_factor, report_to: see `Recipe`.
        logs: the folder for TensorBoard.
        run_name: by which W&B shows the stage.
    """

    checkpoints: Checkpoints | None = None
    when: CheckpointsSection = field(default_factory=CheckpointsSection)
    on_anomaly: Literal["stop", "skip"] = "stop"
    spike_factor: float | None = 20.0
    report_to: Sequence[str] = ()
    logs: Path | None = None
    run_name: str | None = None


def resolve_report_to(recipe: Recipe) -> list[str]:
    """Where metrics go besides the file. Raises HyLoError where a package that was asked for is not installed."""
    if recipe.report_to is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") is not None else []
    for package in recipe.report_to:
        if importlib.util.find_spec(package) is None:
            raise HyLoError(f"report_to: {package} is not installed; install it with: pip install {package}")
    return list(dict.fromkeys(recipe.report_to))


def train_stage(
    stage: StageSection,
    student: HyLoForCausalLM,
    teacher: PreTrainedModel,
    data: PackedWindows,
    output: Path,
    *,
    dtype: torch.dtype,
    seed: int,
    carrying: Carrying | None = None,
    resume: Checkpoint | None = None,
) -> list[dict[str, Any]]:
    """Trains the student in place. Returns what was logged: step, tokens, loss, gradient norm, learning rate, speed.

    Over several ranks student and teacher are sharded, and all of them have to call; the steps are those of one.

    Args:
        teacher: frozen; for a layerwise stage it has the student's layers.
        data: windows of `stage.length`; gone over again where the stage has more tokens.
        output: a folder for `metrics.jsonl`, which the first rank writes.
        dtype: of matrix products.
        resume: the checkpoint to go on from; everything else is then as when the stage began.

    Raises:
        HyLoError: where loss or gradients stop being finite or leap, a checkpoint cannot be written, or the teacher's
            logits are not what its head makes of its hidden states.
        SystemExit, KeyboardInterrupt: on SIGTERM and SIGINT, after a checkpoint.
    """
    carrying = carrying or Carrying()
    freeze_all_but_mixers(student)
    if not replaced_layers(student):
        raise HyLoError(f"{stage.name}: every layer of the layout is attention; there is nothing to train")
    if stage.train == "all":
        student.requires_grad_(True)
    if stage.rope_scaling is not None:
        set_context(student, stage.rope_scaling)
    arguments = _arguments(stage, output, dtype, seed, carrying)
    if arguments.n_gpu > 1:
        raise HyLoError(
            f"{stage.name}: {arguments.n_gpu} GPUs and one process; start as many by "
            f"torchrun --nproc-per-node {arguments.n_gpu} -m hylo upcycle ..., or set CUDA_VISIBLE_DEVICES to one"
        )
    teacher = as_hybrid(teacher)
    if parallel.world_size() > 1 and not isinstance(teacher, HyLoForCausalLM):
        # It would be called once for each length of its own documents, by each rank another number of times.
        raise HyLoError(
            f"{stage.name}: a teacher of the {teacher.config.model_type!r} family runs on one GPU; "
            f"expected {', '.join(FAMILIES)}"
        )
    teacher.requires_grad_(False).eval()
    if stage.objective == "kl":
        # Before its weights are streamed: those that are tied to the embedding are then out of the head's reach.
        check_head(teacher)
    _place(stage, student, teacher, dtype, arguments.device)
    output.mkdir(parents=True, exist_ok=True)
    peak = device_peak_flops(arguments.device, dtype)
    flops = flops_per_token(stage, student, teacher, data.attended)
    speed = Speed(stage.tokens_per_step * data.fill, flops, peak * parallel.world_size() if peak else None)
    guard = Guard(stage.name, carrying.on_anomaly, carrying.spike_factor, clipped=stage.clip_norm > 0)
    monitor = StageMonitor(stage, guard, speed, output / "metrics.jsonl", arguments.device)
    if resume is not None and parallel.world_size() > 1 and not has_shards(resume.folder):
        raise HyLoError(f"{stage.name}: the checkpoint {resume.folder} was written by one process; go on with one")
    if resume is not None:
        monitor.restore(resume.state)
        line = f"{stage.name}: going on from step {resume.step} of {stage.steps}"
        console.print(line, style="dim", highlight=False, markup=False)
    with _signals(carrying) as request, _reports(carrying, resume) as reports:
        section = carrying.when if carrying.checkpoints is not None else None
        options: dict[str, Any] = {
            "model": student,
            "args": arguments,
            "train_dataset": data,
            "data_collator": collate,
            "callbacks": [callback := StageCallback(monitor, request, section), *reports],
            "teacher": teacher,
            "offload_activations": "activations" in stage.offload,
            "monitor": monitor,
            "checkpoints": carrying.checkpoints,
        }
        if stage.optimizer == "muon":
            betas = (arguments.adam_beta1, arguments.adam_beta2)
            options["optimizers"] = (muon_for(student, stage.learning_rate, stage.weight_decay, betas), None)
        trainer: StageTrainer
        if stage.objective == "layerwise":
            trainer = _Layerwise(**options)
        else:
            made_for = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
            length = stage.teacher_length or made_for or stage.length
            options["teacher_length"] = length if length < stage.length else None
            trainer = _Distillation(cross_entropy=stage.cross_entropy, **options)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        try:
            if resume is not None and resume.step >= stage.steps:
                # Stopped between its last step and its end: there is no step to make.
                trainer._load_from_checkpoint(str(resume.folder))
            else:
                trainer.train(resume_from_checkpoint=None if resume is None else str(resume.folder))
        finally:
            monitor.close()
    student.model.stream_dtype = None
    for layer in student.model.decoder_layers:
        layer.mlp.chunk_size = None
    # Outside of `_signals`: what asks from now on ends the process by itself.
    [stopping] = parallel.any_rank(bool(request))
    if stopping:
        step = trainer.state.global_step
        if resume is not None and resume.step >= stage.steps:
            step = resume.step
        elif not callback.stopping:
            # Asked for after the last step, of which there is no checkpoint yet.
            trainer._save_checkpoint(student, trial=None)
        line = f"{stage.name}: stopped at step {step} of {stage.steps}; run again to go on"
        console.print(line, highlight=False, markup=False)
        request.obey()
    student.requires_grad_(True)
    student.eval()
    return read_metrics(output / "metrics.jsonl")


def _place(
    stage: StageSection,
    student: HyLoForCausalLM,
    teacher: PreTrainedModel,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Puts both models where they train, and tells the student how to spare memory."""
    if parallel.world_size() > 1:
        if "teacher" in stage.offload:
            line = f"{stage.name}: the teacher is sharded over {parallel.world_size()} ranks, and not offloaded"
            console.print(line, style="dim", highlight=False, markup=False)
        parallel.shard_teacher(teacher)
        parallel.shard(student)
    elif "teacher" in stage.offload and device.type == "cuda":
        stream_from_cpu(teacher, device)
    else:
        teacher.to(device)
    for layer in student.model.decoder_layers:
        layer.mlp.chunk_size = stage.mlp_chunk
    # Layerwise losses are small differences of large values.
    if stage.objective == "kl" and dtype != torch.float32:
        student.model.stream_dtype = dtype


def _arguments(
    stage: StageSection, output: Path, dtype: torch.dtype, seed: int, carrying: Carrying
) -> TrainingArguments:
    batch_size, accumulation = parallel.share_of_rank(stage)
    return TrainingArguments(
        output_dir=str(output),
        max_steps=stage.steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        optim=_OPTIMIZERS[stage.optimizer],
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(math.ceil(stage.warmup * stage.steps), stage.steps - 1),
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.clip_norm,
        gradient_checkpointing=stage.gradient_checkpointing,
        bf16=dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=max(1, stage.steps // _LOGGED_STEPS),
        logging_nan_inf_filter=False,
        # Windows come in the order that their own seed made.
        train_sampling_strategy="sequential",
        # When a checkpoint is due is for StageCallback to say.
        save_strategy="no",
        # TensorBoard's own callback is given a folder that stays; see `_reports`.
        report_to=[name for name in carrying.report_to if name != "tensorboard"],
        run_name=carrying.run_name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
        data_seed=seed,
    )


@contextmanager
def _signals(carrying: Carrying) -> Iterator[StopRequest]:
    if carrying.checkpoints is None:
        yield StopRequest()
        return
    with deferred_signals() as request:
        yield request


@contextmanager
def _reports(carrying: Carrying, resume: Checkpoint | None) -> Iterator[list[TrainerCallback]]:
    """TensorBoard's callback; steps after the checkpoint that is gone on from are taken off its record."""
    if "tensorboard" not in carrying.report_to or carrying.logs is None or not parallel.is_main():
        yield []
        return
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    with SummaryWriter(str(carrying.logs), purge_step=None if resume is None else resume.step + 1) as writer:
        yield [TensorBoardCallback(writer)]
