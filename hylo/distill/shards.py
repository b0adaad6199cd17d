"""Checkpoints of models and optimizers in shards, by torch.distributed.checkpoint: every rank writes and reads its own.

They may be read by another number of ranks than wrote them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from hylo.files import naming

_MODEL, _OPTIMIZER = "model-shards", "optimizer-shards"
# In the place of an optimizer that has made no step: one that is lost is an error.
_NO_STEP = "no-optimizer-step"


def _plain(optimizer: Any) -> Any:
    """Without accelerate's wrapping."""
    return getattr(optimizer, "optimizer", optimizer)


@contextmanager
def _as_one_error(folder: Path) -> Iterator[None]:
    """What a rank could not read or write, as the error that it is."""
    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()), (error,))[0]
        if isinstance(first, OSError):
            with naming(folder):
                raise first from None
        raise OSError(f"{folder}: {' '.join(str(first).split())[:200]}") from None


def has_shards(folder: Path) -> bool:
    """Whether a checkpoint was written by several ranks."""
    return (folder / _MODEL).is_dir()


def save_shards(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """Every rank has to call. An optimizer that has made no step yet is left out."""
    with _as_one_error(folder):
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=str(folder / _MODEL))
        # Asked for the state of an optimizer that has none, torch has it make a step, which would count.
        if _plain(optimizer).state:
            state = get_optimizer_state_dict(model, _plain(optimizer))
            dcp.save({"optimizer": state}, checkpoint_id=str(folder / _OPTIMIZER))
        else:
            (folder / _NO_STEP).touch()


def load_model_shards(folder: Path, model: nn.Module) -> None:
    """In place. Every rank has to call."""
    state = {"model": get_model_state_dict(model)}
    with _as_one_error(folder):
        dcp.load(state, checkpoint_id=str(folder / _MODEL))
    set_model_state_dict(model, state["model"])


def load_optimizer_shards(folder: Path, model: nn.Module, optimizer: Any) -> None:
    """In place; one that had made no step is left as it is. Every rank has to call."""
    if (folder / _NO_STEP).is_file():
        return
    state = {"optimizer": get_optimizer_state_dict(model, _plain(optimizer))}
    with _as_one_error(folder):
        dcp.load(state, checkpoint_id=str(folder / _OPTIMIZER))
    set_optimizer_state_dict(model, _plain(optimizer), state["optimizer"])
