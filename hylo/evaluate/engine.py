"""What evaluation asks of a model: log-likelihoods of continuations, and greedy answers, batched by tokens.

Rows to be scored that share a beginning are read once up to there: the cache is copied to all of them and each goes on
from it, right-padded, which gives the same values. Answers are generated from left-padded prompts of similar length;
these are read whole, since padding after a shared beginning would stand in the way of a linear layer's convolutions.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria

from hylo.config import HyLoConfig
from hylo.errors import HyLoError
from hylo.modeling import PREFILL_CHUNK
from hylo.progress import Bar, bar

# Tokens of hidden states that the head is applied to at a time: their float32 logits are the largest thing in memory.
_HEAD_TOKENS = 1024
# Sharing a beginning costs a call of its own. On a GPU calls of few tokens take as long as those of many.
_SHARED_TOKENS_WORTH = {"cpu": 256, "cuda": 16384}
# Values of an attention mask over left-padded prompts, rows x length x length, at most: 4 GiB of booleans.
_MASK_VALUES = 2**32

Row = tuple[list[int], list[int]]
Scored = tuple[float, bool]


class NoMemoryError(HyLoError):
    """One sequence alone is more than memory holds."""


# What running out of memory looks like to those who ask an engine.
OUT_OF_MEMORY = (NoMemoryError, torch.OutOfMemoryError)


def context_limit(model: PreTrainedModel) -> int:
    """Tokens that the model was made for."""
    return int(model.config.max_position_embeddings)


class Engine:
    """A model and its tokenizer, ready to be asked.

    Args:
        batch_tokens: tokens of a batch, padding and new tokens counted; chosen by device where None. What does not fit
            into memory is tried again with half of it.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, batch_tokens: int | None = None) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.device = model.device
        self.batch_tokens = batch_tokens or (262_144 if self.device.type == "cuda" else 8_192)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.words = int(model.get_input_embeddings().num_embeddings)
        # No value is read where the mask is zero; any id that has an embedding will do.
        self.pad_id = int(pad or 0) if int(pad or 0) < self.words else 0
        self._may_exceed = max(tokenizer.get_vocab().values()) >= self.words

    def check_ids(self, rows: Iterable[Sequence[int]]) -> None:
        """Raises HyLoError where a row has an id that the model has no embedding for."""
        if not self._may_exceed:
            return
        largest = max((max(row) for row in rows if row), default=0)
        if largest >= self.words:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise HyLoError(
                f"the tokenizer gives {token!r} the id {largest}, and the model has embeddings for {self.words} alone"
            )

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the tokenizer puts before a text."""
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    # Scoring.

    @torch.no_grad()
    def loglikelihoods(self, rows: Sequence[Row], description: str = "score") -> list[Scored]:
        """Of each continuation after its context: the natural log of its probability, and whether it is the greedy one.

        Rows are (context ids, continuation ids), neither empty.

        Raises HyLoError where a value is not finite, or an id is beyond the model's embeddings.
        """
        self.check_ids(ids for row in rows for ids in row)
        results: dict[int, Scored] = {}
        groups = self._groups(rows)
        with bar(description, len(rows), "rows") as shown:
            for shared, indices in groups:
                self._score_group(rows, shared, indices, results, shown)
        values = [results[i] for i in range(len(rows))]
        if not all(abs(value) < float("inf") for value, _ in values):
            raise HyLoError(f"{description}: the log-likelihoods are not finite")
        return values

    def _groups(self, rows: Sequence[Row]) -> list[tuple[int, list[int]]]:
        """Which rows to read together: (shared leading tokens, indices of rows), long ones first."""
        if not rows:
            return []
        worth = _SHARED_TOKENS_WORTH[self.device.type]
        everything = _shared([context for context, _ in rows])
        if everything * (len(rows) - 1) >= worth and everything >= 64:
            return [(everything, list(range(len(rows))))]
        same: dict[tuple[int, ...], list[int]] = {}
        for i, (context, _) in enumerate(rows):
            same.setdefault(tuple(context), []).append(i)
        groups: list[tuple[int, list[int]]] = []
        single: list[int] = []
        for indices in same.values():
            # The last token of a context is read with the continuation: it predicts its first token.
            shared = len(rows[indices[0]][0]) - 1
            if shared * (len(indices) - 1) >= worth:
                groups.append((shared, indices))
            else:
                single += indices
        single.sort(key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
        return [*groups, (0, single)] if single else groups

    def _score_group(
        self, rows: Sequence[Row], shared: int, indices: list[int], results: dict[int, Scored], shown: Bar
    ) -> None:
        cache = None
        if shared:
            prefix = torch.tensor([rows[indices[0]][0][:shared]], device=self.device)
            cache = self._read(prefix)
        widths = [len(rows[i][0]) + len(rows[i][1]) - 1 - shared for i in indices]
        for batch in batches_by_tokens(indices, widths, self.batch_tokens):

            def score(batch: list[int]) -> None:
                results.update(self._score_batch([rows[i] for i in batch], shared, cache, batch))

            self._halving(batch, score)
            shown.advance(len(batch))

    def _read(self, ids: Tensor) -> Any:
        """The cache after `[1, T]` tokens, read in chunks, so that memory does not grow with the square of T."""
        cache = None
        for start in range(0, ids.shape[1], PREFILL_CHUNK):
            piece = ids[:, start : start + PREFILL_CHUNK]
            cache = self.model.get_decoder()(input_ids=piece, past_key_values=cache, use_cache=True).past_key_values
        return cache

    def _score_batch(self, rows: list[Row], shared: int, cache: Any, indices: list[int]) -> dict[int, Scored]:
        """Right-padded: no token sees what comes after it, so that no mask is needed."""
        inputs = [[*context, *continuation][shared:-1] for context, continuation in rows]
        width = max(map(len, inputs))
        ids = torch.full((len(rows), width), self.pad_id)
        for i, row in enumerate(inputs):
            ids[i, : len(row)] = torch.tensor(row)
        arguments: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            copied = copy.deepcopy(cache)
            copied.reorder_cache(torch.zeros(len(rows), dtype=torch.long))
            arguments = {"use_cache": True, "past_key_values": copied}
        hidden = self.model.get_decoder()(input_ids=ids.to(self.device), **arguments).last_hidden_state
        wanted = torch.tensor([token for _, continuation in rows for token in continuation], device=self.device)
        places = [
            (i, len(inputs[i]) - len(continuation) + k)
            for i, (_, continuation) in enumerate(rows)
            for k in range(len(continuation))
        ]
        at = torch.tensor(places, device=self.device)
        values, greedy = self.token_scores(hidden[at[:, 0], at[:, 1]], wanted)
        sizes = [len(continuation) for _, continuation in rows]
        return {
            index: (float(value.double().sum()), bool(best.all()))
            for index, value, best in zip(indices, values.split(sizes), greedy.split(sizes), strict=True)
        }

    def token_scores(self, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the wanted tokens and whether each is the likeliest, `[N]` each, from `[N, D]`.

        The head runs in float32 whatever the weights are in: bfloat16 logits tie.
        """
        head = self.model.get_output_embeddings()
        weight, bias = head.weight.float(), head.bias.float() if head.bias is not None else None
        values, greedy = [], []
        for start in range(0, len(wanted), _HEAD_TOKENS):
            rows = slice(start, start + _HEAD_TOKENS)
            logits = torch.nn.functional.linear(hidden[rows].float(), weight, bias)
            target = wanted[rows, None]
            values.append((logits.gather(1, target) - logits.logsumexp(1, keepdim=True))[:, 0])
            greedy.append(logits.argmax(1) == wanted[rows])
        return torch.cat(values).cpu(), torch.cat(greedy).cpu()

    # Generating.

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[list[int]],
        new_tokens: int,
        *,
        until: Sequence[str] = (),
        description: str = "generate",
    ) -> list[str]:
        """Greedy answers to prompts of token ids: at most `new_tokens` tokens, cut before the first of `until`.

        Raises HyLoError where an id is beyond the model's embeddings.
        """
        self.check_ids(prompts)
        answers: dict[int, str] = {}
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        widths = [len(prompts[i]) + new_tokens for i in order]
        with bar(description, len(prompts), "answers") as shown:
            for batch in batches_by_tokens(order, widths, self.batch_tokens, self._most_rows):

                def answer(batch: list[int]) -> None:
                    texts = self._generate_batch([prompts[i] for i in batch], new_tokens, until)
                    answers.update(zip(batch, texts, strict=True))

                self._halving(batch, answer)
                shown.advance(len(batch))
        return [answers[i] for i in range(len(prompts))]

    def _most_rows(self, width: int) -> int:
        """How many left-padded rows of that width a mask may serve; prompts that are read in chunks need none."""
        chunked = isinstance(self.model.config, HyLoConfig) and width > PREFILL_CHUNK
        return 2**20 if chunked else max(1, _MASK_VALUES // width**2)

    def _generate_batch(self, rows: list[list[int]], new_tokens: int, until: Sequence[str]) -> list[str]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        with self._greedy(new_tokens):
            output = self.model.generate(
                ids.to(self.device),
                attention_mask=mask.to(self.device),
                stopping_criteria=[_Until(self.tokenizer, until, width)] if until else None,
            )
        texts = self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return [cut(text, until) for text in texts]

    @contextmanager
    def _greedy(self, new_tokens: int) -> Iterator[None]:
        """Of a model's own settings for generation only where it ends, and the tokenizer's end of a sequence: a
        penalty, beams or words that it forbids make answers that are not the likeliest.

        They stand on the model: `generate` fills in from there whatever a configuration leaves open.
        """
        own = self.model.generation_config
        self.model.generation_config = GenerationConfig(
            eos_token_id=_end_ids(own.eos_token_id, self.tokenizer.eos_token_id),
            pad_token_id=self.pad_id,
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        try:
            yield
        finally:
            self.model.generation_config = own

    def _halving(self, batch: list[int], work: Callable[[list[int]], None]) -> None:
        """Does the work, in two halves where it does not fit into memory."""
        try:
            work(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise NoMemoryError(
                    "one sequence does not fit into memory; choose shorter lengths or a larger GPU"
                ) from None
        else:
            return
        torch.cuda.empty_cache()
        self.batch_tokens = max(1, self.batch_tokens // 2)
        for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
            self._halving(half, work)


def _end_ids(*given: int | list[int] | None) -> list[int] | None:
    """All tokens that end an answer; None where there is none."""
    ids = [one for ids in given if ids is not None for one in (ids if isinstance(ids, list) else [ids])]
    return list(dict.fromkeys(ids)) or None


class _Until(StoppingCriteria):
    """Ends the rows whose new text contains one of the strings."""

    def __init__(self, tokenizer: Any, until: Sequence[str], prompt_width: int) -> None:
        self.tokenizer, self.until, self.prompt_width = tokenizer, until, prompt_width
        # Every token is at least one byte of its text, or a special one: this many hold the longest string.
        self.tail = max(len(text.encode()) for text in until) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tails = self.tokenizer.batch_decode(input_ids[:, self.prompt_width :][:, -self.tail :])
        ended = [any(text in tail for text in self.until) for tail in tails]
        return torch.tensor(ended, device=input_ids.device)


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings."""
    places = [text.find(one) for one in until if one in text]
    return text[: min(places)] if places else text


def _shared(rows: Sequence[list[int]]) -> int:
    """How many leading tokens all rows share, less the last of the shortest, which predicts what follows it."""
    first, last = min(rows), max(rows)
    shared = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        shared += 1
    return min(shared, min(map(len, rows)) - 1)


def batches_by_tokens(
    items: Sequence[int],
    widths: Sequence[int],
    batch_tokens: int,
    most_rows: Callable[[int], int] | None = None,
) -> list[list[int]]:
    """Cuts items in their order into batches of at most `batch_tokens` padded tokens, one item at least."""
    batches: list[list[int]] = []
    widest = 0
    for item, width in zip(items, widths, strict=True):
        widest = max(widest, width)
        rows = len(batches[-1]) + 1 if batches else 1
        if not batches or rows * widest > batch_tokens or (most_rows is not None and rows > most_rows(widest)):
            batches.append([])
            widest = width
        batches[-1].append(item)
    return batches
