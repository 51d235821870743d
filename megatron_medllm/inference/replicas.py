"""Several copies of the model on this machine: a process and a share of the GPUs each, without Slurm."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

from megatron_medllm.config.exam import EngineConfig
from megatron_medllm.errors import UserError
from megatron_medllm.progress import FILE_VARIABLE, progress
from megatron_medllm.shard import Shard

_POLL_S = 0.2
_SHUTDOWN_S = 30.0


@dataclass(frozen=True)
class _Replica:
    shard: Shard
    process: subprocess.Popen[bytes]
    log: Path
    progress: Path


def run_replicas(engine: EngineConfig, arguments: Sequence[str], output: Path) -> None:
    """Run `medllm ARGUMENTS --shard I/N` for all `engine.replicas` shards at once, and wait for them.

    Their printed lines go to OUTPUT/shards/I-of-N.log. When one fails, the others are stopped; what they have answered
    is kept.

    Raises:
        UserError: fewer GPUs than the replicas need, or a shard failed: names it, its log and its last line.
    """
    gpus = gpus_by_replica(engine)
    folder = output / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    running: list[_Replica] = []
    with _ending(running):
        for number in range(engine.replicas):
            shard = Shard(number + 1, engine.replicas)
            running.append(_start(arguments, shard, folder, gpus[number] if gpus else None))
        _wait(running, title=f"{engine.replicas} replicas")


def gpus_by_replica(engine: EngineConfig) -> list[str] | None:
    """CUDA_VISIBLE_DEVICES of every replica; None where the replicas share no GPUs (on CPUs).

    Raises:
        UserError: fewer GPUs are visible than the replicas need.
    """
    visible = visible_gpus()
    if engine.kind == "transformers" and (engine.device == "cpu" or not visible):
        return None
    needed = engine.replicas * engine.gpus
    if len(visible) < needed:
        raise UserError(
            f"engine.replicas={engine.replicas} of {engine.gpus} GPUs each need {needed}; {len(visible)} are visible"
        )
    return [",".join(visible[start : start + engine.gpus]) for start in range(0, needed, engine.gpus)]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names; without it, the indices of all GPUs that the driver answers for."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False)
    return [str(index) for index in range(len(done.stdout.splitlines()))] if done.returncode == 0 else []


def _start(arguments: Sequence[str], shard: Shard, folder: Path, gpus: str | None) -> _Replica:
    name = f"{shard.index}-of-{shard.count}"
    log, watched = folder / f"{name}.log", folder / f"{name}.progress"
    watched.unlink(missing_ok=True)
    environment = os.environ | {FILE_VARIABLE: str(watched)}
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    command = [sys.executable, "-W", "ignore", "-m", "megatron_medllm", *arguments, "--shard", str(shard)]
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
    return _Replica(shard, process, log, watched)


def _wait(running: Sequence[_Replica], *, title: str) -> None:
    with progress(title, total=len(running)) as bar:
        while True:
            states = [(replica, replica.process.poll()) for replica in running]
            for replica, status in states:
                if status:
                    reason = f"exit status {status}; log: {replica.log}: {_last_line(replica.log)}"
                    raise UserError(f"shard {replica.shard} failed ({reason})")
            bar.update(sum(1.0 if status == 0 else _share_done(replica) for replica, status in states))
            if all(status == 0 for _, status in states):
                return
            time.sleep(_POLL_S)


def _share_done(replica: _Replica) -> float:
    row = orjson.loads(replica.progress.read_bytes()) if replica.progress.is_file() else {}
    return row["done"] / row["total"] if row.get("total") else 0.0


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it printed nothing"


@contextmanager
def _ending(running: list[_Replica]) -> Iterator[None]:
    """Leave no replica behind: not after an error, nor when we are asked to end."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        for replica in running:
            if replica.process.poll() is None:
                replica.process.terminate()
        for replica in running:
            try:
                replica.process.wait(_SHUTDOWN_S)
            except subprocess.TimeoutExpired:
                replica.process.kill()
                replica.process.wait()
            replica.progress.unlink(missing_ok=True)
        signal.signal(signal.SIGTERM, before)
