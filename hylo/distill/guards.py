"""Steps that must not be taken: a loss or gradient norm that is not finite, or that leaps where nothing bounds it."""

import math
import statistics
from collections import deque
from typing import Any, Literal

from hylo.errors import HyLoError
from hylo.progress import console

# Steps that a leap is told by, and how many of them there must be.
_WINDOW = 50
_LEAST = 20
# In a row: more of them are no accident.
_MOST_SKIPPED = 5


class Guard:
    """Looks at each step before its update.

    A leap is more than `spike_factor` times the median of the last 50 accepted steps; the first 20 have none. Steps
    whose windows hold no token to predict say nothing: their loss and gradients are zero whatever the student does.

    Args:
        stage: its name, for messages.
        on_anomaly: `stop` raises; `skip` says so and refuses the step, and raises after five in a row.
        spike_factor: None for no leaps.
        clipped: gradients are scaled down to a norm of their own. Such a step is no longer than others, and one in some
            dozens has a norm that leaps while its loss does not: only the loss is looked at.

    Attributes:
        skipped: how many steps were refused.
    """

    def __init__(
        self,
        stage: str,
        on_anomaly: Literal["stop", "skip"] = "stop",
        spike_factor: float | None = 20.0,
        clipped: bool = False,
    ) -> None:
        self.stage, self.on_anomaly, self.spike_factor = stage, on_anomaly, spike_factor
        self.clipped = clipped
        self.skipped = self._in_a_row = 0
        self._recent = {name: deque[float](maxlen=_WINDOW) for name in ("loss", "gradient norm")}

    def accepts(self, step: int, loss: float, norm: float, tokens: float) -> bool:
        """Whether the update of a step may be applied. Raises HyLoError where the stage must stop.

        Args:
            tokens: that the loss is a mean over. Without one there is nothing to apply, and nothing is refused.
        """
        values = {"loss": loss, "gradient norm": norm}
        problem = self._problem(values)
        if problem is None and not tokens:
            return False
        if problem is None:
            self._in_a_row = 0
            for name, value in values.items():
                self._recent[name].append(value)
            return True
        what = f"{self.stage}: loss {loss:.4g}, gradient norm {norm:.4g} at step {step}"
        if self.on_anomaly == "stop":
            raise HyLoError(f"{what}; {problem} (a lower learning_rate may help, or on_anomaly: skip)")
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row == _MOST_SKIPPED:
            raise HyLoError(f"{what}, the {_MOST_SKIPPED}th in a row to be skipped (a lower learning_rate may help)")
        console.print(f"{what}: skipped; {problem}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        return False

    def _problem(self, values: dict[str, float]) -> str | None:
        if not all(math.isfinite(value) for value in values.values()):
            return "expected finite numbers"
        for name, value in values.items():
            recent = self._recent[name]
            bounded = self.clipped and name == "gradient norm"
            if self.spike_factor is None or bounded or len(recent) < _LEAST:
                continue
            median = statistics.median(recent)
            if value > self.spike_factor * median:
                return f"expected at most {self.spike_factor:g} times the {name}'s median of late, {median:.4g}"
        return None

    def state(self) -> dict[str, Any]:
        """What a resumed stage needs to go on as if it had never stopped."""
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "recent": {name: list(values) for name, values in self._recent.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        for name, values in state["recent"].items():
            self._recent[name] = deque(values, maxlen=_WINDOW)
