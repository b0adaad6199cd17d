"""Conversion as spec, plan, execution.

The spec is a base, a layout and a geometry. The plan says for every tensor of the hybrid what is done to make it, and
can be shown without reading a weight. The execution makes and writes the tensors one by one, so that no more than one
layer's attention is in memory, and the checkpoint appears whole or not at all.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.files import atomic_directory, read_json, write_json
from hylo.modeling import HyLoForCausalLM
from hylo.progress import bar
from hylo.upcycle.bases import Base, copy_companions, in_dtype
from hylo.upcycle.families import hybrid_config
from hylo.upcycle.initialise import RULES, Action, Rule, SourceAttention, Start
from hylo.upcycle.initialise.source import tensor_name
from hylo.upcycle.layout import format_layout, parse_layout
from hylo.upcycle.stream import TensorInfo, TensorWriter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHARD_BYTES = 4 * 2**30


@dataclass(frozen=True)
class PlannedTensor:
    """What makes one tensor of the hybrid.

    Attributes:
        action: copied from the base, decomposed, solved by regression on text, or fresh.
        sources: the base's tensors it is made from, by full name.
    """

    name: str
    shape: torch.Size
    action: Action
    sources: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class ConversionPlan:
    """Every tensor of the hybrid and how it is made."""

    config: HyLoConfig
    start: Start
    dtype: torch.dtype
    tensors: tuple[PlannedTensor, ...]

    @property
    def parameters(self) -> int:
        return sum(tensor.shape.numel() for tensor in self.tensors)


def plan_conversion(
    base: Base,
    layout: str | Sequence[str],
    geometry: Mapping[str, Mapping[str, Any]] | str | None = None,
    *,
    start: Start = "aligned",
    dtype: str | None = None,
    solve_output: bool = False,
    solve_latents: bool = False,
    source_name: str | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
) -> ConversionPlan:
    """The plan for a base, a layout and a geometry. Reads names and sizes, no weights.

    Args:
        geometry: sizes by mixer, or "paper".
        start: what the mixers begin as: `aligned`, near attention, or `paper`, as published.
        dtype: of the hybrid's weights; the base's by default.
        solve_output: whether calibration will solve the output projection of each replaced mixer.
        solve_latents: whether it will make the rest of MLA layers anew as well (`calibrate`'s `latents`).
        source_name: what the hybrid's config names as its base.
        rope_scaling: YaRN's factor and original_max_position_embeddings; the base's own scaling by default.

    Raises:
        HyLoError: where layout, geometry and base do not fit, or the base lacks a tensor or has one too many.
    """
    mixers = parse_layout(layout, base.config.num_hidden_layers)
    config = hybrid_config(base.config, mixers, geometry or {}, source_name or base.folder.name, rope_scaling)
    if dtype is not None and dtype not in DTYPES:
        raise HyLoError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    weight_dtype = DTYPES[dtype] if dtype else (base.config.dtype or torch.float32)
    config.dtype = weight_dtype
    with torch.device("meta"):
        model = HyLoForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    planned = tuple(_planned(name, shape, config, start, solve_output, solve_latents) for name, shape in shapes.items())
    for tensor in planned:
        for source in tensor.sources:
            if source not in base:
                raise HyLoError(f"{base.folder} has no tensor {source}, which {tensor.name} is made from")
    _check_nothing_is_left(base)
    return ConversionPlan(config, start, weight_dtype, planned)


def _check_nothing_is_left(base: Base) -> None:
    """Raises HyLoError where the base has tensors that its config does not call for: the hybrid would lack them."""
    with torch.device("meta"):
        known = AutoModelForCausalLM.from_config(base.config).state_dict().keys()
    # Older files store what the config says of the rotation.
    extra = sorted(name for name in base.names if name not in known and not name.endswith(".rotary_emb.inv_freq"))
    if extra:
        raise HyLoError(
            f"{base.folder} has tensors that its config.json does not call for: {len(extra)}, first {extra[0]}; "
            "expected weights and config of the same model"
        )


def _layer_and_suffix(name: str) -> tuple[int, str] | None:
    """Layer index and the rest of the name, for tensors of a mixer."""
    parts = name.split(".")
    if parts[:2] == ["model", "layers"] and parts[3] == "mixer":
        return int(parts[2]), ".".join(parts[4:])
    return None


def _rule(config: HyLoConfig, start: Start, layer_idx: int, suffix: str) -> Rule:
    assert config.token_mixers is not None
    return RULES[start][config.token_mixers[layer_idx]](config)[suffix]


def _planned(
    name: str, shape: torch.Size, config: HyLoConfig, start: Start, solve_output: bool, solve_latents: bool
) -> PlannedTensor:
    located = _layer_and_suffix(name)
    if located is None:
        return PlannedTensor(name, shape, "copied", (name,), "as it is")
    layer_idx, suffix = located
    rule = _rule(config, start, layer_idx, suffix)
    sources = tuple(tensor_name(layer_idx, source) for source in rule.sources)
    if (
        solve_output
        and suffix in ("o_proj.weight", "out_proj.weight")
        and config.mixer_of(layer_idx).replaces_attention
    ):
        return PlannedTensor(name, shape, "solved", sources, "ridge regression on the teacher's mixer outputs")
    if solve_latents and config.mixer_of(layer_idx).name == "mla" and not suffix.startswith("o_proj."):
        return PlannedTensor(name, shape, "solved", sources, "from the teacher's attention on text")
    return PlannedTensor(name, shape, rule.action, sources, rule.note)


def convert(plan: ConversionPlan, base: Base, output: Path, *, overwrite: bool = False) -> None:
    """Writes the hybrid's checkpoint as a new folder, whole or not at all. Raises as `check_output`."""
    check_output(output, overwrite)
    with atomic_directory(output, overwrite=overwrite) as work:
        write_checkpoint(plan, base, work)


def check_output(output: Path, overwrite: bool) -> None:
    """Raises HyLoError where `output` exists, unless it may be overwritten: a hybrid's checkpoint may, nothing else."""
    if not output.exists():
        return
    if not overwrite:
        raise HyLoError(f"{output} already exists; choose another output or pass --overwrite")
    config = output / "config.json"
    values = read_json(config) if config.is_file() else None
    if not isinstance(values, dict) or values.get("model_type") != HyLoConfig.model_type:
        raise HyLoError(f"{output} is not a hybrid's checkpoint; --overwrite replaces nothing else")


def write_checkpoint(plan: ConversionPlan, base: Base, folder: Path) -> None:
    """Fills a folder: weights in safetensors, config, tokenizer, generation config.

    A `solved` tensor is written as its rule makes it, an output projection as the base's; calibration replaces it.

    Raises:
        HyLoError: where a tensor cannot be made, or holds more than the plan's dtype can.
    """
    shards = _shards(plan)
    layers: dict[int, SourceAttention] = {}
    weight_map: dict[str, str] = {}
    with bar("convert", len(plan.tensors), "tensors") as shown:
        for number, shard in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            announced = {tensor.name: TensorInfo(tensor.shape, plan.dtype) for tensor in shard}
            with TensorWriter(folder / file, announced) as writer:
                for tensor in shard:
                    writer.write(tensor.name, in_dtype(tensor.name, _make(tensor, plan, base, layers), plan.dtype))
                    shown.advance(1)
            weight_map.update(dict.fromkeys(announced, file))
    if len(shards) > 1:
        size = plan.parameters * plan.dtype.itemsize
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
        )
    plan.config.save_pretrained(folder)
    copy_companions(base.folder, folder)
    if not (folder / "generation_config.json").exists():
        GenerationConfig.from_model_config(plan.config).save_pretrained(folder)


