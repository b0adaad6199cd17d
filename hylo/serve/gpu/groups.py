"""The prompts of a step, in groups whose states fit in a bounded memory.

A kernel that reads many prompts at once holds a few states of each beside the cache: one of 256/512 with six heads is
3 MiB, so 256 short prompts in a step would take gigabytes that vLLM has not seen when it sizes the cache. The layers
run such a step group by group; the warm-up tries one full group.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# Of the states of a group's prompts, in float32.
STATE_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Group:
    """Some prompts of a step, one after the other.

    Args:
        prompts, tokens, chunks: where they lie among the step's; chunks are those of Mamba-2's kernels.
        offsets: where each prompt begins among the group's tokens, and the end, `[N + 1]`.
        chunk_offsets: the same of chunks; None where the metadata have none.
        chunk_prompts: which of the group's prompts a chunk belongs to.
        last_chunks: of each prompt, among the group's.
    """

    prompts: slice
    tokens: slice
    offsets: Tensor
    chunk_offsets: Tensor | None = None
    chunk_prompts: Tensor | None = None
    last_chunks: Tensor | None = None


def most_prompts(shape: tuple[int, ...]) -> int:
    """How many prompts a group has at most, whose states are of `shape` in float32."""
    return max(1, STATE_BYTES // (4 * torch.Size(shape).numel()))


def groups(metadata: Any, most: int) -> Iterator[Group]:
    """A step's prompts in groups of at most `most`, alike in size; one group, of the metadata's own, where all fit.

    More than one waits for the GPU, for where the prompts end.
    """
    offsets, ends = metadata.query_start_loc_p, getattr(metadata, "cu_chunk_seqlen_p", None)
    count = offsets.shape[0] - 1
    if count <= most:
        chunks = (ends, metadata.seq_idx_p, metadata.last_chunk_indices_p) if ends is not None else (None, None, None)
        yield Group(slice(None), slice(None), offsets, *chunks)
        return
    places = offsets.tolist()
    lasts = metadata.last_chunk_indices_p.tolist() if ends is not None else []
    number = -(-count // most)
    cuts = [i * count // number for i in range(number + 1)]
    for first, end in pairwise(cuts):
        begin = places[first]
        common = (slice(first, end), slice(begin, places[end]), offsets[first : end + 1] - begin)
        if ends is None:
            yield Group(*common)
            continue
        chunk = lasts[first - 1] + 1 if first else 0
        after = lasts[end - 1] + 1
        yield Group(
            *common,
            chunk_offsets=ends[chunk : after + 1] - begin,
            chunk_prompts=metadata.seq_idx_p[chunk:after] - first,
            last_chunks=metadata.last_chunk_indices_p[first:end] - chunk,
        )


def short_prompts(tokens: int, count: int, device: torch.device, chunk: int | None = None) -> Any:
    """Metadata as vLLM's of prompts that begin, of one slot, alike in length as far as they can be; to try kernels on.

    Args:
        tokens: of all prompts.
        count: of prompts; of fewer tokens, as many.
        chunk: tokens of a chunk of Mamba-2's kernels; None for none.
    """
    count = min(count, tokens)
    ends = [i * tokens // count for i in range(count + 1)]
    made: dict[str, list[int]] = {"query_start_loc_p": ends, "state_indices_tensor_p": [1] * count}
    if chunk is not None:
        cuts, whose, lasts = [0], [], []
        for i, (begin, end) in enumerate(pairwise(ends)):
            mine = [*range(begin + chunk, end, chunk), end]
            cuts += mine
            whose += [i] * len(mine)
            lasts.append(len(whose) - 1)
        made |= {"cu_chunk_seqlen_p": cuts, "seq_idx_p": whose, "last_chunk_indices_p": lasts}
    tensors = {name: torch.tensor(values, dtype=torch.int32, device=device) for name, values in made.items()}
    begun = torch.zeros(count, dtype=torch.bool, device=device)
    return SimpleNamespace(chunk_size=chunk, has_initial_states_p=begun, **tensors)
