"""Time and memory of converting a 3B base: random bfloat16 weights, 6MLA22GDN, published geometry, no GPU.

python benchmarks/conversion.py --name conversion-cpu

The base is written first, in the shards that transformers would make. Memory is that of the whole process: its peak,
and the peak of what it holds beside the pages of the files it reads (which the system can take back at any time).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import LAYOUTS, RESULTS, base_config, circumstances, write_result
from transformers import LlamaForCausalLM

from hylo.upcycle.stream import TensorInfo, TensorWriter

SHARD_BYTES = 5 * 10**9


def write_random_base(folder: Path, name: str) -> int:
    """Fills the folder; returns the bytes of its largest layer."""
    config = base_config(name)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shapes = {key: value.shape for key, value in model.state_dict().items() if key != "lm_head.weight"}
    shards: list[dict[str, TensorInfo]] = [{}]
    for key, shape in shapes.items():
        info = TensorInfo(shape, torch.bfloat16)
        if sum(other.size_bytes for other in shards[-1].values()) + info.size_bytes > SHARD_BYTES:
            shards.append({})
        shards[-1][key] = info
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with TensorWriter(folder / file, shard) as writer:
            for key, info in shard.items():
                value = torch.ones(info.shape) if "norm" in key else torch.randn(info.shape, generator=generator) * 0.02
                writer.write(key, value.bfloat16())
        weight_map.update(dict.fromkeys(shard, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(shape.numel() * 2 for key, shape in shapes.items() if key.startswith("model.layers.0."))


def watched(command: list[str]) -> dict[str, Any]:
    """Runs a command; its seconds, and its peak memory sampled twenty times a second."""
    peaks = {"RssAnon": 0, "VmHWM": 0}
    process = subprocess.Popen(command)

    def sample() -> None:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            for line in lines:
                key, _, value = line.partition(":")
                if key in peaks and value:
                    peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)
            time.sleep(0.05)

    start = time.monotonic()
    watcher = threading.Thread(target=sample)
    watcher.start()
    code = process.wait()
    seconds = time.monotonic() - start
    watcher.join()
    if code:
        sys.exit(f"{command} ended with {code}")
    return {"seconds": round(seconds, 1), "peak_bytes": peaks["VmHWM"], "peak_anonymous_bytes": peaks["RssAnon"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=sorted(LAYOUTS), default="3b")
    parser.add_argument("--name", default="conversion-cpu", help="of the result file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base, hybrid = Path(scratch) / "base", Path(scratch) / "hybrid"
        base.mkdir()
        layer_bytes = write_random_base(base, arguments.base)
        hylo = str(Path(sys.executable).with_name("hylo"))
        layout = LAYOUTS[arguments.base]
        measured = watched([hylo, "convert", str(base), str(hybrid), "--layout", layout, "--geometry", "paper"])
        written = sum(file.stat().st_size for file in hybrid.glob("*.safetensors"))
        start = time.monotonic()
        subprocess.run(["cat", *map(str, hybrid.glob("*.safetensors"))], check=True, stdout=subprocess.DEVNULL)
    result = circumstances() | {
        "layout": layout,
        "threads": torch.get_num_threads(),
        "written_bytes": written,
        "largest_layer_bytes": layer_bytes,
        **measured,
        "beyond_largest_layer_bytes": measured["peak_bytes"] - layer_bytes,
        "reading_the_result_s": round(time.monotonic() - start, 1),
    }
    write_result(RESULTS / f"{arguments.name}.json", result)
    print(json.dumps(result, indent=2))
    if result["seconds"] > 180 or result["beyond_largest_layer_bytes"] > 4 * 2**30:
        sys.exit("expected at most 180 s, and 4 GiB beyond the largest layer")


if __name__ == "__main__":
    main()
