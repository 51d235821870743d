"""When a run looks at its held-out data: before the first step, every so many, and at the end."""

import logging
import time
from collections.abc import Callable

from megatron_medllm.parallel.overlap import gather_parameters
from megatron_medllm.train.setup import Trainer
from megatron_medllm.train.signals import StopRequests

log = logging.getLogger(__name__)


class Validation:
    """Validates where it is due, and never twice after the same step."""

    def __init__(
        self,
        trainer: Trainer,
        stop: StopRequests,
        record: Callable[[int, dict[str, float]], None],
        enter: Callable[[str], None],
    ) -> None:
        """`record` writes a step's metrics down; `enter` is told "validation" as one begins, and "" as it ends."""
        self._trainer, self._stop, self._record, self._enter = trainer, stop, record, enter
        self._best = trainer.checkpoints.best

    def begin(self, first: int) -> None:
        """Before the run's first step; or after a resume what the stopped run did not come to. Collective."""
        if first:
            self.after(first)
        elif self._trainer.config.validate_at_start and self._trainer.step.validation_metrics:
            self._record(0, self._measure())  # there is no checkpoint of step 0 that could be the best

    def after(self, step: int) -> bool:
        """Validate after `step` steps if that is due. Collective.

        Returns:
            True when the step is better than all before, by `checkpoint.best`.
        """
        every = self._trainer.config.validate_every_steps
        is_due = (every > 0 and step % every == 0) or step == self._trainer.step.total_steps
        if not is_due or self._best.validated >= step or not self._trainer.step.validation_metrics:
            return False
        metrics = self._measure()
        self._record(step, metrics)
        improved = self._best.note(step, metrics)
        if self._best.exhausted:
            log.warning(
                "%s has not got better since step %s: training ends after step %d of %d (guard.patience)",
                self._best.metric,
                self._best.step,
                step,
                self._trainer.step.total_steps,
            )
        return improved

    def _measure(self) -> dict[str, float]:
        chunks, started = self._trainer.chunks, time.monotonic()
        self._enter("validation")
        gather_parameters(chunks)
        for chunk in chunks:
            chunk.eval()
        try:
            return self._trainer.step.validate(chunks)
        finally:
            for chunk in chunks:
                chunk.train()
            self._stop.note_validation(time.monotonic() - started)
            self._enter("")
