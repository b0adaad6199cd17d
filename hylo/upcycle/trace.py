"""What passes through each layer of a teacher, and students fed with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a Llama-like causal language model, or of a hybrid."""
    return model.get_decoder().layers


def mixer_of(layer: nn.Module) -> nn.Module:
    """A layer's token mixer: `mixer` in a hybrid, `self_attn` elsewhere."""
    return layer.get_submodule("mixer" if hasattr(layer, "mixer") else "self_attn")


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class LayerTrace:
    """The input, mixer output and output of every layer, each a list over layers of `[B, T, D]`.

    The mixer output is taken after its output projection, before the residual.
    """

    inputs: list[Tensor]
    mixer_outputs: list[Tensor]
    outputs: list[Tensor]


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[LayerTrace]:
    """Records every layer of the forward passes made inside the block; a new pass starts anew."""
    trace = LayerTrace([], [], [])

    def before_layer(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if index == 0:
            for values in (trace.inputs, trace.mixer_outputs, trace.outputs):
                values.clear()
        trace.inputs.append(args[0] if args else kwargs["hidden_states"])

    handles = []
    for i, layer in enumerate(layers_of(model)):
        handles += [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, index=i: before_layer(index, args, kwargs), with_kwargs=True
            ),
            mixer_of(layer).register_forward_hook(lambda _, __, output: trace.mixer_outputs.append(_first(output))),
            layer.register_forward_hook(lambda _, __, output: trace.outputs.append(_first(output))),
        ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def trace_layers(model: PreTrainedModel, batch: dict[str, Tensor]) -> LayerTrace:
    """One forward pass without gradients, recorded. `batch` holds input_ids and attention_mask, `[B, T]`."""
    with recorded(model) as trace:
        model.get_decoder()(**batch, use_cache=False)
    return trace


@torch.no_grad()
def enter_layers(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, list[dict[str, Any]]]:
    """What the first layer reads, `[B, T, D]`, and what each layer is called with besides: some have a window's mask.

    With it a model runs layer by layer over many batches, with one layer's hidden states in memory.
    """
    hidden: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def pass_on(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden.append(hidden_states)
        arguments.append(kwargs)
        return hidden_states

    layers = layers_of(model)
    for layer in layers:
        layer.forward = pass_on
    try:
        model.get_decoder()(**batch, use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    return hidden[0], arguments


@torch.no_grad()
def step_layer(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """One layer: its mixer's output and its own output, `[B, T, D]` each."""
    mixed: list[Tensor] = []
    handle = mixer_of(layer).register_forward_hook(lambda _, __, output: mixed.append(_first(output)))
    try:
        output = _first(layer(hidden, **arguments))
    finally:
        handle.remove()
    return mixed[0], output


@contextmanager
def fed_with(model: PreTrainedModel, inputs: list[Tensor]) -> Iterator[None]:
    """Inside the block, layer i of `model` gets `inputs[i]` whatever the layer before it made."""

    def feed(value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (value, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": value}

    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, value=value: feed(value, args, kwargs), with_kwargs=True
        )
        for layer, value in zip(layers_of(model), inputs, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _ReachedError(Exception):
    """Ends a mixer before one of its modules."""


def reaching(module: nn.Module, call: Callable[[], Any]) -> Tensor:
    """The first argument that `module` is called with inside `call`, which goes no further."""
    reached: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        reached.append(args[0])
        raise _ReachedError

    handle = module.register_forward_pre_hook(stop)
    try:
        call()
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return reached[0]
