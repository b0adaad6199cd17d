"""Where the GPU's time goes while vLLM serves: one long prompt, and steps of decoding at a full batch.

python benchmarks/serving_profile.py --base 3b --name serving-profile-3b-h200

Needs a GPU and vLLM. Weights are random; times are those of kernels, summed by name, from torch's profiler.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, base_config, circumstances, write_result
from serving import published_config, save
from torch.profiler import ProfilerActivity, profile

from hylo.serve.bench.measure import Plan, _engine, _prompt, _run

STEPS = 16


def by_kernel(found: profile, of: int, rows: int = 24) -> dict[str, Any]:
    """Milliseconds of GPU time for each of `of` equal pieces of work, by kernel."""
    kernels = [
        (event.key, event.self_device_time_total / 1e3 / of, event.count / of)
        for event in found.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.self_device_time_total
    ]
    kernels.sort(key=lambda kernel: -kernel[1])
    return {
        "ms": round(sum(ms for _, ms, _ in kernels), 3),
        "kernels": [{"name": name[:110], "ms": round(ms, 4), "calls": round(n, 1)} for name, ms, n in kernels[:rows]],
    }


def decoding(engine: Any, batch: int, context: int, vocabulary: int) -> dict[str, Any]:
    """Steps in which every request of a batch has its prompt behind it."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=4 * STEPS + batch * 16, ignore_eos=True, detokenize=False)
    for i in range(batch):
        engine.add_request(str(i), {"prompt_token_ids": _prompt(context, vocabulary, i)}, sampling)
    begun: set[str] = set()
    while len(begun) < batch:
        begun |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    for _ in range(4):
        engine.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(STEPS):
            engine.step()
        torch.cuda.synchronize()
    engine.abort_request([str(i) for i in range(batch)])
    while engine.has_unfinished_requests():
        engine.step()
    return {"batch": batch, "context": context} | by_kernel(found, STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="3b")
    parser.add_argument("--dense", action="store_true", help="the base itself in place of its hybrid")
    parser.add_argument("--context", type=int, default=65536)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--name", default="serving-profile", help="of the result file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    config = base_config(arguments.base) if arguments.dense else published_config(arguments.base, "paper")
    result: dict[str, Any] = circumstances() | {"base": arguments.base, "dense": arguments.dense}
    with tempfile.TemporaryDirectory() as scratch:
        plan = Plan(
            model=str(save(config, Path(scratch, "model"))),
            contexts=[arguments.context],
            answer=4 * STEPS + arguments.batch * 16,
            load_context=1,
            load_answer=1,
            load_waves=0,
            requests=arguments.batch,
            gpus=1,
            memory=0.92,
            eager=False,
            dtype="bfloat16",
        )
        engine = _engine(plan)
        vocabulary = engine.vllm_config.model_config.get_vocab_size()
        prompt = _prompt(arguments.context, vocabulary)
        _run(engine, [prompt], 8)
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            _run(engine, [prompt], 1)
        result["prompt"] = {"context": arguments.context} | by_kernel(found, 1)
        write_result(arguments.output / f"{arguments.name}.json", result)
        for batch in (1, arguments.batch):
            result[f"decoding {batch}"] = decoding(engine, batch, arguments.context, vocabulary)
            write_result(arguments.output / f"{arguments.name}.json", result)
    for name in ("prompt", "decoding 1", f"decoding {arguments.batch}"):
        print(f"\n{name}: {result[name]['ms']} ms")
        for kernel in result[name]["kernels"]:
            print(f"  {kernel['ms']:9.3f} ms {kernel['calls']:7.1f} x {kernel['name'][:100]}")
    os._exit(0)


if __name__ == "__main__":
    main()
