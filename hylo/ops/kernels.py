"""Which kernels compute an operation: flash-linear-attention's and the package's own on a GPU, or the torch references.

One setting chooses, `auto` by default: kernels where the tensors are on a GPU and there are such that can compute them,
else the reference. With `fla` a recurrence that fla cannot compute is an error.
It is taken from the environment variable HYLO_KERNELS and set by `set_kernels` or, for a block, `kernels`.
"""

import functools
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, cast, get_args

import torch
from packaging.version import Version
from torch import Tensor

from hylo.errors import HyLoError, HyLoWarning

Kernels = Literal["auto", "fla", "reference"]
_INSTALL_FLA = "install it with: pip install 'flash-linear-attention>=0.6,<0.7'"


def _checked(choice: str) -> Kernels:
    if choice not in get_args(Kernels):
        raise HyLoError(f"kernels {choice!r}; expected one of {', '.join(get_args(Kernels))}")
    return cast(Kernels, choice)


_choice: Kernels | None = None


def chosen_kernels() -> Kernels:
    """The setting in force. Raises HyLoError where HYLO_KERNELS holds something else."""
    return _choice or _checked(os.environ.get("HYLO_KERNELS") or "auto")


def set_kernels(choice: str) -> None:
    """Sets the kernels of this process. Raises HyLoError on an unknown name."""
    global _choice
    _choice = _checked(choice)


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Inside the block, the kernels of that name."""
    global _choice
    before, _choice = _choice, _checked(choice)
    try:
        yield
    finally:
        _choice = before


# The largest key size that fla's delta rules take.
FLA_MOST_KEYS = 256


def use_fla(tensor: Tensor, *, gated_backward: bool = False, delta_keys: int = 0) -> bool:
    """Whether fla computes an operation on this tensor.

    Args:
        tensor: an input of the operation, for its device and dtype.
        gated_backward: a backward pass will follow, through a kernel that some versions of Triton compile wrongly.
        delta_keys: the size of a key, in a delta rule.

    Raises:
        HyLoError: where `fla` is chosen and cannot compute it: says what to install. Under `auto` this is a warning,
            given once, and the reference is used.
    """
    choice = chosen_kernels()
    if choice == "reference" or (choice == "auto" and not tensor.is_cuda):
        return False
    problem = _problem(tensor.device, tensor.dtype, gated_backward, delta_keys)
    if problem is None:
        return True
    if choice == "fla":
        raise HyLoError(f"kernels 'fla': {problem}")
    # Float32 without autocast is a choice of exactness over speed, and needs no word.
    if tensor.dtype != torch.float32:
        _warn_once(f"{problem}. Until then plain torch is used, many times slower and with more memory.")
    return False


# Rows from which a kernel is worth its launch, which costs more than one of torch's own.
_FUSED_ROWS = 256


def fuses(tensor: Tensor, package: Literal["fla", "triton"] = "fla") -> bool:
    """Whether one kernel computes a chain of elementwise operations on `[..., D]`, of any dtype but float64.

    A matter of speed alone: where the package is missing nothing is said, and torch does it in a few kernels more.
    """
    return (
        tensor.is_cuda
        and tensor.numel() >= _FUSED_ROWS * tensor.shape[-1]
        and tensor.dtype != torch.float64
        and chosen_kernels() != "reference"
        and _installed(package)
    )


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def will_differentiate(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _problem(device: torch.device, dtype: torch.dtype, gated_backward: bool, delta_keys: int = 0) -> str | None:
    """Why fla cannot compute, and what to do about it; None where it can."""
    if device.type != "cuda":
        return f"flash-linear-attention runs on a GPU, the tensors are on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-linear-attention computes in bfloat16 or float16, the tensors are {str(dtype).split('.')[-1]}"
    if delta_keys > FLA_MOST_KEYS:
        return f"flash-linear-attention's delta rules take keys of at most {FLA_MOST_KEYS}, these have {delta_keys}"
    if importlib.util.find_spec("fla") is None:
        return f"flash-linear-attention is not installed; {_INSTALL_FLA}"
    return _triton_problem(torch.cuda.get_device_capability(device)) if gated_backward else None


@functools.cache
def _triton_problem(capability: tuple[int, int]) -> str | None:
    """Triton 3.4 to 3.7.0 compiles the gated backward pass wrongly on Hopper (fla issue 640), and fla refuses it."""
    try:
        version = Version(importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed; install it with: pip install 'triton>=3.7.1'"
    if capability[0] == 9 and Version("3.4") <= version < Version("3.7.1"):
        return (
            f"Triton {version} computes wrong gradients for gated linear attention on Hopper GPUs; "
            "install a newer one with: pip install 'triton>=3.7.1'"
        )
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, HyLoWarning, stacklevel=4)
