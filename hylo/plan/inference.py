"""Memory to serve a model, on each GPU: weights, cache, state and the workspace of a chunked prefill.

Over several GPUs, tensor parallel: weights are divided, KV heads and states by whole heads, of which the fullest GPU
counts; MLA's latents, which all heads share, and the workspace are counted whole on each.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hylo.mixers import mixer_class
from hylo.modeling import PREFILL_CHUNK
from hylo.plan.model import ModelPlan
from hylo.plan.quantities import GIB, format_tokens
from hylo.plan.workspace import Chunk, prefill_workspace

# Of each GPU's memory: its driver's context, kernels, and what the allocator cannot hand out.
RESERVED_BYTES = GIB
_SMALLEST_CHUNK = 1024
_MOST_GPUS = 1024
# Beyond any prompt: what fits here does not grow with the prompt.
_MOST_TOKENS = 2**40


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    Attributes:
        batch: sequences at a time, each of the whole context.
        gpus: over which the model is divided.
        gpu_memory: bytes of one GPU; None where it is not asked what fits.
        prefill_chunk: tokens of a prompt that are read at a time.
        element_size: bytes of a weight, an activation and a cached value.
    """

    batch: int = 1
    gpus: int = 1
    gpu_memory: int | None = None
    prefill_chunk: int = PREFILL_CHUNK
    element_size: int = 2


def inference_memory(model: ModelPlan, context: int, serving: Serving) -> dict[str, int]:
    """Bytes on each GPU, by part, with `batch` sequences of `context` tokens."""
    config = model.config
    chunk = Chunk(config, min(serving.prefill_chunk, context), serving.batch, context, serving.element_size)
    return {
        "weights": _share(model.parameters * serving.element_size, serving.gpus),
        "cache": _cache_values(model, context, serving.gpus) * serving.batch * serving.element_size,
        "state": _state_bytes(model, serving) * serving.batch,
        "workspace": prefill_workspace(chunk),
    }


def _share(size: int, gpus: int) -> int:
    return -(-size // gpus)


def _by_heads(size: int, heads: int, gpus: int) -> int:
    """What the GPU with the most heads holds of `heads` equal parts."""
    return _share(size * _share(heads, gpus), heads)


def _state_bytes(model: ModelPlan, serving: Serving) -> int:
    """Of a sequence, on each GPU: convolution inputs, and recurrent states in float32."""
    total = 0
    for name in model.layers:
        mixer = mixer_class(name)
        size = mixer.convolution_elements(model.config) * serving.element_size + mixer.state_elements(model.config) * 4
        if size:
            total += _by_heads(size, getattr(model.config.geometry(name), "num_heads", 1), serving.gpus)
    return total


def _cache_values(model: ModelPlan, context: int, gpus: int) -> int:
    """Values that each GPU caches for a sequence."""
    config = model.config
    total = 0
    for i, name in enumerate(model.layers):
        values = mixer_class(name).cache_elements_per_token(config)
        if name == "attention":
            # Its heads are divided, and a layer with a window keeps no more than the next token sees.
            window = config.window_of(i)
            tokens = context if window is None else min(context, window - 1)
            total += tokens * _by_heads(values, config.num_key_value_heads, gpus)
        else:
            total += context * values
    return total


def fits(model: ModelPlan, context: int, serving: Serving) -> bool:
    """Whether a GPU of `gpu_memory` holds it."""
    assert serving.gpu_memory is not None
    return sum(inference_memory(model, context, serving).values()) <= serving.gpu_memory - RESERVED_BYTES


def longest_context(model: ModelPlan, serving: Serving) -> int | None:
    """The most tokens a sequence that fit, 0 where not even one does, or None where any number does."""
    if fits(model, _MOST_TOKENS, serving):
        return None
    low, high = 0, _MOST_TOKENS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(model, middle, serving) else (low, middle)
    return low


def remedies(model: ModelPlan, context: int, serving: Serving) -> list[str]:
    """What would make a context fit, each by itself and tried; empty where it fits or nothing does."""
    if fits(model, context, serving):
        return []
    return list(_remedies(model, context, serving))


def _remedies(model: ModelPlan, context: int, serving: Serving) -> Iterator[str]:
    for batch in _halves(serving.batch, 1):
        if fits(model, context, replace(serving, batch=batch)):
            yield f"--batch {batch}"
            break
    gpus = serving.gpus
    while (gpus := 2 * gpus) <= _MOST_GPUS:
        if fits(model, context, replace(serving, gpus=gpus)):
            yield f"--gpus {gpus}"
            break
    for chunk in _halves(min(serving.prefill_chunk, context), _SMALLEST_CHUNK):
        if fits(model, context, replace(serving, prefill_chunk=chunk)):
            yield f"--prefill-chunk {chunk}"
            break
    caching = [name for name in model.layers if mixer_class(name).cache_elements_per_token(model.config)]
    if caching:
        parts = inference_memory(model, context, serving)
        assert serving.gpu_memory is not None
        left = serving.gpu_memory - RESERVED_BYTES - sum(parts.values()) + parts["cache"]
        most = left * len(caching) // parts["cache"]
        if 0 < most < len(caching):
            yield f"at most {most} of the {len(caching)} layers that cache (the others linear), or a smaller rank"
    longest = longest_context(model, serving)
    if longest:
        yield f"a context of at most {format_tokens(longest)} tokens"


def _halves(value: int, least: int) -> Iterator[int]:
    while (value := value // 2) >= least:
        yield value
