"""What a stage tells while it trains: a bar, and `metrics.jsonl` with a line for each logged step."""

import json
import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hylo.distill import parallel
from hylo.distill.guards import Guard
from hylo.distill.recipe import StageSection
from hylo.files import naming
from hylo.progress import Bar

_LABELS = {"loss": "loss", "kl": "KL", "cross_entropy": "CE"}


@dataclass(frozen=True)
class Speed:
    """What turns steps into tokens, and tokens into a share of what the device could do.

    Attributes:
        tokens_per_step: real tokens, on average.
        flops_per_token: model FLOPs.
        peak_flops: of the device, a second; None where it is not known, and MFU left out.
    """

    tokens_per_step: float
    flops_per_token: float = 0.0
    peak_flops: float | None = None


class StageMonitor:
    """Gathers each step's loss and gradient norm, lets the guard judge them, and tells of them.

    Args:
        metrics: the file of metrics; begun anew, or with the lines of the checkpoint that is gone on from.
    """

    def __init__(self, stage: StageSection, guard: Guard, speed: Speed, metrics: Path, device: torch.device) -> None:
        self.stage, self.guard, self.speed, self.metrics, self.device = stage, guard, speed, metrics, device
        self._write_metrics("")
        self.bar: Bar | None = None
        # Of the step that is being made: on the device, summed over its batches.
        self._sums: dict[str, torch.Tensor] = {}
        self._tokens: torch.Tensor | float = 0.0
        # Of the accepted steps since the last logged one; `tokens` is how many their loss is a mean over.
        self._steps: list[dict[str, float]] = []
        self._seconds_before = 0.0
        self._begin = self._last_log = time.monotonic()
        self._steps_since_log = 0

    # While a step is made.

    def add(self, loss: torch.Tensor, parts: dict[str, torch.Tensor], tokens: torch.Tensor | float) -> None:
        """A batch's share of the step's loss, and of what it is made of.

        Args:
            tokens: that the loss of the whole step, on all ranks, is a mean over.
        """
        self._tokens = tokens
        for name, value in {"loss": loss, **parts}.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def accepts(self, step: int, norm: Any) -> bool:
        """Whether the step's update may be applied. Raises HyLoError where the guard stops."""
        names = [*self._sums, "grad_norm", "tokens"]
        norm = torch.as_tensor(norm.full_tensor() if hasattr(norm, "full_tensor") else norm).to(self.device)
        tokens = torch.as_tensor(self._tokens, dtype=torch.float32).to(self.device)
        # One transfer a step. Each rank has its share of the loss, all have the norm and the number of tokens.
        means = parallel.mean_over_ranks(torch.stack([*self._sums.values(), norm.float(), tokens]))
        values = dict(zip(names, means.tolist(), strict=True))
        self._sums = {}
        accepted = self.guard.accepts(step, values["loss"], values["grad_norm"], values["tokens"])
        if accepted:
            self._steps.append(values)
        return accepted

    # Telling.

    def start(self, done: int, total: int) -> None:
        """Begins the bar, at `done` of `total` steps."""
        per_step = self.speed.tokens_per_step
        if parallel.is_main():
            self.bar = Bar(self.stage.name, total * per_step, "tokens", done=done * per_step)
        self._begin = self._last_log = time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def step_done(self) -> None:
        self._steps_since_log += 1
        if self.bar is not None:
            self.bar.advance(self.speed.tokens_per_step, self._status)

    _status = ""

    def summary(self, logs: dict[str, float]) -> dict[str, float]:
        """The trainer's own `logs`, with means over the accepted steps since the last log, and what they took.

        Means are over tokens, as each step's own. Where every step since then was skipped, or had no token to predict,
        there is no loss and no gradient norm.
        """
        entry = {key: value for key, value in logs.items() if key not in ("loss", "grad_norm")}
        values: dict[str, float] = {}
        if self._steps:
            tokens = math.fsum(step["tokens"] for step in self._steps)
            values = {
                name: math.fsum(step["tokens"] * step[name] for step in self._steps) / tokens
                for name in self._steps[0]
                if name not in ("grad_norm", "tokens")
            }
            values["grad_norm"] = self._steps[-1]["grad_norm"]
        now = time.monotonic()
        rate = self._steps_since_log * self.speed.tokens_per_step / max(now - self._last_log, 1e-9)
        self._steps, self._steps_since_log, self._last_log = [], 0, now
        entry = values | entry | {"skipped": self.guard.skipped, "tokens_per_s": round(rate, 1)}
        if self.speed.peak_flops is not None:
            entry["mfu"] = round(rate * self.speed.flops_per_token / self.speed.peak_flops, 4)
        entry |= {"memory_bytes": peak_memory_bytes(self.device), "seconds": round(self.seconds, 3)}
        self._status = _status(entry)
        return entry

    def write(self, step: int, logs: dict[str, float]) -> None:
        if not parallel.is_main():
            return
        entry = {"step": step, "tokens": round(step * self.speed.tokens_per_step), "loss": None, "grad_norm": None}
        with naming(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(entry | logs) + "\n")

    def _write_metrics(self, lines: str) -> None:
        if parallel.is_main():
            with naming(self.metrics):
                self.metrics.write_text(lines)

    @property
    def seconds(self) -> float:
        """That the stage has trained, before it was stopped included."""
        return self._seconds_before + time.monotonic() - self._begin

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    # For checkpoints.

    def state(self) -> dict[str, Any]:
        """What a resumed stage needs to tell and to judge as if it had never stopped."""
        return {
            "steps": self._steps,
            "seconds": self.seconds,
            "metrics": self.metrics.read_text() if parallel.is_main() else "",
            "guard": self.guard.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._steps, self._seconds_before = state["steps"], state["seconds"]
        self._write_metrics(state["metrics"])
        self.guard.restore(state["guard"])


def _status(entry: dict[str, Any]) -> str:
    # A loss that has no parts is the KL of an end-to-end stage, or the layers' own.
    told = [f"{label} {entry[name]:.3f}" for name, label in _LABELS.items() if entry.get(name) is not None]
    if "mfu" in entry:
        told.append(f"MFU {entry['mfu']:.0%}")
    told.append(f"{entry['memory_bytes'] / 2**30:.1f} GiB")
    if entry["skipped"]:
        told.append(f"{entry['skipped']} skipped")
    return "  ".join(told)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that tensors have taken on a GPU since the stage began, or the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; none where there is no such file, as on ranks that do not write."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
