"""`medllm submit`: freeze code and configuration into the run directory, and queue the recipe as a chain of jobs."""

import shutil
import subprocess
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path

from megatron_medllm.config.cluster import (
    REQUEUE_EXIT_CODE,
    SBATCH_SETTINGS,
    UNFIT_NODE_EXIT_CODE,
    ClusterConfig,
)
from megatron_medllm.errors import UserError
from megatron_medllm.launch.jobs import ON_END, RunFiles, StageJob, write_specification
from megatron_medllm.launch.render import SCRIPTS, check_run_dir, container_options, render_script, sbatch_options
from megatron_medllm.launch.status import refuse_queued
from megatron_medllm.provenance import PACKAGE, git_state
from megatron_medllm.recipe.owner import owning
from megatron_medllm.storage import atomic_write, write_json


@dataclass(frozen=True)
class Submission:
    """What was (or, in a dry run, would be) handed to Slurm: scripts and job ids by stage, in order.

    `container` are the options that every srun gets for the recipe's container.
    """

    scripts: dict[str, str]
    job_ids: dict[str, str]
    container: tuple[str, ...] = ()


def submit(
    run: Path, jobs: list[StageJob], cluster: ClusterConfig, *, config_text: str, dry_run: bool = False
) -> Submission:
    """Queue `jobs`, each after the jobs it names in `after`; a failing stage cancels those behind it.

    Args:
        run: the run directory, on a file system that all nodes share.
        config_text: the resolved configuration as YAML; frozen as RUN/launch/config.yaml, which jobs refer to.
        dry_run: render everything, write and queue nothing; ids read `<cpt>`.

    Raises:
        UserError: batch scripts cannot name the run directory, jobs of this run are still queued, Slurm refused a job
            (those already queued are cancelled), or the site settings are missing.
    """
    files = RunFiles(run.resolve())
    jobs = whole_chain(jobs, cluster)
    check_chain(jobs)
    check_run_dir(files.run)
    if dry_run:
        placeholders = {job.name: f"<{job.name}>" for job in jobs}
        scripts = {job.name: render_job(job, files, cluster, placeholders) for job in jobs}
        return Submission(scripts, {}, tuple(container_options(cluster)))
    with owning(files.run, "medllm submit"):
        return _queue_chain(files, jobs, cluster, config_text)


def _queue_chain(files: RunFiles, jobs: list[StageJob], cluster: ClusterConfig, config_text: str) -> Submission:
    refuse_queued(files.run)
    freeze(files, jobs, cluster, config_text)
    scripts: dict[str, str] = {}
    job_ids: dict[str, str] = {}
    try:
        for job in jobs:
            scripts[job.name] = render_job(job, files, cluster, job_ids)
            with atomic_write(files.script(job.name)) as stream:
                stream.write(scripts[job.name].encode())
            job_ids[job.name] = queue(files, job.name, cluster)
    except BaseException:
        if job_ids:
            subprocess.run(["scancel", *job_ids.values()], check=False)
        raise
    write_json(files.submission, {"jobs": job_ids})
    return Submission(scripts, job_ids)


def whole_chain(jobs: list[StageJob], cluster: ClusterConfig) -> list[StageJob]:
    """The jobs, the last ones marked, and behind them the one that tells of the end (`cluster.on_end`)."""
    waited_for = {name for job in jobs for name in job.after}
    jobs = [replace(job, is_last=job.name not in waited_for) for job in jobs]
    if cluster.on_end is None:
        return jobs
    names = tuple(job.name for job in jobs)
    told = StageJob(name=ON_END, script="end", command=(cluster.on_end,), after=names, after_any=True, duration_s=300)
    return [*jobs, told]


def check_chain(jobs: list[StageJob]) -> None:
    """Refuse a chain in which a job waits for one that does not come before it."""
    seen: set[str] = set()
    for job in jobs:
        missing = [name for name in job.after if name not in seen]
        if missing:
            raise UserError(f"stage {job.name} waits for {missing[0]}, which is not queued before it")
        if job.name in seen:
            raise UserError(f"stage {job.name} is queued twice")
        seen.add(job.name)


