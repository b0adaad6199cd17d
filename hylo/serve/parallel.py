"""Over how many ranks a hybrid's heads can be shared."""

import math
from typing import Any

from hylo.config import HyLoConfig
from hylo.errors import HyLoError


def parallel_sizes(config: HyLoConfig) -> list[int]:
    """Over how many ranks every mixer's heads divide evenly."""
    counts = [count for heads in _heads(config).values() for count in heads]
    shared = math.gcd(*counts)
    return [size for size in range(1, shared + 1) if shared % size == 0]


def check_parallel(config: HyLoConfig, size: int) -> None:
    """Raises HyLoError where `size` ranks cannot share the heads: names whose, and the sizes that would do."""
    for mixer, heads in _heads(config).items():
        for count in heads:
            if count % size:
                expected = ", ".join(map(str, parallel_sizes(config)))
                raise HyLoError(
                    f"tensor parallel {size}: {count} heads of {mixer} do not divide over {size} ranks; "
                    f"expected one of {expected}"
                )


def _heads(config: HyLoConfig) -> dict[str, list[int]]:
    """Head counts by mixer."""
    found: dict[str, list[int]] = {}
    for mixer in sorted(set(config.token_mixers or [])):
        sizes: Any = config.geometry(mixer)
        if mixer in ("attention", "mla"):
            found[mixer] = [config.num_attention_heads, config.num_key_value_heads]
        elif mixer == "mamba2":
            found[mixer] = [sizes.num_heads, sizes.num_kv_heads]
        else:
            found[mixer] = [sizes.num_heads]
    return found
