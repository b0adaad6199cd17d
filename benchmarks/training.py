"""Stages of training on one or several GPUs: tokens a second, model FLOPs use, and peak memory against the plan.

python benchmarks/training.py --case smollm2-kl --name training-smollm2-kl-h100
python benchmarks/training.py --case 1b-64k --name training-1b-64k-h100
torchrun --nproc-per-node 2 benchmarks/training.py --case 1b-8k --name training-1b-8k-2-h200

Weights and tokens are random, sizes are real, and the stage runs as `hylo upcycle` runs it. A stage of a few steps
comes first, in which kernels are compiled and tuned. `--profile` also writes where the time of a step goes.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, base_config, circumstances, write_result
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from hylo import HyLoForCausalLM
from hylo.data.batches import PackedWindows
from hylo.data.mixture import Part, plan_windows
from hylo.data.store import MemoryStore
from hylo.distill import parallel
from hylo.distill.recipe import StageSection
from hylo.distill.trainer import train_stage
from hylo.plan.model import plan_model
from hylo.plan.training import Training, training_memory
from hylo.upcycle.families import hybrid_config
from hylo.upcycle.layout import parse_layout

SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    tie_word_embeddings=True,
)
LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    tie_word_embeddings=False,
)
TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=300,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
)
SMOLLM2_HYBRID = {"base": SMOLLM2, "teacher": SMOLLM2, "layout": "8MLA22GDN", "geometry": {"mla": {"kv_lora_rank": 64}}}
LLAMA_1B_HYBRID = {"base": base_config("1b", 131072), "teacher": LLAMA_8B, "layout": "4MLA12GDN", "geometry": "paper"}
LAYERWISE, KL = {"objective": "layerwise"}, {"objective": "kl", "train": "all"}
# Of documents in a window: about 900 tokens by the median, as in technical text; 0 for one document a window.
MIXED, WHOLE = 900, 0
CASES: dict[str, dict[str, Any]] = {
    "smollm2-layerwise": SMOLLM2_HYBRID | {"documents": MIXED, "stage": LAYERWISE | {"length": 8192, "batch_size": 8}},
    "smollm2-kl": SMOLLM2_HYBRID | {"documents": MIXED, "stage": KL | {"length": 8192, "batch_size": 8}},
    "1b-8k": LLAMA_1B_HYBRID
    | {"documents": MIXED, "stage": KL | {"length": 8192, "batch_size": 8, "gradient_checkpointing": True}},
    "1b-64k": LLAMA_1B_HYBRID
    | {"documents": WHOLE, "stage": KL | {"length": 65536, "accumulation": 2, "gradient_checkpointing": True}},
    "tiny": {"base": TINY, "teacher": TINY, "layout": "2MLA2GDN", "geometry": {}, "documents": 100}
    | {"stage": KL | {"length": 256, "batch_size": 2}},
}


def models(case: dict[str, Any], device: str) -> tuple[HyLoForCausalLM, HyLoForCausalLM]:
    """Student in float32; teacher in bfloat16, or in float32 where it is the base of a layerwise stage."""
    base = case["base"]
    student = hybrid_config(base, parse_layout(case["layout"], base.num_hidden_layers), case["geometry"], "random")
    layerwise = case["stage"]["objective"] == "layerwise"
    config = base if layerwise else case["teacher"]
    teacher = hybrid_config(config, ["attention"] * config.num_hidden_layers, {}, "random")
    made = []
    for own, dtype in ((student, torch.float32), (teacher, torch.float32 if layerwise else torch.bfloat16)):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        with torch.device(device):
            made.append(HyLoForCausalLM(own))
        torch.set_default_dtype(torch.float32)
        made[-1].config._attn_implementation = "sdpa"
    return made[0], made[1]


def windows(stage: StageSection, median: int, words: int) -> PackedWindows:
    """Random tokens; lengths of documents log-normal, none longer than a window."""
    random = np.random.default_rng(0)
    tokens = stage.steps * stage.tokens_per_step
    if median == WHOLE:
        lengths = np.full(tokens // stage.length, stage.length)
    else:
        lengths = np.minimum(np.exp(random.normal(np.log(median), 1.2, 4 * tokens // median)), stage.length).astype(int)
        lengths = lengths[np.cumsum(lengths) <= 1.2 * tokens].clip(min=8)
    store = MemoryStore([random.integers(0, words, size) for size in lengths])
    return PackedWindows([store], plan_windows([Part("random", store)], stage.length, tokens=tokens, seed=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), required=True)
    parser.add_argument("--name", default="training", help="of the result file")
    parser.add_argument("--steps", type=int, default=8, help="that are measured")
    parser.add_argument("--profile", action="store_true", help="write where the time goes to NAME-profile.txt")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the stage, such as batch_size=4")
    arguments = parser.parse_args()
    case = CASES[arguments.case]
    changes = {key: int(value) for key, value in (change.split("=") for change in arguments.set)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    parallel.begin()

    def stage_of(steps: int) -> StageSection:
        values = {"name": "stage", "learning_rate": 1e-5, "tokens": 10**12} | case["stage"] | changes
        whole = StageSection(**values)
        return whole.model_copy(update={"tokens": steps * whole.tokens_per_step})

    student, teacher = models(case, device)
    plan = Training(plan_model(student.config), *([plan_model(teacher.config)] * 2), gpus=parallel.world_size())
    with tempfile.TemporaryDirectory() as folder:
        for steps, name in ((3, "warm-up"), (arguments.steps, "measured")):
            stage = stage_of(steps)
            data = windows(stage, case["documents"], student.config.vocab_size)
            logs = train_stage(stage, student, teacher, data, Path(folder) / name, dtype=dtype, seed=0)
        if arguments.profile:
            stage = stage_of(2)
            data = windows(stage, case["documents"], student.config.vocab_size)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                train_stage(stage, student, teacher, data, Path(folder) / "profile", dtype=dtype, seed=0)
            sort = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
            table = profiler.key_averages().table(sort_by=sort, row_limit=60, max_name_column_width=70)
            arguments.output.mkdir(parents=True, exist_ok=True)
            (arguments.output / f"{arguments.name}-profile.txt").write_text(table)
    if not parallel.is_main():
        return
    planned = training_memory(plan, stage)
    # The first step of a stage makes the optimizer's moments.
    rates = [log["tokens_per_s"] for log in logs[1:]]
    result: dict[str, Any] = circumstances() | {
        "case": arguments.case,
        "gpus": parallel.world_size(),
        "layout": case["layout"],
        "student_parameters": plan.student.parameters,
        "teacher_parameters": plan.teacher.parameters,
        "stage": stage_of(arguments.steps).model_dump(exclude={"name"}),
        "attended": round(data.attended, 1),
        "fill": round(data.fill, 4),
        "tokens_per_s": round(statistics.median(rates), 1),
        "tokens_per_s_each": rates,
        # The same windows on any number of GPUs.
        "loss_each": [log["loss"] for log in logs],
        "memory_bytes": logs[-1]["memory_bytes"],
        "planned_memory": planned,
        "memory_over_plan": round(logs[-1]["memory_bytes"] / sum(planned.values()), 4),
    }
    if "mfu" in logs[-1]:
        result["mfu"] = round(statistics.median(log["mfu"] for log in logs[1:]), 4)
    write_result(arguments.output / f"{arguments.name}.json", result)
    print({key: value for key, value in result.items() if key not in ("versions", "stage")}, flush=True)


if __name__ == "__main__":
    main()
