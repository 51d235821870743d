"""A recipe's stages as batch jobs: which script, how many nodes, how long by the planner."""

import shlex
from dataclasses import replace
from pathlib import Path

import yaml

from megatron_medllm.config.cluster import ClusterConfig
from megatron_medllm.config.run import RunConfig, StageName
from megatron_medllm.corpus.plan import parts_folder
from megatron_medllm.errors import UserError
from megatron_medllm.launch.jobs import RunFiles, StageJob
from megatron_medllm.launch.status import last_save_time_s
from megatron_medllm.launch.submit import submission_report, submit
from megatron_medllm.planner import Plan, plan, require_fit
from megatron_medllm.planner.from_config import workload_of
from megatron_medllm.recipe.stages import Command, Stage, recipe_stages

# A stage's command -> the script in slurm/; trainings of a recipe's own sections have their own.
SCRIPTS = {
    Command.DEMO: "corpus",
    Command.CORPUS: "corpus",
    Command.TRAIN: "cpt",
    Command.PAIRS: "eval",
    Command.SCORE: "score",
    Command.EXPORT: "export",
    Command.EVAL: "eval",
    Command.REPORT: "eval",
}
DISTRIBUTED = {Command.TRAIN, Command.SCORE}
BENCHMARKS = ("throughput", "scoring", "generation")
MERGE_TIME_S = 1200.0  # reads answers and makes reports
BENCH_TIME_S = 2400.0  # asked for, with the margin that every job gets: reading or drawing 72B weights takes most of it


def submit_recipe(run: RunConfig, *, stages: list[str] | None, dry_run: bool, force: bool) -> str:
    """Submit the recipe, or the named stages of it, as a chain of Slurm jobs.

    Raises:
        UserError: an unknown stage, no section `cluster`, a plan that does not fit, or Slurm refused.
    """
    files, cluster = RunFiles(run.run_dir.resolve()), _cluster(run)
    jobs = recipe_jobs(run, recipe_stages(run, files.config), cluster, only=stages, force=force)
    return _submit(run, jobs, cluster, dry_run=dry_run)


def submit_bench(run: RunConfig, arguments: str, *, dry_run: bool, force: bool) -> str:
    """Submit `medllm bench ARGUMENTS` of the recipe as one Slurm job, with the recipe's layout.

    Raises:
        UserError: no such benchmark, no section `cluster`, a plan that does not fit, or Slurm refused.
    """
    cluster = _cluster(run)
    job = bench_job(run, shlex.split(arguments), cluster, config=RunFiles(run.run_dir.resolve()).config, force=force)
    return _submit(run, [job], cluster, dry_run=dry_run)


def _cluster(run: RunConfig) -> ClusterConfig:
    if run.cluster is None:
        raise UserError("medllm submit needs the section 'cluster'")
    return run.cluster


def _submit(run: RunConfig, jobs: list[StageJob], cluster: ClusterConfig, *, dry_run: bool) -> str:
    config_text = yaml.safe_dump(run.model_dump(mode="json"), allow_unicode=True, sort_keys=False)
    return submission_report(submit(run.run_dir, jobs, cluster, config_text=config_text, dry_run=dry_run))


def recipe_jobs(
    run: RunConfig,
    stages: list[Stage],
    cluster: ClusterConfig,
    *,
    only: list[str] | None = None,
    force: bool = False,
) -> list[StageJob]:
    """One job per stage; of one that is sharded an array, and behind it a job with the stage's name that merges.

    `only` keeps these stages, which then read what an earlier submission made.

    Raises:
        UserError: an unknown stage in `only`, or a training that cannot fit the cluster's GPUs (unless `force`).
    """
    names = [stage.name for stage in stages]
    unknown = sorted(set(only or ()) - set(names))
    if unknown:
        raise UserError(f"unknown stage {unknown[0]!r}; this recipe has {', '.join(names)}")
    kept = [stage for stage in stages if only is None or stage.name in only]
    waits = waits_of(run, kept)
    jobs = [_job(run, stage, cluster, after=waits[stage.name], force=force) for stage in kept]
    return [part for stage, job in zip(kept, jobs, strict=True) for part in _in_shards(stage, job, cluster)]


