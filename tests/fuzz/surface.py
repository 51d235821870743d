"""Fuzzing of what users bring: any input is read right, or refused in one line. Never a traceback, never silence.

A *surface* is one thing that users hand over: adapter configs, exam questions, corpus files. A test of one:

    @fuzz("adapter configs", settings=adapter_settings())
    def test_adapter_configs(folder: Path, settings: dict) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        outcome = right_or_one_line(lambda: read_peft(folder, SHAPE))
        if outcome.refusal is None:
            assert ...  # what was read is right

`make test` runs FUZZ_EXAMPLES inputs a surface (100) from fixed seeds. `make fuzz` runs for FUZZ_SECONDS, split evenly
over the surfaces, from new seeds. Both print how many inputs each surface saw.
"""

import functools
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import strategies as st

from megatron_medllm.errors import UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
FIRST_SEED = int(os.environ.get("FUZZ_SEED", time.time_ns() // 1000 % 10**9 if SECONDS else 0))
ROUND = 250  # inputs between two looks at the clock
LONGEST_MESSAGE = 2000

inputs_seen: Counter[str] = Counter()  # surface -> inputs
refused: Counter[str] = Counter()  # surface -> inputs that were refused in one line
tests_collected: list[str] = []  # conftest fills it: the time is split over them
_running: list[str] = []


@dataclass(frozen=True)
class Outcome:
    """What became of one input: the value that was read, or the line that refuses it."""

    value: Any = None
    refusal: str | None = None


def right_or_one_line(call: Callable[[], Any]) -> Outcome:
    """Run `call`. A UserError must be one plain line; any other exception is a fault and goes through."""
    try:
        return Outcome(value=call())
    except UserError as error:
        message = str(error)
        assert message.strip(), "an empty message"
        assert len(message.splitlines()) == 1, f"several lines: {message!r}"
        assert len(message) <= LONGEST_MESSAGE, f"{len(message)} characters: {message[:200]!r}"
        refused.update(_running[-1:])
        return Outcome(refusal=message)


def fuzz(surface: str, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call a test with an empty `folder` and one input of each strategy, as often as the settings above say."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        def run(tmp_path: Path) -> None:
            folder = tmp_path / "input"

            def once(**case: Any) -> None:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                inputs_seen[surface] += 1
                test(folder, **case)

            _running.append(surface)
            try:
                _rounds(once, strategies)
            finally:
                _running.pop()

        functools.update_wrapper(run, test)
        del run.__wrapped__  # type: ignore[attr-defined]  # pytest would take the strategies for fixtures
        run.__annotations__ = {"tmp_path": Path}
        return run

    return decorate


def _rounds(once: Callable[..., None], strategies: dict[str, st.SearchStrategy[Any]]) -> None:
    """Rounds of inputs, each from a seed of its own, until the number or the time is reached."""
    until = time.monotonic() + SECONDS / max(1, len(tests_collected))
    left, seed = EXAMPLES, FIRST_SEED
    while left > 0 or (SECONDS and time.monotonic() < until):
        examples = ROUND if SECONDS else min(left, ROUND)
        settings = hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            print_blob=True,
        )
        hypothesis.seed(seed)(settings(hypothesis.given(**strategies)(once)))()
        left, seed = (0 if SECONDS else left - examples), seed + 1
