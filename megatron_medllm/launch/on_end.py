"""Calls `cluster.on_end` when the chain has ended, well or not.

    python3 RUN/code/megatron_medllm/launch/on_end.py RUN STAGE

Called by path on the node's own Python, as the supervisor is: one file on the standard library (3.8 or newer). The
command gets the run directory, the verdict (`finished` or `failed`), the failing stage and the reason as arguments
("$1" to "$4") and as MEDLLM_RUN, MEDLLM_VERDICT, MEDLLM_STAGE and MEDLLM_REASON.
"""

from __future__ import annotations  # the node's Python may be 3.8

import json
import os
import pathlib
import subprocess
import sys
from typing import Any, Dict  # noqa: UP035 # for Python 3.8

Row = Dict[str, Any]  # noqa: UP006 # evaluated by Python 3.8


def main(run: pathlib.Path, stage: str) -> int:
    """Find the verdict, run the command, return its exit status."""
    spec = read(run / "launch" / (stage + ".json"))
    failing, reason = first_failure(run, list(spec["after"]))
    words = (str(run), "failed" if failing else "finished", failing, reason)
    named = dict(zip(("MEDLLM_RUN", "MEDLLM_VERDICT", "MEDLLM_STAGE", "MEDLLM_REASON"), words))  # noqa: B905 # 3.8
    print("on_end: " + " ".join(words), file=sys.stderr)
    return subprocess.run(["bash", "-c", spec["command"][0], "on_end", *words], env={**os.environ, **named}).returncode


def first_failure(run: pathlib.Path, stages: list[str]) -> tuple[str, str]:
    """The first stage that did not finish, and why; two empty words where all did. Those behind it were cancelled."""
    for stage in stages:
        tasks = read(run / "launch" / (stage + ".json"))["array_size"]
        names = (
            {f"{stage}.{number}": f"shard {number + 1}/{tasks}: " for number in range(tasks)} if tasks else {stage: ""}
        )
        for name, shard in names.items():
            path = run / "launch" / (name + ".ended.json")
            report = read(path) if path.exists() else {"outcome": "gone", "reason": "Slurm ended it without a word"}
            if report["outcome"] == "requeued":
                report["reason"] = "Slurm ended it; before that: " + report["reason"]
            if report["outcome"] != "finished":
                return stage, shard + report["reason"]
    return "", ""


def read(path: pathlib.Path) -> Row:
    """A JSON file."""
    return json.loads(path.read_text())


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), sys.argv[2]))
