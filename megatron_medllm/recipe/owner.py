"""A run directory has one owner: the process that works on it, written down in RUN/owner.json.

A lock of the kernel's would go with its process, but not on every shared file system, and not across hosts. A file
stays, and says who holds it. A live process, or one of another host, keeps it; a dead one of this host is followed.
"""

import fcntl
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_medllm.errors import UserError
from megatron_medllm.processes import ProcessId
from megatron_medllm.storage import read_json, write_json

log = logging.getLogger(__name__)

_POLL_S = 0.2
# What an orphaned stage gets to save in, once asked; then it is killed. A checkpoint is whole or not there.
SAVE_GRACE_S = 600.0
# Only a process that hangs in the kernel, mostly on a dead file system, outlives SIGKILL for so long.
KILL_GRACE_S = 30.0


@dataclass
class Owner:
    """This process as the owner of a run directory."""

    path: Path
    command: str
    since: str

    def write(self, stage: str | None = None, child: ProcessId | None = None) -> None:
        """Say who works here, and which process runs which stage."""
        worker = None if child is None else {"name": stage, **asdict(child)}
        row = {**asdict(ProcessId.own()), "command": self.command, "since": self.since, "stage": worker}
        write_json(self.path, row)


@contextmanager
def owning(run_dir: Path, command: str) -> Iterator[Owner]:
    """Own the run directory while the block runs.

    What a killed owner's stage is still doing is asked to save, waited for, and killed when it does not end.

    Raises:
        UserError: another process owns it, or what it left running cannot be ended; names the process.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    owner = Owner(run_dir / "owner.json", command, time.strftime("%Y-%m-%d %H:%M:%S"))
    with _guard(run_dir):
        orphan = _free(owner.path)
        owner.write(*(orphan or ()))
    if orphan is not None:
        _end(*orphan)  # where that fails or is interrupted, the file goes on to name the stage
        owner.write()
    try:
        yield owner
    finally:
        owner.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Holder:
    """Who owns a run directory, as its file has it: the process, its command, and the stage that it runs."""

    process: ProcessId
    command: str
    stage: str | None

    @classmethod
    def of(cls, run_dir: Path) -> "Holder | None":
        """The owner, dead or alive; None where nobody left the file."""
        path = run_dir / "owner.json"
        if not path.is_file():
            return None
        row = read_json(path)
        stage = row["stage"]["name"] if row["stage"] else None
        return cls(ProcessId(row["host"], row["pid"], row["started"]), row["command"], stage)


def _free(path: Path) -> tuple[str, ProcessId] | None:
    """Refuse unless nobody owns the directory; the stage that a dead owner has left running, if any.

    Raises:
        UserError: it is owned.
    """
    if not path.is_file():
        return None
    row = read_json(path)
    holder = ProcessId(row["host"], row["pid"], row["started"])
    if holder.lives():
        gone = "" if holder.is_here else f"; if that process is gone, delete {path}"
        raise UserError(f"{path.parent}: {row['command']} ({holder}, since {row['since']}) works here{gone}")
    stage = row["stage"]
    if stage is None:
        return None
    process = ProcessId(stage["host"], stage["pid"], stage["started"])
    return (stage["name"], process) if process.lives() else None


def _end(stage: str, process: ProcessId) -> None:
    """End what a dead owner left running.

    Raises:
        UserError: not even SIGKILL ends it.
    """
    log.warning(
        "stage %s (%s) has outlived its pipeline: asked to save and stop; it is killed if it runs on for %g s",
        *(stage, process, SAVE_GRACE_S),
    )
    process.signal(signal.SIGTERM)
    if _ends_within(SAVE_GRACE_S, process):
        return
    log.warning("stage %s (%s) has not stopped within %g s: killed", stage, process, SAVE_GRACE_S)
    process.signal(signal.SIGKILL, group=True)
    if not _ends_within(KILL_GRACE_S, process):
        raise UserError(f"stage {stage} ({process}) still works here and cannot be killed: end it, then run again")


def _ends_within(seconds: float, process: ProcessId) -> bool:
    deadline = time.monotonic() + seconds
    while process.lives():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


@contextmanager
def _guard(run_dir: Path) -> Iterator[None]:
    """One process of this host at a time; only such ones take over from a dead owner."""
    with open(run_dir / ".owner.lock", "wb") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
