"""What `benchmarks/retrieval.py` cuts, and which tokens it counts."""

import torch
from retrieval import Windowed, exercises, kept_alone, loss, seen
from tiny import make_tokenizer
from transformers import LlamaForCausalLM


def test_a_window_and_the_first_token() -> None:
    assert seen(5, 2)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 0, 1, 1],
    ]


def test_answers_are_what_is_counted() -> None:
    tokenizer = make_tokenizer()
    for ids, answered in exercises(tokenizer, 4, 40, seed=0):
        text = tokenizer.decode(ids)
        parts, last = [], -2
        for place in answered:
            parts += [[]] if place != last + 1 else []
            parts[-1].append(ids[place])
            last = place
        told = [tokenizer.decode(part) for part in parts]
        assert told and all(f"Answer:{answer}" in text for answer in told)


def test_layers_are_cut_as_asked(teacher: LlamaForCausalLM) -> None:
    generator = torch.Generator().manual_seed(0)
    made = [(torch.randint(2, 300, (40,), generator=generator).tolist(), [20, 21, 39])]
    whole = loss(teacher, made)
    windowed = Windowed(teacher.model.layers, 64)
    windowed.cut = {1}
    assert abs(loss(teacher, made) - whole) < 1e-5
    windowed.window = 4
    cut = loss(teacher, made)
    windowed.cut = {2}
    assert len({round(each, 4) for each in (whole, cut, loss(teacher, made))}) == 3
    # All at once, but those that are kept.
    kept = [row["loss"] for row in kept_alone(teacher, windowed, made, [[1], range(len(teacher.model.layers))])]
    assert len(set(kept)) == 3 and abs(kept[-1] - whole) < 1e-4
    windowed.cut = ()
    assert loss(teacher, made) == whole
