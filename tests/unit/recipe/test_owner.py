"""One owner of a run directory: refused by name, followed when it is dead, its last stage ended first."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from megatron_medllm.errors import UserError
from megatron_medllm.processes import ProcessId
from megatron_medllm.recipe import owner as owner_module
from megatron_medllm.recipe.owner import owning
from megatron_medllm.storage import read_json, write_json

OWN = """
import sys, time
from pathlib import Path
from megatron_medllm.processes import ProcessId
from megatron_medllm.recipe.owner import owning
with owning(Path(sys.argv[1]), "medllm pipeline") as owner:
    owner.write(sys.argv[2] or None, ProcessId.of(int(sys.argv[3])) if sys.argv[3] else None)
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


# Deaf to SIGTERM, as a process that hangs; so is its child.
DEAF = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "3600"])
print(child.pid, flush=True)
child.wait()
"""


@contextmanager
def deaf_orphan(run_dir: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """A stage that ignores SIGTERM, left by an owner that was killed; and its child's process id."""
    stage = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert stage.stdout is not None
    child = int(stage.stdout.readline())
    owner = start_owner(run_dir, "cpt", str(stage.pid))
    owner.kill()
    owner.wait()
    try:
        yield stage, child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(stage.pid, signal.SIGKILL)
        stage.wait()


def test_an_orphan_that_does_not_stop_is_killed_with_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(owner_module, "SAVE_GRACE_S", 0.5)
    with deaf_orphan(tmp_path) as (stage, child), owning(tmp_path, "medllm pipeline"):
        assert stage.wait(timeout=1) == -signal.SIGKILL
        assert read_json(tmp_path / "owner.json")["stage"] is None
        deadline = time.monotonic() + 30
        while ProcessId.of(child).started:  # 0: gone, or a zombie that nobody has reaped yet
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert f"stage cpt (process {stage.pid} on" in caplog.text and "killed if it runs on for 0.5 s" in caplog.text


def test_an_orphan_that_cannot_be_killed_is_named_and_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner_module, "SAVE_GRACE_S", 0.2)
    monkeypatch.setattr(owner_module, "KILL_GRACE_S", 0.2)
    monkeypatch.setattr(ProcessId, "signal", lambda *_, **__: None)  # as to one that hangs in the kernel
    with deaf_orphan(tmp_path) as (stage, _):
        with pytest.raises(UserError, match=rf"stage cpt \(process {stage.pid} on .*\) .* cannot be killed"):
            with owning(tmp_path, "medllm pipeline"):
                pass
        assert read_json(tmp_path / "owner.json")["stage"]["pid"] == stage.pid


def test_waiting_for_an_orphan_may_be_interrupted_and_the_next_owner_still_finds_it(tmp_path: Path) -> None:
    with deaf_orphan(tmp_path) as (stage, _):
        second = subprocess.Popen(
            [sys.executable, "-c", OWN, str(tmp_path), "", ""],
            stderr=subprocess.PIPE,
            text=True,
            # Tests that run in a shell's background inherit that SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert second.stderr is not None and "has outlived its pipeline" in second.stderr.readline()
        second.send_signal(signal.SIGINT)
        second.communicate(timeout=30)
        assert read_json(tmp_path / "owner.json")["stage"]["pid"] == stage.pid


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
