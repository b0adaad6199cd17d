"""Forward and backward of each mixer at 64K tokens, beside flash-linear-attention's own layer. Needs a GPU and fla.

python benchmarks/mixers.py --name mixers-h100

Layers of one name have the same weights; their outputs are compared before they are timed. fla's Mamba-2 needs the
Triton kernels of mamba-ssm, its MLA flash-attn; where the latter is missing, the result says what stood in.
"""

import argparse
import importlib
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, write_result
from torch import Tensor, nn

from hylo import HyLoConfig
from hylo.mixers import mixer_class
from hylo.mixers.rotary import RotaryEmbedding

Layer = Callable[[Tensor], Tensor]


def ours(name: str, geometry: dict[str, Any], **sizes: Any) -> nn.Module:
    config = HyLoConfig(
        num_hidden_layers=1, token_mixers=[name], mixer_geometry={name: geometry}, attn_implementation="sdpa", **sizes
    )
    config._attn_implementation = "sdpa"
    mixer = mixer_class(name)(config, 0)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.02)
    mixer.reset_parameters()
    return mixer.to("cuda", torch.bfloat16)


def called(mixer: nn.Module, tokens: int) -> Layer:
    """The mixer as a function of hidden states."""
    positions = None
    rotary = type(mixer).rotary_embedding(mixer.config)
    if isinstance(rotary, RotaryEmbedding):
        rotary = rotary.cuda()
        positions = rotary(
            torch.empty(0, device="cuda", dtype=torch.bfloat16), torch.arange(tokens, device="cuda")[None]
        )
    return lambda x: mixer(x, positions, None, None)


def cases(tokens: int) -> dict[str, Callable[[], tuple[Layer, nn.Module, dict[str, tuple[Layer, nn.Module]], bool]]]:
    """By name: our layer, its peers, and whether the first peer has the same weights."""
    from fla.layers import GatedDeltaNet, KimiDeltaAttention
    from fla.layers.simple_gla import SimpleGatedLinearAttention

    def same(mixer: nn.Module, peer: nn.Module, label: str) -> Any:
        peer = peer.to("cuda", torch.bfloat16)
        peer.load_state_dict(mixer.state_dict())
        return called(mixer, tokens), mixer, {label: (lambda x: peer(x)[0], peer)}, True

    def gdn_published() -> Any:
        mixer = ours("gdn", {"num_heads": 6, "head_k_dim": 256, "head_v_dim": 512}, hidden_size=2048)
        return same(mixer, GatedDeltaNet(2048, expand_v=2, head_dim=256, num_heads=6), "fla GatedDeltaNet")

    def gdn_aligned() -> Any:
        mixer = ours("gdn", {"num_heads": 24, "head_k_dim": 128, "head_v_dim": 128}, hidden_size=3072)
        return same(mixer, GatedDeltaNet(3072, expand_v=1, head_dim=128, num_heads=24), "fla GatedDeltaNet")

    def kda() -> Any:
        geometry = {"num_heads": 16, "head_k_dim": 128, "head_v_dim": 128, "gate_rank": 128}
        mixer = ours("kda", geometry, hidden_size=2048)
        return same(mixer, KimiDeltaAttention(2048, head_dim=128, num_heads=16), "fla KimiDeltaAttention")

    def fla_mamba2() -> nn.Module:
        from fla.layers import Mamba2 as FlaMamba2

        # Its path for training alone needs causal-conv1d; the other differentiates as well, on the same kernels.
        layer = FlaMamba2(
            num_heads=16,
            head_dim=128,
            hidden_size=2048,
            state_size=128,
            expand=1,
            n_groups=16,
            norm_before_gate=False,
            layer_idx=0,
        )
        return layer.eval()

    def mamba2(num_kv_heads: int) -> tuple[Layer, nn.Module]:
        geometry = {"num_heads": 16, "num_kv_heads": num_kv_heads, "head_dim": 128}
        sizes = {"num_attention_heads": 16, "num_key_value_heads": num_kv_heads, "head_dim": 128}
        mixer = ours("mamba2", geometry, hidden_size=2048, **sizes)
        return called(mixer, tokens), mixer

    def mamba2_same() -> Any:
        return same(mamba2(16)[1], fla_mamba2(), "fla Mamba2")

    def mamba2_grouped() -> Any:
        layer, mixer = mamba2(8)
        peer = fla_mamba2().to("cuda", torch.bfloat16)
        simple = SimpleGatedLinearAttention(
            hidden_size=2048, num_heads=16, expand_k=1, expand_v=1, use_short_conv=True, gate_logit_normalizer=16
        ).to("cuda", torch.bfloat16)
        peers: dict[str, tuple[Layer, nn.Module]] = {
            "fla Mamba2 with 16 heads of x and B": (lambda x: peer(x)[0], peer),
            "fla SimpleGatedLinearAttention, without dt, D and the convolution's bias": (
                lambda x: simple(x)[0],
                simple,
            ),
        }
        return layer, mixer, peers, False

    def mla() -> Any:
        geometry = {
            "kv_lora_rank": 128,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        }
        sizes = {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}
        mixer = ours("mla", geometry, **sizes)
        import fla.layers.mla as fla_mla

        label = "fla MultiheadLatentAttention"
        if fla_mla.flash_attn_func is None:
            label += " with SDPA for flash-attn"

            def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, **kwargs: Any) -> Tensor:
                q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

            fla_mla.flash_attn_func = sdpa
        peer = fla_mla.MultiheadLatentAttention(
            hidden_size=3072,
            num_heads=24,
            q_lora_rank=1536,
            qk_rope_head_dim=64,
            kv_lora_rank=128,
            v_head_dim=128,
            qk_nope_head_dim=64,
            qk_head_dim=128,
            layer_idx=0,
        ).to("cuda", torch.bfloat16)
        return called(mixer, tokens), mixer, {label: (lambda x: peer(x, None)[0], peer)}, False

    return {
        "gdn, 6 heads of 256/512, d 2048": gdn_published,
        "gdn, 24 heads of 128, d 3072": gdn_aligned,
        "kda, 16 heads of 128, d 2048": kda,
        "mamba2, 16 heads of 128, d 2048": mamba2_same,
        "mamba2, 16 and 8 heads of 128, d 2048": mamba2_grouped,
        "mla, rank 128, 24 heads of 64+64, d 3072": mla,
    }


