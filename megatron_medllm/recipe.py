"""The published recipe as a list of stages: what each reads, makes and runs."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import yaml

from megatron_medllm.certify.certificate import state_of
from megatron_medllm.config.cluster import ClusterConfig
from megatron_medllm.config.run import RunConfig, StageName
from megatron_medllm.errors import UserError
from megatron_medllm.launch.jobs import RunFiles, StageJob
from megatron_medllm.launch.recipe_jobs import bench_job, recipe_jobs
from megatron_medllm.launch.submit import submission_report, submit


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One arrow of the data's way.

    `arguments` follow `medllm`. `settings` names the configuration's sections that the result depends on, `inputs`
    files that no stage makes, `after` the stages whose results it reads. `outputs` are removed when the stage is
    redone.
    """

    name: str
    arguments: tuple[str, ...]
    settings: tuple[str, ...]
    outputs: tuple[Path, ...]
    inputs: tuple[Path, ...] = ()
    after: tuple[str, ...] = ()


def recipe_stages(run: RunConfig, config_path: Path) -> list[Stage]:
    """The stages that the recipe's sections ask for, in order.

    Raises:
        UserError: the recipe has no model to start from.
    """
    return _Recipe(run, config_path).stages()


class _Recipe:
    """Adds stage after stage; knows which model is the newest and which stage made it."""

    def __init__(self, run: RunConfig, config_path: Path) -> None:
        self._run, self._config, self._dir = run, str(config_path), run.run_dir
        self._stages: list[Stage] = []
        self._world: tuple[str, ...] = ()
        self._examined: list[str] = []

    def stages(self) -> list[Stage]:
        run = self._run
        if run.demo is not None:
            world = self._dir / "world"
            self._add("world", "demo", settings=("demo",), outputs=(world,))
            self._world = ("world",)
        for name, corpus in run.corpora.items():
            files = () if self._world else tuple(Path(p) for s in corpus.sources.values() for p in s.paths)
            self._add(
                f"corpus-{name}",
                *("corpus", "build", "--only", name),
                settings=(f"corpora.{name}",),
                inputs=tuple(path for path in files if path.is_file()),
                outputs=(self._dir / "corpus" / name,),
                after=self._world,
            )
        model, made_by = self._base_model()
        self._examine("base", model, made_by)
        if run.cpt is not None:
            model, made_by = self._train("cpt", "cpt", model, made_by)
            self._examine("cpt", model, made_by)
        if run.rpo is not None:
            model, made_by = self._preference_rounds(model, made_by)
        last = run.rpo or run.cpt or run.base
        if made_by is not None and last is not None and last.adapter is None:  # with adapters, training has merged them
            checkpoints, hf_dir = str(self._dir / made_by / "checkpoints"), str(self._dir / "hf")
            self._add("export", "export", checkpoints, hf_dir, "--source", str(model), settings=(),
                      outputs=(self._dir / "hf",), after=(made_by,), with_config=False)  # fmt: skip
        if self._examined:
            self._add("report", "report", str(self._dir), settings=(), outputs=(self._dir / "report.html",),
                      after=tuple(stage.name for stage in self._stages), with_config=False)  # fmt: skip
        return self._stages

    def _add(
        self,
        name: str,
        *arguments: str,
        settings: tuple[str, ...],
        outputs: tuple[Path, ...],
        inputs: tuple[Path, ...] = (),
        after: tuple[str, ...] = (),
        overrides: tuple[str, ...] = (),
        with_config: bool = True,
    ) -> None:
        config = (self._config,) if with_config else ()
        self._stages.append(
            Stage(
                name=name,
                arguments=(*arguments, *config, *overrides),
                settings=settings,
                outputs=outputs,
                inputs=inputs,
                after=after,
            )
        )

    def _base_model(self) -> tuple[Path, str | None]:
        if self._run.base is not None:
            return self._train("base", "base", None, None)
        if self._run.model.path is None:
            raise UserError("model.path: a recipe without a 'base' section needs a model to start from")
        return self._run.model.path, None

    def _train(
        self, name: str, stage: str, model: Path | None, made_by: str | None, overrides: tuple[str, ...] = (),
        after: tuple[str, ...] = (),
    ) -> tuple[Path, str]:  # fmt: skip
        """Train `stage` into RUN/NAME; the model directory it will leave."""
        output = self._dir / name
        corpora = () if stage == "rpo" else tuple(f"corpus-{name}" for name in self._corpora_of(stage))
        self._add(
            name,
            "train",
            settings=(stage, "model", "layout", "seed", "tokenizer"),
            outputs=(output,),
            after=(*corpora, *((made_by,) if made_by else ()), *after),
            overrides=(f"stage={stage}", f"output={output}", *model_overrides(model), *overrides),
        )
        return output / "hf", name

    def _corpora_of(self, stage: str) -> list[str]:
        section = getattr(self._run, stage)
        folders = {str(self._dir / "corpus" / name): name for name in self._run.corpora}
        return [folders[str(source.path)] for source in section.data if str(source.path) in folders]

    def _preference_rounds(self, model: Path, made_by: str | None) -> tuple[Path, str | None]:
        """Sample, pair, score and train, round after round; each round's reference is the round before."""
        run = self._run
        for number in range(1, run.rounds + 1):
            suffix = "" if number == 1 else f"-{number}"
            pairs = run.rpo.pairs if run.rpo and run.pairs is None else self._dir / f"pairs{suffix}" / "pairs.jsonl"
            before = (made_by,) if made_by else ()
            if run.pairs is not None:
                self._add(
                    f"pairs{suffix}", "pairs", settings=("pairs",), outputs=(pairs.parent,),
                    after=(*before, *self._world), overrides=(f"output={pairs.parent}", *model_overrides(model)),
                )  # fmt: skip
                before = (f"pairs{suffix}",)
            reference = self._dir / f"reference{suffix}"
            data = (f"rpo.pairs={pairs}", f"rpo.reference={reference}")
            self._add(
                f"score{suffix}", "score", settings=SCORE_SETTINGS, outputs=(reference,),
                after=before, overrides=(*data, *model_overrides(model)),
            )  # fmt: skip
            start, started_by = model, made_by
            scored = (f"score{suffix}",)
            model, made_by = self._train(f"rpo{suffix}", "rpo", start, started_by, data, after=scored)
            self._examine(f"rpo{suffix}", model, made_by)
            if run.controls and number == run.rounds:
                for control, settings in CONTROLS.items():
                    found, maker = self._train(control, "rpo", start, started_by, (*data, *settings), after=scored)
                    self._examine(control, found, maker)
        return model, made_by

    def _examine(self, name: str, model: Path, made_by: str | None) -> None:
        if self._run.eval is None:
            return
        output = self._dir / "eval" / name
        self._add(
            f"eval-{name}", "eval", "run", settings=("eval",), outputs=(output,),
            after=(*((made_by,) if made_by else ()), *self._world),
            overrides=(f"output={output}", *model_overrides(model)),
        )  # fmt: skip
        self._examined.append(name)


