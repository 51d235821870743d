"""Which pairs of a preference run validate: whole questions, the same ones in every run over them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_medllm.data.pairs import Pair
from megatron_medllm.errors import UserError
from megatron_medllm.storage import digest_value


@dataclass(frozen=True)
class HeldOut:
    """Questions whose pairs never train, in an order of their own: the first of them are as good as any."""

    questions: dict[str, list[int]]  # name -> rows of its pairs

    @property
    def rows(self) -> list[int]:
        """Of their pairs, question after question."""
        return [row for rows in self.questions.values() for row in rows]

    def digest(self) -> str | None:
        """What a checkpoint must agree in; None where nothing is held out."""
        return digest_value(self.questions) if self.questions else None

    def report(self) -> dict[str, Any]:
        """JSON-able."""
        return {"questions": list(self.questions), "pairs": len(self.rows), "rows": sorted(self.rows)}


def hold_out(pairs: Sequence[Pair], share: float) -> HeldOut:
    """Hold out about `share` of the questions that the pairs answer; at least one, where it is not 0.

    A question's name alone decides, not the seed and not the other questions: further rounds over the same questions,
    with other answers, validate on the same ones.

    Raises:
        UserError: all pairs answer one question.
    """
    if not share:
        return HeldOut({})
    questions = by_question(pairs)
    if len(questions) < 2:
        raise UserError(f"rpo.validation_share={share:g}: all pairs answer one question; there is none to hold out")
    places = {name: _place(name) for name in questions}
    ordered = sorted(questions, key=lambda name: (places[name], name))
    count = sum(place < share for place in places.values())
    return HeldOut({name: questions[name] for name in ordered[: min(max(count, 1), len(ordered) - 1)]})


def _place(name: str) -> float:
    """Where a name falls in [0, 1)."""
    return int(digest_value(name)[:13], 16) / 16**13


def by_question(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """Rows of every question's pairs. Pairs that share a name or a prompt, directly or by others, answer one."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    names = [pair.question or (f"row:{pair.row}",) for pair in pairs]
    for first, *others in names:
        for other in others:
            one, two = sorted((root(first), root(other)))
            parent[two] = one  # the first by name stands for all, whatever the pairs' order
    found: dict[str, list[int]] = defaultdict(list)
    for pair, (first, *_) in zip(pairs, names, strict=True):
        found[root(first)].append(pair.row)
    return dict(found)
