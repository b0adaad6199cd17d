"""A step's prompts in groups: each group as if it were a step of its own."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hylo.serve.gpu.groups import STATE_BYTES, groups, most_prompts, short_prompts

CHUNK = 16
LENGTHS = [1, 40, 16, 17, 3, 1, 90, 15, 16, 2, 33]


def step(lengths: list[int], chunk: int | None) -> Any:
    offsets, ends, whose, lasts = [0], [0], [], []
    for i, length in enumerate(lengths):
        begin, end = offsets[-1], offsets[-1] + length
        cuts = [*range(begin + CHUNK, end, CHUNK), end]
        offsets.append(end)
        ends += cuts
        whose += [i] * len(cuts)
        lasts.append(len(whose) - 1)
    made = {"query_start_loc_p": offsets}
    if chunk:
        made |= {"cu_chunk_seqlen_p": ends, "seq_idx_p": whose, "last_chunk_indices_p": lasts}
    return SimpleNamespace(**{name: torch.tensor(values, dtype=torch.int32) for name, values in made.items()})


def same(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype


@pytest.mark.parametrize("chunk", [None, CHUNK])
@pytest.mark.parametrize("most", [1, 2, 3, 4, 10, 11, 12])
def test_each_group_is_a_step_of_its_own(most: int, chunk: int | None) -> None:
    found = list(groups(step(LENGTHS, chunk), most))
    assert len(found) == -(-len(LENGTHS) // most)
    held: list[int] = []
    tokens: list[int] = []
    for group in found:
        mine = LENGTHS[group.prompts]
        assert 1 <= len(mine) <= most
        held += mine
        tokens += range(sum(LENGTHS))[group.tokens]
        alone = step(mine, chunk)
        same(group.offsets, alone.query_start_loc_p)
        same(group.chunk_offsets, getattr(alone, "cu_chunk_seqlen_p", None))
        same(group.chunk_prompts, getattr(alone, "seq_idx_p", None))
        same(group.last_chunks, getattr(alone, "last_chunk_indices_p", None))
    assert held == LENGTHS
    assert tokens == list(range(sum(LENGTHS)))


@pytest.mark.parametrize("chunk", [None, CHUNK])
@pytest.mark.parametrize(("tokens", "count"), [(100, 1), (100, 7), (64, 4), (5, 9), (1, 1)])
def test_prompts_to_try_kernels_on(tokens: int, count: int, chunk: int | None) -> None:
    made = short_prompts(tokens, count, torch.device("cpu"), chunk)
    lengths = [end - begin for begin, end in pairwise(made.query_start_loc_p.tolist())]
    assert sum(lengths) == tokens
    assert len(lengths) == min(count, tokens) == len(made.state_indices_tensor_p) == len(made.has_initial_states_p)
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1
    (whole,) = groups(made, count)
    expected = step(lengths, chunk)
    same(whole.offsets, expected.query_start_loc_p)
    same(whole.chunk_offsets, getattr(expected, "cu_chunk_seqlen_p", None))
    same(whole.last_chunks, getattr(expected, "last_chunk_indices_p", None))


def test_sizes_of_groups() -> None:
    """Six heads of 256/512 are 3 MiB a prompt. A state larger than the bound goes alone."""
    assert most_prompts((6, 512, 256)) == 42
    assert most_prompts((9, 64, 64)) == 910
    assert most_prompts((STATE_BYTES, 1, 1)) == 1
