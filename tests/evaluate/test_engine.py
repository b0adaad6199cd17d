"""Log-likelihoods and answers against the plainest way to get them: one row at a time, whole logits."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tokenizer, random_hybrid, random_ids, sentences
from transformers import GenerationConfig, PreTrainedModel

from hylo.data import encode
from hylo.errors import HyLoError
from hylo.evaluate import engine as engine_module
from hylo.evaluate.engine import Engine, Row, batches_by_tokens, cut
from hylo.evaluate.perplexity import POSITIONS, cut_windows, perplexity_by_position
from hylo.upcycle.bases import load_model, load_tokenizer

MODELS = ["base", "hybrid"]


@pytest.fixture(scope="module")
def engines(base_folder: Path, mixed_folder: Path) -> dict[str, Engine]:
    folders = {"base": base_folder, "hybrid": mixed_folder}
    return {name: Engine(load_model(folder, torch.float32), load_tokenizer(folder)) for name, folder in folders.items()}


def ids(*lengths: int) -> list[list[int]]:
    return [random_ids(length).tolist() for length in lengths]


@torch.no_grad()
def plainly(model: PreTrainedModel, rows: Sequence[Row]) -> list[tuple[float, bool]]:
    results = []
    for context, continuation in rows:
        logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        wanted = torch.tensor(continuation)
        results.append((float(logits.gather(1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all())))
    return results


def assert_same(scored: Sequence[tuple[float, bool]], expected: Sequence[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in scored] == [greedy for _, greedy in expected]
    assert [value for value, _ in scored] == pytest.approx([value for value, _ in expected], rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_whole_logits(engines: dict[str, Engine], name: str) -> None:
    rows = list(zip(ids(5, 40, 17, 1, 90), ids(3, 1, 20, 8, 2), strict=True))
    best = engines[name].model.generate(torch.tensor([rows[0][0]]), max_new_tokens=2, do_sample=False)[0, 5:].tolist()
    rows.append((rows[0][0], best))
    expected = plainly(engines[name].model, rows)
    assert expected[-1][1]
    assert_same(engines[name].loglikelihoods(rows), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shared_by_all", [True, False])
def test_a_shared_beginning_is_read_once_and_changes_nothing(
    engines: dict[str, Engine], name: str, shared_by_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few-shot prompts share their shots, the choices of a question their context."""
    shots, questions = ids(70)[0], ids(9, 30, 12)
    contexts = [shots + question for question in questions] if shared_by_all else ids(80, 100, 4)
    rows = [(context, choice) for context in contexts for choice in ids(4, 11, 7)]
    expected = plainly(engines[name].model, rows)
    monkeypatch.setattr(engine_module, "_SHARED_TOKENS_WORTH", {"cpu": 100})
    engine = Engine(engines[name].model, engines[name].tokenizer, batch_tokens=200)
    reads = []
    read = engine._read
    monkeypatch.setattr(engine, "_read", lambda prefix: (reads.append(prefix.shape[1]), read(prefix))[1])
    assert_same(engine.loglikelihoods(rows), expected)
    assert reads == ([70] if shared_by_all else [79, 99])


@pytest.mark.parametrize("name", MODELS)
def test_answers_in_batches_are_those_alone(engines: dict[str, Engine], name: str) -> None:
    prompts = ids(30, 5, 31, 60, 12)
    model, tokenizer = engines[name].model, engines[name].tokenizer
    batched = Engine(model, tokenizer, batch_tokens=150).generate(prompts, 8)
    alone = [Engine(model, tokenizer).generate([prompt], 8)[0] for prompt in prompts]
    assert batched == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("name", MODELS)
def test_a_model_s_own_settings_do_not_change_greedy_answers(engines: dict[str, Engine], name: str) -> None:
    """A chat model may come with a penalty, beams or sampling; only where it ends is its own."""
    prompts = ids(30, 9)
    engine = engines[name]
    expected = engine.generate(prompts, 12)
    first = engine.encode(expected[0], special=False)[0]
    own = engine.model.generation_config
    changed: dict[str, Any] = {
        "repetition_penalty": 5.0,
        "num_beams": 3,
        "no_repeat_ngram_size": 1,
        "do_sample": True,
        "temperature": 9.0,
        "suppress_tokens": [first],
        "min_new_tokens": 12,
        "max_length": 3,
    }
    try:
        engine.model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, **changed)
        given = engine.model.generation_config
        assert engine.generate(prompts, 12) == expected
        assert engine.model.generation_config is given
        engine.model.generation_config = GenerationConfig(eos_token_id=[first], **changed)
        assert engine.generate(prompts[:1], 12) == [engine.tokenizer.decode([first])]
    finally:
        engine.model.generation_config = own


def test_answers_end_where_the_tokenizer_ends_a_sequence(engines: dict[str, Engine]) -> None:
    """Beside the model's own end, or in its place: a fine-tune may end turns with another token."""
    model, tokenizer = engines["base"].model, make_tokenizer()
    prompts = ids(10)
    whole = model.generate(torch.tensor(prompts), max_new_tokens=8, do_sample=False)[0, 10:].tolist()
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(whole[3])})
    expected = tokenizer.decode(whole[: whole.index(whole[3])])
    own = model.generation_config
    try:
        for model_end in (None, own.eos_token_id, [own.eos_token_id]):
            model.generation_config = GenerationConfig(eos_token_id=model_end)
            assert Engine(model, tokenizer).generate(prompts, 8) == [expected]
    finally:
        model.generation_config = own


