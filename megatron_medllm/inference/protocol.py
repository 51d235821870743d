"""What every engine takes and gives. Requests and completions are plain data: they also travel as JSON lines."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from megatron_medllm.config.base import Switch
from megatron_medllm.exams.ending import answer_end
from megatron_medllm.exams.prompts import Mode

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True, slots=True)
class Request:
    """One text to continue. `prompt` is plain text; `messages`, when given, go through the model's chat template.

    A request with a temperature draws from its own `seed`: its answer does not depend on what else is in the batch.
    `thinking` is that template's switch. `ends_as` says which kind of exam answer is awaited: the text ends where such
    an answer is complete, for a base model does not stop there by itself. None: the text ends at `stop`, end-of-text or
    `max_new_tokens` alone.
    """

    request_id: str
    prompt: str = ""
    messages: tuple[dict[str, str], ...] = ()
    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ends_as: Mode | None = None
    thinking: Switch = "auto"

    def to_dict(self) -> dict[str, Any]:
        """For JSON. A switch that is left alone is not written: answers are kept under what was asked."""
        row = asdict(self)
        if self.thinking == "auto":
            del row["thinking"]
        return row


@dataclass(frozen=True, slots=True)
class Completion:
    """What the model wrote, without end-of-text and without the stop text; lengths in tokens.

    `finish_reason` is "stop" where a stop text or a complete answer ended it; "length" means that neither came within
    `max_new_tokens`. `new_tokens` counts all that was generated, also what was cut off.
    """

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


# Engines that know stop texts alone end a short answer with its line.
_LINE_END = "\n"
# What the OpenAI interface takes.
MOST_STOP_TEXTS = 4


def engine_stop(request: Request) -> tuple[str, ...]:
    """The stop texts for an engine that knows no other way to end a text early.

    An explanation's end cannot be said in stop texts: such an engine runs on, and `finish` cuts.
    """
    if request.ends_as == "answer_only" and _LINE_END not in request.stop and len(request.stop) < MOST_STOP_TEXTS:
        return (*request.stop, _LINE_END)
    return request.stop


def is_blank_line(request: Request, text: str) -> bool:
    """Whether `engine_stop` ended the text before the answer: the model began with an empty line, or with `答え:`.

    The engine is then asked again with the request's own stop texts.
    """
    return engine_stop(request) != request.stop and answer_end(text + _LINE_END, "answer_only") is None


def finish(text: str, request: Request, reason: FinishReason) -> tuple[str, FinishReason]:
    """End `text` at the first stop text and where the answer is complete; `reason` says why the engine ended it."""
    cut, stopped = cut_at_stop(text, request.stop)
    end = answer_end(cut, request.ends_as) if request.ends_as is not None else None
    if end is not None:
        return cut[:end], "stop"
    return cut, "stop" if stopped else reason


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the earliest of the `stop` texts, and whether one was there."""
    ends = [at for at in (text.find(mark) for mark in stop) if at >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def request_seed(base_seed: int, request_id: str) -> int:
    """A seed of its own for every request, below 2**63 so that every engine takes it."""
    return int.from_bytes(hashlib.sha256(f"{base_seed}:{request_id}".encode()).digest()[:8], "big") >> 1
