"""Answers are kept one by one, so that a killed run goes on where it stopped.

The log is an append-only JSON-lines file. Each answer lies under a key of everything that decides it (model, prompt,
decoding, engine); a changed setting therefore asks again and never mixes with old answers.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_medllm.config.exam import EngineConfig
from megatron_medllm.errors import UserError
from megatron_medllm.inference.engines import model_identity, open_engine
from megatron_medllm.inference.protocol import Completion, Request
from megatron_medllm.progress import progress
from megatron_medllm.storage import digest_value, full_disk_error

_SYNC_EVERY_S = 2.0


@dataclass(frozen=True)
class Answers:
    """Completions by request id, where they came from, and what this run itself took."""

    completions: dict[str, Completion]
    provenance: dict[str, Any]
    timing: dict[str, float]


def answer_requests(
    config: EngineConfig,
    model_dir: Path,
    requests: Sequence[Request],
    *,
    log: Path,
    title: str,
) -> Answers:
    """Answer every request, taking from `log` what an earlier run has answered.

    The model is only loaded when something is missing.

    Raises:
        UserError: the engine failed (finished answers are in `log`), or the log is damaged.
    """
    identity = model_identity(config, model_dir)
    fingerprint = {**identity, "engine": config.kind, "dtype": config.dtype}
    key_of = {request.request_id: digest_value([request.to_dict(), fingerprint]) for request in requests}
    logged = _read_log(log)
    completions = {
        request.request_id: logged[key_of[request.request_id]]
        for request in requests
        if key_of[request.request_id] in logged
    }
    missing = [request for request in requests if request.request_id not in completions]
    provenance: dict[str, Any] = dict(fingerprint)
    timing = {"answered": len(missing), "taken_from_log": len(completions), "seconds": 0.0, "new_tokens": 0}
    if not missing:
        return Answers(completions, provenance, timing)
    engine = open_engine(config, model_dir)
    provenance |= engine.describe()
    started = time.monotonic()
    try:
        with _Appender(log) as appender, progress(title, total=len(requests)) as bar:
            for completion in engine.generate(missing):
                appender.append(key_of[completion.request_id], completion)
                completions[completion.request_id] = completion
                timing["new_tokens"] += completion.new_tokens
                elapsed = time.monotonic() - started
                bar.update(len(completions), f"{timing['new_tokens'] / max(elapsed, 1e-9):,.0f} tok/s")
    finally:
        engine.close()
    timing["seconds"] = time.monotonic() - started
    unanswered = [request.request_id for request in requests if request.request_id not in completions]
    if unanswered:
        raise UserError(
            f"the {config.kind} engine left {len(unanswered)} requests unanswered (first: {unanswered[0]}); "
            f"{len(completions)} answers are kept in {log}: run the same command again"
        )
    return Answers(completions, provenance, timing)


def _read_log(log: Path) -> dict[str, Completion]:
    """Answers by key. A line cut off by a kill is removed; any other damage is refused."""
    if not log.exists():
        return {}
    content = log.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(log, whole)
    answers = {}
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            row = orjson.loads(line)
            key = row.pop("key")
            answers[key] = Completion(**row)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(f"{log}:{number}: not an answer of this log; remove the line or the file") from None
    return answers


class _Appender:
    def __init__(self, log: Path) -> None:
        self._log = log
        self._synced_at = time.monotonic()

    def __enter__(self) -> "_Appender":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._stream = open(self._log, "ab")
        except OSError as error:
            raise full_disk_error(error, self._log) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def append(self, key: str, completion: Completion) -> None:
        row = {
            "key": key,
            "request_id": completion.request_id,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "new_tokens": completion.new_tokens,
        }
        try:
            self._stream.write(orjson.dumps(row) + b"\n")
            self._stream.flush()
            if time.monotonic() - self._synced_at > _SYNC_EVERY_S:
                os.fsync(self._stream.fileno())
                self._synced_at = time.monotonic()
        except OSError as error:
            raise full_disk_error(error, self._log) from error
