"""Memory to train a stage of a recipe, on each GPU: an upper estimate, each part at its largest.

Weights that train are float32, with AdamW's two moments; products are computed in bfloat16 by autocast. The residual
stream is in bfloat16 too, but in layerwise stages, which compare large values that differ little. Over several GPUs
full sharding is assumed: weights, gradients, moments and the teacher are divided; what a window makes is not.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hylo.distill.recipe import StageSection
from hylo.mixers import mixer_class
from hylo.ops.linear_kl import workspace_bytes
from hylo.plan.inference import RESERVED_BYTES
from hylo.plan.model import ModelPlan
from hylo.plan.quantities import format_tokens
from hylo.plan.workspace import SOFTMAX_MIXERS, STATE_CHUNK, Chunk, head_sizes, linear_sizes, prefill_workspace

_MASTER = 4
# AdamW's two, in float32 or in 8 bits with a scale for each 256; Muon has one, and AdamW's for all but mixers.
_MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.0 + 2 * 4 / 256, "muon": 8.0}
_MOST_GPUS = 1024


@dataclass(frozen=True)
class Training:
    """What a stage trains, and on what.

    Attributes:
        student, base, teacher: the teacher of `kl` stages is `teacher`, that of layerwise stages the base.
        compute_size: bytes of a value in a matrix product.
        gpus: over which all is sharded.
        gpu_memory: bytes of one GPU; None where it is not asked what fits.
    """

    student: ModelPlan
    base: ModelPlan
    teacher: ModelPlan
    compute_size: int = 2
    gpus: int = 1
    gpu_memory: int | None = None


def training_memory(training: Training, stage: StageSection) -> dict[str, int]:
    """Bytes on each GPU, by part."""
    student = training.student
    trained = student.parameters if stage.train == "all" else student.replaced_parameters
    # Autocast keeps a copy of every weight that it reads, where products are not in float32 anyway.
    copies = 0 if training.compute_size == _MASTER else training.compute_size
    return {
        "weights": _share(student.parameters * (_MASTER + copies), training.gpus),
        "gradients": _share(trained * _MASTER, training.gpus),
        "optimizer": _share(round(trained * _MOMENTS[stage.optimizer]), training.gpus),
        "activations": max(_activations(training, stage), _teacher_pass(training, stage)),
        "teacher": _teacher(training, stage),
        "loss": _loss(training, stage),
        "gathered": _gathered(training, stage),
    }


def _share(size: int, gpus: int) -> int:
    return -(-size // gpus)


def _rows(stage: StageSection) -> int:
    """Tokens of one pass."""
    return stage.batch_size * stage.length


def _activations(training: Training, stage: StageSection) -> int:
    """What the student keeps for its backward pass, and the gradients inside the layer that is being gone back through.

    With gradient checkpointing: the input of every layer, and one layer made again.
    """
    student, stream = training.student, _stream_size(training, stage)
    layers = [_layer_values(student, name, training.compute_size, stream) for name in student.layers]
    largest = float(max(layers))
    if stage.mlp_chunk is not None:
        # Of the MLP there is one chunk at a time, made again.
        mlp = _mlp_values(student) * training.compute_size
        outside = largest - mlp
        layers = [layer - mlp for layer in layers]
        largest = outside + mlp * min(1.0, stage.mlp_chunk / stage.length)
    kept = float(sum(layers))
    if stage.gradient_checkpointing:
        inputs = 0 if "activations" in stage.offload else len(layers) * student.config.hidden_size * stream
        kept = inputs + largest
    elif "activations" in stage.offload:
        kept = largest
    return round(_rows(stage) * (kept + largest))


def _stream_size(training: Training, stage: StageSection) -> int:
    """Bytes of a value of the residual stream."""
    return _MASTER if stage.objective == "layerwise" else training.compute_size


def _mlp_values(model: ModelPlan) -> int:
    """Gate, up and their product."""
    return 3 * model.config.intermediate_size


def _layer_values(model: ModelPlan, mixer: str, compute_size: int, stream_size: int) -> int:
    """Bytes a token that one layer keeps for its backward pass."""
    config = model.config
    # Before each norm, and what products read of it.
    stream = 2 * config.hidden_size * (stream_size + compute_size)
    if mixer in SOFTMAX_MIXERS:
        heads = head_sizes(config, mixer)
        # Queries and keys before and after rotation, values, what latents expand to, output.
        mixed = heads.heads * (2 * heads.qk + heads.v) + heads.kv_heads * (2 * heads.qk + heads.v) + heads.expanded
    else:
        linear = linear_sizes(config, mixer)
        # Before and after the convolution, for all heads; the triangles of the delta rule; the gate; the output before
        # and after its norm.
        mixed = linear.projected + linear.convolved + max(0, linear.head_inputs - linear.convolved)
        mixed += linear.heads * STATE_CHUNK + 3 * linear.value_size
    return stream + (_mlp_values(model) + mixed) * compute_size


def _teacher_of(training: Training, stage: StageSection) -> ModelPlan:
    return training.base if stage.objective == "layerwise" else training.teacher


def _teacher_pass(training: Training, stage: StageSection) -> int:
    """What the teacher's own pass takes; the student's has not begun then."""
    config = _teacher_of(training, stage).config
    return prefill_workspace(Chunk(config, stage.length, stage.batch_size, stage.length, training.compute_size))


def _teacher(training: Training, stage: StageSection) -> int:
    """Its weights, and what it hands over: final hidden states, or every layer's input and mixer output."""
    teacher = _teacher_of(training, stage)
    hidden = _rows(stage) * teacher.config.hidden_size
    if stage.objective == "kl":
        weights = _share(teacher.parameters * training.compute_size, training.gpus)
        if "teacher" in stage.offload and training.gpus == 1:
            # Its head stays, and one layer at a time comes.
            layer = (teacher.parameters - 2 * teacher.head_parameters) // len(teacher.layers)
            weights = (teacher.head_parameters + layer) * training.compute_size
        return weights + hidden * training.compute_size
    # In float32, as stage 1 compares large values that differ little.
    handed_over = len(teacher.layers) * hidden * (_MASTER + training.compute_size)
    return _share(teacher.parameters * _MASTER, training.gpus) + handed_over


