"""How large the pages of vLLM's cache are made: a hybrid's are as large as a state, and few of them make a request."""

from collections.abc import Sequence

# What all kernels for latents take: vLLM 0.27 rounds to it by itself.
PAGE_MULTIPLE = 128
# Pages grow by this much at most: requests that are shorter than the longest get nothing for it.
_MOST_GROWTH = 1.05


def pages_of_a_request(latent_layers: int, linear_layers: Sequence[int]) -> tuple[int, int]:
    """Pages that every `page_tokens` of a request take, and those that its states take, as vLLM groups layers: a page
    is of as many layers as the kind has that has fewest, or of all where no kind has half as many again.

    Args:
        latent_layers: that keep latents.
        linear_layers: of each kind that keeps states, how many there are.
    """
    counts = [latent_layers, *linear_layers]
    together = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    return -(-latent_layers // together), sum(-(-count // together) for count in linear_layers)


def page_tokens(length: int, least: int, a_page: int, states: int) -> int:
    """Tokens of a page with which requests of `length` tokens take least memory: the last page is filled as well.

    Args:
        least: tokens that a page must have, for a state to fit into one.
        a_page, states: what `pages_of_a_request` says.
    """

    def rounded(tokens: int) -> int:
        return -(-tokens // PAGE_MULTIPLE) * PAGE_MULTIPLE

    least = rounded(least)
    sizes = [least, *(rounded(-(-length // count)) for count in range(1, -(-length // least) + 1))]
    fit = [size for size in sizes if least <= size <= _MOST_GROWTH * least]
    return min(fit, key=lambda size: ((a_page * -(-length // size) + states) * size, size))
