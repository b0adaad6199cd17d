"""Llama's RMS norm, of a layer's stream and of Qwen3's heads."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hylo.ops.rms_norm import add_then_norm, rms_norm


class RMSNorm(LlamaRMSNorm):
    """transformers' class, by a kernel where there is one; float64 stays float64."""

    def forward(self, hidden_states: Tensor, dtype: torch.dtype | None = None, residual: Tensor | None = None) -> Any:
        """The norm in `dtype`, by default that of the hidden states; with a residual, of the sum, and the sum."""
        if residual is None:
            return rms_norm(hidden_states, self.weight, self.variance_epsilon, dtype)
        return add_then_norm(hidden_states, residual, self.weight, self.variance_epsilon, dtype)
