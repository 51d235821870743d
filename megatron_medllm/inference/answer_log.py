"""Answers are kept one by one, so that a killed run goes on where it stopped.

The log is an append-only JSON-lines file. Each answer lies under a key of everything that decides it (model, prompt,
decoding, engine); a changed setting therefore asks again and never mixes with old answers. Beside it lies what the
engine said of itself. Every shard of the work has a log of its own; answers are looked for in all of them.
"""

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import orjson

from megatron_medllm.config.exam import EngineConfig
from megatron_medllm.errors import UserError
from megatron_medllm.inference.engines import model_identity, open_engine
from megatron_medllm.inference.protocol import Completion, Engine, Request
from megatron_medllm.inference.shards import request_units, shard_files
from megatron_medllm.progress import progress
from megatron_medllm.shard import Shard
from megatron_medllm.storage import digest_value, full_disk_error, write_json

# What a run took lies apart, so that equal answers make equal results.
TIMING = "timing.json"
# How the work was divided changes no answer, and is not told with the results.
NOT_OF_THE_RESULT = {"engine": {"replicas"}}
_SYNC_EVERY_S = 2.0
_COMPLETION_FIELDS = tuple(field.name for field in fields(Completion))


@dataclass(frozen=True)
class Answers:
    """Completions by request id, where they came from, and what this run itself took."""

    completions: dict[str, Completion]
    provenance: dict[str, Any]
    timing: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Logged:
    """An answer, and the engine that gave it as it describes itself."""

    completion: Completion
    engine: dict[str, Any]


def answer_requests(
    config: EngineConfig,
    model_dir: Path,
    requests: Sequence[Request],
    *,
    log: Path,
    title: str,
    shard: Shard | None = None,
    merge: bool = False,
) -> Answers:
    """Answer every request, taking from `log` and the shards' logs beside it what has been answered.

    The model is only loaded when something is missing. The transformers engine decodes a unit of which something is
    missing again as a whole: the texts are those of a run that was never interrupted.

    Args:
        shard: answer this shard's units alone, into a log of its own.
        merge: answer nothing.

    Raises:
        UserError: the engine failed (finished answers are in the log), a log is damaged, or `merge` lacks an answer.
    """
    identity = model_identity(config, model_dir)
    fingerprint = {**identity, "engine": config.kind, "dtype": config.dtype}
    key_of = {request.request_id: digest_value([request.to_dict(), fingerprint]) for request in requests}
    units = request_units(requests, config.unit_size)
    own = log if shard is None else shard.file(log)
    logged = _read_logs([log, *shard_files(log)], own=own)
    answered = {name: logged[key] for name, key in key_of.items() if key in logged}
    if merge:
        _require_all(units, answered, log=log, replicas=config.replicas)
    mine = [unit for n, unit in enumerate(units) if shard is None or shard == Shard.of_unit(n, shard.count)]
    unfinished = _unfinished(config, mine, answered)
    own_requests = {request.request_id for unit in mine for request in unit}
    wanted = [name for name in key_of if name in own_requests]
    timing = {"answered": sum(map(len, unfinished)), "seconds": 0.0, "new_tokens": 0}
    timing["taken_from_log"] = len(wanted) - timing["answered"]
    if unfinished:
        engine = open_engine(_settled(config, requests), model_dir)
        try:
            _ask(engine, unfinished, answered, timing, log=own, key_of=key_of, title=title)
        finally:
            engine.close()
    unanswered = [name for name in wanted if name not in answered]
    if unanswered:
        raise UserError(
            f"the {config.kind} engine left {len(unanswered)} requests unanswered (first: {unanswered[0]}); "
            f"{len(wanted) - len(unanswered)} answers are kept in {own}: run the same command again"
        )
    completions = {name: answered[name].completion for name in wanted}
    return Answers(completions, fingerprint | _shared(answered[name].engine for name in wanted), timing)


