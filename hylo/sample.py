"""Text that a model writes by itself, to distill it on where no text like its own training's is at hand.

A teacher's own samples are drawn from the very distribution that the student is to have, which text from elsewhere is
not (data-free distillation, as in LLM-QAT, arXiv 2305.17888, section 3.1). Tokens are drawn one by one from the whole
distribution, to the full length: what ends a turn or a document does not end a sample.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, set_seed
from transformers.generation.streamers import BaseStreamer

from hylo.data.documents import is_unicode
from hylo.data.encode import first_ids
from hylo.errors import HyLoError
from hylo.files import partial_of, read_json, write_json, write_text
from hylo.lock import LOCK_FILE, locked
from hylo.precision import default_device, resolve_precision
from hylo.progress import Bar
from hylo.upcycle.bases import (
    context_length,
    load_model,
    load_text_config,
    load_tokenizer,
    opened_folder,
    weights_digest,
)

_FILE = "sample.json"
# Samples at a time: a step of decoding costs a GPU much the same for one and for hundreds.
_BATCH = {"hf": {"cuda": 256, "cpu": 16}, "vllm": {"cuda": 1024, "cpu": 64}}
_CPU_CACHE_BYTES = 2**31
# What a cut in the middle of a character decodes to.
_BROKEN = "�"

Backend = Literal["hf", "vllm"]
# A batch of samples that go on from these ids, drawn with this seed.
Write = Callable[[list[int], int], list[list[int]]]


@dataclass(frozen=True)
class Sampling:
    """What makes the samples, besides the model.

    Attributes:
        length: tokens of a sample, what it starts with counted.
        starts: texts that samples start with, in turns, special tokens among them; where there is none, what the
            tokenizer puts before a text, or its beginning-of-sequence or end-of-sequence token.
        temperature: that logits are divided by; 1 is the model's own distribution.
        seed: that of each batch is made of, with the batch's number.
        batch_size: samples at a time, and in a file.
        backend: `vllm` draws many times faster, where it is installed.
        cache_bytes: of vLLM's cache; what is left of nearly all of a GPU where None. It makes no other samples.
    """

    length: int
    starts: tuple[str, ...]
    temperature: float
    seed: int
    batch_size: int
    backend: Backend
    cache_bytes: int | None = None


def default_batch_size(backend: Backend) -> int:
    return _BATCH[backend][default_device().type]


def write_samples(base: str, output: Path, tokens: int, sampling: Sampling) -> int:
    """Writes `OUTPUT/00000.jsonl` and so on, rows of name and text, until they hold `tokens` tokens.

    Each file is written whole or not at all. Files that are there are taken as they are, where `sample.json` says that
    they were made alike, so that a run that was stopped goes on. Returns the tokens that the files hold.

    Raises:
        HyLoError: where `length` is more than the model was made for or no more than a start, a start has no tokens,
            there is nothing to start with, vLLM is asked for and missing, `output` holds something else or another
            process is at work in it, or a batch is more than memory holds.
    """
    if sampling.backend == "vllm":
        from hylo.evaluate.backends import check_vllm

        check_vllm()
    with opened_folder(base) as folder:
        config = load_text_config(folder)
        context = context_length(config, base)
        if sampling.length > context:
            raise HyLoError(f"--length {sampling.length:,}: {base} was made for {context:,} tokens")
        tokenizer = load_tokenizer(folder)
        starts = _start_ids(tokenizer, sampling, config.vocab_size)
        told = {"weights": weights_digest(folder), **asdict(sampling), "starts": list(sampling.starts)}
        del told["cache_bytes"]
        count = -(-tokens // (sampling.batch_size * sampling.length))
        files = [output / f"{i:05d}.jsonl" for i in range(count)]
        each = sampling.batch_size * sampling.length
        with ExitStack() as stack:
            stack.enter_context(_claimed(output, told))
            stack.enter_context(_memory_told(sampling))
            done = sum(file.is_file() for file in files) * each
            shown = Bar("sample", count * each, "tokens", done)
            stack.callback(shown.close)
            write: Write | None = None
            for i, file in enumerate(files):
                if file.is_file():
                    continue
                seed = _seed(sampling.seed, i)
                write = write or stack.enter_context(_WRITERS[sampling.backend](folder, sampling, seed, shown))
                texts = (_text(tokenizer, ids) for ids in write(starts[i % len(starts)], seed))
                lines = [{"name": f"sample-{i:05d}-{j:04d}", "text": text} for j, text in enumerate(texts) if text]
                write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return count * each


@contextmanager
def _claimed(output: Path, told: dict[str, Any]) -> Iterator[None]:
    """Makes the folder, or sees that it holds samples made alike; alone with it until the end of the block."""
    file = output / _FILE
    ours = {_FILE, partial_of(file).name, LOCK_FILE}
    foreign = output.exists() and not (output.is_dir() and {entry.name for entry in output.iterdir()} <= ours)
    if foreign and not file.is_file():
        raise HyLoError(f"{output} is there and holds no samples; expected a new folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HyLoError(f"cannot write to {output}: {error.strerror}") from None
    with locked(output):
        held = read_json(file) if any(output.glob("[0-9]*.jsonl")) else told
        if differing := [key for key in told if not isinstance(held, dict) or held.get(key) != told[key]]:
            raise HyLoError(f"{output} holds samples drawn with other {', '.join(differing)}; choose another --output")
        write_json(file, told)
        yield


@contextmanager
def _memory_told(sampling: Sampling) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise HyLoError(
            f"--batch-size {sampling.batch_size} of --length {sampling.length}: more than memory holds; "
            "give fewer or shorter ones"
        ) from None


def _seed(seed: int, batch: int) -> int:
    """Of a batch: of two runs with seeds that lie near each other none has a batch of the other."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}".encode()).digest()[:4], "big") >> 1


