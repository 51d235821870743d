"""What a stage kept and what it lost: nothing that a user brought vanishes without a count and a reason.

Every reader, filter and packer writes to an `Account`. Its *subjects* are what must not be lost whole: a source, a tier
of pairs, a validation share, the labels. A subject that loses everything stops the stage (`require`); one that loses
more than half is warned about. `lines` go to the terminal at the stage's end, `to_json` goes into its manifest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_medllm.errors import UserError

_WARN_ABOVE = 0.5


@dataclass
class Lost:
    """How many were lost in one way, and the first of them: `FILE:LINE: reason`."""

    count: int
    first: str


@dataclass
class Tally:
    """One subject's kept and lost; `lost` by kind, in the order in which the kinds first came."""

    kept: int = 0
    lost: dict[str, Lost] = field(default_factory=dict)

    @property
    def total_lost(self) -> int:
        """Lost in all ways."""
        return sum(loss.count for loss in self.lost.values())

    @property
    def lost_share(self) -> float:
        """Lost of all that came."""
        return self.total_lost / max(1, self.kept + self.total_lost)


class Account:
    """Kept and lost per subject, counted in `unit` (documents, pairs, rows, …)."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.subjects: dict[str, Tally] = {}

    def subject(self, name: str) -> Tally:
        """The tally of a subject; naming one that must not stay empty makes `require` see it."""
        return self.subjects.setdefault(name, Tally())

    def keep(self, subject: str, count: int = 1) -> None:
        """Count what goes on."""
        self.subject(subject).kept += count

    def lose(self, subject: str, kind: str, first: str, count: int = 1) -> None:
        """Count what does not go on.

        Args:
            kind: a short reason, the same for all losses of its kind (`not JSON`, `too long`).
            first: where and why, with all detail: `FILE:LINE: reason`. Only the first of a kind is remembered.
        """
        lost = self.subject(subject).lost
        if kind in lost:
            lost[kind].count += count
        elif count:
            lost[kind] = Lost(count, first)

    def add(self, other: "Account") -> None:
        """Take over what another account holds, such as another process's."""
        for name, tally in other.subjects.items():
            self.keep(name, tally.kept)
            for kind, loss in tally.lost.items():
                self.lose(name, kind, loss.first, loss.count)

    def to_json(self) -> dict[str, Any]:
        """For a manifest."""
        subjects = {
            name: {
                "kept": tally.kept,
                "lost": {kind: {"count": loss.count, "first": loss.first} for kind, loss in tally.lost.items()},
            }
            for name, tally in self.subjects.items()
        }
        return {"unit": self.unit, "subjects": subjects}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Account":
        """Inverse of `to_json`."""
        account = cls(value["unit"])
        for name, tally in value["subjects"].items():
            account.keep(name, tally["kept"])
            for kind, loss in tally["lost"].items():
                account.lose(name, kind, loss["first"], loss["count"])
        return account

    def lines(self) -> list[str]:
        """For the terminal: what each subject kept, then `loss_lines`."""
        kept = [f"{name}: {tally.kept:,} {self.unit} kept" for name, tally in self.subjects.items()]
        return kept + self.loss_lines()

    def loss_lines(self) -> list[str]:
        """A line for every subject and kind of loss, and a warning where more than half was lost."""
        return self.losses() + [f"warning: {warning}" for warning in self.warnings()]

    def losses(self) -> list[str]:
        """A line for every subject and kind of loss: how many, and the first."""
        return [
            f"{name}: lost {loss.count:,} ({kind}), first {loss.first}"
            for name, tally in self.subjects.items()
            for kind, loss in tally.lost.items()
        ]

    def warnings(self) -> list[str]:
        """The subjects that lost more than half, with the kind that took most."""
        found = []
        for name, tally in self.subjects.items():
            if tally.lost_share > _WARN_ABOVE:
                kind, _ = self._worst(tally)
                total = tally.kept + tally.total_lost
                found.append(f"{name} lost {tally.total_lost:,} of {total:,} {self.unit} (mostly: {kind})")
        return found

    def require(self, way_out: str, *, subject: str | None = None) -> None:
        """Stop where a subject (default: any) has kept nothing.

        Args:
            way_out: what the user can do about it, a clause.

        Raises:
            UserError: a subject kept nothing; says how many it lost, to what most, and the first of these.
        """
        for name, tally in self.subjects.items():
            if tally.kept or subject not in (None, name):
                continue
            if not tally.lost:
                raise UserError(f"{name}: no {self.unit} at all; {way_out}")
            kind, loss = self._worst(tally)
            raise UserError(
                f"{name}: none of {tally.total_lost:,} {self.unit} is left "
                f"({kind}: {loss.count:,}, first {loss.first}); {way_out}"
            )

    @staticmethod
    def _worst(tally: Tally) -> tuple[str, Lost]:
        return max(tally.lost.items(), key=lambda item: item[1].count)
