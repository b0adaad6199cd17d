"""Packed windows as a dataset, their batches, and what counts in the loss."""

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from data_examples import write_store
from tiny import VOCABULARY, random_hybrid
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from hylo.data.batches import PackedWindows, collate, targets
from hylo.data.mixture import Part, plan_windows
from hylo.data.store import MemoryStore
from hylo.errors import HyLoError


def packed(folder: Path, length: int = 16, tokens: int | None = None, seed: int = 0, **store: Any) -> PackedWindows:
    """Documents of 1 to 40 tokens, numbered from 2; every third counts where `counted`."""
    lengths = [1 + (7 * i) % 40 for i in range(40)]
    stores = [write_store(folder / "store", lengths, **store)]
    return PackedWindows(stores, plan_windows([Part("numbers", stores[0])], length, tokens=tokens, seed=seed))


def test_an_item_with_an_id_beyond_the_model_is_refused(tmp_path: Path) -> None:
    for start, vocabulary, refused in (([], 22, 0), ([], 21, 1), ([], 12, 1), ([], 11, 2), ([30], 22, 2)):
        store = write_store(tmp_path / f"{start}{vocabulary}", [10, 10], start=start)
        plan = plan_windows([Part("numbers", store)], 10 + len(start), tokens=None, seed=0)
        windows = PackedWindows([store], plan, vocabulary)
        told = []
        for i in range(2):
            try:
                windows[i]
            except HyLoError as error:
                told.append(str(error))
        assert len(told) == refused
        assert all("numbers holds token id " in line and f"config.vocab_size is {vocabulary}" in line for line in told)


def document_of(token: int) -> int:
    """Of the documents of `packed`."""
    ends = list(itertools.accumulate(1 + (7 * i) % 40 for i in range(40)))
    return next(i for i, end in enumerate(ends) if token - 2 < end)


def test_every_token_of_every_document_is_there_once(tmp_path: Path) -> None:
    windows = packed(tmp_path)
    seen = []
    for i in range(len(windows)):
        item = windows[i]
        for key in ("input_ids", "labels", "position_ids"):
            assert item[key].shape == (16,)
        assert item["lengths"].sum() == 16
        for piece in windows.pieces(i):
            # A piece is a run of tokens of one document.
            assert piece == list(range(piece[0], piece[-1] + 1))
            assert document_of(piece[0]) == document_of(piece[-1])
            seen += piece
    assert sorted(seen) == list(range(2, 2 + windows.tokens))
    assert windows.documents == 40
    assert windows.fill == windows.tokens / (16 * len(windows)) > 0.95
    with pytest.raises(IndexError):
        windows[len(windows)]


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("start", [[], [0, 1]])
def test_labels_and_positions(tmp_path: Path, counted: bool, start: list[int]) -> None:
    windows = packed(tmp_path, counted=counted, start=start)
    padded = 0
    for i in range(len(windows)):
        item = windows[i]
        parts = [torch.split(item[key], item["lengths"].tolist()) for key in ("input_ids", "labels", "position_ids")]
        pieces = len(windows.pieces(i))
        for number, (ids, labels, positions) in enumerate(zip(*parts, strict=True)):
            assert positions.tolist() == list(range(len(ids)))
            if number == pieces:
                padded += 1
                assert (labels == -100).all()
                continue
            assert ids[: len(start)].tolist() == start
            # A first token is predicted by nothing; what starts a text is not to be predicted.
            expected = [
                token if at >= max(1, len(start)) and (not counted or token % 3 == 0) else -100
                for at, token in enumerate(ids.tolist())
            ]
            assert labels.tolist() == expected
    assert padded > 0


def test_a_batch_is_one_row(tmp_path: Path) -> None:
    windows = packed(tmp_path)
    items = [windows[i] for i in range(3)]
    batch = collate(items)
    for key in ("input_ids", "labels", "position_ids"):
        assert batch[key].shape == (1, 48)
        assert torch.equal(batch[key][0], torch.cat([item[key] for item in items]))
    offsets = batch["cu_seqlens"]
    assert offsets.dtype == torch.int32
    assert (offsets[0], offsets[-1]) == (0, 48)
    assert offsets.diff().tolist() == torch.cat([item["lengths"] for item in items]).tolist()
    assert batch["max_seqlen"] == int(offsets.diff().max())
    assert (batch["position_ids"][0] == 0).nonzero().flatten().tolist() == offsets[:-1].tolist()


