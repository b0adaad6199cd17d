"""fused_linear_kl with both heads in FSDP2 shards, on two gloo processes: what one process computes, to 1e-6."""

import copy
import itertools
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hylo.ops.linear_kl import fused_linear_kl

RANKS, TOKENS, WIDTH, TEACHER_WIDTH = 2, 40, 8, 12
# Odd, so that the shards are not of one size.
WORDS = 23
STEPS = 2
LOSSES: list[dict[str, Any]] = [{}, {"temperature": 2.0, "top_k": 5}]


class Tiny(nn.Module):
    """Ends in hidden states, as a decoder does; the head is read by the loss."""

    def __init__(self, width: int, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embedding(ids)))


def shard(model: Tiny, how: str) -> None:
    """`left whole`: as FSDP2 leaves the root's weights after its forward; `again`: in shards again; `own`: apart."""
    fully_shard(model.body)
    if how == "own":
        fully_shard(model.head)
    fully_shard(model, **({"reshard_after_forward": True} if how == "again" else {}))


def loss_of(student: Tiny, teacher: Tiny, ids: Tensor, mask: Tensor, count: Tensor, **loss: Any) -> Tensor:
    hidden = student(ids)
    with torch.no_grad():
        teacher_hidden = teacher(ids)
    return fused_linear_kl(
        hidden, student.head.weight, teacher_hidden, teacher.head.weight, mask, count=count, chunk_size=8, **loss
    )


def close(actual: Tensor, expected: Tensor, message: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6, msg=lambda text: f"{message}: {text}")


def check(rank: int, how: str, tied: bool, idle: bool, loss: dict[str, Any]) -> None:
    case = f"rank {rank}, {how}, tied {tied}, idle {idle}, {loss}"
    torch.manual_seed(0)
    student, teacher = Tiny(WIDTH, tied), Tiny(TEACHER_WIDTH, False).requires_grad_(False)
    ids = torch.randint(0, WORDS, (STEPS, RANKS, TOKENS))
    mask = torch.rand(ids.shape) < 0.7
    if idle:
        mask[:, 1] = False
    count = mask.sum()

    single = copy.deepcopy(student)
    expected = loss_of(single, teacher, ids.flatten(), mask.flatten(), count, **loss)
    expected.backward()

    shard(student, how)
    shard(teacher, how)
    total = torch.zeros(())
    for step in range(STEPS):
        part = loss_of(student, teacher, ids[step, rank], mask[step, rank], count, **loss)
        if step == 0:
            assert isinstance(student.head.weight, DTensor) == (how != "left whole"), case
        total += part.detach()
        (part * RANKS).backward()
    dist.all_reduce(total)
    close(total, expected.detach(), case)
    gradients = dict(single.named_parameters())
    for name, parameter in student.named_parameters():
        assert isinstance(parameter.grad, DTensor), case
        close(parameter.grad.full_tensor(), gradients[name].grad, f"{case}, {name}")


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for how, tied, loss in itertools.product(("left whole", "again", "own"), (False, True), LOSSES):
        if not (how == "own" and tied):
            check(rank, how, tied, False, loss)
    check(rank, "again", False, True, {})
    check(rank, "left whole", True, True, {})
    check_frozen_head(rank)
    dist.barrier()
    # At once: tearing gloo down has aborted processes whose work was done ("terminate called without ...").
    os._exit(0)


def check_frozen_head(rank: int) -> None:
    """In shards, and no gradient, nor a product or a reduction for one."""
    torch.manual_seed(0)
    student, teacher = Tiny(WIDTH, False), Tiny(TEACHER_WIDTH, False).requires_grad_(False)
    student.head.requires_grad_(False)
    shard(student, "again")
    shard(teacher, "again")
    ids, mask = torch.randint(0, WORDS, (TOKENS,)), torch.ones(TOKENS)
    loss_of(student, teacher, ids, mask, mask.sum()).backward()
    assert student.head.weight.grad is None
    assert student.body.weight.grad.full_tensor().any()


def test_two_ranks_are_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path / "store"),), nprocs=RANKS)
