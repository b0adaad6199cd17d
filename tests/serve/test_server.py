"""`hylo serve` as a user runs it: a process, the OpenAI API, clients that behave and clients that do not."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hylo[serve]'")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "load.py"


def test_each_of_several_servers_ends() -> None:
    """What Python runs first in a process of `--api-server-count` limits how long that one waits for its clients."""
    code = (
        "import runpy, uvicorn; runpy.run_module('hylo.serve.start', run_name='__mp_main__'); "
        "print(uvicorn.Config(None).timeout_graceful_shutdown)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["5"]


@pytest.mark.skipif(
    "hylo" not in {point.name for point in entry_points(group="vllm.general_plugins")},
    reason="the entry point is not installed: pip install the package again",
)
def test_a_server_under_load(mixed_folder: Path, tmp_path: Path) -> None:
    """The load test, shortened: right answers, 4xx for the others, no block of the cache kept, an end on SIGTERM."""
    command = [sys.executable, SCRIPT, "--model", mixed_folder, "--output", tmp_path]
    command += ["--clients", "20", "--seconds", "15", "--context", "512", "--max-num-seqs", "8", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(2**26)]
    # The server's engine is a process of its own, whatever the tests of engines say.
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    ended = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, check=False
    )
    assert (tmp_path / "load.json").is_file(), ended.stdout + ended.stderr
    result = json.loads((tmp_path / "load.json").read_text())
    assert all(result["holds"].values()), json.dumps(result, indent=2)
    assert len(result["kinds"]) >= 8 and all(row["asked"] > 10 for row in result["kinds"].values())
    assert result["most"]["waiting"] > 0 and result["most"]["blocks"] > 0
    assert ended.returncode == 0
