"""Runs once per node under `srun`: check the node, then start its ranks and pass on why they stopped.

    python -m megatron_medllm.launch.node RUN STAGE

Ranks are started by torch's elastic agent (what `torchrun` runs) with a static rendezvous at the first node of the
allocation, and no restarts of its own: Slurm restarts the job. Slurm sends USR1 and TERM to every process of the
step, so the trainer gets them itself; the agent must survive them, or it would kill the trainer while it saves.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from megatron_medllm.config.cluster import REQUEUE_EXIT_CODE, UNFIT_NODE_EXIT_CODE
from megatron_medllm.errors import USER_ERROR_EXIT_CODE
from megatron_medllm.launch.jobs import RunFiles, read_specification
from megatron_medllm.launch.supervisor import job_id, log_directory, restart_count, start_name, task_name
from megatron_medllm.processes import ProcessId, host_name
from megatron_medllm.progress import FILE_VARIABLE
from megatron_medllm.storage import read_json, write_json

# Ranks that are still saving when another one has already left get this long before they are killed.
SHUTDOWN_TIMEOUT_S = 600
RENDEZVOUS_TIMEOUT_S = 600
# Containers may take minutes to start, and not the same on all nodes.
CHECK_IN_TIMEOUT_S = 600.0
CHECK_IN_POLL_S = 0.5
# A stalled rank gets this long to write its stack.
STACK_WAIT_S = 10.0
PORT_BASE, PORT_RANGE = 20_000, 10_000
EXIT_STATUS_FILE = "exit-status.json"


def main(run: Path, stage: str) -> int:
    """Check this node, run the stage's command on it, and return the exit status for `srun`."""
    files = RunFiles(run.resolve())
    spec = read_specification(files, stage)
    for name in (signal.SIGUSR1, signal.SIGTERM):
        # A handler, not SIG_IGN: that would be inherited by ranks which have not set theirs up yet.
        signal.signal(name, lambda *_: None)
    unfit = check_in(files, stage, spec, node_problem(files.run, spec))
    if unfit:
        print("\n".join(f"{node}: {problem}" for node, problem in sorted(unfit.items())), file=sys.stderr)
        return UNFIT_NODE_EXIT_CODE
    status = run_stage(files, stage, spec)
    write_json(node_logs(files, stage) / EXIT_STATUS_FILE, status)  # srun tells of one node's only
    return status


def run_stage(files: RunFiles, stage: str, spec: dict[str, Any]) -> int:
    """Run this node's part of the stage's command, behind the checks of a distributed job; its exit status."""
    logs = node_logs(files, stage)
    command = [*spec["command"], *shard_arguments(spec)]
    if not spec["processes_per_node"]:
        return run_once(command, logs, progress=files.progress(task_name(stage)))
    checks = ["-m", "megatron_medllm.launch.health", str(files.run), str(spec["max_clock_skew_s"])]
    status = run_node_ranks(checks, spec, logs / "health", port_offset=0)
    if status:
        return status
    if spec["checkpoints"]:
        verdict = (files.run / spec["checkpoints"]).parent / "watch" / "stall.json"
        threading.Thread(target=end_stalled_ranks, args=(verdict,), daemon=True).start()
    return run_node_ranks(command, spec, logs, port_offset=1)


def shard_arguments(spec: dict[str, Any]) -> list[str]:
    """Which part of an array this task is; nothing for a job that is no array."""
    task, size = os.environ.get("SLURM_ARRAY_TASK_ID"), spec["array_size"]
    return ["--shard", f"{int(task) + 1}/{size}"] if size and task is not None else []


def end_stalled_ranks(verdict: Path) -> None:
    """Wait for a verdict of this start's watch; the ranks of this node that it names leave their stack and are killed.

    Without it a stopped rank that is alone on its node would keep the agent waiting for it (train/watch.py).
    """
    while not (verdict.is_file() and is_of_this_start(found := read_json(verdict))):
        time.sleep(CHECK_IN_POLL_S)
    silent = found["ranks"] if found["kind"] == "silent" else []
    processes = [ProcessId(row["host"], row["pid"], row["started"]) for row in silent]
    for number, pause_s in ((signal.SIGUSR2, 0.0), (signal.SIGCONT, STACK_WAIT_S), (signal.SIGKILL, 0.0)):
        for process in processes:
            process.signal(number)
        time.sleep(pause_s)


def is_of_this_start(row: dict[str, Any]) -> bool:
    """Whether a file of the trainer's watch was written in this start of this job."""
    return (row["job_id"], row["restart"]) == (os.environ.get("SLURM_JOB_ID"), restart_count())


