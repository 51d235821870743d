"""One owner of a run directory: refused by name, followed when it is dead, its last stage ended first."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_medllm.errors import UserError
from megatron_medllm.processes import ProcessId
from megatron_medllm.recipe.owner import owning
from megatron_medllm.storage import read_json, write_json

OWN = """
import sys, time
from pathlib import Path
from megatron_medllm.recipe.owner import owning
with owning(Path(sys.argv[1]), "medllm pipeline") as owner:
    owner.write(stage=sys.argv[2] or None, child=int(sys.argv[3]) if sys.argv[3] else None)
    print("owned", flush=True)
    time.sleep(3600)
"""


def start_owner(run_dir: Path, stage: str = "", child: str = "") -> subprocess.Popen:
    owner = subprocess.Popen([sys.executable, "-c", OWN, str(run_dir), stage, child], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "owned\n"
    return owner


def test_a_second_owner_is_refused_by_name_and_the_first_leaves_nothing(tmp_path: Path) -> None:
    first = start_owner(tmp_path)
    try:
        with pytest.raises(UserError, match=rf"medllm pipeline \(process {first.pid} on .*, since 20.*\) works here$"):
            with owning(tmp_path, "medllm submit"):
                pass
    finally:
        first.kill()
        first.wait()
    with owning(tmp_path, "medllm submit"):  # the first is dead, and on this host
        assert read_json(tmp_path / "owner.json")["command"] == "medllm submit"
    assert not (tmp_path / "owner.json").exists()


def test_what_a_killed_owner_left_running_is_ended_first(tmp_path: Path) -> None:
    stage = subprocess.Popen(["sleep", "3600"])
    owner = start_owner(tmp_path, "cpt", str(stage.pid))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with owning(tmp_path, "medllm pipeline"):
        assert stage.wait(timeout=30) == -signal.SIGTERM


def test_another_hosts_owner_and_a_reused_number_are_told_apart(tmp_path: Path) -> None:
    own = ProcessId.own()
    row = {"command": "medllm pipeline", "since": "then", "stage": None}
    write_json(tmp_path / "owner.json", {"host": "elsewhere", "pid": own.pid, "started": own.started, **row})
    with pytest.raises(UserError, match=r"on elsewhere.*if that process is gone, delete .*owner.json"):
        with owning(tmp_path, "medllm pipeline"):
            pass
    write_json(tmp_path / "owner.json", {"host": own.host, "pid": own.pid, "started": own.started + 1, **row})
    with owning(tmp_path, "medllm pipeline"):
        pass
