"""Which rank holds the others up: a verdict from the ranks' heartbeats.

Two kinds of stall, as a distributed job shows them:

    silent   a rank's heartbeat stands still: its process is stopped, dead, or holds the interpreter's lock for good,
             or its host is gone
    stuck    all heartbeats go on, and no rank has moved: one of them stands outside a collective, or hangs behind the
             others, which wait for it

Times are the judge's own: how long it has seen a number unchanged. The hosts' clocks do not matter.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_medllm.processes import ProcessId

# In the order in which a rank comes to them: what it has not begun yet, others may wait for.
IN_A_STEP = ("validation", "data", "forward_backward", "gradient_norm", "optimizer")
LEFT = "left"  # the phase of a rank that has ended its training loop


@dataclass(frozen=True)
class Beat:
    """A rank's sign of life. `moves` counts the phases and micro-batches that it has begun."""

    count: int = 0
    step: int = 0
    phase: str = ""
    moves: int = 0
    waiting: bool = False


@dataclass(frozen=True)
class Verdict:
    """Who stalled the run."""

    kind: str
    ranks: tuple[int, ...]
    reason: str

    def as_row(self, processes: list[ProcessId]) -> dict[str, Any]:
        """JSON-able, with the named ranks' processes."""
        named = [{"rank": rank, **asdict(processes[rank])} for rank in self.ranks]
        return {"kind": self.kind, "ranks": named, "reason": self.reason}


class Judge:
    """Watches the beats of all ranks.

    Args:
        processes: of every rank, by rank.
        timeout_s: a rank that is silent, or a step in which nothing moves, for so long is a stall.
        now: the judge's clock at the start, in seconds.
        gap_s: a judge that was itself not running for so long starts anew; a suspended job stalls nobody.
    """

    def __init__(self, processes: list[ProcessId], *, timeout_s: float, now: float, gap_s: float) -> None:
        self._processes, self._timeout_s, self._gap_s = processes, timeout_s, gap_s
        self._beats = [Beat() for _ in processes]
        self._reset(now)

    def _reset(self, now: float) -> None:
        self._looked = now
        self._answered = [now] * len(self._processes)
        self._moved = now

    def look(self, now: float, beats: Mapping[int, Beat]) -> Verdict | None:
        """Take in the newest beats that could be read; a rank without one has said nothing new."""
        if now - self._looked > self._gap_s:
            self._reset(now)
        self._looked = now
        for rank, beat in beats.items():
            if beat.count != self._beats[rank].count:
                self._answered[rank] = now
            if beat.moves != self._beats[rank].moves:
                self._moved = now
            self._beats[rank] = beat
        here = [rank for rank, beat in enumerate(self._beats) if beat.phase != LEFT]
        silent = [rank for rank in here if now - self._answered[rank] > self._timeout_s]
        if silent:
            return Verdict("silent", tuple(silent), self._sentence(silent, "has not answered"))
        if any(now - self._answered[rank] > self._timeout_s / 2 for rank in here):
            return None  # one may be about to turn out silent: what it last said is no evidence
        in_a_step = all(self._beats[rank].phase in IN_A_STEP for rank in here)
        if here and in_a_step and now - self._moved > self._timeout_s:
            culprits = self._behind(here)
            return Verdict("stuck", tuple(culprits), self._sentence(culprits, "has not moved"))
        return None

    def _behind(self, ranks: list[int]) -> list[int]:
        """Those that do not wait for others, while others do; else those that are the furthest behind."""
        busy = [rank for rank in ranks if not self._beats[rank].waiting]
        if busy:
            return busy
        places = {rank: (self._beats[rank].step, IN_A_STEP.index(self._beats[rank].phase)) for rank in ranks}
        return [rank for rank in ranks if places[rank] == min(places.values())]

    def _sentence(self, ranks: list[int], what: str) -> str:
        first, beat = ranks[0], self._beats[ranks[0]]
        others = f", nor have ranks {', '.join(map(str, ranks[1:9]))}" if len(ranks) > 1 else ""
        place = f"last seen in {beat.phase} of step {beat.step}" if beat.phase else "never seen in training"
        return f"rank {first} ({self._processes[first]}) {what} for {self._timeout_s:g} s, {place}{others}"