def test_positions_that_count_are_those_before_tokens_that_count(tmp_path: Path) -> None:
    windows = packed(tmp_path, counted=True)
    batch = collate([windows[i] for i in range(len(windows))])
    ids, expected = batch["input_ids"][0].tolist(), []
    ends = set(batch["cu_seqlens"][1:].tolist())
    for at in range(len(ids)):
        follows = at + 1 < len(ids) and at + 1 not in ends and ids[at + 1] % 3 == 0 and ids[at + 1] != 0
        expected.append(ids[at + 1] if follows else -100)
    assert targets(batch["labels"])[0].tolist() == expected
    assert (targets(batch["labels"]) != -100).sum() == (batch["labels"] != -100).sum() > 0


@pytest.mark.parametrize("counted", [False, True])
def test_the_trainer_counts_the_positions_of_the_loss(tmp_path: Path, counted: bool) -> None:
    """Over accumulated batches of several windows, as `compute_loss` is given it."""
    seen: list[tuple[int, int]] = []

    class Counting(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            seen.append((int((targets(inputs["labels"]) != -100).sum()), int(kwargs["num_items_in_batch"])))
            return next(model.parameters()).sum() * 0.0

    trainer = Counting(
        model=random_hybrid(["gdn"]),
        args=TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
        ),
        train_dataset=packed(tmp_path, counted=counted),
        data_collator=collate,
    )
    trainer.train()
    assert len(seen) == 6
    for step in (seen[:3], seen[3:]):
        assert {count for _, count in step} == {sum(positions for positions, _ in step)}
        assert step[0][1] > 0


@torch.no_grad()
def test_packed_documents_are_as_alone(tmp_path: Path) -> None:
    """Through every mixer, as the collator lays them out."""
    stores = [write_store(tmp_path / "store", [5, 9, 3, 20, 12, 2, 7])]
    assert stores[0].tokens + 2 < VOCABULARY
    windows = PackedWindows(stores, plan_windows([Part("a", stores[0])], 16, tokens=None, seed=0))
    model = random_hybrid(["kda", "attention", "mamba2", "mla", "gdn"])
    batch = collate([windows[i] for i in range(len(windows))])
    together = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], cu_seqlens=batch["cu_seqlens"]
    ).logits[0]
    begins = iter(batch["cu_seqlens"].tolist())
    for i in range(len(windows)):
        pieces = windows.pieces(i)
        for piece in pieces:
            begin = next(begins)
            alone = model(input_ids=torch.tensor([piece])).logits[0]
            torch.testing.assert_close(together[begin : begin + len(piece)], alone, atol=1e-4, rtol=1e-4)
        if len(windows[i]["lengths"]) > len(pieces):
            next(begins)


def test_items_are_the_same_in_every_process(tmp_path: Path) -> None:
    windows = packed(tmp_path)
    expected = [windows[i] for i in range(len(windows))]
    for copy in (pickle.loads(pickle.dumps(windows)), windows):
        loader = DataLoader(copy, batch_size=2, collate_fn=collate, num_workers=2 if copy is windows else 0)
        batches = list(loader)
        assert len(batches) == -(-len(expected) // 2)
        for i, batch in enumerate(batches):
            reference = collate(expected[2 * i : 2 * i + 2])
            assert batch.keys() == reference.keys()
            assert all(torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(reference[key])) for key in reference)


def test_going_on_in_the_middle(tmp_path: Path) -> None:
    """As the Trainer does, by leaving out the batches before."""
    loader = DataLoader(packed(tmp_path, tokens=1600), batch_size=2, collate_fn=collate)
    rest = list(skip_first_batches(loader, 7))
    whole = list(loader)
    assert len(rest) == len(whole) - 7
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rest, whole[7:], strict=True))


def test_the_length_that_tokens_attend_over(tmp_path: Path) -> None:
    """By counting for each token the tokens that it sees."""
    windows = packed(tmp_path, start=[0, 1])
    seen = [at + 1 for i in range(len(windows)) for piece in windows.pieces(i) for at in range(len(piece))]
    assert (windows.attended + 1) / 2 == pytest.approx(sum(seen) / len(seen))


def test_documents_at_hand_are_those_of_a_store(tmp_path: Path) -> None:
    stored = packed(tmp_path)
    ends = list(itertools.accumulate((1 + (7 * i) % 40 for i in range(40)), initial=2))
    store = MemoryStore([np.arange(begin, end) for begin, end in itertools.pairwise(ends)])
    windows = PackedWindows([store], plan_windows([Part("numbers", store)], 16, tokens=None, seed=0))
    assert windows.tokens == stored.tokens
    for i in range(len(stored)):
        assert all(torch.equal(value, windows[i][key]) for key, value in stored[i].items())