def check_in(files: RunFiles, stage: str, spec: dict[str, Any], problem: str | None) -> dict[str, str]:
    """What every unfit node of this start suffers from; all nodes return the same, and leave the job together.

    Each node checks in with a file in the run directory and waits for the others' files, or for the first that reports
    a problem. Without that, the fit nodes would wait in a rendezvous for one that has left, and the job's exit status
    would tell of the timeout, not of the node.
    """
    folder = files.launch / "check-in" / task_name(stage) / start_name()
    write_json(folder / f"{host_name()}.json", {"problem": problem})
    deadline = time.monotonic() + CHECK_IN_TIMEOUT_S
    while True:
        problems = {path.stem: read_json(path)["problem"] for path in folder.glob("[!.]*.json")}
        unfit = {node: what for node, what in problems.items() if what}
        if time.monotonic() > deadline:
            absent = set(allocated_nodes()) - problems.keys()
            unfit |= dict.fromkeys(absent, f"did not check in within {CHECK_IN_TIMEOUT_S:g} s")
        for node, what in unfit.items():
            write_json(files.unfit_nodes / f"{node}.json", {"reason": what, "job_id": job_id()})
        if unfit or len(problems) >= spec["nodes"] or time.monotonic() > deadline:
            return unfit
        time.sleep(CHECK_IN_POLL_S)


def node_problem(run: Path, spec: dict[str, Any]) -> str | None:
    """What makes this node unfit on its own: missing GPUs, no disk, or a run directory that it cannot write."""
    if spec["gpus_per_node"] and spec["check_gpus"]:
        found = count_gpus()
        if found < spec["gpus_per_node"]:
            return f"{found} usable GPUs, {spec['gpus_per_node']} expected"
    free_gib = shutil.disk_usage(run).free / 2**30
    if free_gib < spec["min_free_disk_gib"]:
        return f"{free_gib:.1f} GiB free at {run}, {spec['min_free_disk_gib']:g} needed"
    if not os.access(run, os.W_OK):
        return f"{run} is not writable"
    return None


def count_gpus() -> int:
    """GPUs that the driver answers for."""
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False)
    return len(done.stdout.splitlines()) if done.returncode == 0 else 0


def node_logs(files: RunFiles, stage: str) -> Path:
    """Per-rank logs of this start on this node; the supervisor looks for errors under its parent."""
    return log_directory(files.run, task_name(stage)) / f"node{node_rank()}"


def node_rank() -> int:
    """This node's index in the allocation."""
    return int(os.environ.get("SLURM_NODEID", "0"))


def run_once(command: list[str], logs: Path, *, progress: Path) -> int:
    """Run the command as one process, its output shown and its errors kept too; it says in `progress` how far it is."""
    logs.mkdir(parents=True, exist_ok=True)
    progress.unlink(missing_ok=True)  # an earlier start's
    environment = os.environ | {FILE_VARIABLE: str(progress)}
    with open(logs / "stderr.log", "wb") as errors:
        process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, env=environment)
        assert process.stderr is not None
        for line in process.stderr:
            errors.write(line)
            errors.flush()
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
        return exit_status([process.wait()])


def run_node_ranks(command: list[str], spec: dict[str, Any], logs: Path, *, port_offset: int) -> int:
    """Run the command as this node's ranks of one distributed job and wait for them."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logs.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN_TIMEOUT_S)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=spec["nodes"],
        max_nodes=spec["nodes"],
        nproc_per_node=spec["processes_per_node"],
        run_id=f"{job_id()}-{port_offset}",
        rdzv_backend="static",
        rdzv_endpoint=f"{first_node()}:{rendezvous_port() + port_offset}",
        rdzv_configs={"rank": node_rank(), "timeout": RENDEZVOUS_TIMEOUT_S},
        max_restarts=0,
        monitor_interval=0.5,
        signals_to_handle="SIGINT",
        # Every rank's output goes to its files; the first rank's is shown too.
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL, tee={0: Std.ALL}),
    )
    try:
        elastic_launch(config, entrypoint=sys.executable)("-u", *command)
    except ChildFailedError as error:
        return exit_status([failure.exitcode for failure in error.failures.values()])
    return 0


def exit_status(codes: list[int]) -> int:
    """One exit status for a node's processes.

    A request to run again counts only if every process that failed asked for it or was interrupted beside one that
    did; any real failure wins, and of these a wrong input, which no other start mends. Who dies of USR1 asks for it
    too: Slurm alone sends that, to what may not listen (a corpus) or not yet. Death by signal -n becomes 128 + n, as
    shells write it.
    """
    failed = [code for code in codes if code]
    if not failed:
        return 0
    interrupted = {REQUEUE_EXIT_CODE, -signal.SIGUSR1, -signal.SIGTERM}
    if {REQUEUE_EXIT_CODE, -signal.SIGUSR1} & set(failed) and set(failed) <= interrupted:
        return REQUEUE_EXIT_CODE
    if USER_ERROR_EXIT_CODE in failed:  # the others may have crashed because one gave up
        return USER_ERROR_EXIT_CODE
    worst = next((code for code in failed if code not in interrupted), failed[0])
    return worst if worst > 0 else 128 - worst


def first_node() -> str:
    """Host name of the allocation's first node."""
    return allocated_nodes()[0]


def allocated_nodes() -> list[str]:
    """Host names of the allocation's nodes, in Slurm's order."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return ["localhost"]
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return done.stdout.split()


def rendezvous_port() -> int:
    """A port that all nodes of a job agree on and neighbouring jobs do not share; two per job.

    A restart takes another pair, so that a port which something else holds does not stop the job for good.
    """
    return PORT_BASE + 2 * (int(job_id()) + 1013 * restart_count()) % PORT_RANGE


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