def _start_ids(tokenizer: Any, sampling: Sampling, vocabulary: int) -> list[list[int]]:
    if not sampling.starts:
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        own = first_ids(tokenizer) or [mark for mark in marks if mark is not None][:1]
        if not own:
            raise HyLoError("the tokenizer has no token that a text begins with; give --start")
        starts = [own]
    else:
        if broken := [text for text in sampling.starts if not is_unicode(text)]:
            raise HyLoError(f"--start {broken[0]!r}: expected text that UTF-8 can hold")
        starts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in sampling.starts]
    for ids, text in zip(starts, sampling.starts or ("",), strict=True):
        if not ids:
            raise HyLoError(f"--start {text!r}: no token")
        if max(ids) >= vocabulary:
            raise HyLoError(f"--start {text!r}: id {max(ids)}, and the model's config.vocab_size is {vocabulary}")
    # As the tokenizer starts every text that is read later.
    first = first_ids(tokenizer)
    starts = [ids if ids[: len(first)] == first else [*first, *ids] for ids in starts]
    if (longest := max(map(len, starts))) >= sampling.length:
        raise HyLoError(f"--length {sampling.length}: no more than the {longest} tokens that samples start with")
    return starts


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Without what the tokenizer puts before every text by itself."""
    first = first_ids(tokenizer)
    ids = list(ids[len(first) :] if first and list(ids[: len(first)]) == first else ids)
    return str(tokenizer.decode(ids, skip_special_tokens=False)).rstrip(_BROKEN)


class _Counted(BaseStreamer):
    """Moves a bar with each token of a batch."""

    def __init__(self, shown: Bar) -> None:
        self.shown = shown

    def put(self, value: Tensor) -> None:
        self.shown.advance(value.numel())

    def end(self) -> None:
        pass


def _with_transformers(folder: Path, sampling: Sampling, first_seed: int, shown: Bar) -> AbstractContextManager[Write]:
    device = default_device()
    # A CPU is many times slower in bfloat16 where it multiplies by a few rows at a time.
    dtype = torch.float32 if device.type == "cpu" else resolve_precision("auto")
    model = load_model(folder, dtype).to(device).eval()

    @torch.no_grad()
    def write(start: list[int], seed: int) -> list[list[int]]:
        set_seed(seed)
        # What the model's folder says of generation, such as top_k, is for answers.
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=sampling.length - len(start),
            pad_token_id=0,
        )
        ids = torch.tensor([start] * sampling.batch_size, device=device)
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=_Counted(shown))
        return [[int(token) for token in row] for row in rows.tolist()]

    return nullcontext(write)


@contextmanager
def _with_vllm(folder: Path, sampling: Sampling, first_seed: int, shown: Bar) -> Iterator[Write]:
    """The engine has one seed, its first batch's: one for each request costs more than the model does."""
    from hylo.evaluate.backends import engine_memory
    from hylo.serve.installed import name_vllm

    name_vllm()
    from vllm import LLM

    # What finds no room in the cache waits.
    cache_bytes = sampling.cache_bytes or (None if torch.cuda.is_available() else _CPU_CACHE_BYTES)
    try:
        llm = LLM(
            str(folder),
            dtype=str(resolve_precision("auto")).removeprefix("torch."),
            max_model_len=sampling.length,
            max_num_seqs=sampling.batch_size,
            generation_config="vllm",
            seed=first_seed,
            **engine_memory(cache_bytes),
        )
    except (ValueError, RuntimeError) as error:
        raise HyLoError(f"vLLM does not take {folder}: {' '.join(str(error).split())[:200]}") from None

    def write(start: list[int], seed: int) -> list[list[int]]:
        rows = continuations(llm, start, sampling)
        shown.advance(sampling.batch_size * sampling.length)
        return rows

    try:
        yield write
    finally:
        llm.llm_engine.engine_core.shutdown()


def continuations(llm: Any, start: list[int], sampling: Sampling) -> list[list[int]]:
    """A batch of samples that go on from these ids, drawn by a vLLM engine."""
    from vllm import SamplingParams

    asked = SamplingParams(
        temperature=sampling.temperature,
        max_tokens=sampling.length - len(start),
        ignore_eos=True,
        detokenize=False,
    )
    answers = llm.generate([{"prompt_token_ids": start}] * sampling.batch_size, asked, use_tqdm=False)
    return [[*start, *answer.outputs[0].token_ids] for answer in answers]


_WRITERS: dict[str, Callable[[Path, Sampling, int, Bar], AbstractContextManager[Write]]] = {
    "hf": _with_transformers,
    "vllm": _with_vllm,
}
