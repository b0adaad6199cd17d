"""Llama's RMS norm, of a layer's stream and of Qwen3's heads."""

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hylo.ops.rms_norm import add_then_norm, rms_norm


class RMSNorm(LlamaRMSNorm):
    """transformers' class, by a kernel where there is one; float64 stays float64."""

    def forward(self, hidden_states: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """In `dtype`; by default that of the hidden states."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, dtype)

    def of_sum(self, x: Tensor, residual: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The norm of residual + x, and that sum."""
        return add_then_norm(x, residual, self.weight, self.variance_epsilon, dtype)
