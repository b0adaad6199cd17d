"""Where a base needs attention: what it loses when one layer alone is replaced, and layouts chosen by it.

Of each layer alone, with all others left as they are: KL(base || base with that layer as a linear mixer), and the same
with MLA, each after its closed-form start. The difference is what a place in the cache buys there. A layout for a cache
of n MLA layers takes the n layers that gain most.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hylo.config import HyLoConfig
from hylo.data.windows import Windows
from hylo.errors import HyLoError
from hylo.evaluate.agreement import Reference, make_reference, score
from hylo.mixers import mixer_class
from hylo.modeling import HyLoForCausalLM
from hylo.precision import autocast, default_device, resolve_precision
from hylo.progress import bar
from hylo.upcycle.bases import Base, load_model
from hylo.upcycle.calibrate import calibrate
from hylo.upcycle.convert import convert, plan_conversion
from hylo.upcycle.geometry import PAPER
from hylo.upcycle.trace import enter_layers, layers_of, step_layer


@dataclass(frozen=True)
class Evidence:
    """What each layer loses when it alone is replaced, in nats a token.

    Attributes:
        linear: KL where the layer is a linear mixer.
        mla: KL where it is MLA.
    """

    linear: list[float]
    mla: list[float]

    @property
    def gains(self) -> list[float]:
        """What MLA is worth in place of the linear mixer, by layer."""
        return [linear - mla for linear, mla in zip(self.linear, self.mla, strict=True)]

    def best(self, count: int) -> list[int]:
        """The layers with the largest gains, in order of their place."""
        gains = self.gains
        return sorted(sorted(range(len(gains)), key=lambda layer: -gains[layer])[:count])

    def kept(self, layers: Sequence[int]) -> float:
        """The sum over layers, `layers` as MLA, the others linear: of each alone, not what all lose together."""
        return sum(
            mla if i in layers else linear for i, (linear, mla) in enumerate(zip(self.linear, self.mla, strict=True))
        )


def measure_layers(
    folder: Path,
    linear: str,
    geometry: Mapping[str, Mapping[str, Any]] | str,
    text: Windows,
    unseen: Windows,
    *,
    batch_size: int = 2,
) -> Evidence:
    """Converts all layers of a base to MLA, and all to a linear mixer, calibrates both, and measures layer by layer.

    Args:
        folder: the base's.
        linear: the name of the linear mixer.
        geometry: sizes by mixer, or "paper".
        text, unseen: what calibration reads, and what is scored.
        batch_size: windows read at a time.

    Raises HyLoError where base, geometry and mixers do not fit, or a value is not finite.
    """
    device = default_device()
    teacher = load_model(folder, torch.float32).to(device)
    read, scored = (_on(device, windows.batches(batch_size)) for windows in (text, unseen))
    found: dict[str, list[float]] = {}
    with autocast(device, resolve_precision("auto")):
        reference = make_reference(teacher, scored)
        for mixer in (linear, "mla"):
            with tempfile.TemporaryDirectory() as scratch:
                with Base.open(folder) as base:
                    mixers = [mixer] * base.config.num_hidden_layers
                    sizes = sizes_of(geometry, mixer)
                    convert(plan_conversion(base, mixers, sizes, dtype="float32"), base, Path(scratch) / "all")
                student = load_model(Path(scratch) / "all", torch.float32).to(device)
            assert isinstance(student, HyLoForCausalLM)
            # Queries with norms cannot be solved.
            latents = mixer == "mla" and not student.config.qk_norm
            calibrate(student, teacher, read, sequential=False, latents=latents, gates=True)
            found[mixer] = each_layer_alone(student, teacher, scored, reference, f"{mixer}, each layer alone")
    return Evidence(found[linear], found["mla"])


def sizes_of(geometry: Mapping[str, Mapping[str, Any]] | str, mixer: str) -> Mapping[str, Mapping[str, Any]] | str:
    """What of a geometry holds for a hybrid with one mixer."""
    if isinstance(geometry, str):
        return geometry
    return {name: sizes for name, sizes in geometry.items() if name in (mixer, PAPER)}


def _on(device: torch.device | str, batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{key: batch[key].to(device) for key in ("input_ids", "attention_mask")} for batch in batches]


@torch.no_grad()
def each_layer_alone(
    student: HyLoForCausalLM,
    teacher: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    reference: Reference,
    description: str = "each layer alone",
) -> list[float]:
    """KL of the teacher with one layer taken from the student, for each layer; nats a token.

    Args:
        student: one whose every layer stands by itself, as calibration without `sequential` leaves it.
        batches: input_ids and attention_mask, `[B, T]` each; text that calibration did not use.
        reference: the teacher's final hidden states on the batches.

    Raises HyLoError where a KL is not finite.
    """
    teacher_layers = layers_of(teacher)
    entered = [enter_layers(teacher, batch) for batch in batches]
    hidden = [states for states, _ in entered]
    contexts = [
        student.model.mixing_context(states, batch["attention_mask"])
        for states, batch in zip(hidden, batches, strict=True)
    ]
    losses: list[float] = []
    depth = len(teacher_layers)
    with bar(description, depth * (depth + 1) // 2, "layers") as shown:
        for i, layer in enumerate(student.model.decoder_layers):
            finals = []
            for states, (_, arguments), context in zip(hidden, entered, contexts, strict=True):
                changed = layer(states, **context.arguments(layer.mixer), past_key_values=None)
                for above, own in zip(teacher_layers[i + 1 :], arguments[i + 1 :], strict=True):
                    changed = step_layer(above, changed, own)[1]
                finals.append(teacher.get_decoder().norm(changed))
            kl = score(finals, reference.head, batches, reference, f"layer {i} alone").kl
            assert kl is not None
            losses.append(kl)
            hidden = [
                step_layer(teacher_layers[i], states, arguments[i])[1]
                for states, (_, arguments) in zip(hidden, entered, strict=True)
            ]
            shown.advance(depth - i)
    return losses


@torch.no_grad()
def mixer_errors(
    student: HyLoForCausalLM, teacher: PreTrainedModel, batches: Sequence[dict[str, Tensor]]
) -> list[float]:
    """Of each layer, on the teacher's input: the squared error of the mixer's output, as a share of the teacher's own.

    Args:
        batches: input_ids and attention_mask, `[B, T]` each; text that calibration did not use.
    """
    entered = [enter_layers(teacher, batch) for batch in batches]
    hidden = [states for states, _ in entered]
    contexts = [
        student.model.mixing_context(states, batch["attention_mask"])
        for states, batch in zip(hidden, batches, strict=True)
    ]
    errors: list[float] = []
    for at, (layer, teacher_layer) in enumerate(zip(student.model.decoder_layers, layers_of(teacher), strict=True)):
        sums = torch.zeros(2, dtype=torch.float64)
        for i, (batch, context) in enumerate(zip(batches, contexts, strict=True)):
            mixed = layer.mixer(
                layer.input_layernorm(hidden[i]), **context.arguments(layer.mixer), past_key_values=None
            )
            target, hidden[i] = step_layer(teacher_layer, hidden[i], entered[i][1][at])
            real = batch["attention_mask"].bool()
            sums += torch.stack(
                [(mixed - target)[real].double().square().sum(), target[real].double().square().sum()]
            ).cpu()
        errors.append((sums[0] / sums[1]).item())
    return errors


def mla_share(config: HyLoConfig) -> float:
    """What one MLA layer of a hybrid's geometry caches, as a share of what all layers of its base do."""
    return mixer_class("mla").cache_elements_per_token(config) / config.base_cache_elements_per_token


def mla_layers_within(config: HyLoConfig, share: float) -> int:
    """How many MLA layers a share of the base's cache holds.

    Args:
        config: of a hybrid with MLA.
        share: of the base's cache, more than 0 and at most 1.

    Raises HyLoError where it holds none, or all.
    """
    one, layers = mla_share(config), config.num_hidden_layers
    count = int(share / one + 1e-9)
    if not count:
        raise HyLoError(
            f"a cache of {share:.2%} holds no MLA layer of this geometry: one takes {one:.2%} of the base's"
        )
    if count >= layers:
        raise HyLoError(
            f"a cache of {share:.2%} holds MLA in all {layers} layers ({one * layers:.2%}): nothing to choose"
        )
    return count


def index_layout(mla: Sequence[int], block: str) -> str:
    """As `hylo.upcycle.layout` reads it: MLA at these layers, the rest another block."""
    return f"MLA:{','.join(map(str, mla))} {block}"
