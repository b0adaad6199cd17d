"""Several GPUs and hosts: who is who, what ranks agree on, and models in shards (FSDP2, torch.distributed.fsdp).

A run is started by `torchrun` or `accelerate launch`, which tell each process its rank. The models know nothing of it:
they are sharded here, layer by layer, and gathered again when they are saved.
"""

import datetime
import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from hylo.distill.recipe import StageSection
from hylo.errors import HyLoError
from hylo.modeling import HyLoForCausalLM
from hylo.progress import console
from hylo.upcycle.trace import layers_of

# How long ranks wait for one that converts, calibrates or evaluates.
_PATIENCE = datetime.timedelta(hours=24)
# Of accelerate's configuration: precision and accumulation, and what would wrap or compile models.
_SAID_BY_THE_RECIPE = (
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)

T = TypeVar("T")


def begin() -> None:
    """Joins the other processes of a run, where there are any. Before the first model is loaded.

    What accelerate was configured with is dropped, by one process too: it would change what the recipe says.
    """
    for name in _SAID_BY_THE_RECIPE:
        os.environ.pop(name, None)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
        _waiting_room()
        console.quiet = not is_main()


@functools.cache
def _waiting_room() -> dist.ProcessGroup | None:
    """For waiting and for words, which need no GPU."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE) if world_size() > 1 else None


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that converts, evaluates, writes and tells."""
    return rank() == 0


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier(group=_waiting_room())


def on_main(act: Callable[[], T]) -> T:
    """What `act` gives on the first rank, for all; the others wait.

    Raises what it raises there; on the other ranks SystemExit, as the first one says why.
    """
    if world_size() == 1:
        return act()
    outcome: list[Any] = [None, None]
    error: BaseException | None = None
    if is_main():
        try:
            outcome = ["done", act()]
        except BaseException as caught:
            error = caught
            outcome = ["failed", None]
    dist.broadcast_object_list(outcome, src=0, group=_waiting_room())
    if error is not None:
        raise error
    if outcome[0] == "failed":
        raise SystemExit(1)
    return outcome[1]


def main_first(act: Callable[[], T]) -> T:
    """`act` on every rank, on the first before the others: what it leaves on the disk is there for them."""
    kept: list[T] = []
    on_main(lambda: kept.append(act()))
    return kept[0] if kept else act()


def any_rank(*flags: bool) -> list[bool]:
    """Each flag, raised where one rank raises it."""
    if world_size() == 1:
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(raised, dist.ReduceOp.MAX, group=_waiting_room())
    return [bool(flag) for flag in raised]


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """In place."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def share_of_rank(stage: StageSection) -> tuple[int, int]:
    """Windows at a time and batches a step on each rank, so that all ranks make the steps that one would make.

    Raises HyLoError where the windows of a step do not divide over the ranks.
    """
    ranks, windows = world_size(), stage.batch_size * stage.accumulation
    if windows % ranks:
        raise HyLoError(
            f"{stage.name}: {windows} windows a step (batch_size {stage.batch_size} x accumulation "
            f"{stage.accumulation}) do not divide over {ranks} ranks; expected a multiple of {ranks}"
        )
    own = windows // ranks
    batch = max(size for size in range(1, min(stage.batch_size, own) + 1) if own % size == 0)
    return batch, own // batch


@functools.cache
def _mesh() -> DeviceMesh:
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world_size(),))


def shard(model: PreTrainedModel) -> None:
    """Full sharding over all ranks: each layer by itself, then embedding, norm and head. Nothing where there is one.

    What needs gradients has to be said before. Weights are gathered in their own dtype: products are cast by autocast,
    as on one GPU. What is sharded already stays so.
    """
    if world_size() == 1 or isinstance(model, FSDPModule):
        return
    for layer in layers_of(model):
        fully_shard(layer, mesh=_mesh())
    fully_shard(model, mesh=_mesh())


def shard_teacher(model: PreTrainedModel) -> None:
    """As `shard`, for a model that is called without its head: the head is gathered by the loss that reads it."""
    if world_size() == 1 or isinstance(model.get_decoder(), FSDPModule):
        return
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    for layer in layers_of(model):
        fully_shard(layer, mesh=_mesh())
    tied = head.weight is model.get_input_embeddings().weight
    if not tied:
        fully_shard(head, mesh=_mesh())
    # The root too gives its weights back: nothing goes back through a teacher.
    fully_shard(decoder, mesh=_mesh(), reshard_after_forward=True)
    if tied:
        head.weight = model.get_input_embeddings().weight


def whole(model: HyLoForCausalLM) -> HyLoForCausalLM:
    """The model with all its weights, on the first rank's CPU; without weights on the others. Every rank has to call.

    The model itself where there is one rank.
    """
    if world_size() == 1:
        return model
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    with torch.device("meta"):
        gathered = HyLoForCausalLM(model.config)
    if is_main():
        gathered.load_state_dict(state, assign=True)
        gathered.tie_weights()
    return gathered
