"""What the linear mixers share when served: states in vLLM's cache, and one step of a mixed batch.

vLLM puts the tokens of all requests end to end, those of decoding requests (one token each) first. Each request has a
slot of the cache, a convolution state `[W - 1, channels]` of the model's dtype and a recurrent state `[H, V, K]` in
float32. A step reads each slot, and leaves in it the state after the request's last token.
"""

from abc import abstractmethod
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

# Registers the operation that splits vLLM's compiled graphs and calls `forward_native` or `forward_cuda` of a layer.
import vllm.model_executor.layers.mamba.short_conv  # noqa: F401
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from hylo.ops.kernels import chosen_kernels
from hylo.serve.metadata import ConvolvedBackend
from hylo.serve.states import StateShapes

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class LinearLayer(nn.Module, MambaBase):
    """Base of the served linear mixers.

    A subclass projects its input, calls `mix` with everything that its recurrence reads, and projects what it gives.
    `step` defines the recurrence in plain torch; on a GPU `decode` and `prefill` may be kernels.
    """

    def __init__(self, vllm_config: "VllmConfig", shapes: StateShapes, prefix: str) -> None:
        super().__init__()
        self.shapes, self.prefix = shapes, prefix
        self.dtype: torch.dtype = vllm_config.model_config.dtype
        self.kv_cache = (torch.tensor([]), torch.tensor([]))
        self.most_requests: int = vllm_config.scheduler_config.max_num_seqs
        # The most tokens that kernels have been tried on.
        self.warmed_up = 0
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"two layers are called {prefix}")
        layers[prefix] = self

    @abstractmethod
    def step(self, rows: Tensor, past: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Some tokens of each of B sequences.

        Args:
            rows: what `mix` was called with, `[B, T, ...]`.
            past: the convolution's inputs before them, `[B, W - 1, channels]`, zeros at the beginning.
            state: the recurrent state before them, `[B, H, V, K]`; None at the beginning.

        Returns:
            outputs `[B, T, H * V]`, and both states after the last token.
        """

    def mix(self, rows: Tensor, output_size: int) -> Tensor:
        """Runs the recurrence over a step's tokens, `[T, ...]` to `[T, output_size]`."""
        output = rows.new_empty(rows.shape[0], output_size)
        torch.ops.vllm.short_conv(rows, output, self.prefix)
        return output

    def forward_native(self, hidden_states: Tensor, output: Tensor) -> None:
        """What the operation calls, on any device."""
        metadata: Any = get_forward_context().attn_metadata
        if metadata is None:
            # vLLM measures memory, or records graphs of what is around: there is no cache.
            output.zero_()
            if by_kernels(hidden_states) and hidden_states.shape[0] > self.warmed_up:
                self.warmed_up = hidden_states.shape[0]
                self.warm_up(hidden_states)
            return
        metadata = metadata[self.prefix]
        decoded = metadata.num_decode_tokens
        total = decoded + metadata.num_prefill_tokens
        if decoded:
            slots = metadata.state_indices_tensor_d.flatten()[:decoded]
            self.decode(hidden_states[:decoded], output[:decoded], slots)
        if metadata.num_prefills:
            self.prefill(hidden_states[decoded:total], output[decoded:total], metadata)

    forward_cuda = forward_native

    def decode(self, rows: Tensor, output: Tensor, slots: Tensor) -> None:
        """One token of each request."""
        past, state = self.kv_cache
        slots = slots.long()
        made, past[slots], state[slots] = self.step(rows[:, None], past[slots], state[slots])
        output.copy_(made[:, 0])

    def prefill(self, rows: Tensor, output: Tensor, metadata: Any) -> None:
        """Some tokens of each prompt, one prompt after the other."""
        past, state = self.kv_cache
        slots, begun = metadata.state_indices_tensor_p.flatten().tolist(), metadata.has_initial_states_p.tolist()
        for i, (begin, end) in enumerate(pairwise(metadata.query_start_loc_p.tolist())):
            slot = slots[i]
            before = past[slot : slot + 1] if begun[i] else torch.zeros_like(past[slot : slot + 1])
            made, after, last = self.step(rows[None, begin:end], before, state[slot : slot + 1] if begun[i] else None)
            output[begin:end], past[slot], state[slot] = made[0], after[0], last[0]

    def warm_up(self, rows: Tensor) -> None:
        """Runs the kernels on `[T, ...]`: they choose their block sizes, and vLLM sees their memory.

        Once as one prompt, and once as so many as share a call.
        """

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return self.shapes.both

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.dtype, torch.float32

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.SHORT_CONV

    def get_attn_backend(self) -> type[AttentionBackend]:
        return ConvolvedBackend


def by_kernels(rows: Tensor) -> bool:
    """Whether vLLM's kernels compute a step: on a GPU, in half precision, unless the references are asked for."""
    return rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16) and chosen_kernels() != "reference"


def last_inputs(past: Tensor, inputs: Tensor) -> Tensor:
    """The convolution state after `[B, T, C]`, given the one before, `[B, W - 1, C]`."""
    return torch.cat([past, inputs], dim=1)[:, inputs.shape[1] :]