def step_ms(layer: Layer, module: nn.Module, x: Tensor, upstream: Tensor) -> float:
    """One forward and backward, by CUDA events."""
    module.zero_grad(set_to_none=True)
    x.grad = None
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    layer(x).backward(upstream)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="mixers-gpu", help="of the result file")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="layers whose name begins so")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result: dict[str, Any] = circumstances() | {"tokens": arguments.tokens, "repeats": arguments.repeats, "layers": {}}
    result["versions"]["mamba-ssm"] = getattr(importlib.import_module("mamba_ssm"), "__version__", None)
    for name, build in cases(arguments.tokens).items():
        if not name.startswith(arguments.only):
            continue
        torch.manual_seed(0)
        layer, module, peers, comparable = build()
        hidden = module.config.hidden_size
        x = torch.randn(1, arguments.tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        upstream = torch.randn_like(x)
        row: dict[str, Any] = {}
        for label, (peer, peer_module) in peers.items():
            try:
                if comparable:
                    with torch.no_grad():
                        expected, output = peer(x).float(), layer(x).float()
                    row["relative_difference"] = float((output - expected).norm() / expected.norm())
                times: dict[str, list[float]] = {"hylo": [], label: []}
                # Warm up, then take turns: clocks drift alike for both.
                for repeat in range(3 + arguments.repeats):
                    for who, (f, m) in {"hylo": (layer, module), label: (peer, peer_module)}.items():
                        ms = step_ms(f, m, x, upstream)
                        if repeat >= 3:
                            times[who].append(ms)
                medians = {who: statistics.median(values) for who, values in times.items()}
                row[label] = {
                    "hylo_ms": round(medians["hylo"], 3),
                    "peer_ms": round(medians[label], 3),
                    "ratio": round(medians["hylo"] / medians[label], 4),
                    "spread": {who: [round(min(v), 3), round(max(v), 3)] for who, v in times.items()},
                }
            except Exception as error:
                row[label] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
                torch.cuda.empty_cache()
                if not any("hylo_ms" in value for value in row.values() if isinstance(value, dict)):
                    mine = [step_ms(layer, module, x, upstream) for _ in range(3 + arguments.repeats)][3:]
                    row["hylo_ms"] = round(statistics.median(mine), 3)
        result["layers"][name] = row
        print(name, row, flush=True)
        write_result(arguments.output / f"{arguments.name}.json", result)
        del layer, module, peers, x, upstream
        torch.cuda.empty_cache()
    # fla's own layer comes first among the peers.
    first = {name: next(v for v in row.values() if isinstance(v, dict)) for name, row in result["layers"].items()}
    slower = {name: row for name, row in first.items() if not row.get("ratio", math.inf) <= 1.05}
    if slower:
        sys.exit(f"not shown to be within 1.05 times fla's own layer: {slower}")


if __name__ == "__main__":
    main()
