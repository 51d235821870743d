"""Watches a training from inside: who is slow, and who holds the others up when nothing moves.

A thread of every rank does three things. It samples where the main thread stands, in a collective or not, which gives
the rank's own time (`stragglers`). It writes a heartbeat to OUTPUT/watch/rank-N.json. On a few ranks it reads all
heartbeats and judges (`stall`). A stall ends the run: OUTPUT/watch/stall.json names the rank, OUTPUT/watch/
rank-N.stack.txt holds every rank's Python stack, and each rank exits with STALLED_EXIT_CODE. The stack of a process
that does not answer is asked for by a neighbour on its host: `faulthandler` writes it on a signal, without the
interpreter's lock, and a stopped process is continued for that.

Heartbeats are files in the run directory, which all nodes share anyway: they still tell when rank 0 is the one that
hangs, and need no connection that could hang with it.

On CUDA the own time is the main thread's: a slow host or data loader shows, a slow GPU does not, for which
OUTPUT/watch/rank-N.flight-recorder.pickle (the last collectives) is written beside the stacks.
"""

import faulthandler
import linecache
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
import torch
import torch.distributed as dist

from megatron_medllm.config.cluster import STALLED_EXIT_CODE
from megatron_medllm.config.run import RunConfig
from megatron_medllm.processes import ProcessId
from megatron_medllm.storage import write_json
from megatron_medllm.train.setup import Trainer
from megatron_medllm.train.stall import LEFT, Beat, Judge
from megatron_medllm.train.stragglers import Stragglers, spread
from megatron_medllm.train.throughput import StepClock

log = logging.getLogger(__name__)

_SAMPLE_S = 0.02
_LONGEST_BEAT_S = 10.0
_BEAT_BYTES = 256  # of one size, so that a beat on a full disk needs no new block
_STACK_WAIT_S = 10.0  # for the stacks of the others, before the processes end
STALL_FILE, SLOW_FILE = "stall.json", "slow.json"