def waits_of(run: RunConfig, stages: list[Stage]) -> dict[str, tuple[str, ...]]:
    """The stages that each stage waits for: those it reads from and, where exams have requirements, their exams.

    What is made of a model whose exam has failed is not worth its GPUs: `medllm pipeline` stops there too.
    """
    present = {stage.name for stage in stages}
    has_gates = run.eval is not None and bool(run.eval.require)
    exams: list[tuple[str, set[str]]] = []  # name, and the stages that make its model
    behind: dict[str, set[str]] = {}  # all stages before a stage
    found = {}
    for stage in stages:
        after = [name for name in stage.after if name in present]
        behind[stage.name] = set(after).union(*(behind[name] for name in after))
        if has_gates and stage.command is not Command.EVAL:
            after += [name for name, makers in exams if makers <= behind[stage.name] and name not in after]
        if stage.command is Command.EVAL:
            exams.append((stage.name, behind[stage.name]))
        found[stage.name] = tuple(after)
    return found


def bench_job(
    run: RunConfig, arguments: list[str], cluster: ClusterConfig, *, config: Path, force: bool = False
) -> StageJob:
    """`medllm bench ARGUMENTS[0] CONFIG ARGUMENTS[1:]` as a job on the recipe's layout; generation on one GPU.

    Raises:
        UserError: no such benchmark, or a training that cannot fit the cluster's GPUs (unless `force`).
    """
    if not arguments or arguments[0] not in BENCHMARKS:
        raise UserError(f"--bench {' '.join(arguments)!r}: expected one of {', '.join(BENCHMARKS)}, then its options")
    name, *options = arguments
    if name == "throughput":
        planned_training(run, cluster, trains=run.stage, force=force)
    distributed = name != "generation"
    nodes = run.layout.nodes if distributed else 1
    processes = run.layout.world_size // nodes if distributed else 0
    return StageJob(
        name=f"bench-{name}",
        script="bench",
        command=("-m", "megatron_medllm", "bench", name, str(config), *options),
        nodes=nodes,
        gpus_per_node=(processes or 1) if cluster.gpus else 0,
        processes_per_node=processes,
        duration_s=BENCH_TIME_S,
    )


def _job(run: RunConfig, stage: Stage, cluster: ClusterConfig, *, after: tuple[str, ...], force: bool) -> StageJob:
    distributed = stage.command in DISTRIBUTED
    nodes = run.layout.nodes if distributed else 1
    processes = run.layout.world_size // nodes if distributed else 0
    gpus = processes or (stage.engine.gpus if stage.engine is not None else 0)
    job = StageJob(
        name=stage.name,
        script=SCRIPTS[stage.command] if stage.trains in (None, "base") else stage.trains,
        command=("-m", "megatron_medllm", *stage.arguments),
        nodes=nodes,
        gpus_per_node=gpus if cluster.gpus else 0,
        processes_per_node=processes,
        answers=None if stage.engine is None else str(stage.outputs[0].resolve()),
        parts=str(parts_folder(stage.outputs[0].resolve())) if stage.command is Command.CORPUS else None,
        after=after,
        exam=str(stage.outputs[0].resolve() / "summary.json") if stage.command is Command.EVAL else None,
    )
    return job if stage.trains is None else _trained_job(run, stage.outputs[0], cluster, job, stage.trains, force=force)


def _in_shards(stage: Stage, job: StageJob, cluster: ClusterConfig) -> list[StageJob]:
    """The job, or its array of shards and the job that makes the result of theirs."""
    if stage.command is Command.CORPUS:
        count, last = cluster.corpus_tasks, replace(job, command=(*job.command, "--finish"))
    else:  # the merge loads no model
        merge = (*job.command, "--merge")
        count, last = stage.replicas, replace(job, command=merge, gpus_per_node=0, duration_s=MERGE_TIME_S)
    if count == 1:
        return [job]
    array = replace(job, name=f"{job.name}-shards", array_size=count)
    return [array, replace(last, after=(array.name,))]


def _trained_job(
    run: RunConfig, output: Path, cluster: ClusterConfig, job: StageJob, trains: StageName, *, force: bool
) -> StageJob:
    """The job of a training: its duration by the planner, and where its progress shows."""
    folder = output.resolve()
    planned = planned_training(run, cluster, trains=trains, force=force)
    measured = last_save_time_s(folder / "metrics.jsonl")
    return replace(
        job,
        duration_s=planned.training_time_s if planned else None,
        save_time_s=measured if measured is not None else planned.checkpoint.save_time_s if planned else 60.0,
        checkpoints=str(folder / "checkpoints"),
        metrics=str(folder / "metrics.jsonl"),
        total_steps=planned.total_steps if planned else None,
    )


def planned_training(run: RunConfig, cluster: ClusterConfig, *, trains: StageName, force: bool) -> Plan | None:
    """The plan of a training stage on the cluster's GPUs; None where there are none to plan for."""
    if not cluster.gpus:
        return None
    found = plan(workload_of(run.model_copy(update={"stage": trains})), cluster.hardware)
    if not force:
        require_fit(found)
    return found
