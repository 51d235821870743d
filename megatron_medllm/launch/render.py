"""A stage's batch script: the file in slurm/ with its `#SBATCH` lines filled in. The commands below them stay as is."""

import re
from pathlib import Path

from megatron_medllm.config.cluster import SBATCH_SETTINGS, ClusterConfig, format_slurm_time, parse_slurm_time
from megatron_medllm.errors import UserError
from megatron_medllm.launch.jobs import RunFiles, StageJob
from megatron_medllm.shipped import shipped

SCRIPTS = shipped("slurm")
# Slurm may deliver the signal up to a minute late; the trainer finishes its step and saves, twice as long as planned.
SIGNAL_SLACK_S = 90
TIME_SAFETY = 1.3


def signal_lead_s(save_time_s: float) -> int:
    """Seconds before the time limit at which the job is told to save."""
    return int(SIGNAL_SLACK_S + 2 * save_time_s)


def time_limit_s(job: StageJob, cluster: ClusterConfig) -> int:
    """Seconds to ask for: the planned duration with a margin, at most the cluster's longest.

    Raises:
        UserError: the cluster's longest job is over before it could save.
    """
    longest, lead = parse_slurm_time(cluster.max_time), signal_lead_s(job.save_time_s)
    if longest < 2 * lead:
        raise UserError(
            f"cluster.max_time={cluster.max_time} is too short for {job.name}: saving needs a lead of {lead} s, "
            f"so ask for at least {format_slurm_time(2 * lead)}"
        )
    if job.duration_s is None:
        return longest
    return min(longest, int(TIME_SAFETY * job.duration_s) + 2 * lead)


def sbatch_options(job: StageJob, *, files: RunFiles, cluster: ClusterConfig, dependency_ids: list[str]) -> list[str]:
    """The `#SBATCH` options of one job."""
    escaped = str(files.launch / "logs" / job.name).replace("%", "%%")  # Slurm would expand %j in the run's own name
    number = "%A_%a" if job.array_size else "%j"
    options = [
        f"--job-name={quoted(f'medllm-{job.name}-{files.run.name}')}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--time={format_slurm_time(time_limit_s(job, cluster))}",
        f"--signal=USR1@{signal_lead_s(job.save_time_s)}",
        "--requeue",
        "--open-mode=append",
        f"--output={quoted(f'{escaped}/{number}.out')}",
    ]
    if cluster.gpus and job.gpus_per_node:
        options.append(f"--gpus-per-node={job.gpus_per_node}")
    if cluster.cpus_per_process:
        options.append(f"--cpus-per-task={cluster.cpus_per_process * max(1, job.processes_per_node)}")
    if cluster.exclude:
        options.append(f"--exclude={','.join(cluster.exclude)}")
    options += site_options(cluster)
    if cluster.mail_user:
        options.append("--mail-type=END,FAIL" if job.is_last else "--mail-type=FAIL")
    if job.array_size:
        options.append(f"--array=0-{job.array_size - 1}")
    if dependency_ids:
        when = "afterany" if job.after_any else "afterok"
        options += [f"--dependency={when}:{':'.join(dependency_ids)}", "--kill-on-invalid-dep=yes"]
    return [*options, *cluster.extra_options]


def site_options(cluster: ClusterConfig) -> list[str]:
    """Who pays and where it runs, as the recipe has it; what it leaves open is the site's (env.sh)."""
    values = {option: getattr(cluster, name) for name, (option, _) in SBATCH_SETTINGS.items()}
    given = {option: value for option, value in values.items() if value}
    return [f"--{option}" if value is True else f"--{option}={quoted(value)}" for option, value in given.items()]


def container_options(cluster: ClusterConfig) -> list[str]:
    """What srun gets for pyxis; none where the recipe names no container."""
    if cluster.container_image is None:
        return []
    options = [f"--container-image={cluster.container_image}"]
    if cluster.container_mounts:
        options.append(f"--container-mounts={','.join(cluster.container_mounts)}")
    if cluster.container_workdir is not None:
        options.append(f"--container-workdir={cluster.container_workdir}")
    return options


def quoted(value: str) -> str:
    """A value as sbatch reads it back from an `#SBATCH` line: in double quotes where it needs them."""
    return value if re.fullmatch(r"[^\s'\"\\#]+", value) else f'"{value}"'


def check_run_dir(run: Path) -> None:
    """Refuse a directory that batch scripts cannot name: neither sbatch nor PYTHONPATH has an escape for these.

    Raises:
        UserError: its path holds a quote, a backslash, a colon or a control character.
    """
    wrong = next((c for c in str(run) if c in "\"'\\:" or not c.isprintable()), None)
    if wrong is not None:
        raise UserError(
            f"run_dir: batch scripts cannot name {str(run)!r}: it holds {wrong!r}; choose another directory"
        )


def render_script(script: str, options: list[str]) -> str:
    """The text of slurm/`script`.sbatch with `options` in place of its own.

    Raises:
        UserError: there is no such script.
    """
    path = SCRIPTS / f"{script}.sbatch"
    if not path.is_file():
        raise UserError(f"{path}: no such batch script")
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    body = [line for line in lines[first:] if not line.startswith("#SBATCH")]
    return "\n".join([*lines[:first], *(f"#SBATCH {option}" for option in options), *body]) + "\n"
