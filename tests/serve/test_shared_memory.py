"""Blocks of latents that fit what a GPU's programs share."""

import pytest

from hylo.serve.gpu.shared_memory import block_tokens, shared_bytes

# Of A100, of RTX and L4, of Hopper.
AMPERE, SMALL, HOPPER = 163 * 1024, 99 * 1024, 227 * 1024


@pytest.mark.parametrize(
    ("width", "heads", "compiled"),
    [
        (128 + 64, 32, [69632, 40960, 26624]),
        (64 + 32, 16, [31744, 17408, 10240]),
        (256 + 64, 32, [110592, 65536, 43008]),
        (512 + 64, 32, [192512, 114688, 75776]),
        (128 + 32, 16, [50176, 27648, 16384]),
    ],
)
def test_bytes_are_those_of_the_compiled_kernel(width: int, heads: int, compiled: list[int]) -> None:
    """`metadata.shared` of `_attend` by Triton 3.7.1, for sm_80, 86, 89 and 90 alike: 128, 64 and 32 tokens."""
    assert [shared_bytes(block, heads, width) for block in (128, 64, 32)] == compiled


def test_blocks() -> None:
    """Every published geometry has the block that was measured on Hopper; on smaller ones no model fails for it."""
    for width in (128 + 64, 256 + 64, 512 + 64):
        assert block_tokens(128, 32, width, HOPPER) == 128
    assert [block_tokens(128, 32, width, AMPERE) for width in (192, 320, 576)] == [128, 128, 64]
    assert [block_tokens(128, 32, width, SMALL) for width in (192, 320, 576)] == [128, 64, 32]
    assert block_tokens(128, 32, 4096, SMALL) == 16
