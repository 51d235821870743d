"""What every engine takes and gives. Requests and completions are plain data: they also travel as JSON lines."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Request:
    """One text to continue. `prompt` is plain text; `messages`, when given, go through the model's chat template.

    A request with a temperature draws from its own `seed`: its answer does not depend on what else is in the batch.
    """

    request_id: str
    prompt: str = ""
    messages: tuple[dict[str, str], ...] = ()
    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote, without end-of-text and without the stop text; lengths in tokens."""

    request_id: str
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    new_tokens: int


class Engine(Protocol):
    """A loaded model. Completions come as they finish, in any order."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Answer every request.

        Raises:
            UserError: the engine stopped working; what it had finished was yielded before.
        """

    def describe(self) -> dict[str, Any]:
        """Engine kind, versions and settings that can change the text: part of every answer's provenance."""

    def close(self) -> None:
        """Free the model."""


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the earliest of the `stop` texts, and whether one was there."""
    ends = [at for at in (text.find(mark) for mark in stop) if at >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def request_seed(base_seed: int, request_id: str) -> int:
    """A seed of its own for every request, below 2**63 so that every engine takes it."""
    return int.from_bytes(hashlib.sha256(f"{base_seed}:{request_id}".encode()).digest()[:8], "big") >> 1
