"""One way of answering a training question, and where it stands in the hierarchy."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_medllm.exams.prompts import Mode

Tier = Literal["gold", "right", "wrong", "malformed"]
TIERS: tuple[Tier, ...] = ("gold", "right", "wrong", "malformed")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response with its tier.

    `provenance` says who wrote it: the data, or a model (by digest and engine) with its seed and temperature; `prompt`
    is what a model was asked, worked examples included. `truncated`: its text has no end of its own; generation was cut
    off at `max_new_tokens`, or the text was cut here.
    """

    problem_id: str
    mode: Mode
    tier: Tier
    text: str
    answer: tuple[str, ...] | None
    provenance: dict[str, Any]
    truncated: bool = False
    prompt: str | list[dict[str, str]] = ""

    def to_row(self) -> dict[str, Any]:
        """The row of samples.jsonl."""
        return {
            "problem_id": self.problem_id,
            "mode": self.mode,
            "tier": self.tier,
            "text": self.text,
            "answer": list(self.answer) if self.answer is not None else None,
            "truncated": self.truncated,
            "prompt": self.prompt,
            **self.provenance,
        }