def render_job(job: StageJob, files: RunFiles, cluster: ClusterConfig, job_ids: dict[str, str]) -> str:
    """The batch script of one job, given the ids of those before it."""
    waits = [job_ids[name] for name in job.after]
    return render_script(job.script, sbatch_options(job, files=files, cluster=cluster, dependency_ids=waits))


def freeze(files: RunFiles, jobs: list[StageJob], cluster: ClusterConfig, config_text: str) -> None:
    """Copy code, configuration and site settings into the run directory, with the git state they came from."""
    env_file = cluster.env_file or SCRIPTS / "env.sh"
    if not env_file.is_file():
        raise UserError(f"{env_file}: no such site settings (cluster.env_file)")
    shutil.rmtree(files.code, ignore_errors=True)
    shutil.copytree(PACKAGE, files.code / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for job in jobs:
        (files.launch / "logs" / job.name).mkdir(parents=True, exist_ok=True)
        settings = {
            "check_gpus": cluster.gpus,
            "min_free_disk_gib": cluster.min_free_disk_gib,
            "max_clock_skew_s": cluster.max_clock_skew_s,
            "max_restarts_without_progress": cluster.max_restarts_without_progress,
            "exclude": cluster.exclude,
            "requeue_exit_code": REQUEUE_EXIT_CODE,
            "unfit_node_exit_code": UNFIT_NODE_EXIT_CODE,
        }
        write_specification(files, job, settings)
        for kind in ("ended.json", "progress"):  # of an earlier submission; the history keeps how it ended
            name = escape(job.name)
            for path in [*files.launch.glob(f"{name}.{kind}"), *files.launch.glob(f"{name}.*.{kind}")]:
                path.unlink()
    files.cancelled.unlink(missing_ok=True)
    shutil.rmtree(files.unfit_nodes, ignore_errors=True)
    frozen = {
        files.config: config_text.encode(),
        files.launch / "env.sh": env_file.read_bytes(),
        files.launch / "stage.sh": (SCRIPTS / "stage.sh").read_bytes(),
        files.launch / "container-options": "".join(f"{line}\n" for line in container_options(cluster)).encode(),
    }
    for path, content in frozen.items():
        with atomic_write(path) as stream:
            stream.write(content)
    write_json(files.launch / "source.json", git_state())


def queue(files: RunFiles, stage: str, cluster: ClusterConfig) -> str:
    """Hand a rendered script to sbatch, with the site settings in its environment; returns the job id.

    To sbatch a variable of its environment counts more than the script: those of which the recipe has a setting go.
    """
    command = 'source "$1"; unset -v "${@:5}"; exec sbatch --parsable "$3" "$2" "$4"'
    settled = [variable for name, (_, variable) in SBATCH_SETTINGS.items() if variable and getattr(cluster, name)]
    arguments = [str(files.launch / "env.sh"), str(files.run), str(files.script(stage)), stage, *settled]
    try:
        done = subprocess.run(
            ["bash", "-c", command, "submit", *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UserError("bash not found") from None
    if done.returncode:
        raise UserError(f"sbatch refused {files.script(stage)}: {done.stderr.strip() or 'no message'}")
    return done.stdout.strip().split(";")[0]


def submission_report(found: Submission) -> str:
    """The job ids, or the scripts of a dry run, as text."""
    if found.job_ids:
        width = max(map(len, found.job_ids))
        return "\n".join(f"{stage:<{width}}  job {job_id}" for stage, job_id in found.job_ids.items())
    container = [f"# srun also gets: {' '.join(found.container)}"] if found.container else []
    return "\n".join([*container, *(f"# ---- {stage}.sbatch ----\n{text}" for stage, text in found.scripts.items())])
