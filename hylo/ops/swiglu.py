"""The gate of a Llama MLP: fla's kernel, which keeps no intermediate for the backward pass, or plain torch."""

from torch import Tensor
from torch.nn import functional

from hylo.ops.kernels import fuses


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, `[..., D]` each."""
    if fuses(gate):
        from fla.modules.activations.ops import swiglu as fused

        return fused(gate, up)
    return functional.silu(gate) * up