class Watch:
    """One rank's part of it. `enter` and `end_step` are the training loop's; the rest runs by itself."""

    def __init__(self, trainer: Trainer, first: int, processes: list[ProcessId], stages: list[int]) -> None:
        self._runtime, self._config = trainer.runtime, trainer.config.watch
        self._rank, self._processes, self._directory = trainer.runtime.rank, processes, watch_dir(trainer.run)
        self._main_thread = threading.get_ident()
        self._phase, self._step, self._moves, self._count = "", first, 0, 0
        self._busy_s = self._waiting_s = 0.0
        self._sampled_at = time.monotonic()
        self._stragglers = Stragglers(stages, factor=self._config.slow_factor, steps=self._config.slow_steps)
        self._warned: set[int] = set()
        self._ended = threading.Event()
        self._stacks = open(self._stack_path(self._rank), "wb", buffering=0)  # noqa: SIM115 # faulthandler keeps it
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        self._hooks = [chunk.register_forward_pre_hook(self._note_move) for chunk in trainer.chunks]
        self._write_beat(Beat())
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """Say what the loop does next: a part of the step's clock, or "" between steps."""
        self._phase, self._sampled_at = phase, time.monotonic()
        self._moves += 1

    def end_step(self, step: int, clock: StepClock) -> dict[str, float]:
        """The spread of the step's times over ranks, for the metrics; warns about a slow rank. Collective."""
        self._step = step + 1
        if self._runtime.world_size == 1:
            return {}
        sampled = self._busy_s + self._waiting_s
        whole = clock.parts["data"] + clock.parts["forward_backward"]
        own = whole * self._busy_s / sampled if sampled else whole
        self._busy_s = self._waiting_s = 0.0
        mine = torch.tensor([own, clock.parts["forward_backward"]], dtype=torch.float64, device=self._runtime.device)
        everyone = [torch.empty_like(mine) for _ in range(self._runtime.world_size)]
        dist.all_gather(everyone, mine)
        own_s, whole_s = torch.stack(everyone, dim=1).tolist()
        self._stragglers.note(own_s)
        if self._runtime.is_main:
            self._warn(step + 1)
        return spread(own_s) | {"forward_backward_min_s": min(whole_s), "forward_backward_max_s": max(whole_s)}

    def _warn(self, step: int) -> None:
        """Name each rank once while it stays slow."""
        slow = self._stragglers.slow()
        for rank in slow.keys() - self._warned:
            log.warning("step %d: %s", step, self._slow_sentence(rank, *slow[rank]))
        if slow.keys() != self._warned:
            rows = [
                {"rank": rank, **asdict(self._processes[rank]), "reason": self._slow_sentence(rank, *seconds)}
                for rank, seconds in slow.items()
            ]
            write_json(self._directory / SLOW_FILE, {"step": step, "ranks": rows, **_start()})
        self._warned = set(slow)

    def _slow_sentence(self, rank: int, own_s: float, others_s: float) -> str:
        return (
            f"rank {rank} ({self._processes[rank]}) is slow: {own_s:.2f} s of its own a step, {others_s:.2f} s for the "
            f"others, over {self._config.slow_steps} steps"
        )

    def close(self) -> None:
        """Stop watching; the others no longer wait for this rank's beats."""
        self._ended.set()
        self._thread.join()
        for hook in self._hooks:
            hook.remove()
        faulthandler.unregister(signal.SIGUSR2)
        self._write_beat(Beat(self._count + 1, self._step, LEFT, self._moves))
        self._stacks.close()
        if not self._stack_path(self._rank).stat().st_size:
            self._stack_path(self._rank).unlink()

    def _note_move(self, *_: Any) -> None:
        self._moves += 1

    def _sample(self) -> None:
        """Charge the time since the last sample to the rank itself or to its waiting."""
        now = time.monotonic()
        passed, self._sampled_at = now - self._sampled_at, now
        if self._phase in ("data", "forward_backward"):
            if self._is_waiting():
                self._waiting_s += passed
            else:
                self._busy_s += passed

    def _is_waiting(self) -> bool:
        frame = sys._current_frames().get(self._main_thread)
        return frame is not None and is_waiting(frame)

    # ---- the thread

    def _run(self) -> None:
        timeout_s = self._config.stall_timeout_s
        interval = min(_LONGEST_BEAT_S, max(0.1, timeout_s / 20))
        now = time.monotonic()
        judge = Judge(self._processes, timeout_s=timeout_s, now=now, gap_s=timeout_s / 2)
        judges = self._rank in judging_ranks(len(self._processes))
        next_beat = now + interval if timeout_s else float("inf")
        pause = _SAMPLE_S if self._runtime.world_size > 1 else interval
        while not self._ended.wait(pause):
            self._sample()
            now = time.monotonic()
            if now < next_beat:
                continue
            next_beat = now + interval
            self._count += 1
            self._write_beat(Beat(self._count, self._step + 1, self._phase, self._moves, self._is_waiting()))
            verdict = judge.look(time.monotonic(), self._read_beats()) if judges else None
            if verdict is not None:
                self._announce(verdict.as_row(self._processes), verdict.reason)
            if self._stall_path.exists():
                self._end_process()

    @property
    def _stall_path(self) -> Path:
        return self._directory / STALL_FILE

    def _beat_path(self, rank: int) -> Path:
        return self._directory / f"rank-{rank:05d}.json"

    def _stack_path(self, rank: int) -> Path:
        return self._directory / f"rank-{rank:05d}.stack.txt"

    def _write_beat(self, beat: Beat) -> None:
        row = orjson.dumps(asdict(beat)).ljust(_BEAT_BYTES - 1) + b"\n"
        try:
            handle = os.open(self._beat_path(self._rank), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(handle, row, 0)
            finally:
                os.close(handle)
        except OSError as error:
            log.debug("no heartbeat: %s", error)

    def _read_beats(self) -> dict[int, Beat]:
        """What can be read; a beat that is being written is read the next time."""
        found = {}
        for rank in range(len(self._processes)):
            try:
                found[rank] = Beat(**orjson.loads(self._beat_path(rank).read_bytes()))
            except (OSError, orjson.JSONDecodeError):
                continue
        return found

    def _announce(self, row: dict[str, Any], reason: str) -> None:
        """Write the verdict; the first of several judges wins."""
        partial = self._stall_path.with_name(f".{STALL_FILE}.{self._rank}")
        partial.write_bytes(orjson.dumps(row | _start() | {"stacks": str(self._directory)}, option=orjson.OPT_INDENT_2))
        try:
            os.link(partial, self._stall_path)
            print(f"stalled: {reason}; stacks: {self._directory}", file=sys.stderr, flush=True)
        except FileExistsError:
            pass
        finally:
            partial.unlink()

    def _end_process(self) -> None:
        """Leave this rank's stack, help the silent ones on this host to leave theirs, and exit."""
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        path = self._directory / f"rank-{self._rank:05d}.flight-recorder.pickle"
        path.write_bytes(flight_record(self._runtime.device))
        verdict = orjson.loads(self._stall_path.read_bytes())
        named = [row["rank"] for row in verdict["ranks"]] if verdict["kind"] == "silent" else []
        silent = [rank for rank in named if self._processes[rank].is_here and rank != self._rank]
        for rank in silent:
            self._processes[rank].signal(signal.SIGUSR2)
            self._processes[rank].signal(signal.SIGCONT)
        deadline = time.monotonic() + _STACK_WAIT_S
        while time.monotonic() < deadline and not self._all_stacks_written():
            time.sleep(0.1)
        for rank in silent:
            self._processes[rank].signal(signal.SIGKILL)
        os._exit(STALLED_EXIT_CODE)

    def _all_stacks_written(self) -> bool:
        paths = [self._stack_path(rank) for rank in range(len(self._processes))]
        return all(path.is_file() and path.stat().st_size for path in paths)


@contextmanager
def watching(trainer: Trainer, first: int) -> Iterator[Watch]:
    """Watch the training from step `first` on while the block runs. Collective at its start."""
    directory = watch_dir(trainer.run)
    if trainer.runtime.is_main:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    mine = (ProcessId.own(), trainer.runtime.pp_rank)
    everyone: list[Any] = [None] * trainer.runtime.world_size
    dist.all_gather_object(everyone, mine)  # nobody writes before the folder is clean
    watch = Watch(trainer, first, [process for process, _ in everyone], [stage for _, stage in everyone])
    try:
        yield watch
    finally:
        watch.close()


def watch_dir(run: RunConfig) -> Path:
    """Where heartbeats, stacks and verdicts of a stage are."""
    return run.output_dir() / "watch"


def judging_ranks(world_size: int) -> set[int]:
    """The ranks that read all heartbeats: a few, far apart, so that some are alive when one or a node is not."""
    return {0, world_size // 3, 2 * world_size // 3, world_size - 1}


def is_waiting(frame: FrameType) -> bool:
    """Whether a thread whose innermost Python frame this is stands in a collective, or waits for one to end."""
    if f"{os.sep}torch{os.sep}distributed{os.sep}" in frame.f_code.co_filename:
        return True
    if frame.f_code.co_name == "synchronize" and f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
        return True  # the device may be in a collective
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return ".wait(" in line or ".item(" in line


def _start() -> dict[str, Any]:
    """Which start of which job this is, so that the supervisor does not take an earlier one's verdict for its own."""
    return {"job_id": os.environ.get("SLURM_JOB_ID"), "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}


def flight_record(device: torch.device) -> bytes:
    """The last collectives as torch's flight recorder kept them, pickled; empty of them unless it is turned on.

    TORCH_FR_BUFFER_SIZE says how many; slurm/env.sh sets it.
    """
    c10d = torch._C._distributed_c10d  # whose stubs leave both dumps out
    if device.type == "cuda":
        return c10d._dump_nccl_trace()  # type: ignore[attr-defined]
    return c10d._dump_fr_trace()  # type: ignore[attr-defined]
