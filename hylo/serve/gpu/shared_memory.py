"""How many tokens a kernel reads at a time, by the memory of a program: 227 KiB on Hopper, 99 on consumer cards."""

from functools import cache
from typing import Any

import torch

# No matrix product has fewer rows.
_LEAST = 16


def shared_bytes(block: int, heads: int, width: int) -> int:
    """What a program of `latent_decode` takes: a block of 16-bit latents beside the one at work, queries, and weights.

    Equal to what Triton 3.7.1 says of the compiled kernel.

    Args:
        block: tokens.
        heads: of a program.
        width: channels of a latent, rank and rotary part each rounded up to a power of two.
    """
    return 2 * ((block + heads) * width + block * heads)


def block_tokens(most: int, heads: int, width: int, shared: int) -> int:
    """The largest block that fits: `most`, a power of two, or that halved so often."""
    block = most
    while block > _LEAST and shared_bytes(block, heads, width) > shared:
        block //= 2
    return block


@cache
def shared_by_programs(device: torch.device) -> int:
    """Bytes that the warps of a program may share on a GPU."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
