"""Other programs' progress, kept off the terminal."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and lines of lm-eval and datasets; this program has its own."""
    import datasets
    from tqdm import tqdm

    names = ("lm_eval", "lm-eval", "datasets")
    before = {name: logging.getLogger(name).level for name in names}
    bars = datasets.are_progress_bars_disabled()
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    begin = tqdm.__init__

    # Written where nobody reads, rather than disabled: vLLM divides by the time that a bar has run.
    nowhere = open(os.devnull, "w")  # noqa: SIM115

    def silent(self: Any, *arguments: Any, **settings: Any) -> None:
        begin(self, *arguments, **settings | {"file": nowhere})

    tqdm.__init__ = silent
    try:
        yield
    finally:
        nowhere.close()
        tqdm.__init__ = begin
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
