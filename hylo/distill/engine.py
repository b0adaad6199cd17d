"""What the trainers of all stages share around their loss: guards, metrics, checkpoints, and ending when asked to."""

import functools
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hylo.distill import parallel
from hylo.distill.checkpoints import Checkpoints
from hylo.distill.progress import StageMonitor
from hylo.distill.recipe import CheckpointsSection
from hylo.distill.shards import has_shards, load_model_shards, load_optimizer_shards, save_shards
from hylo.distill.signals import StopRequest


class StageTrainer(Trainer):
    """A Trainer to be mixed into one with a loss.

    A loss may be made of several: what `compute_loss` leaves in `loss_parts`, by name, is told beside it.

    Args:
        monitor: sees every step before its update, and every logged step.
        checkpoints: where they are written; None for none.
    """

    loss_parts: dict[str, Tensor]

    def __init__(self, *args: Any, monitor: StageMonitor, checkpoints: Checkpoints | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.monitor, self.checkpoints = monitor, checkpoints
        self.loss_parts = {}
        self._writing_to: Path | None = None
        # Sharded, its parameters lie on their devices and reduce their own gradients; and a launcher's group of one
        # process needs no wrapping (DDP) either: all that is left is autocast.
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True)

    @property
    def sharded(self) -> bool:
        return parallel.world_size() > 1

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        # Trainer tells by names, among which decays and skips of linear mixers are not.
        matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
        return [name for name in super().get_decay_parameter_names(model) if name in matrices]

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Trainer counts them wherever a model takes losses, as the student does.
        assert num_items_in_batch is not None
        self.monitor.add(loss, self.loss_parts, num_items_in_batch)
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # The last call before the update, with gradients accumulated and clipped.
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.monitor.accepts(self.state.global_step + 1, grad_norm):
            # An optimizer leaves parameters without gradients, and their moments, as they are.
            model.zero_grad(set_to_none=True)
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The summary at the end of training repeats these, without what came before a resumption.
        if "loss" in logs:
            super().log(self.monitor.summary(logs), start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._writing_to is None else str(self._writing_to)

    def _move_model_to_device(self, model: torch.nn.Module, device: torch.device) -> None:
        if not self.sharded:
            super()._move_model_to_device(model, device)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        assert self.checkpoints is not None
        step, state = self.state.global_step, self.monitor.state()
        if not self.sharded:
            with self.checkpoints.writing(step, state) as self._writing_to:
                super()._save_checkpoint(model, trial)
                # Pickled, and nothing reads it.
                for pickled in self._writing_to.rglob("training_args.bin"):
                    pickled.unlink()
            self._writing_to = None
            return
        with self.checkpoints.writing_together(step, state) as folder:
            save_shards(folder, model, self.optimizer)
            self._save_rng_state(str(folder))
            if parallel.is_main():
                torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
                self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if has_shards(Path(resume_from_checkpoint)):
            load_model_shards(Path(resume_from_checkpoint), self.model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and has_shards(Path(checkpoint)):
            load_optimizer_shards(Path(checkpoint), self.model, self.optimizer)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Written by another number of ranks it is none of ours; neither data nor loss depend on it.
        own = f"rng_state_{parallel.rank()}.pth" if self.sharded else "rng_state.pth"
        if checkpoint is not None and (Path(checkpoint) / own).is_file():
            super()._load_rng_state(checkpoint)


class StageCallback(TrainerCallback):
    """Drives the monitor, and decides when a checkpoint is due.

    Args:
        request: to end, by a signal.
        section: when checkpoints are due; None for never.

    Attributes:
        stopping: whether a rank was asked to end, and the stage ends for that.
    """

    def __init__(self, monitor: StageMonitor, request: StopRequest, section: CheckpointsSection | None) -> None:
        self.monitor, self.request, self.section = monitor, request, section
        self._last = time.monotonic()
        self.stopping = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.monitor.start(state.global_step, state.max_steps)
        self._last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.monitor.step_done()
        if state.global_step >= state.max_steps:
            # However many steps a line is for, the last line is for the last ones.
            control.should_log = True
        if self.section is None:
            return
        due = parallel.is_main() and self._due(self.section, state.global_step)
        self.stopping, due = parallel.any_rank(bool(self.request), due)
        if self.stopping:
            control.should_save = control.should_training_stop = True
        # What the last step made is the stage's own result.
        elif state.global_step < state.max_steps:
            control.should_save = due

    def _due(self, section: CheckpointsSection, step: int) -> bool:
        by_time = section.minutes is not None and time.monotonic() - self._last >= 60 * section.minutes
        return by_time or (section.steps is not None and step % section.steps == 0)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs:
            self.monitor.write(state.global_step, logs)
