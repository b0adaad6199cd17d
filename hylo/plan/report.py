"""A plan as one JSON object: sizes, memory to serve, and with a recipe memory to train."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from hylo.config import HyLoConfig
from hylo.distill.recipe import Recipe
from hylo.errors import HyLoError
from hylo.plan import inference, training
from hylo.plan.duration import Pace, stage_flops
from hylo.plan.inference import Serving
from hylo.plan.model import ModelPlan, counts, plan_model
from hylo.plan.training import Training
from hylo.upcycle.families import hybrid_config
from hylo.upcycle.layout import format_layout, parse_layout


def plan_pair(
    config: PreTrainedConfig,
    layout: str | Sequence[str] | None,
    geometry: Mapping[str, Mapping[str, Any]] | str,
    name: str,
    rope_scaling: Mapping[str, Any] | None = None,
) -> tuple[ModelPlan, ModelPlan]:
    """A hybrid and its base. Of a hybrid's own config no layout is asked.

    Args:
        rope_scaling: YaRN's factor and original_max_position_embeddings; the base's own scaling by default.

    Raises HyLoError where layout, geometry and base do not fit.
    """
    if isinstance(config, HyLoConfig):
        if layout is not None or geometry:
            raise HyLoError(f"{name} is a hybrid already; --layout and --geometry are for bases")
        return plan_model(config), plan_dense(config, name)
    if layout is None:
        raise HyLoError("plan needs a --layout such as 4MLA12GDN, or a --recipe that has one")
    mixers = parse_layout(layout, config.num_hidden_layers)
    return plan_model(hybrid_config(config, mixers, geometry, name, rope_scaling)), plan_dense(config, name)


def plan_dense(config: PreTrainedConfig, name: str) -> ModelPlan:
    """The model whose layers are all attention."""
    mixers = ["attention"] * config.num_hidden_layers
    if isinstance(config, HyLoConfig):
        dense = copy.deepcopy(config)
        dense.token_mixers, dense.mixer_geometry = mixers, {}
    else:
        dense = hybrid_config(config, mixers, {}, name)
    return plan_model(dense)


def plan_report(hybrid: ModelPlan, base: ModelPlan, contexts: Sequence[int], serving: Serving) -> dict[str, Any]:
    """Sizes, and memory to serve both models at each context."""
    report = {"name": format_layout(hybrid.layers)} | counts(hybrid, base, serving.element_size)
    models = {"hybrid": hybrid, "base": base}
    report["inference"] = {
        "batch": serving.batch,
        "gpus": serving.gpus,
        "assumes": "assumes tensor parallelism, latents whole on each",
        "gpu_memory_bytes": serving.gpu_memory,
        "prefill_chunk": serving.prefill_chunk,
        "contexts": [
            {"context": context} | {name: _serving_estimate(model, context, serving) for name, model in models.items()}
            for context in contexts
        ],
    }
    if serving.gpu_memory is not None:
        longest = {name: inference.longest_context(model, serving) for name, model in models.items()}
        report["inference"]["longest_context"] = longest
    return report


def _serving_estimate(model: ModelPlan, context: int, serving: Serving) -> dict[str, Any]:
    parts = inference.inference_memory(model, context, serving)
    change = [] if serving.gpu_memory is None else inference.remedies(model, context, serving)
    return _estimate(parts, None if serving.gpu_memory is None else inference.fits(model, context, serving), change)


def training_report(
    recipe: Recipe, hybrid: ModelPlan, base: ModelPlan, teacher: ModelPlan, serving: Serving, pace: Pace | None = None
) -> dict[str, Any]:
    """Memory and time of each stage, on the GPUs that the model would be served on.

    Raises HyLoError where student and teacher differ in vocabulary.
    """
    if hybrid.config.vocab_size != teacher.config.vocab_size:
        raise HyLoError(
            f"teacher {recipe.teacher} has a head of {teacher.config.vocab_size} words, the base one of "
            f"{hybrid.config.vocab_size}"
        )
    compute_size = 4 if recipe.precision == "float32" else 2
    setup = Training(hybrid, base, teacher, compute_size, serving.gpus, serving.gpu_memory)
    pace = pace or Pace()
    stages = []
    for stage in recipe.stages:
        parts = training.training_memory(setup, stage)
        change = [] if setup.gpu_memory is None else training.remedies(setup, stage)
        fits = None if setup.gpu_memory is None else training.fits(setup, stage)
        flops = stage_flops(setup, stage)
        time = {"tokens": stage.steps * stage.tokens_per_step, "flops": flops}
        time["hours"] = flops / (pace.flops_per_s * serving.gpus) / 3600
        stages.append({"name": stage.name} | time | _estimate(parts, fits, change))
    setting = {"gpus": serving.gpus, "assumes": "assumes full sharding", "gpu": pace.gpu, "mfu": pace.mfu}
    return setting | {"stages": stages}


def _estimate(parts: dict[str, int], fits: bool | None, change: list[str]) -> dict[str, Any]:
    return {"bytes": parts, "total_bytes": sum(parts.values()), "fits": fits, "change": change}