# What the reference log-probabilities depend on. The optimizer and the loss are not among them.
SCORE_SETTINGS = (
    *("model", "layout", "tokenizer", "rpo.adapter", "rpo.fp8", "rpo.fp8_recipe"),
    *("rpo.sequence_length", "rpo.micro_batch_size", "rpo.share_prompt", "rpo.template", "rpo.add_eos"),
    *("rpo.mask_patterns", "rpo.too_long", "rpo.rpo_guard"),
)

# What the preference term is compared with: the NLL alone, and DPO alone.
CONTROLS = {
    "rpo-sft": ("rpo.loss.kind=sft",),
    "rpo-dpo": ("rpo.loss.kind=rpo", "rpo.loss.alpha=0"),
}


def model_overrides(model: Path | None) -> tuple[str, ...]:
    """Overrides that make a command start from a model directory."""
    return () if model is None else (f"model.path={model}", "model.size=null", "model.shape=null")


def _trained(run: RunConfig) -> list[RunConfig]:
    """The run once for every section that trains, `stage` set to it."""
    names: tuple[StageName, ...] = get_args(StageName)
    return [run.model_copy(update={"stage": name}) for name in names if getattr(run, name) is not None]


def certificates(run: RunConfig) -> str:
    """A line about the certificate of every stage that trains."""
    return "\n".join(f"certificate {stage.stage:<5} {state_of(stage)}" for stage in _trained(run))


def certify_stages(run: RunConfig) -> None:
    """Make the certificates that are missing.

    Raises:
        UserError: a stage's layout is not certified, or cannot be.
    """
    from megatron_medllm.certify.run import certify  # torch: only where it is asked for

    for stage in _trained(run):
        certificate, _ = certify(stage)
        if not certificate.passed:
            failed = next(check for check in certificate.checks if not check.passed)
            raise UserError(
                f"stage {stage.stage} is not certified: {failed.name} ({failed.where}) differs by "
                f"{failed.difference:.2g}, bound {failed.bound:.2g}; see {run.run_dir / 'certificate.json'}"
            )


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
