"""Tokens and bytes as people write them."""

import re

from hylo.errors import HyLoError

GIB = 2**30
# Of a number: more are no size of anything, and beyond what Python reads.
_DIGITS = 15
_UNITS = {"": 1, "K": 2**10, "M": 2**20}


def parse_contexts(text: str, option: str = "--context") -> list[int]:
    """`8K,64K,1M` to tokens, K being 1,024. Raises HyLoError, naming the option, on anything else."""
    contexts = []
    for item in text.split(","):
        match = re.fullmatch(rf"(\d{{1,{_DIGITS}}})([KM]?)", item.strip().upper(), re.ASCII)
        if match is None or not int(match[1]):
            raise HyLoError(
                f"{option} {text[:40]!r}: {item[:40]!r} is no number of tokens; expected 8192, 8K or 1M, by commas"
            )
        contexts.append(int(match[1]) * _UNITS[match[2]])
    return contexts


def parse_gib(text: str, option: str) -> int:
    """`80` or `80GiB` to bytes. Raises HyLoError, naming the option, on anything else."""
    match = re.fullmatch(rf"(\d{{1,{_DIGITS}}}(?:\.\d+)?)\s*(?:GIB)?", text.strip().upper(), re.ASCII)
    if match is None or not float(match[1]):
        raise HyLoError(f"{option} {text[:40]!r}; expected GiB such as 80 or 80GiB")
    return int(float(match[1]) * GIB)


def format_tokens(tokens: int) -> str:
    """8,192 as 8K; what is no whole number of K, in full."""
    for unit in ("M", "K"):
        if tokens >= _UNITS[unit] and tokens % _UNITS[unit] == 0:
            return f"{tokens // _UNITS[unit]}{unit}"
    return f"{tokens:,}"


def format_gib(size_bytes: int) -> str:
    """In GiB, with two decimals."""
    return f"{size_bytes / GIB:,.2f}"
