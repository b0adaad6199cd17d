"""The one door to a run's data: what it is evaluated on, and the windows of each stage."""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from hylo.data.batches import PackedWindows
from hylo.data.documents import Document
from hylo.data.encode import Encoder
from hylo.data.held_out import HeldOut, evaluation_of, held_out_of, room
from hylo.data.mixture import Part, plan_windows
from hylo.data.sections import DataSection
from hylo.data.sources import OpenSource, open_source
from hylo.data.store import FORMAT, StoreWriter, default_cache
from hylo.data.windows import Windows, single_documents
from hylo.errors import HyLoError


class Corpus:
    """A recipe's data, opened.

    Args:
        section: the recipe's.
        load_tokenizer: gives the base's; called when tokens are first needed, and not for `digest` or `evaluation`.
        cache: where tokens are kept; `$HYLO_CACHE` or ~/.cache/hylo by default. Runs may share it: what is there is
            named by everything that makes it.
        load_vocabulary: gives the model's `config.vocab_size`, to check ids by; called with `load_tokenizer`. None for
            no check.
        evaluation_tokens: how much the run evaluates on at most; of large sources no more is held out in memory than it
            takes.
    """

    def __init__(
        self,
        section: DataSection,
        load_tokenizer: Callable[[], Any],
        *,
        cache: Path | None = None,
        load_vocabulary: Callable[[], int] | None = None,
        evaluation_tokens: int = 100_000,
    ) -> None:
        self.section, self.evaluation_tokens = section, evaluation_tokens
        self._load_tokenizer, self._load_vocabulary = load_tokenizer, load_vocabulary
        self.cache = Path(cache or default_cache())

    @cached_property
    def sources(self) -> list[OpenSource]:
        """To train on. Raises HyLoError where one does not exist."""
        return [open_source(source) for source in self.section.train]

    @cached_property
    def encoder(self) -> Encoder:
        vocabulary = self._load_vocabulary() if self._load_vocabulary is not None else None
        return Encoder(self._load_tokenizer(), self.section.loss, self.section.end_of_text, vocabulary)

    @cached_property
    def held_out(self) -> HeldOut:
        """What training text is kept apart from. Raises HyLoError where a source cannot be read or holds no text."""
        if self.section.eval is not None:
            return evaluation_of([open_source(source) for source in self.section.eval], self.evaluation_tokens)
        return held_out_of(self.sources, self.section.holdout, self.evaluation_tokens)

    @property
    def evaluation(self) -> list[Document]:
        """To evaluate on."""
        return self.held_out.documents

    @cached_property
    def digest(self) -> str:
        """A hash that tells whether the documents changed: for fingerprints, beside `section.model_dump()`.

        Text is read where a source has 256 MiB at most. Larger files are told by name, size and time of change,
        datasets of the hub by their fingerprint, or where they are streamed by their files and revision.
        """
        digests = [*self._fingerprints, *(open_source(source).fingerprint() for source in self.section.eval or [])]
        # How much of a large source is held out.
        return hashlib.sha256(json.dumps([digests, room(self.evaluation_tokens)]).encode()).hexdigest()

    def check(self) -> None:
        """Everything that can be found wrong before long work; reads what is held out, and each source's beginning.

        Raises HyLoError where a source does not exist, its columns are not there, or the chat template does not fit.
        """
        _ = self.encoder, self.held_out
        for source in self.sources:
            if source.tokens is not None:
                source.tokens.open(self.encoder)
                continue
            first = next(source.documents(), None)
            if first is None:
                raise HyLoError(f"no text in {source.name}")
            self.encoder.encode([first], self.encoder.start(first))

    def prepare(self, *, tokens: int | None, length: int, seed: int) -> PackedWindows:
        """The windows of a stage, as many as hold `tokens` tokens; what is not tokenised yet is tokenised first.

        Args:
            tokens: padding counted; where the sources have fewer they are gone over again, otherwise packed and in
                another order. None for everything once.
            length: tokens a window.
            seed: of the order, and of which documents come together.

        Raises:
            HyLoError: where a source cannot be read, no text is left to train on, no document is long enough, or the
                tokenizer gives an id that the model has no embedding for.
        """
        return self._windows(tokens, length, seed, self.section.packing)

    def calibration(self, *, tokens: int, length: int, seed: int) -> Windows:
        """As `prepare`, windows of one document each, in memory."""
        return single_documents(self._windows(tokens, length, seed, packing=False))

    def _windows(self, tokens: int | None, length: int, seed: int, packing: bool) -> PackedWindows:
        parts = self._parts(tokens)
        plan = plan_windows(parts, length, tokens=tokens, seed=seed, packing=packing)
        windows = PackedWindows([part.store for part in parts], plan, self.encoder.vocabulary)
        if self.encoder.may_exceed:
            # Tokens in the cache may have been made for a model with more embeddings.
            windows.check()
        return windows

    def _parts(self, tokens: int | None) -> list[Part]:
        weights = [source.section.weight for source in self.sources]
        total = sum(weight or 0.0 for weight in weights)
        parts = []
        for source, writer, weight in zip(self.sources, self._writers, weights, strict=True):
            share = 1.0 if weight is None else weight / total
            limit = None if tokens is None else max(1, round(tokens * share))
            store = writer.open(limit) if source.tokens is None else source.tokens.open(self.encoder)
            parts.append(Part(source.name, store, weight))
        if not any(part.store.documents for part in parts):
            if any(part.store.info.unusable for part in parts):
                raise HyLoError("no training document can be used: none has a token that the loss is to predict")
            raise HyLoError(
                "no text is left to train on once the evaluation text is held out; give more than one document"
            )
        return parts

    @cached_property
    def _fingerprints(self) -> list[str]:
        return [source.fingerprint() for source in self.sources]

    @cached_property
    def _writers(self) -> list[StoreWriter]:
        encoder, held_out = self.encoder.digest(), self.held_out.digest()
        writers = []
        for source, fingerprint in zip(self.sources, self._fingerprints, strict=True):
            told_by = json.dumps([FORMAT, fingerprint, encoder, held_out])
            folder = self.cache / hashlib.sha256(told_by.encode()).hexdigest()[:32]
            writers.append(StoreWriter(folder, source.name, source.documents, self.held_out.training, self.encoder))
        return writers
