"""Whole checkpoints, in and out: everything is checked before the first byte is written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.files import atomic_directory, read_json, write_json
from hylo.modeling import HyLoForCausalLM
from hylo.progress import bar
from hylo.upcycle.bases import copy_companions, load_config
from hylo.upcycle.convert import check_output
from hylo.upcycle.interop import hybrid_config
from hylo.upcycle.interop.configs import FAMILIES, hylo_config, released_configs
from hylo.upcycle.interop.hybrid_config import HybridConfig
from hylo.upcycle.interop.tensors import EMBEDDING, HEAD, halves_from_pairs, pairs_from_halves, released_name
from hylo.upcycle.stream import TensorReader, TensorWriter

_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Transfer:
    """What was written: the model's config, and how many values its file holds."""

    config: HyLoConfig
    parameters: int


def import_released(source: Path, output: Path, *, overwrite: bool = False) -> Transfer:
    """Writes a released checkpoint as one of ours. Values and dtypes stay as they are.

    The head is the embedding where config.json says so and the file holds no other values for it.

    Raises:
        HyLoError: where a file is missing, cut off, or contradicts another. Nothing is written then.
    """
    check_output(output, overwrite)
    base, hybrid = _read_config(source, FAMILIES), HybridConfig.read(source)
    with TensorReader(source) as weights:
        config = hylo_config(base, hybrid, tied=_is_tied(base, weights), where=str(source))
        shapes = _shapes(config)
        sources = {name: released_name(name, config) for name in shapes}
        expected = {sources[name]: shape for name, shape in shapes.items()}
        if config.tie_word_embeddings and HEAD in weights:
            expected[HEAD] = expected[EMBEDDING]
        _check_tensors(source, weights, expected)
        config.architectures = [HyLoForCausalLM.__name__]
        config.base_model = source.name
        config.dtype = weights.tensors[EMBEDDING].dtype
        with atomic_directory(output, overwrite=overwrite) as work:
            parameters = _copy(
                weights, sources, lambda name, tensor: halves_from_pairs(name, tensor, config), work / _WEIGHTS
            )
            config.save_pretrained(work)
            copy_companions(source, work)
    return Transfer(config, parameters)


def export_released(source: Path, output: Path, *, overwrite: bool = False) -> Transfer:
    """Writes one of our checkpoints as a released one. Values and dtypes stay as they are.

    A tied head is stored apart from the embedding all the same, as released files have it.

    Raises:
        HyLoError: where the format cannot hold the model, or a file is cut off or does not fit. Nothing is written.
    """
    _check_replaceable(output, overwrite)
    config = _read_config(source, (HyLoConfig.model_type,))
    assert isinstance(config, HyLoConfig)
    base, hybrid = released_configs(config, str(source))
    with TensorReader(source) as weights:
        shapes = _shapes(config)
        _check_tensors(source, weights, shapes)
        sources = {released_name(name, config): name for name in shapes}
        sources.setdefault(HEAD, EMBEDDING)
        with atomic_directory(output, overwrite=overwrite) as work:
            parameters = _copy(
                weights, sources, lambda name, tensor: pairs_from_halves(sources[name], tensor, config), work / _WEIGHTS
            )
            base.save_pretrained(work)
            write_json(work / hybrid_config.FILE, hybrid.to_json())
            copy_companions(source, work)
    return Transfer(config, parameters)


def _read_config(folder: Path, families: tuple[str, ...]) -> PreTrainedConfig:
    """Raises HyLoError where config.json is missing, is no model's, or is of another family."""
    values = read_json(folder / "config.json")
    family = values.get("model_type") if isinstance(values, dict) else None
    if family not in families:
        raise HyLoError(f"{folder}: config.json is of the {family!r} family; expected {' or '.join(families)}")
    return load_config(folder)


def _is_tied(base: PreTrainedConfig, weights: TensorReader) -> bool:
    if not base.tie_word_embeddings or HEAD not in weights or EMBEDDING not in weights:
        return bool(base.tie_word_embeddings)
    alike = weights.tensors[HEAD] == weights.tensors[EMBEDDING]
    return alike and torch.equal(weights[HEAD], weights[EMBEDDING])


def _shapes(config: HyLoConfig) -> dict[str, torch.Size]:
    """The tensors of one of our checkpoints."""
    with torch.device("meta"):
        model = HyLoForCausalLM(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[HEAD]
    return shapes


def _check_tensors(folder: Path, weights: TensorReader, expected: Mapping[str, torch.Size]) -> None:
    """Raises HyLoError naming the first tensor that is missing, of another shape, or unexpected."""
    for name, shape in expected.items():
        if name not in weights:
            raise HyLoError(f"{folder} has no tensor {name}, which its config calls for")
        if weights.tensors[name].shape != shape:
            raise HyLoError(f"{folder}: {name} is {list(weights.tensors[name].shape)}; expected {list(shape)}")
    for name in sorted(weights.tensors):
        if name not in expected:
            raise HyLoError(f"{folder} has a tensor {name}, which its config does not call for")


def _check_replaceable(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise HyLoError(f"{output} already exists; choose another output or pass --overwrite")
    if not (output / hybrid_config.FILE).is_file():
        raise HyLoError(f"{output} is no released checkpoint; --overwrite replaces nothing else")


def _copy(weights: TensorReader, sources: Mapping[str, str], make: Callable[[str, Tensor], Tensor], file: Path) -> int:
    """Writes each tensor of `sources` (its name in the file, then in `weights`) as `make` gives it; counts values."""
    announced = {name: weights.tensors[source] for name, source in sources.items()}
    with bar("copy", len(sources), "tensors") as shown, TensorWriter(file, announced) as writer:
        for name, source in sources.items():
            writer.write(name, make(name, weights[source]))
            shown.advance(1)
    return sum(tensor.shape.numel() for tensor in announced.values())