def _loss(training: Training, stage: StageSection) -> int:
    """Workspace of the loss, and the gradients that it makes before the backward pass."""
    config = training.student.config
    hidden = _rows(stage) * config.hidden_size
    if stage.objective == "layerwise":
        # Of each replaced layer the outputs of layer and mixer, until they have been gone back through.
        replaced = sum(mixer_class(name).replaces_attention for name in training.student.layers)
        return replaced * hidden * (_MASTER + training.compute_size)
    widths = config.hidden_size, _teacher_of(training, stage).config.hidden_size
    logits = workspace_bytes(_rows(stage), config.vocab_size, *widths, training.compute_size)
    # The head as products read it and its gradient in float32; the gradient of the hidden states; cross-entropy, by
    # choice, makes both once more.
    head = training.student.head_parameters * (training.compute_size + _MASTER)
    made = head + hidden * training.compute_size
    beyond = stage.length > (stage.teacher_length or training.teacher.config.max_position_embeddings)
    return logits + made + (made if stage.cross_entropy or beyond else 0)


def _gathered(training: Training, stage: StageSection) -> int:
    """What every rank holds whole for a while: the student's embedding and head with their gradients, two of its
    layers, and the head of the teacher or two of its layers."""
    if training.gpus == 1:
        return 0
    student, teacher = training.student, _teacher_of(training, stage)
    ends = student.head_parameters * (1 if student.config.tie_word_embeddings else 2)
    trained = 2 * _MASTER if stage.train == "all" else _MASTER
    own = ends * trained + 2 * (student.parameters - ends) // len(student.layers) * _MASTER
    size = training.compute_size if stage.objective == "kl" else _MASTER
    read = max(teacher.head_parameters, 2 * (teacher.parameters // len(teacher.layers))) * size
    return own + read


def fits(training: Training, stage: StageSection) -> bool:
    """Whether a GPU of `gpu_memory` holds it."""
    assert training.gpu_memory is not None
    return sum(training_memory(training, stage).values()) <= training.gpu_memory - RESERVED_BYTES


def remedies(training: Training, stage: StageSection) -> list[str]:
    """What would make a stage fit, each by itself and tried; empty where it fits or nothing does."""
    return [] if fits(training, stage) else list(_remedies(training, stage))


def _remedies(training: Training, stage: StageSection) -> Iterator[str]:
    checkpointed = stage.model_copy(update={"gradient_checkpointing": True})
    if not stage.gradient_checkpointing and fits(training, checkpointed):
        yield "gradient_checkpointing: true"
    with_checkpoints = "" if stage.gradient_checkpointing else ", gradient_checkpointing: true"
    for change, values in (
        ("optimizer: adamw_8bit", {"optimizer": "adamw_8bit"}),
        ("offload: [activations]", {"offload": ["activations"]}),
        ("offload: [activations, teacher]", {"offload": ["activations", "teacher"]}),
    ):
        if "teacher" in change and training.gpus > 1:
            continue
        if fits(training, checkpointed.model_copy(update=values)):
            yield change + with_checkpoints
            break
    for batch in range(stage.batch_size - 1, 0, -1):
        if fits(training, checkpointed.model_copy(update={"batch_size": batch})):
            accumulation = -(-stage.batch_size * stage.accumulation // batch)
            yield f"batch_size: {batch}, accumulation: {accumulation}{with_checkpoints}"
            break
    gpus = training.gpus
    while (gpus := 2 * gpus) <= _MOST_GPUS:
        if fits(replace(training, gpus=gpus), checkpointed):
            yield f"--gpus {gpus}" + ("" if stage.gradient_checkpointing else " and gradient_checkpointing: true")
            break
    length = stage.length
    while (length := length // 2) > 1:
        if fits(training, checkpointed.model_copy(update={"length": length})):
            yield f"length: at most {format_tokens(length)}"
            break
