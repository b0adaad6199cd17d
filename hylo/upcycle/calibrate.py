"""Calibration: the output projection of every replaced mixer, solved in closed form on real text.

The output projection W of a layer is the ridge solution of

    min_W  sum_t |W f_t - a_t|^2 + lambda |W|^2,

f_t the student mixer's features before the projection, a_t the teacher's mixer output at the same token. Layers are
solved in order. With `sequential`, the features of a layer come from the student's own hidden states, with the layers
below already solved, so that a layer makes up for what those got wrong; otherwise from the teacher's.

A text's first token is the sink of attention in most models, and bears massive activations that all other tokens lean
on (arXiv 2402.17762): where its mixer outputs are off, these are never made, and the whole text is lost. It is one in
a thousand, and each text has another. So tokens of the text are read alone as well, each as a first token, and count.

F^T F and F^T A are all that the solution needs: they are summed in float64 over the text, batch by batch.

With `latents`, what stands before the projection in MLA layers is made anew as well, from what the teacher's attention
does on the text (`hylo.upcycle.initialise.activation`), before the projection is solved. Linear layers may have their
gates set (`gates`) or their heads read averages (`averages`): of several starts each layer keeps the one that leaves
the least error. After it the MLP may make up for what is left (`mlp`).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hylo.config import HyLoConfig
from hylo.data.windows import Windows
from hylo.errors import HyLoError
from hylo.mixers.mamba2 import Mamba2
from hylo.mixers.mla import MLAGeometry, MultiHeadLatentAttention
from hylo.modeling import HyLoDecoderLayer, HyLoForCausalLM, MixingContext
from hylo.precision import autocast, default_device
from hylo.progress import bar
from hylo.upcycle.activations import AttentionStatistics, AttentionWeights, LagStatistics
from hylo.upcycle.bases import load_model, save_checkpoint
from hylo.upcycle.initialise.activation import ActivationDecomposition
from hylo.upcycle.initialise.averages import AverageStatistics
from hylo.upcycle.initialise.gates import GateStatistics, conv_size, has_gates, set_value_taps
from hylo.upcycle.pairs import pairs_by_gain, set_pairs
from hylo.upcycle.repair import repair_mlp
from hylo.upcycle.ridge import RidgeRegression
from hylo.upcycle.trace import enter_layers, layers_of, mixer_of, reaching, step_layer

# Of one layer and batch: its input on the teacher `[B, T, d]`, which tokens are real `[B, T]`, what the teacher's layer
# is called with besides, how often the batch counts, and the student's context.
LayerText = tuple[Tensor, Tensor, dict[str, Any], float, MixingContext]

# About how many tokens of the text are read alone, and how much they count together, as a share of the text.
_FIRST_TOKENS = 2048
_FIRST_ROWS = 512
_FIRST_SHARE = 1 / 16
# Of starts, that is chosen which is best on every so many-th batch, solved on the others.
_CHECKED = 4


def calibrate_checkpoint(
    checkpoint: Path,
    base: Path,
    windows: Windows,
    output: Path,
    *,
    dtype: torch.dtype,
    batch_size: int = 4,
    ridge: float = 1e-3,
    sequential: bool = True,
    latents: bool = False,
    pairs: bool = False,
    gates: bool = False,
    averages: bool = False,
    mlp: bool = False,
    save_dtype: torch.dtype = torch.float32,
) -> None:
    """Calibrates a converted checkpoint against its base, and fills the folder `output` with the result.

    Args:
        checkpoint, base: model folders.
        windows: the text.
        dtype: of matrix products.
        ridge, sequential, latents, pairs, gates, averages, mlp: see `calibrate`. Raises as it does.
        save_dtype: of the weights that are written. Raises as `save_checkpoint` does.
    """
    device = default_device()
    student = load_model(checkpoint, torch.float32).to(device)
    assert isinstance(student, HyLoForCausalLM)
    teacher = load_model(base, torch.float32).to(device)
    batches = [
        {key: batch[key].to(device) for key in ("input_ids", "attention_mask")} for batch in windows.batches(batch_size)
    ]
    with autocast(device, dtype):
        calibrate(
            student,
            teacher,
            batches,
            ridge=ridge,
            sequential=sequential,
            latents=latents,
            pairs=pairs,
            gates=gates,
            averages=averages,
            mlp=mlp,
        )
    save_checkpoint(student, output, base, save_dtype)


@torch.no_grad()
def calibrate(
    student: HyLoForCausalLM,
    teacher: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    *,
    ridge: float = 1e-3,
    sequential: bool = True,
    latents: bool = False,
    pairs: bool = False,
    gates: bool = False,
    averages: bool = False,
    mlp: bool = False,
) -> None:
    """Solves the output projections of all layers whose mixer is not attention, in place.

    Args:
        batches: input_ids and attention_mask, `[B, T]` each; text that evaluation does not use.
        ridge: lambda, relative to the mean square of a feature.
        sequential: features from the student's own hidden states rather than the teacher's.
        latents: make queries, latents and rotary keys of MLA layers anew, from the teacher's attention on the text.
        pairs: with `latents`, choose the rotary pairs of MLA layers by what they gain (`hylo.upcycle.pairs`), and leave
            them in the student's config.
        gates: set output gates and value convolutions of linear layers, from the teacher's attention on the text; those
            whose heads are not the teacher's stay as they are.
        averages: in place of that (or of the start as it is), let heads of linear layers read averages of values, where
            that leaves a layer less error (`hylo.upcycle.initialise.averages`).
        mlp: let the MLPs of those layers make up for what their mixers lack (`hylo.upcycle.repair`).

    Raises:
        HyLoError: where values are not finite, `latents` is asked of MLA layers that norm queries or keys, or `pairs`
            without `latents`.
    """
    if pairs and not latents:
        raise HyLoError("calibration: pairs is true; expected latents to be true as well, which makes the weights anew")
    if latents:
        check_latents(student.config)
    layers = student.model.decoder_layers
    if pairs:
        mla = [i for i, layer in enumerate(layers) if isinstance(layer.mixer, MultiHeadLatentAttention)]
        if mla:
            geometry = student.config.geometry("mla")
            assert isinstance(geometry, MLAGeometry)
            set_pairs(student, pairs_by_gain(teacher, batches, geometry, mla))
    batches, weights = _with_first_tokens(batches)
    entered = [enter_layers(teacher, batch) for batch in batches]
    teacher_hidden = [hidden for hidden, _ in entered]
    student_hidden = list(teacher_hidden)
    contexts = [
        student.model.mixing_context(hidden, batch["attention_mask"])
        for hidden, batch in zip(teacher_hidden, batches, strict=True)
    ]
    real = [batch["attention_mask"].bool() for batch in batches]
    tokens = sum(int(mask.sum()) for mask in real)
    with bar("calibrate", tokens, "tokens") as shown:
        for i, (layer, teacher_layer) in enumerate(zip(layers, layers_of(teacher), strict=True)):
            mixer, solved = layer.mixer, layer.mixer.replaces_attention
            arguments = [by_layer[i] for _, by_layer in entered]
            text = list(zip(teacher_hidden, real, arguments, weights, contexts, strict=True))
            if latents and isinstance(mixer, MultiHeadLatentAttention):
                _solve_latents(mixer, teacher_layer, text)
            steps = [step_layer(teacher_layer, hidden, own) for hidden, _, own, _, _ in text]
            inputs = student_hidden if sequential else teacher_hidden
            if solved:
                starts = _starts(layer, teacher_layer, text, gates=gates, averages=averages)
                features = _solve_best(
                    layer, starts, inputs, [mixed for mixed, _ in steps], text, ridge, keep=sequential
                )
                if mlp:
                    repair_mlp(layer, _added(layer, inputs, steps, text), ridge)
            elif sequential:
                features = [_features(layer, x, context) for x, context in zip(inputs, contexts, strict=True)]
            if sequential:
                student_hidden = [
                    layer.after_mixing(hidden, mixer.output_projection(x))
                    for hidden, x in zip(student_hidden, features, strict=True)
                ]
            teacher_hidden = [output for _, output in steps]
            # Every token passes every layer: a layer is its share of the tokens.
            shown.advance(tokens / len(layers))


def _with_first_tokens(batches: list[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], list[float]]:
    """The text, tokens of it each as a text of its own, and how often each batch counts."""
    tokens = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    # Evenly through the text, so that a token stands for as many as it is frequent.
    alone = tokens[:: max(1, len(tokens) // _FIRST_TOKENS), None]
    # A kernel's grid may hold 65,535 heads of sequences.
    first = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in alone.split(_FIRST_ROWS)]
    return [*batches, *first], [1.0] * len(batches) + [_FIRST_SHARE * len(tokens) / len(alone)] * len(first)


def check_latents(config: HyLoConfig) -> None:
    """Raises HyLoError where `latents` cannot be had of a hybrid."""
    if "mla" in (config.token_mixers or []) and config.qk_norm:
        raise HyLoError(
            "calibration: latents is true; queries of this base have norms, through which they cannot be solved"
        )


def _solve_best(
    layer: HyLoDecoderLayer,
    starts: Sequence[Callable[[], None]],
    inputs: list[Tensor],
    targets: list[Tensor],
    text: list[LayerText],
    ridge: float,
    *,
    keep: bool,
) -> list[Tensor]:
    """Solves the output projection after each start of the mixer, and keeps the start that leaves the least error.

    The error is that on batches of the text which the solution did not see, where there are enough of them; what is
    kept is solved on all.

    Args:
        starts: each changes what stands before the projection, of the mixer as it was before any.
        inputs: the layer's, `[B, T, d]`, batch by batch.
        targets: what the mixer should give, `[B, T, d]`.

    Returns, if they are to be kept, the features before the projection, `[B, T, F]`, batch by batch.
    """
    mixer, projection = layer.mixer, layer.mixer.output_projection
    before = {name: value.clone() for name, value in mixer.state_dict().items()} if len(starts) > 1 else {}
    # Of little text none is held out.
    step = _CHECKED if before and len(text) >= 2 * _CHECKED else 0
    best: tuple[float, dict[str, Tensor], list[Tensor]] | None = None
    for start in starts:
        if before:
            mixer.load_state_dict(before)
        start()
        fit, check = RidgeRegression(), RidgeRegression()
        features = []
        for i, (x, target, (_, real, _, weight, context)) in enumerate(zip(inputs, targets, text, strict=True)):
            read = _features(layer, x, context)
            # The projection's bias, where it has one, stays what the base's biases make it.
            wanted = target if projection.bias is None else target - projection.bias
            (check if step and i % step == step - 1 else fit).add(read[real], wanted[real], weight)
            if keep:
                features.append(read)
        error = (check if step else fit).error(fit.solve(ridge)) if before else 0.0
        if best is None or error < best[0]:
            projection.weight.copy_((fit + check).solve(ridge))
            state = {name: value.clone() for name, value in mixer.state_dict().items()} if before else {}
            best = error, state, features
    assert best is not None
    if before:
        mixer.load_state_dict(best[1])
    return best[2]


def _added(
    layer: HyLoDecoderLayer, inputs: list[Tensor], steps: list[tuple[Tensor, Tensor]], text: list[LayerText]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    """What `repair_mlp` reads."""
    for x, (_, output), (hidden, real, _, weight, context) in zip(inputs, steps, text, strict=True):
        mixed = layer.mixer.output_projection(_features(layer, x, context))
        yield x, mixed, output - hidden, real, weight


def _as_it_is() -> None:
    """The start of a mixer that is kept."""


def _starts(
    layer: HyLoDecoderLayer, teacher_layer: torch.nn.Module, text: list[LayerText], *, gates: bool, averages: bool
) -> list[Callable[[], None]]:
    """What a mixer may start as: as it is, or with its gates following attention; and with heads that read averages."""
    if not has_gates(layer.mixer):
        return [_as_it_is]
    starts = [partial(_solve_gates, layer, teacher_layer, text) if gates else _as_it_is]
    return starts + [partial(_solve_averages, layer, teacher_layer, text)] * averages


def _solve_latents(mixer: MultiHeadLatentAttention, teacher_layer: torch.nn.Module, text: list[LayerText]) -> None:
    """All of an MLA mixer but its output projection."""
    statistics = AttentionStatistics(AttentionWeights.of(mixer_of(teacher_layer)))
    norm = teacher_layer.get_submodule("input_layernorm")
    for hidden, real, arguments, weight, _ in text:
        if hidden.shape[1] == 1:
            statistics.add_alone(norm(hidden)[:, 0], weight)
        else:
            statistics.add(norm(hidden), real, arguments["position_embeddings"])
    statistics.check()
    ActivationDecomposition(statistics, mixer.geometry).apply_to(mixer)


def _solve_averages(layer: HyLoDecoderLayer, teacher_layer: torch.nn.Module, text: list[LayerText]) -> None:
    """Values and output gate of a linear mixer."""
    statistics = AverageStatistics(layer.mixer, AttentionWeights.of(mixer_of(teacher_layer)))
    for hidden, real, _, weight, _ in text:
        statistics.add(layer.input_layernorm(hidden)[real], weight)
    statistics.apply()


def _solve_gates(layer: HyLoDecoderLayer, teacher_layer: torch.nn.Module, text: list[LayerText]) -> None:
    """Output gate and value convolution of a linear mixer."""
    mixer = layer.mixer
    weights = AttentionWeights.of(mixer_of(teacher_layer))
    norm = mixer.norm if isinstance(mixer, Mamba2) else mixer.get_submodule("o_norm")
    projection = mixer_of(teacher_layer).get_submodule("o_proj")
    if not mixer.config.qk_norm:
        # Whose norms the weights alone do not say.
        lags = LagStatistics(weights, conv_size(mixer))
        for hidden, real, arguments, _, _ in text:
            if hidden.shape[1] > 1:
                lags.add(layer.input_layernorm(hidden), real, arguments["position_embeddings"])
        set_value_taps(mixer, lags)
    statistics = GateStatistics(mixer, weights)
    for hidden, real, arguments, weight, context in text:
        x = layer.input_layernorm(hidden)
        attended = reaching(projection, partial(teacher_layer, hidden, **arguments))
        read = reaching(norm, partial(mixer, x, **context.arguments(mixer), past_key_values=None))
        statistics.add(x[real], attended[real].unflatten(-1, (len(weights.query), -1)), read[real], weight)
    statistics.apply()


def _features(layer: HyLoDecoderLayer, hidden: Tensor, context: MixingContext) -> Tensor:
    """What the mixer hands to its output projection, `[B, T, F]`."""
    x, arguments = layer.input_layernorm(hidden), context.arguments(layer.mixer)
    return reaching(layer.mixer.output_projection, partial(layer.mixer, x, **arguments, past_key_values=None))