def test_answers_end_before_the_first_stop(engines: dict[str, Engine]) -> None:
    prompts = ids(10, 20)
    whole = engines["base"].generate(prompts, 24)
    stop = whole[0][5]
    stopped = engines["base"].generate(prompts, 24, until=[stop, "never"])
    assert stopped == [text.split(stop)[0] for text in whole]
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", ["two"]) == "one"


def test_batches_hold_as_many_tokens_as_allowed() -> None:
    assert batches_by_tokens([7, 8, 9, 10], [50, 40, 30, 20], 100) == [[7, 8], [9, 10]]
    assert batches_by_tokens([1, 2], [500, 10], 100) == [[1], [2]]
    assert batches_by_tokens([1, 2, 3, 4], [10] * 4, 100, lambda width: 3) == [[1, 2, 3], [4]]


def test_what_does_not_fit_into_memory_is_halved(engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(engines["base"].model, engines["base"].tokenizer, batch_tokens=1000)
    rows = list(zip(ids(*[20] * 7), ids(*[4] * 7), strict=True))
    expected = plainly(engine.model, rows)
    score, sizes = engine._score_batch, []

    def short_of_memory(rows: list[Row], *rest: object) -> dict[int, tuple[float, bool]]:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError
        return score(rows, *rest)

    monkeypatch.setattr(engine, "_score_batch", short_of_memory)
    assert_same(engine.loglikelihoods(rows), expected)
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    assert engine.batch_tokens < 1000


def test_values_that_are_not_finite_are_refused(engines: dict[str, Engine]) -> None:
    model = random_hybrid(["gdn", "mla"])
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(HyLoError, match="not finite"):
        Engine(model, engines["base"].tokenizer).loglikelihoods([([3, 4], [5])])


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_perplexity_by_position_is_that_of_whole_logits(engines: dict[str, Engine], name: str) -> None:
    """Over windows of 1,100 tokens, read 8,192 at a time: the second stretch holds 76 of them."""
    engine = engines[name]
    windows = ids(1100, 1100)
    scores = perplexity_by_position(engine, windows)
    logits = engine.model(torch.tensor(windows)).logits[:, :-1].log_softmax(-1)
    nats = -logits.gather(-1, torch.tensor(windows)[:, 1:, None])[..., 0].double()
    # The first token is not predicted: the stretch from 0 holds one less.
    for score, stretch in zip(scores.positions, (nats[:, : POSITIONS - 1], nats[:, POSITIONS - 1 :]), strict=True):
        assert score.tokens == stretch.numel()
        assert score.nats == pytest.approx(float(stretch.mean()), rel=1e-4)
        assert score.stderr == pytest.approx(float(stretch.mean(1).std() / 2**0.5), rel=1e-3)
    assert scores.nats == pytest.approx(float(nats.mean()), rel=1e-4)
    assert scores.stderr == pytest.approx(float(nats.mean(1).std() / 2**0.5), rel=1e-3)
    assert [score.start for score in scores.positions] == [0, 1024]


def test_windows_are_cut_from_texts_end_to_end(engines: dict[str, Engine]) -> None:
    engine = engines["base"]
    windows = cut_windows(["mila bado " * 40, "duke pano " * 40], engine.tokenizer, 50, 8)
    assert [len(window) for window in windows] == [50] * len(windows)
    joined = engine.tokenizer.decode([token for window in windows for token in window])
    assert joined.startswith("mila bado")
    assert "duke" in joined
    with pytest.raises(HyLoError, match="fewer than a window of 5,000"):
        cut_windows(["short"], engine.tokenizer, 5000, 1)


def test_texts_are_read_and_tokenised_as_far_as_windows_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    text = sentences(1, 200)
    expected = cut_windows([text], tokenizer, 50, 3)
    monkeypatch.setattr(encode, "PIECE_CHARACTERS", 400)
    sizes: list[int] = []

    def counting(text: str, **more: Any) -> Any:
        sizes.append(len(text))
        return tokenizer(text, **more)

    def texts() -> Iterator[str]:
        yield text
        pytest.fail("the second text was read")

    assert cut_windows(texts(), counting, 50, 3) == expected
    assert sum(sizes) < 1500 < len(text)


def test_an_id_without_an_embedding_is_named(engines: dict[str, Engine]) -> None:
    """A tokenizer may have such ids as long as no text uses them."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<beyond>"])
    engine = Engine(engines["base"].model, tokenizer)
    usual, beyond = engine.encode("bado dila"), engine.encode("bado <beyond>")
    assert len(engine.generate([usual], 2)) == 1
    for asked in (
        lambda: engine.generate([usual, beyond], 2),
        lambda: engine.loglikelihoods([(usual, beyond)]),
        lambda: perplexity_by_position(engine, [beyond]),
    ):
        with pytest.raises(HyLoError, match=f"'<beyond>' the id {len(tokenizer) - 1}, and the model has embeddings"):
            asked()


def test_padding_needs_an_embedding_too(engines: dict[str, Engine]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id >= engines["base"].words
    rows = ids(5, 9)
    padded = Engine(engines["base"].model, tokenizer)
    assert padded.generate(rows, 4) == engines["base"].generate(rows, 4)
