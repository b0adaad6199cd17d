"""Prefill and decode through `generate()` up to 2M tokens, the dense base beside it. Needs a GPU and fla.

python benchmarks/long_context.py --base 1b --name long-context-1b-h200

Weights are random, of the published geometry. The base is transformers' own LlamaForCausalLM, as it comes.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import LAYOUTS, RESULTS, base_config, circumstances, write_result
from transformers import LlamaForCausalLM, PreTrainedModel, StoppingCriteria

from hylo import HyLoForCausalLM
from hylo.plan.inference import Serving, inference_memory
from hylo.plan.model import plan_model
from hylo.upcycle.families import hybrid_config
from hylo.upcycle.layout import parse_layout

NEW_TOKENS = 64


class Clock(StoppingCriteria):
    """Notes when each token is there, and the peak memory of prefill and decode apart."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prefill_peak = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        torch.cuda.synchronize()
        if not self.times:
            self.prefill_peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def measure(model: PreTrainedModel, context: int, new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """One prompt of random tokens, then greedy tokens."""
    torch.cuda.empty_cache()
    torch.manual_seed(context)
    ids = torch.randint(0, 128256, (1, context), device="cuda")
    clock = Clock()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=[clock],
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    steps = sorted(b - a for a, b in zip(clock.times[:-1], clock.times[1:], strict=True))
    row = {
        "context": context,
        "prefill_s": round(clock.times[0] - start, 3),
        "prefill_tokens_per_s": round(context / (clock.times[0] - start)),
        "decode_s": round(clock.times[-1] - clock.times[0], 3),
        "decode_ms_per_token": round(1e3 * steps[len(steps) // 2], 3),
        "decode_tokens_per_s": round((len(clock.times) - 1) / (clock.times[-1] - clock.times[0]), 1),
        "prefill_peak_bytes": clock.prefill_peak,
        "decode_peak_bytes": torch.cuda.max_memory_allocated(),
    }
    cache = out.past_key_values
    if isinstance(model, HyLoForCausalLM):
        config, tokens = model.config, context + new_tokens - 1
        row |= {
            "cache_bytes": cache.token_bytes(),
            "planned_cache_bytes": config.cache_bytes(tokens),
            "state_bytes": cache.state_bytes(),
            "planned_state_bytes": config.state_bytes(),
            "planned_peak_bytes": sum(inference_memory(plan_model(config), tokens, Serving()).values()),
        }
        row["peak_over_plan"] = round(row["prefill_peak_bytes"] / row["planned_peak_bytes"], 4)
        row["prefill_peak_beside_cache_bytes"] = row["prefill_peak_bytes"] - row["cache_bytes"]
        assert row["cache_bytes"] == row["planned_cache_bytes"], row
        assert row["state_bytes"] == row["planned_state_bytes"], row
    else:
        row["cache_bytes"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return row


def run(model: PreTrainedModel, contexts: list[int], label: str, rows: list[dict[str, Any]], save: Any) -> None:
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # Kernels are compiled and chosen here: a first chunk, a further one, single tokens.
    measure(model, 20000, 4)
    memory = torch.cuda.get_device_properties(0).total_memory
    for context in contexts:
        try:
            row = measure(model, context)
        except torch.OutOfMemoryError:
            row = {"context": context, "failed": f"out of memory ({memory / 2**30:.0f} GiB)"}
        rows.append({"weights_bytes": weights} | row)
        print(label, row, flush=True)
        save()
        if "failed" in row:
            break


def check(rows: dict[int, dict[str, Any]]) -> None:
    """Ends with an error where a claim does not hold, of those whose lengths were measured."""
    short, long, million = rows.get(8 * 2**10), rows.get(64 * 2**10), rows.get(2**20)
    wrong = [
        f"{n}: peak {row['peak_over_plan']} of the plan"
        for n, row in rows.items()
        if abs(row["peak_over_plan"] - 1) > 0.1
    ]
    if short and long and long["decode_ms_per_token"] > 1.15 * short["decode_ms_per_token"]:
        wrong.append("a token at 64K takes more than 1.15 times one at 8K")
    key = "prefill_peak_beside_cache_bytes"
    if long and million and million[key] > 1.3 * long[key]:
        wrong.append("1M needs more than 1.3 times the memory of 64K, cache apart")
    if wrong:
        sys.exit("; ".join(wrong))


def tokens(text: str) -> list[int]:
    units = {"K": 2**10, "M": 2**20}
    return [int(part.rstrip("KM")) * units.get(part[-1], 1) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=sorted(LAYOUTS), default="1b")
    parser.add_argument("--contexts", type=tokens, default="8K,64K,256K,1M,2M")
    parser.add_argument("--base-contexts", type=tokens, default="8K,64K,256K,1M,2M", help="until memory runs out")
    parser.add_argument("--name", default="long-context", help="of the result file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    config = base_config(arguments.base)
    mixers = parse_layout(LAYOUTS[arguments.base], config.num_hidden_layers)
    result: dict[str, Any] = circumstances() | {
        "layout": LAYOUTS[arguments.base],
        "new_tokens": NEW_TOKENS,
        "hybrid": [],
        "base": [],
    }

    def save() -> None:
        write_result(arguments.output / f"{arguments.name}.json", result)

    for label, kind, settings, contexts in (
        ("hybrid", HyLoForCausalLM, hybrid_config(config, mixers, "paper", arguments.base), arguments.contexts),
        ("base", LlamaForCausalLM, config, arguments.base_contexts),
    ):
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = kind._from_config(settings, dtype=torch.bfloat16).eval()
        result[f"{label}_parameters"] = sum(parameter.numel() for parameter in model.parameters())
        run(model, contexts, label, result[label], save)
        del model
        torch.cuda.empty_cache()
    check({row["context"]: row for row in result["hybrid"] if "failed" not in row})


if __name__ == "__main__":
    main()
