"""Fuzzing: see surface.py. Here: the time is split over the tests, and the inputs of each surface are counted."""

import json
import os
from pathlib import Path

import pytest

from tests.fuzz import surface

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count the fuzz tests; one that runs by the clock has no other limit."""
    ours = [item for item in items if HERE in item.path.parents]
    surface.tests_collected[:] = [item.nodeid for item in ours]
    if surface.SECONDS:
        for item in ours:
            item.add_marker(pytest.mark.timeout(0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many inputs each surface saw; FUZZ_REPORT names a JSON file for them."""
    if not surface.inputs_seen:
        return
    terminalreporter.section(f"inputs (first seed {surface.FIRST_SEED})")
    rows = {
        name: {"inputs": count, "refused": surface.refused[name]} for name, count in surface.inputs_seen.most_common()
    }
    for name, row in rows.items():
        terminalreporter.write_line(f"{name:<40}{row['inputs']:>10,}  refused in one line: {row['refused']:,}")
    if report := os.environ.get("FUZZ_REPORT"):
        Path(report).write_text(json.dumps(rows, indent=2) + "\n")
