"""Which process is which: a process id alone may have been given to another one since."""

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessId:
    """One process of one host. `started` is its start in clock ticks since boot, 0 where /proc does not tell."""

    host: str
    pid: int
    started: int = 0

    @classmethod
    def own(cls) -> "ProcessId":
        """This process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> "ProcessId":
        """A process of this host."""
        return cls(host_name(), pid, _started(pid))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_here(self) -> bool:
        """Whether it belongs to this host."""
        return self.host == host_name()

    def lives(self) -> bool:
        """Whether it still runs; asked about another host's, the answer is that it may."""
        if not self.is_here:
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            pass
        return not (self.started and _started(self.pid) != self.started)

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal, unless it is gone or another host's; with `group` to all of its group, if it leads one."""
        if self.is_here and self.lives():
            with contextlib.suppress(ProcessLookupError):
                leads = os.getpgid(self.pid) == self.pid
                (os.killpg if group and leads else os.kill)(self.pid, number)


def host_name() -> str:
    """This node, as Slurm calls it where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _started(pid: int) -> int:
    """Start of a process in clock ticks since boot; 0 where it is gone, a zombie, or there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])