def _ask(
    engine: Engine,
    units: Sequence[Sequence[Request]],
    answered: dict[str, _Logged],
    timing: dict[str, float],
    *,
    log: Path,
    key_of: dict[str, str],
    title: str,
) -> None:
    """Have the units answered one after the other, into `log` and `answered`; `timing` is kept up."""
    described, started, before = engine.describe(), time.monotonic(), timing["taken_from_log"]
    total = before + timing["answered"]
    with _Appender(log, described) as appender, progress(title, total=total) as bar:
        for done, completion in enumerate((c for unit in units for c in engine.generate(unit)), start=1):
            appender.append(key_of[completion.request_id], completion)
            answered[completion.request_id] = _Logged(completion, described)
            timing["new_tokens"] += completion.new_tokens
            timing["seconds"] = time.monotonic() - started
            bar.update(before + done, f"{timing['new_tokens'] / max(timing['seconds'], 1e-9):,.0f} tok/s")


def write_timing(path: Path, answers: Answers) -> dict[str, float]:
    """Write what the answers took, with their rate; returns it."""
    timing = {**answers.timing, "tokens_per_s": answers.timing["new_tokens"] / (answers.timing["seconds"] or 1.0)}
    write_json(path, timing)
    return timing


def _settled(config: EngineConfig, requests: Sequence[Request]) -> EngineConfig:
    """The settings with what they leave to the requests: greedy ones are answered alike in any batch."""
    if config.batch_invariant is not None:
        return config
    return config.model_copy(update={"batch_invariant": all(request.temperature == 0 for request in requests)})


def _unfinished(
    config: EngineConfig, units: Sequence[list[Request]], answered: dict[str, _Logged]
) -> list[list[Request]]:
    """What to ask, in the portions in which the engine is asked; empty ones are left out."""
    found = [unit for unit in units if any(request.request_id not in answered for request in unit)]
    if config.kind == "transformers" or not found:
        return found
    # Every request stands for itself, and the engine makes its own batches.
    return [[request for unit in found for request in unit if request.request_id not in answered]]


def _shared(engines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What the engines say of themselves; a list of all values where they differ (nodes of two kinds, an upgrade)."""
    distinct = {digest_value(engine): engine for engine in engines}
    described = [distinct[digest] for digest in sorted(distinct)]
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for engine in described for name in engine):
        values = [engine[name] for engine in described if name in engine]
        merged[name] = values[0] if all(value == values[0] for value in values) else values
    return merged


def _require_all(units: Sequence[Sequence[Request]], answered: dict[str, _Logged], *, log: Path, replicas: int) -> None:
    """Refuse to merge an incomplete work, and name the first shard of which something is missing."""
    lacking = [(n, r.request_id) for n, unit in enumerate(units) for r in unit if r.request_id not in answered]
    if not lacking:
        return
    number, first = lacking[0]
    counts = {shard.count for shard in shard_files(log).values()}
    shard = Shard.of_unit(number, counts.pop() if len(counts) == 1 else replicas)
    missing = sum(Shard.of_unit(n, shard.count) == shard for n, _ in lacking)
    raise UserError(
        f"{log.parent}: shard {shard} is not complete: {missing} requests are unanswered (first: {first}); "
        f"run it again with --shard {shard}, or all without --merge"
    )


def _read_logs(logs: Iterable[Path], *, own: Path) -> dict[str, _Logged]:
    """Answers by key. Our own log's last line, cut off by a kill, is removed; another shard may be writing its own."""
    answers: dict[str, _Logged] = {}
    for log in dict.fromkeys([*logs, own]):
        if log.exists():
            answers |= _read_log(log, mend=log == own)
    return answers


def _read_log(log: Path, *, mend: bool) -> dict[str, _Logged]:
    """The answers of one log; a last line that is not whole is passed over, any other damage is refused."""
    content = log.read_bytes()
    whole = content.rfind(b"\n") + 1
    if mend and whole < len(content):
        os.truncate(log, whole)
    answers = {}
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            row = orjson.loads(line)
            completion = Completion(**{name: row[name] for name in _COMPLETION_FIELDS})
            answers[row["key"]] = _Logged(completion, row.get("engine", {}))
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(f"{log}:{number}: not an answer of this log; remove the line or the file") from None
    return answers


class _Appender:
    def __init__(self, log: Path, engine: dict[str, Any]) -> None:
        self._log, self._engine = log, engine
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
        row = {"key": key, **asdict(completion), "engine": self._engine}
        try:
            self._stream.write(orjson.dumps(row) + b"\n")
            self._stream.flush()
            if time.monotonic() - self._synced_at > _SYNC_EVERY_S:
                os.fsync(self._stream.fileno())
                self._synced_at = time.monotonic()
        except OSError as error:
            raise full_disk_error(error, self._log) from error
