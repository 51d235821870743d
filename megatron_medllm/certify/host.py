"""Runs the processes of a certificate: imports the trainer once and forks every rank. `python -m ... JOBS.json`

Importing torch and Megatron-Core takes seconds of a core; sixteen ranks on two cores would wait for nothing else.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_medllm.certify.probe import train_and_record
from megatron_medllm.certify.truth import compute_truth
from megatron_medllm.checkpoint.convert import export_checkpoint
from megatron_medllm.config.run import RunConfig
from megatron_medllm.storage import write_json

_LAST_WORDS_S = 2.0  # between the first rank's failure and the end of the others
_LOST = "Connection closed by peer"


def main(jobs_path: str) -> None:
    """Do the phases of a file one after the other, the tasks of a phase side by side.

    A task that fails leaves OUT/failed.json and does not stop the others; those that name it in `needs` are left out.
    """
    torch.set_num_threads(1)
    jobs = json.loads(Path(jobs_path).read_text())
    failed: set[str] = set()
    for phase in jobs["phases"]:
        started = [_Task(task) for task in phase if not failed & set(task["needs"])]
        deadline = time.monotonic() + jobs["timeout_s"]
        while any(task.running() for task in started):
            if time.monotonic() > deadline:
                for task in started:
                    task.give_up(f"no answer in {jobs['timeout_s']:g} s")
            time.sleep(0.02)
        failed |= {task.name for task in started if task.failed}


class _Task:
    """The forked processes of one task."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.name, self.failed = task["name"], False
        self._broken: list[int] = []  # ranks that ended with an error
        self._end_others_at = 0.0
        self._out = Path(task["out"])
        self._out.mkdir(parents=True, exist_ok=True)
        # The store lives here: a port picked now and bound later could be lost.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pids = {_fork(task, rank, self._store.port): rank for rank in range(task["ranks"])}

    def running(self) -> bool:
        for pid in list(self._pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                rank = self._pids.pop(pid)
                if status:
                    self._broken.append(rank)
                    self._end_others_at = self._end_others_at or time.monotonic() + _LAST_WORDS_S
        if self._broken and (not self._pids or time.monotonic() > self._end_others_at):
            self.give_up(self._culprit())
            self._broken.clear()
        return bool(self._pids)

    def _culprit(self) -> str:
        """The last line of the rank that failed of itself: the others lose their connections to it."""
        words = {rank: _last_line(self._out / f"rank-{rank}.log") for rank in sorted(self._broken)}
        rank = next((rank for rank, line in words.items() if _LOST not in line), min(words))
        return f"rank {rank}: {words[rank]}"

    def give_up(self, reason: str) -> None:
        """End what still runs, and say why."""
        if not self.failed:
            self.failed = True
            write_json(self._out / "failed.json", {"reason": reason})
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "ended without a word"


def _fork(task: dict[str, Any], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(Path(task["out"], f"rank-{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(task["ranks"]),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        _work(task)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _work(task: dict[str, Any]) -> None:
    out = Path(task["out"])
    if task["do"] == "export":
        base = task["base"] and Path(task["base"])
        export_checkpoint(Path(task["checkpoint"]), out / "hf", base_dir=base, dtype=torch.float32, workers=1)
        return
    run = RunConfig.model_validate(task["settings"])
    if task["do"] == "truth":
        compute_truth(run, Path(task["start"]), out)
    else:
        resume_from = task.get("resume_from")
        train_and_record(run, out, resume_from=resume_from and Path(resume_from))


if __name__ == "__main__":
    main(sys.argv[1])
