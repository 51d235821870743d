"""tools/gpu_session.sh on tiny shapes: what a session of one GPU does, and what is left of a part that is cut off."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tools" / "gpu_session"))

import parts  # noqa: E402
import recipes  # noqa: E402
import session  # noqa: E402

from megatron_medllm.config.run import load  # noqa: E402


def run_session(out: Path, *arguments: str) -> str:
    command = ["bash", str(REPOSITORY / "tools" / "gpu_session.sh"), str(out), "--tiny", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_parts_run_to_a_table_and_are_not_run_twice(tmp_path: Path) -> None:
    names = ["lora-4k", "rpo-2k"]
    printed = run_session(tmp_path, "train", "tests", "--rows", *names)
    rows = {row["row"]: row for row in results(tmp_path) if "row" in row}
    assert all(rows[name]["tokens_per_s"] > 0 and "optimizer" in rows[name]["parts_ms"] for name in names), printed
    assert any(row.get("result") == "passed" for row in rows.values())
    assert [(row["part"], row["ended"]) for row in results(tmp_path) if "ended" in row] == [
        ("train", "done"),
        ("tests", "done"),
    ]
    report = (tmp_path / "report.md").read_text()
    assert all(f"| {name} |" in report for name in names) and report in printed
    assert {"results.jsonl", "report.md", "logs.tar.gz"} <= {path.name for path in tmp_path.iterdir()}
    assert run_session(tmp_path, "--report").rstrip() == report.rstrip()
    again = run_session(tmp_path, "train", "tests")
    assert again.count("skipped") == 2 and len([row for row in results(tmp_path) if "ended" in row]) == 2


# Writes a row for each name it is given; "stuck" hangs, "dead" ends the process first.
PRETENDS = """
import json, os, sys, time
out, *names = sys.argv[1:]
for name in names:
    if name == "stuck":
        time.sleep(600)
    if name == "dead":
        os._exit(9)
    with open(out, "a") as stream:
        stream.write(json.dumps({"row": name, "value": 1}) + "\\n")
"""


def pretended(*rows: str, row_limit_s: float = 2.0) -> parts.Part:
    def command(folder: Path, names: list[str], tiny: bool) -> list[str]:
        return ["-c", PRETENDS, str(folder / "rows.jsonl"), *(names or rows)]

    return parts.Part("of a test", 60, command, parts.ROW_FILE, rows if row_limit_s else (), row_limit_s)


def run_part(part: parts.Part, out: Path, *, limit_s: float = 60) -> list[dict[str, Any]]:
    found = session.Results(out)
    session.run_part("p", part, list(part.rows), found, out / "work", limit_s=limit_s, tiny=True, again=False)
    assert found.rows == results(out)  # what is known is what was written
    return found.rows


def test_rows_that_die_or_hang_stop_no_other(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    rows = run_part(pretended("first", "dead", "stuck", "last"), tmp_path)
    assert [(row["row"], row.get("value"), row.get("error", "")[:13]) for row in rows[:-1]] == [
        ("first", 1, ""),
        ("dead", None, "exit status 9"),
        ("stuck", None, "time limit"),
        ("last", 1, ""),
    ]
    assert rows[-1]["ended"] == "rows failed"


def test_a_part_at_its_limit_keeps_the_rows_it_had_and_goes_on_from_there(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    rows = run_part(pretended("first", "stuck", row_limit_s=600), tmp_path, limit_s=6)
    assert rows[0] == {"part": "p", "row": "first", "value": 1}
    assert rows[-1]["ended"] != "done"
    rows = run_part(pretended("first", "second"), tmp_path)
    assert [row["row"] for row in rows if row.get("value")] == ["first", "second"]  # the first one not again


def test_a_part_without_named_rows_is_ended_at_its_limit(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    rows = run_part(pretended("first", "stuck", row_limit_s=0), tmp_path, limit_s=6)
    assert rows[0]["row"] == "first" and rows[-1]["ended"] == "time limit"


@pytest.mark.parametrize("name", recipes.ROWS)
@pytest.mark.parametrize("tiny", [False, True])
def test_every_row_is_a_recipe_with_settings_it_knows(name: str, tiny: bool) -> None:
    row = recipes.ROWS[name]
    run = load(REPOSITORY / "examples" / f"{row.recipe}.yaml", row.all_overrides(tiny=tiny))
    assert run.model.path is None and (run.model.resolve_shape().hidden_size < 1000) == tiny
    for switch, value in row.switches.items():
        assert getattr(run.kernels, switch) == ("auto" if tiny and value == "cudnn" else value)  # cuDNN needs a GPU
