"""What the benchmarks share: the bases' sizes, and what a result file says of where it was made."""

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

RESULTS = Path(__file__).parent / "results"
# Llama-3.2-1B and -3B, without their rope scaling: weights are random.
BASES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
}
LAYOUTS = {"1b": "4MLA12GDN", "3b": "6MLA22GDN"}


def base_config(name: str, context: int = 2**21) -> LlamaConfig:
    return LlamaConfig(
        **BASES[name],
        head_dim={"1b": 64, "3b": 128}[name],
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def circumstances() -> dict[str, Any]:
    """Date, hardware, versions and command."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("transformers", "triton", "flash-linear-attention", "safetensors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {"name": properties.name, "memory_bytes": properties.total_memory}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": _command(),
        "gpu": gpu,
        "cpu": {"name": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "memory_bytes": _memory_bytes()},
        "commit": _commit(),
        "versions": versions,
    }


def _cpu_name() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _commit() -> str | None:
    """Of the repository that the benchmark is in, with a plus sign where files differ; None outside of one."""
    try:
        run = functools.partial(subprocess.run, cwd=RESULTS.parent, capture_output=True, text=True, check=True)
        changed = run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
        return run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _command() -> str:
    """As typed in the repository's root, without where the result was put."""
    script, *arguments = sys.argv
    if "--output" in arguments:
        place = arguments.index("--output")
        del arguments[place : place + 2]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    start = ["python"] if ranks == 1 else ["torchrun", "--nproc-per-node", str(ranks)]
    return shlex.join([*start, f"benchmarks/{Path(script).name}", *arguments])


def write_result(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
