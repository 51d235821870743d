"""What is remembered of a stage between runs, and why it must be redone.

A stage's *key* is a digest of what its result depends on: its command, settings, input files and the keys of the
stages before it. The parts are kept beside it, so that a change can be named.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_medllm import __version__
from megatron_medllm.recipe.stages import Stage
from megatron_medllm.storage import digest_value, read_json, write_json

Parts = dict[str, str]  # what the result depends on -> its digest
_INPUT, _SETTING, _STAGE = "input ", "setting ", "stage "


def key_parts(stage: Stage, keys: dict[str, str], settings: dict[str, Any], inputs: dict[str, str]) -> Parts:
    """What the stage's result depends on.

    Args:
        keys: of the stages before it.
        settings: the whole resolved configuration, JSON-able.
        inputs: digest by path of its input files.
    """
    settings = _without(settings, stage.but)
    return {
        "version": __version__,
        "command": digest_value(stage.arguments),
        **{_SETTING + name: digest_value(_setting(settings, name)) for name in stage.settings},
        **{_INPUT + path: digest for path, digest in inputs.items()},
        **{_STAGE + name: keys[name] for name in stage.after},
    }


def recipe_parts(stages: list[Stage], settings: dict[str, Any], inputs: dict[str, dict[str, str]]) -> dict[str, Parts]:
    """The parts of every stage by its name; `inputs` are each stage's digests by path."""
    found: dict[str, Parts] = {}
    keys: dict[str, str] = {}
    for stage in stages:
        found[stage.name] = key_parts(stage, keys, settings, inputs[stage.name])
        keys[stage.name] = stage_key(found[stage.name])
    return found


def _without(settings: dict[str, Any], dotted: tuple[str, ...]) -> dict[str, Any]:
    """A copy without these settings."""
    kept = copy.deepcopy(settings)
    for name in dotted:
        section, _, key = name.rpartition(".")
        (_setting(kept, section) or {}).pop(key, None)
    return kept


def _setting(settings: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        settings = (settings or {}).get(part)
    return settings


def stage_key(parts: Parts) -> str:
    """The parts as one digest."""
    return digest_value(parts)


@dataclass(frozen=True)
class Ending:
    """A stage's `status`, `begun` or `done` (None: never begun), and its command's exit status (None: not ended).

    `since`, in seconds since the epoch, is at or before the command's start.
    """

    status: str | None
    exit_status: int | None
    since: float


@dataclass(frozen=True)
class Record:
    """One stage's file in RUN/stages."""

    path: Path

    def _read(self) -> dict[str, Any]:
        return read_json(self.path) if self.path.is_file() else {}

    def ending(self) -> Ending:
        """How the stage stands."""
        found = self._read()
        finished_at, seconds = found.get("finished_at", 0.0), found.get("seconds", 0.0)
        return Ending(found.get("status"), found.get("exit_status"), finished_at - seconds)

    def is_done(self, key: str, outputs: tuple[Path, ...]) -> bool:
        """Whether the stage finished under this key and its outputs are there."""
        found = self._read()
        return found.get("status") == "done" and found["key"] == key and all(path.exists() for path in outputs)

    def was_begun(self, key: str) -> bool:
        """Whether work under this key was interrupted, so that it may go on."""
        return self._read().get("key") == key

    def changes(self, parts: Parts) -> list[str]:
        """What differs from the time the stage was run, in words; empty for a stage that never was."""
        before: Parts | None = self._read().get("parts")
        if before is None:
            return []
        found = [_phrase(name, before.get(name), parts.get(name)) for name in dict.fromkeys([*before, *parts])]
        return [phrase for phrase in found if phrase is not None]

    def write(self, parts: Parts, status: str, seconds: float, *, exit_status: int | None = None) -> None:
        """Remember. `exit_status` is the command's; None while it runs."""
        row = {"key": stage_key(parts), "status": status, "seconds": seconds, "finished_at": time.time()}
        row["exit_status"] = exit_status
        write_json(self.path, {**row, "parts": parts})

    def seconds(self) -> float:
        """How long the stage took, interruptions included."""
        return float(self._read().get("seconds", 0.0))


def _phrase(name: str, before: str | None, now: str | None) -> str | None:
    if before == now:
        return None
    if name.startswith(_STAGE):
        return f"{name} was redone" if before and now else None  # a new arrow comes with a new setting or command
    what = name.removeprefix(_INPUT)
    return f"{what} is new" if before is None else f"{what} is gone" if now is None else f"{what} changed"
