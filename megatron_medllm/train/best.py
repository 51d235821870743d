"""Which step was the best, by a metric on held-out data, and whether the run still gets better."""

import math
from typing import Any

from megatron_medllm.config.train import CptConfig, RpoConfig
from megatron_medllm.errors import UserError
from megatron_medllm.train.step import Step

# By the beginning of a metric's name. Others (lengths, the rejected answers' own numbers) are neither.
_LOWER_IS_BETTER = ("validation_loss", "validation_perplexity", "validation_preference_loss", "validation_nll")
_HIGHER_IS_BETTER = (
    "validation_accuracy",
    "validation_margin",
    "validation_chosen_logprob",
    "validation_chosen_reward",
)


class Best:
    """What a run's validations found. Every process holds the same one; checkpoints carry it."""

    def __init__(self, metric: str | None = None, *, patience: int = 0) -> None:
        """Args:
        metric: by which steps are compared; None: not at all.
        patience: validations without a better one after which the run is exhausted; 0: never.
        """
        self.metric, self._patience = metric, patience
        self._sign = -1.0 if metric is not None and metric.startswith(_LOWER_IS_BETTER) else 1.0
        self._values: list[tuple[int, float | None]] = []  # of validated steps that are compared, in order
        self.validated = -1  # the last validated step

    def note(self, step: int, metrics: dict[str, float]) -> bool:
        """Record a validation after `step` steps.

        Returns:
            True when the step is better than all before; a tie is not.
        """
        self.validated = step
        if self.metric is None:
            return False
        value = metrics.get(self.metric)
        self._values.append((step, value if value is not None and math.isfinite(value) else None))
        return self.step == step

    def ranked(self) -> list[int]:
        """Validated steps, the best first; of equals the earlier first."""
        found = [(-self._sign * value, step) for step, value in self._values if value is not None]
        return [step for _, step in sorted(found)]

    @property
    def step(self) -> int | None:
        """The best one."""
        return next(iter(self.ranked()), None)

    def value(self, step: int) -> float | None:
        """The metric after `step` steps."""
        return dict(self._values).get(step)

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` validations found nothing better."""
        steps = [step for step, _ in self._values]
        behind = len(steps) - (steps.index(self.step) + 1 if self.step is not None else 0)
        return self._patience > 0 and behind >= self._patience

    def forget(self, step: int) -> None:
        """A checkpoint of this step could not be written: it is no candidate."""
        self._values = [(each, None if each == step else value) for each, value in self._values]

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"metric": self.metric, "validated": self.validated, "values": self._values}

    def go_back(self, step: int, stored: dict[str, Any] | None) -> None:
        """Be as after `step` steps, whose checkpoint has `stored`, or nothing.

        A run that rolls back keeps what it found up to there; one that resumes takes what is stored.
        """
        if self.validated < 0 and stored is not None:
            self.validated = stored["validated"]
            if stored["metric"] == self.metric:
                self._values = [(each, value) for each, value in stored["values"]]
        self._values = [(each, value) for each, value in self._values if each <= step]
        self.validated = min(self.validated, step)


def build_best(config: CptConfig | RpoConfig, step: Step) -> Best:
    """What `checkpoint.best` and `guard.patience` ask for.

    Raises:
        UserError: the metric is not reported, or has no better and worse.
    """
    metric, reported = config.checkpoint.best, step.validation_metrics
    if metric is not None:
        if not reported:
            raise UserError(f"checkpoint.best={metric}, but nothing is held out for validation")
        known = [name for name in reported if name.startswith(_LOWER_IS_BETTER + _HIGHER_IS_BETTER)]
        if metric not in known:
            raise UserError(f"checkpoint.best={metric}: this run can compare its steps by {', '.join(known)}")
    return Best(metric, patience=config.guard.patience)
