"""How long a stage takes: its model FLOPs, over what GPUs make of them."""

from dataclasses import dataclass

import torch

from hylo.distill.flops import flops_per_token, peak_flops
from hylo.distill.recipe import StageSection
from hylo.distill.stage1 import freeze_all_but_mixers
from hylo.errors import HyLoError
from hylo.modeling import HyLoForCausalLM
from hylo.plan.model import ModelPlan
from hylo.plan.training import Training


@dataclass(frozen=True)
class Pace:
    """What GPUs make of model FLOPs.

    Attributes:
        gpu: its name, such as H100, A100 or L40S.
        mfu: the share of its dense bfloat16 peak that model FLOPs take; docs/training.md says what was measured.

    Raises HyLoError where its peak is not known.
    """

    gpu: str = "H100"
    mfu: float = 0.3

    def __post_init__(self) -> None:
        if peak_flops(self.gpu) is None:
            raise HyLoError(f"the peak of a GPU {self.gpu!r} is not known here; expected a name such as H100 or A100")

    @property
    def flops_per_s(self) -> float:
        """Of one GPU."""
        peak = peak_flops(self.gpu)
        assert peak is not None
        return peak * self.mfu


def stage_flops(training: Training, stage: StageSection) -> float:
    """Model FLOPs of a stage, every window taken to be one document."""
    student = _without_weights(training.student)
    freeze_all_but_mixers(student)
    if stage.train == "all":
        student.requires_grad_(True)
    teacher = _without_weights(training.base if stage.objective == "layerwise" else training.teacher)
    return stage.steps * stage.tokens_per_step * flops_per_token(stage, student, teacher)


def _without_weights(model: ModelPlan) -> HyLoForCausalLM:
    with torch.device("meta"):
        return HyLoForCausalLM(model.config)
