"""`hylo serve` as a user runs it: a process, the OpenAI API, clients that behave and clients that do not."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'hylo[serve]'")

from hylo.upcycle.bases import load_model, load_tokenizer

pytestmark = pytest.mark.skipif(
    "hylo" not in {point.name for point in entry_points(group="vllm.general_plugins")},
    reason="the entry point is not installed: pip install the package again",
)

START_S, STOP_S = 180, 60
COMMAND = "import typer; from hylo.commands import bench, serve; app = typer.Typer(); "
COMMAND += "serve.register(app); bench.register(app); app()"


class Server:
    """A server of one model, and how to ask it."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        options = ["--port", str(self.port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
        options += ["--kv-cache-memory-bytes", str(2**26), "--served-model-name", "hybrid", "--max-num-seqs", "8"]
        self.log = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, "serve", str(folder), "--context", "256", *options],
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("GET" if body is None else "POST", path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def complete(self, prompt: str, tokens: int, **options: Any) -> tuple[int, Any]:
        body = {"model": "hybrid", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        status, answer = self.ask("/v1/completions", json.dumps(body | options).encode())
        return status, json.loads(answer)

    def abandon(self, prompt: str) -> None:
        """Begins to read a long answer, and hangs up."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = {"model": "hybrid", "prompt": prompt, "max_tokens": 200, "stream": True, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        connection.getresponse().read(40)
        connection.close()

    def metric(self, name: str) -> float:
        lines = self.ask("/metrics")[1].decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))

    def wait(self) -> None:
        for _ in range(START_S):
            assert self.process.poll() is None, Path(self.log.name).read_text()[-3000:]
            try:
                if self.ask("/health")[0] == 200:
                    return
            except OSError:
                time.sleep(1)
        raise AssertionError(f"no server after {START_S} s")


@pytest.fixture(scope="module")
def server(mixed_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(mixed_folder, tmp_path_factory.mktemp("server") / "log")
    try:
        started.wait()
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
        started.process.wait()
        started.log.close()


def test_clients_of_all_kinds(server: Server, mixed_folder: Path) -> None:
    """Right answers for all who ask rightly, 4xx for the others, and no block of the cache kept by anybody."""
    prompts = [f"word {i} " * (1 + 3 * i) for i in range(10)]
    with ThreadPoolExecutor(16) as clients:
        asked = [clients.submit(server.complete, prompt, 8) for prompt in prompts]
        left = [clients.submit(server.abandon, prompt) for prompt in prompts[:4]]
        wrong = [
            clients.submit(server.ask, "/v1/completions", b'{"model": "hybrid", "prompt": '),
            clients.submit(server.ask, "/v1/completions", b'{"model": "another", "prompt": "a"}'),
            clients.submit(server.ask, "/v1/completions", b'{"model": "hybrid", "prompt": "a", "max_tokens": -1}'),
            clients.submit(server.complete, "too long " * 400, 4),
        ]
        answers = [each.result() for each in asked]
        refusals = [each.result()[0] for each in wrong]
        for each in left:
            each.result()
    assert all(400 <= status < 500 for status in refusals), refusals
    model, tokenizer = load_model(mixed_folder, torch.float32), load_tokenizer(mixed_folder)
    for prompt, (status, answer) in zip(prompts, answers, strict=True):
        assert status == 200, answer
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
        # The last token may be part of a character: vLLM then leaves it out.
        said, meant = answer["choices"][0]["text"], tokenizer.decode(expected)
        assert said.rstrip("\ufffd") == meant.rstrip("\ufffd")
    for _ in range(100):
        if not server.metric("vllm:num_requests_running") and not server.metric("vllm:kv_cache_usage_perc"):
            break
        time.sleep(0.2)
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_it_stops_when_told(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(STOP_S) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
