"""Calibration: the output projection of every replaced mixer, solved in closed form on real text.

The output projection W of a layer is the ridge solution of

    min_W  sum_t |W f_t - a_t|^2 + lambda |W|^2,

f_t the student mixer's features before the projection, a_t the teacher's mixer output at the same token. Layers are
solved in order. With `sequential`, the features of a layer come from the student's own hidden states, with the layers
below already solved, so that a layer makes up for what those got wrong; otherwise from the teacher's.

F^T F and F^T A are all that the solution needs: they are summed in float64 over the text, batch by batch.

With `latents`, what stands before the projection in MLA layers is made anew as well, from what the teacher's attention
does on the text (`hylo.upcycle.initialise.activation`), before the projection is solved.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hylo.data.windows import Windows
from hylo.errors import HyLoError
from hylo.mixers.mla import MultiHeadLatentAttention
from hylo.modeling import HyLoDecoderLayer, HyLoForCausalLM, MixingContext
from hylo.precision import autocast, default_device
from hylo.progress import bar
from hylo.upcycle.activations import AttentionStatistics, AttentionWeights
from hylo.upcycle.bases import load_model, save_checkpoint
from hylo.upcycle.initialise.activation import ActivationDecomposition
from hylo.upcycle.trace import enter_layers, layers_of, mixer_of, step_layer


class RidgeRegression:
    """Least squares with an L2 penalty, from sums over batches."""

    def __init__(self) -> None:
        self._gram: Tensor | None = None
        self._cross: Tensor | None = None

    def add(self, features: Tensor, targets: Tensor) -> None:
        """`[N, F]` and `[N, D]`. Products in float32 whatever autocast says: squared features need the digits."""
        with torch.autocast(features.device.type, enabled=False):
            features, targets = features.float(), targets.float()
            gram, cross = (features.T @ features).double(), (features.T @ targets).double()
        self._gram = gram if self._gram is None else self._gram + gram
        self._cross = cross if self._cross is None else self._cross + cross

    def solve(self, penalty: float) -> Tensor:
        """W `[D, F]`, float64; the penalty is relative to the mean square of the features.

        Raises HyLoError where features or targets are not finite, or all features are zero.
        """
        assert self._gram is not None and self._cross is not None
        if not torch.isfinite(self._gram).all() or not torch.isfinite(self._cross).all() or not self._gram.any():
            raise HyLoError("calibration: a layer's values are not finite or all zero; are the base's weights sound?")
        size = self._gram.shape[0]
        ridge = penalty * self._gram.diagonal().mean() * torch.eye(size, dtype=torch.float64, device=self._gram.device)
        return torch.linalg.solve(self._gram + ridge, self._cross).T


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
    save_dtype: torch.dtype = torch.float32,
) -> None:
    """Calibrates a converted checkpoint against its base, and fills the folder `output` with the result.

    Args:
        checkpoint, base: model folders.
        windows: the text.
        dtype: of matrix products.
        ridge, sequential, latents: see `calibrate`. Raises as it does.
    """
    device = default_device()
    student = load_model(checkpoint, torch.float32).to(device)
    assert isinstance(student, HyLoForCausalLM)
    teacher = load_model(base, torch.float32).to(device)
    batches = [
        {key: batch[key].to(device) for key in ("input_ids", "attention_mask")} for batch in windows.batches(batch_size)
    ]
    with autocast(device, dtype):
        calibrate(student, teacher, batches, ridge=ridge, sequential=sequential, latents=latents)
    save_checkpoint(student.to(save_dtype), output, base)


@torch.no_grad()
def calibrate(
    student: HyLoForCausalLM,
    teacher: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    *,
    ridge: float = 1e-3,
    sequential: bool = True,
    latents: bool = False,
) -> None:
    """Solves the output projections of all layers whose mixer is not attention, in place.

    Args:
        batches: input_ids and attention_mask, `[B, T]` each; text that evaluation does not use.
        ridge: lambda, relative to the mean square of a feature.
        sequential: features from the student's own hidden states rather than the teacher's.
        latents: make queries, latents and rotary keys of MLA layers anew, from the teacher's attention on the text.

    Raises:
        HyLoError: where values are not finite, or `latents` is asked of MLA layers that norm queries or keys.
    """
    if latents:
        _check_latents(student)
    layers = student.model.decoder_layers
    entered = [enter_layers(teacher, batch) for batch in batches]
    teacher_hidden = [hidden for hidden, _ in entered]
    arguments = [shared for _, shared in entered]
    student_hidden = list(teacher_hidden)
    contexts = [
        student.model.mixing_context(hidden, batch["attention_mask"])
        for hidden, batch in zip(teacher_hidden, batches, strict=True)
    ]
    real = [batch["attention_mask"].bool() for batch in batches]
    tokens = sum(int(mask.sum()) for mask in real)
    with bar("calibrate", tokens, "tokens") as shown:
        for layer, teacher_layer in zip(layers, layers_of(teacher), strict=True):
            solved = layer.mixer.replaces_attention
            projection = layer.mixer.output_projection
            regression = RidgeRegression()
            features = []
            if latents and isinstance(layer.mixer, MultiHeadLatentAttention):
                _solve_latents(layer.mixer, teacher_layer, zip(teacher_hidden, real, arguments, strict=True))
            for i, context in enumerate(contexts):
                mixed, output = step_layer(teacher_layer, teacher_hidden[i], arguments[i])
                if solved or sequential:
                    x = _features(layer, student_hidden[i] if sequential else teacher_hidden[i], context)
                    if solved:
                        # The projection's bias, where it has one, stays what the base's biases make it.
                        target = mixed if projection.bias is None else mixed - projection.bias
                        regression.add(x[real[i]], target[real[i]])
                    if sequential:
                        features.append(x)
                teacher_hidden[i] = output
            if solved:
                projection.weight.copy_(regression.solve(ridge))
            if sequential:
                student_hidden = [
                    layer.after_mixing(hidden, projection(x))
                    for hidden, x in zip(student_hidden, features, strict=True)
                ]
            # Every token passes every layer: a layer is its share of the tokens.
            shown.advance(tokens / len(layers))


def _check_latents(student: HyLoForCausalLM) -> None:
    mixers = student.config.token_mixers or []
    if "mla" in mixers and student.config.qk_norm:
        raise HyLoError(
            "calibration: latents is true; queries of this base have norms, through which they cannot be solved"
        )


def _solve_latents(
    mixer: MultiHeadLatentAttention,
    teacher_layer: torch.nn.Module,
    text: Iterable[tuple[Tensor, Tensor, dict[str, Any]]],
) -> None:
    """All of an MLA mixer but its output projection.

    Args:
        text: the layer's input on the teacher `[B, T, d]`, which tokens are real `[B, T]`, and what the layer is
            called with besides, batch by batch.
    """
    statistics = AttentionStatistics(AttentionWeights.of(mixer_of(teacher_layer)))
    norm = teacher_layer.get_submodule("input_layernorm")
    for hidden, real, arguments in text:
        statistics.add(norm(hidden), real, arguments["position_embeddings"])
    if not all(bool(torch.isfinite(x).all()) for x in (statistics.cost, statistics.keys, statistics.read)):
        raise HyLoError("calibration: a layer's values are not finite; are the base's weights sound?")
    ActivationDecomposition(statistics, mixer.geometry).apply_to(mixer)


class _ReachedError(Exception):
    """Ends a mixer before its output projection."""


def _features(layer: HyLoDecoderLayer, hidden: Tensor, context: MixingContext) -> Tensor:
    """What the mixer hands to its output projection, `[B, T, F]`."""
    features: list[Tensor] = []

    def stop(_: torch.nn.Module, args: tuple[Tensor]) -> None:
        features.append(args[0])
        raise _ReachedError

    handle = layer.mixer.output_projection.register_forward_pre_hook(stop)
    try:
        layer.mixer(layer.input_layernorm(hidden), **context.arguments(layer.mixer), past_key_values=None)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return features[0]
