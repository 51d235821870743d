"""Which steps are not to be trusted, and how often that may happen."""

import math
import statistics
from collections import deque

from megatron_medllm.config.train import GuardConfig
from megatron_medllm.errors import UserError


class LossGuard:
    """Watches the loss: skip a bad step, roll back after several in a row (and leave them out), stop after too many."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._in_a_row: list[int] = []
        self._skipped = 0
        self._left_out: set[int] = set()  # steps that led to a roll-back; their data would do so again

    def problem(self, step: int, loss: float) -> str | None:
        """Why a step with this loss must not update the weights; None when it may."""
        if step in self._left_out:
            return "left out since the roll-back"
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        factor = self._config.loss_spike_factor
        if factor and len(self._losses) == self._losses.maxlen:
            median = statistics.median(self._losses)
            if loss > factor * median:
                return f"the loss is {loss:.4g}, {factor:g}x beyond the median {median:.4g}"
        return None

    def note(self, step: int, loss: float, *, skipped: bool) -> bool:
        """Record a step.

        Returns:
            True when the last checkpoint should be reloaded.

        Raises:
            UserError: too many steps were skipped.
        """
        if step in self._left_out:
            return False
        if not skipped:
            self._in_a_row = []
            self._losses.append(loss)
            return False
        self._in_a_row.append(step)
        self._skipped += 1
        if self._skipped >= self._config.stop_after:
            raise UserError(f"{self._skipped} steps had to be skipped (guard.stop_after); the run has gone wrong")
        if len(self._in_a_row) >= self._config.roll_back_after:
            self._left_out.update(self._in_a_row)
            self._in_a_row = []
            return True
        return False
