"""A recipe's stages as batch jobs: which script, how many nodes, how long by the planner."""

from pathlib import Path
from typing import Protocol

from megatron_medllm.config.cluster import ClusterConfig
from megatron_medllm.config.run import RunConfig
from megatron_medllm.errors import UserError
from megatron_medllm.launch.jobs import StageJob
from megatron_medllm.launch.status import last_save_time_s
from megatron_medllm.planner import Plan, plan, require_fit
from megatron_medllm.planner.from_config import workload_of

# medllm's command -> the script in slurm/
SCRIPTS = {
    "demo": "corpus",
    "corpus": "corpus",
    "import": "import",
    "train": "cpt",
    "pairs": "eval",
    "score": "score",
    "export": "export",
    "eval": "eval",
    "report": "eval",
}
DISTRIBUTED = {"train", "score"}
USES_GPU = {"train", "score", "pairs", "eval"}
BENCHMARKS = ("throughput", "scoring", "generation")
BENCH_TIME_S = 2400.0  # asked for, with the margin that every job gets: reading or drawing 72B weights takes most of it


class RecipeStage(Protocol):
    """What this module reads of a stage of the recipe (megatron_medllm.recipe.Stage)."""

    @property
    def name(self) -> str:
        """Unique within the recipe."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Follow `medllm`."""

    @property
    def after(self) -> tuple[str, ...]:
        """Names of the stages whose results it reads."""


def recipe_jobs(
    run: RunConfig,
    stages: list[RecipeStage],
    cluster: ClusterConfig,
    *,
    only: list[str] | None = None,
    force: bool = False,
) -> list[StageJob]:
    """One job per stage. `only` keeps these stages, which then read what an earlier submission made.

    Raises:
        UserError: an unknown stage in `only`, or a training that cannot fit the cluster's GPUs (unless `force`).
    """
    names = [stage.name for stage in stages]
    unknown = sorted(set(only or ()) - set(names))
    if unknown:
        raise UserError(f"unknown stage {unknown[0]!r}; this recipe has {', '.join(names)}")
    kept = [stage for stage in stages if only is None or stage.name in only]
    present = {stage.name for stage in kept}
    return [_job(run, stage, cluster, present=present, force=force) for stage in kept]


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


def _job(run: RunConfig, stage: RecipeStage, cluster: ClusterConfig, *, present: set[str], force: bool) -> StageJob:
    command = stage.arguments[0]
    distributed = command in DISTRIBUTED
    nodes = run.layout.nodes if distributed else 1
    processes = run.layout.world_size // nodes if distributed else 0
    gpus = processes or (1 if command in USES_GPU else 0)
    trains = _stage_trained(stage)
    script = SCRIPTS[command] if trains in (None, "base") else trains
    job = StageJob(
        name=stage.name,
        script=script,
        command=("-m", "megatron_medllm", *stage.arguments),
        nodes=nodes,
        gpus_per_node=gpus if cluster.gpus else 0,
        processes_per_node=processes,
        after=tuple(name for name in stage.after if name in present),
    )
    return job if trains is None else _trained_job(run, stage, cluster, job, trains=trains, force=force)


def _stage_trained(stage: RecipeStage) -> str | None:
    if stage.arguments[0] != "train":
        return None
    return next((a.removeprefix("stage=") for a in stage.arguments if a.startswith("stage=")), "cpt")


def _trained_job(
    run: RunConfig, stage: RecipeStage, cluster: ClusterConfig, job: StageJob, *, trains: str, force: bool
) -> StageJob:
    output = next((Path(a.removeprefix("output=")) for a in stage.arguments if a.startswith("output=")), None)
    folder = (output or run.run_dir / trains).resolve()
    planned = planned_training(run, cluster, trains=trains, force=force)
    measured = last_save_time_s(folder / "metrics.jsonl")
    save_time_s = measured if measured is not None else planned.checkpoint.save_time_s if planned else 60.0
    return StageJob(
        **{
            **vars(job),
            "duration_s": planned.training_time_s if planned else None,
            "save_time_s": save_time_s,
            "checkpoints": str(folder / "checkpoints"),
            "metrics": str(folder / "metrics.jsonl"),
            "total_steps": planned.total_steps if planned else None,
        }
    )


def planned_training(run: RunConfig, cluster: ClusterConfig, *, trains: str, force: bool) -> Plan | None:
    """The plan of a training stage on the cluster's GPUs; None where there are none to plan for."""
    if not cluster.gpus:
        return None
    found = plan(workload_of(run.model_copy(update={"stage": trains})), cluster.hardware)
    if not force:
        require_fit(found)
    return found
