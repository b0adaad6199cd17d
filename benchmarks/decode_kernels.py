"""What one step of decoding reads, kernel by kernel: latents, by ours and by vLLM's own, and a linear layer's state.

python benchmarks/decode_kernels.py --name decode-kernels-h200

Needs a GPU and vLLM. Sizes are those of the 3B 6MLA22GDN geometry. Each row is one layer: microseconds of a step, and
bytes a second of what must be read (and of a state, written) at the least. `--shapes` times ours in other shapes.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, write_result
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

from hylo.serve.gpu import delta as rule
from hylo.serve.gpu import latent_decode
from hylo.serve.gpu.latent_backend import decode_splits

HEADS, RANK, ROPE, PAGE = 24, 128, 64, 12624
DELTA_HEADS, KEY, VALUE = 9, 256, 512
CASES = [(1, 8192), (1, 65536), (1, 1048576), (16, 65536), (128, 8192), (128, 65536)]
SHAPES = [(64, 4, 3), (64, 4, 2), (64, 8, 3), (128, 4, 2), (128, 4, 3), (128, 8, 3), (32, 4, 4), (32, 2, 3), (64, 4, 4)]


def microseconds(work: Callable[[], Any], repeats: int = 20) -> float:
    """Median of replays of a CUDA graph of ten, as a server runs it: launches do not count."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            work()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(100 * start.elapsed_time(end))
    return statistics.median(times)


def latents(batch: int, context: int, longest: int, shapes: bool) -> dict[str, Any]:
    """Ours beside vLLM's, over the same cache and cut into as many pieces."""
    make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    most = -(-context // PAGE)
    pages = torch.randperm(batch * most, device="cuda", dtype=torch.int32).view(batch, most)
    cache = torch.empty(batch * most, PAGE, RANK + ROPE, **make).normal_()
    query = torch.randn(batch, HEADS, RANK + ROPE, **make)
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    splits = decode_splits(batch, HEADS, longest, current_platform.num_compute_units())
    parts = torch.empty(batch, HEADS, splits, RANK + 1, device="cuda")
    one, scale = torch.ones((), device="cuda"), (RANK + ROPE) ** -0.5
    outs: list[tuple[Tensor, Tensor]] = [
        (torch.empty(batch, HEADS, RANK, **make), torch.empty(batch, HEADS, **make)) for _ in range(2)
    ]

    def theirs() -> None:
        held = cache.unsqueeze(2)
        decode_attention_fwd(
            query, held, held[..., :RANK], *outs[0], pages, lengths, parts, splits, scale, PAGE,
            k_scale=one, v_scale=one, is_mla=True,
        )  # fmt: skip

    def ours() -> None:
        latent_decode.attend_pieces(query, cache, pages, lengths, parts, scale)
        latent_decode.join_pieces(parts, lengths, *outs[1])

    row: dict[str, Any] = {"batch": batch, "context": context, "splits": splits}
    read = batch * context * (RANK + ROPE) * 2
    for name, work in {"vllm": theirs, "hylo": ours}.items():
        row[f"{name}_us"] = round(microseconds(work), 1)
        row[f"{name}_gb_per_s"] = round(read / row[f"{name}_us"] / 1e3)
    row["hylo_attend_us"] = round(
        microseconds(lambda: latent_decode.attend_pieces(query, cache, pages, lengths, parts, scale)), 1
    )
    difference = (outs[0][0].float() - outs[1][0].float()).abs().max() / outs[0][0].float().abs().max()
    row["difference"] = float(difference)
    if shapes:
        held_shape = latent_decode.BLOCK, latent_decode.WARPS, latent_decode.STAGES
        for shape in SHAPES:
            latent_decode.BLOCK, latent_decode.WARPS, latent_decode.STAGES = shape
            try:
                row[" ".join(map(str, shape))] = round(microseconds(ours), 1)
            except Exception as error:
                row[" ".join(map(str, shape))] = type(error).__name__
        latent_decode.BLOCK, latent_decode.WARPS, latent_decode.STAGES = held_shape
    return row


def delta(batch: int, shapes: bool) -> dict[str, Any]:
    make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    state = torch.zeros(batch + 1, DELTA_HEADS, VALUE, KEY, device="cuda")
    slots = torch.arange(1, batch + 1, dtype=torch.int32, device="cuda")
    q, k = (torch.randn(batch, DELTA_HEADS, KEY, **make) for _ in range(2))
    v = torch.randn(batch, DELTA_HEADS, VALUE, **make)
    decays, b = (torch.randn(batch, DELTA_HEADS, **make) for _ in range(2))
    A_log, dt_bias = torch.zeros(DELTA_HEADS, device="cuda"), torch.zeros(DELTA_HEADS, device="cuda")

    def work() -> None:
        rule.decode(q, k, v, decays, b, A_log, dt_bias, state, slots)

    row = {"batch": batch, "us": round(microseconds(work), 1)}
    row["gb_per_s"] = round(2 * state[1:].nbytes / row["us"] / 1e3)
    if shapes:
        own = rule.VALUES, rule.WARPS
        for shape in itertools.product((8, 16, 32, 64), (1, 2, 4, 8)):
            rule.VALUES, rule.WARPS = shape
            row[" ".join(map(str, shape))] = round(microseconds(work), 1)
        rule.VALUES, rule.WARPS = own
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="decode-kernels-gpu", help="of the result file")
    parser.add_argument("--longest", type=int, default=1048576, help="context that the server was started for")
    parser.add_argument("--shapes", action="store_true", help="time ours in other shapes too")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result: dict[str, Any] = circumstances() | {"longest": arguments.longest, "latents": [], "delta": []}
    for batch, context in CASES:
        result["latents"].append(latents(batch, context, arguments.longest, arguments.shapes))
        print(result["latents"][-1], flush=True)
        torch.cuda.empty_cache()
    for batch in (1, 16, 128):
        result["delta"].append(delta(batch, arguments.shapes))
        print(result["delta"][-1], flush=True)
    write_result(arguments.output / f"{arguments.name}.json", result)


if __name__ == "__main__":
    main()
