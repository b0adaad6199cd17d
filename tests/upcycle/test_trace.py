"""A model run layer by layer is the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_ids, write_base

from hylo.upcycle.activations import AttentionWeights
from hylo.upcycle.bases import load_model
from hylo.upcycle.trace import enter_layers, layers_of, mixer_of, step_layer, trace_layers

WINDOW = 8
QWEN = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("family", "sizes", "windows"),
    [
        ("llama", {}, [None] * 4),
        ("mistral", {"sliding_window": WINDOW}, [WINDOW] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("qwen2", QWEN, [None, None, WINDOW, WINDOW]),
        ("qwen3", QWEN, [None, None, WINDOW, WINDOW]),
        ("qwen2", QWEN | {"use_sliding_window": False}, [None] * 4),
    ],
)
@torch.no_grad()
def test_each_layer_has_its_own_window(
    tmp_path: Path, family: str, sizes: dict[str, Any], windows: list[int | None]
) -> None:
    """As its mask, and as the statistics of its attention know it."""
    model = load_model(write_base(tmp_path, family=family, tokenizer=False, **sizes), torch.float32)
    batch = {"input_ids": random_ids(2, 40), "attention_mask": torch.ones(2, 40).long()}
    batch["attention_mask"][1, 30:] = 0
    whole = trace_layers(model, batch)
    hidden, arguments = enter_layers(model, batch)
    for i, layer in enumerate(layers_of(model)):
        torch.testing.assert_close(hidden, whole.inputs[i])
        mixed, hidden = step_layer(layer, hidden, arguments[i])
        torch.testing.assert_close(mixed, whole.mixer_outputs[i])
        assert AttentionWeights.of(mixer_of(layer)).window == windows[i]
    # The model is as it was.
    torch.testing.assert_close(trace_layers(model, batch).outputs[-1], hidden)
