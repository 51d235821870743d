"""Which rank is slower than the others: the spread of a step's own time over ranks, and who stays behind.

The time of forward and backward is the same on all ranks of a synchronous run: the fast ones wait for the slow one.
A rank's *own* time leaves out what it spends waiting in collectives, so there the slow one stands out.
"""

import statistics
from collections import deque

_WORTH_S = 0.02  # a difference below this is not worth a warning, whatever its ratio


class Stragglers:
    """Remembers the last steps' own times of all ranks. Pure arithmetic; the same on every rank.

    Args:
        stages: the pipeline stage of every rank; ranks are compared within their stage, where it has others.
        factor: slow is a rank whose own time is above this x the median of the others.
        steps: how many steps in a row (half of them, at least, above the factor; see `slow`) make a straggler.
    """

    def __init__(self, stages: list[int], *, factor: float, steps: int) -> None:
        self._factor, self._steps = factor, steps
        everyone = range(len(stages))
        same = [[other for other in everyone if other != rank and stages[other] == stages[rank]] for rank in everyone]
        self._others = [found or [o for o in everyone if o != rank] for rank, found in enumerate(same)]
        self._history: list[deque[tuple[float, float]]] = [deque(maxlen=steps) for _ in stages]

    def note(self, own_s: list[float]) -> None:
        """Take in one step's own time of every rank, in seconds."""
        for rank, others in enumerate(self._others):
            if others:
                self._history[rank].append((own_s[rank], statistics.median(own_s[other] for other in others)))

    def slow(self) -> dict[int, tuple[float, float]]:
        """Ranks that are slow by the median of the last `steps` steps: (own, others') seconds of a step.

        The median of the steps' ratios lets one hiccup, however long, pass.
        """
        found = {}
        for rank, history in enumerate(self._history):
            if len(history) < self._steps:
                continue
            own, others = (statistics.median(column) for column in zip(*history, strict=True))
            ratios = [mine / max(theirs, 1e-9) for mine, theirs in history]
            if statistics.median(ratios) > self._factor and own - others > _WORTH_S:
                found[rank] = (own, others)
        return found


def spread(own_s: list[float]) -> dict[str, float]:
    """Metrics of one step: minimum, median and maximum of the ranks' own times, and the slowest rank."""
    return {
        "own_time_min_s": min(own_s),
        "own_time_median_s": statistics.median(own_s),
        "own_time_max_s": max(own_s),
        "slowest_rank": float(own_s.index(max(own_s))),
    }
