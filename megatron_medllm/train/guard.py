"""Which steps are not to be trusted, and how often that may happen."""

import math
import statistics
from collections import deque

from megatron_medllm.config.train import GuardConfig
from megatron_medllm.errors import UserError


class LossGuard:
    """Watches the loss: skip a bad step, roll back after several in a row, stop after too many."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._in_a_row = 0
        self._skipped = 0

    def problem(self, loss: float) -> str | None:
        """Why a step with this loss must not update the weights; None when it may."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        factor = self._config.loss_spike_factor
        if factor and len(self._losses) == self._losses.maxlen:
            median = statistics.median(self._losses)
            if loss > factor * median:
                return f"the loss is {loss:.4g}, {factor:g}x beyond the median {median:.4g}"
        return None

    def note(self, loss: float, *, skipped: bool) -> bool:
        """Record a step.

        Returns:
            True when the last checkpoint should be reloaded.

        Raises:
            UserError: too many steps were skipped.
        """
        if not skipped:
            self._in_a_row = 0
            self._losses.append(loss)
            return False
        self._in_a_row += 1
        self._skipped += 1
        if self._skipped >= self._config.stop_after:
            raise UserError(f"{self._skipped} steps had to be skipped (guard.stop_after); the run has gone wrong")
        if self._in_a_row >= self._config.roll_back_after:
            self._in_a_row = 0
            return True
        return False