def _shards(plan: ConversionPlan) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in plan.tensors:
        size = tensor.shape.numel() * plan.dtype.itemsize
        if shards[-1] and filled + size > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _make(tensor: PlannedTensor, plan: ConversionPlan, base: Base, layers: dict[int, SourceAttention]) -> Tensor:
    located = _layer_and_suffix(tensor.name)
    if located is None:
        made = base.tensor(tensor.name)
    else:
        layer_idx, suffix = located
        if layer_idx not in layers:
            # Tensors come layer by layer: what was decomposed for the last one is let go.
            layers.clear()
            layers[layer_idx] = SourceAttention(base.tensor, layer_idx, plan.config)
        made = _rule(plan.config, plan.start, layer_idx, suffix).make(layers[layer_idx], tensor.shape)
    if made.shape != tensor.shape:
        raise HyLoError(f"{tensor.name}: made {tuple(made.shape)}, expected {tuple(tensor.shape)}")
    if not bool(torch.isfinite(made).all()):
        raise HyLoError(f"{tensor.name}: the values made from {', '.join(tensor.sources)} are not finite")
    return made


def plan_table(plan: ConversionPlan) -> Table:
    """The plan, tensor by tensor."""
    title = f"{format_layout(plan.config.token_mixers or [])}: {plan.parameters:,} parameters"
    table = Table(title=title, box=None, title_justify="left", pad_edge=False)
    for column in ("tensor", "shape", "action", "from"):
        table.add_column(column, no_wrap=True)
    table.add_column("how", overflow="fold")
    styles = {"copied": "", "decomposed": "cyan", "solved": "green", "fresh": "yellow"}
    for tensor in plan.tensors:
        shape = "x".join(map(str, tensor.shape))
        # The layer stands in the tensor's own name.
        sources = ", ".join(source.removesuffix(".weight").split(".")[-1] for source in tensor.sources)
        table.add_row(tensor.name, shape, tensor.action, sources, tensor.note, style=styles[tensor.action])
    return table


def plan_json(plan: ConversionPlan) -> str:
    """The plan as JSON: config and tensors."""
    tensors = [
        {"name": t.name, "shape": list(t.shape), "action": t.action, "from": list(t.sources), "how": t.note}
        for t in plan.tensors
    ]
    return json.dumps({"token_mixers": plan.config.token_mixers, "parameters": plan.parameters, "tensors": tensors})
