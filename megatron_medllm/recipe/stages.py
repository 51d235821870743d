"""The published recipe as a graph of stages: what each runs, reads, makes and trains."""

import os
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

from megatron_medllm.config.exam import EngineConfig, ExamConfig, PromptConfig
from megatron_medllm.config.run import RunConfig, StageName
from megatron_medllm.config.train import CptConfig, RpoConfig
from megatron_medllm.errors import UserError
from megatron_medllm.recipe.inputs import Input, InputKind


class Command(StrEnum):
    """The `medllm` command that a stage runs."""

    DEMO = "demo"
    CORPUS = "corpus build"
    TRAIN = "train"
    PAIRS = "pairs"
    SCORE = "score"
    EVAL = "eval run"
    EXPORT = "export"
    REPORT = "report"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One arrow of the data's way.

    `config` is the recipe that the command reads, None for a command that reads none; `operands` and `overrides` stand
    before and behind it. `settings` names the configuration's sections that the result depends on, and `but` what in
    them it does not depend on. `inputs` are the files that no stage makes, `after` the stages whose results it reads.
    `outputs` are removed when the stage is redone. `trains` is the training, if it is one, which writes into the first
    of the outputs; `engine` generates text, in as many shards as it has replicas.
    """

    name: str
    command: Command
    outputs: tuple[Path, ...]
    settings: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    operands: tuple[str, ...] = ()
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    inputs: tuple[Input, ...] = ()
    after: tuple[str, ...] = ()
    trains: StageName | None = None
    engine: EngineConfig | None = None

    @property
    def replicas(self) -> int:
        """Copies of the model that share the stage's work, each with `--shard I/N`; `--merge` makes the result."""
        return 1 if self.engine is None else self.engine.replicas

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows `medllm`."""
        config = () if self.config is None else (str(self.config),)
        return (*self.command.split(), *self.operands, *config, *self.overrides)


@dataclass(frozen=True)
class Model:
    """A model directory, and the stage that makes it; None: it is there already."""

    path: Path | None
    made_by: str | None = None

    @property
    def overrides(self) -> tuple[str, ...]:
        """What makes a command start from it."""
        return () if self.path is None else (f"model.path={self.path}", "model.size=null", "model.shape=null")

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Its files, where no stage makes them."""
        if self.path is None or self.made_by is not None:
            return ()
        return (Input("model.path", InputKind.MODEL, (str(self.path),)),)

    @property
    def after(self) -> tuple[str, ...]:
        """The stage to wait for."""
        return () if self.made_by is None else (self.made_by,)


# What the reference log-probabilities depend on. The optimizer and the loss are not among them.
SCORE_SETTINGS = (
    *("model", "layout", "tokenizer", "rpo.adapter", "rpo.fp8", "rpo.fp8_recipe"),
    *("rpo.sequence_length", "rpo.micro_batch_size", "rpo.share_prompt", "rpo.template", "rpo.thinking"),
    *("rpo.add_eos", "rpo.mask_patterns", "rpo.too_long", "rpo.filters"),
)

# Settings of a training that leave its weights as they are: changing one, after a stall perhaps, must not undo it.
OF_THE_RUN_ALONE = ("watch", "checkpoint", "guard.walltime_s", "log_every_steps", "wandb_project")

# What the preference term is compared with: the NLL alone, and DPO alone.
CONTROLS = {
    "rpo-sft": ("rpo.loss.kind=sft",),
    "rpo-dpo": ("rpo.loss.kind=rpo", "rpo.loss.alpha=0"),
}


def recipe_stages(run: RunConfig, config_path: Path) -> list[Stage]:
    """The stages that the recipe's sections ask for, in order.

    Raises:
        UserError: the recipe has no model to start from.
    """
    return _Recipe(run, config_path).stages()


@dataclass
class _Recipe:
    """Adds stage after stage; knows what each of them makes."""

    run: RunConfig
    config: Path
    _stages: list[Stage] = field(default_factory=list)
    _examined: bool = False

    def stages(self) -> list[Stage]:
        run = self.run
        if run.demo is not None:
            self._add(Stage(name="world", command=Command.DEMO, settings=("demo",), outputs=(run.run_dir / "world",)))
        for name in run.corpora:
            self._corpus(name)
        model = self._base_model()
        self._examine("base", model)
        if run.cpt is not None:
            model = self._train("cpt", "cpt", model)
            self._examine("cpt", model)
        if run.rpo is not None:
            model = self._preference_rounds(model)
        self._export(model)
        if self._examined:
            self._stages.append(
                Stage(
                    name="report",
                    command=Command.REPORT,
                    operands=(str(run.run_dir),),
                    outputs=(run.run_dir / "report.html",),
                    after=tuple(stage.name for stage in self._stages),
                )
            )
        return self._stages

    def _add(self, stage: Stage) -> None:
        """Add a stage that reads the recipe. An input that an earlier stage makes becomes a stage to wait for."""
        makers = {path: self._maker(path) for entry in stage.inputs for path in entry.paths}
        inputs = (
            Input(entry.setting, entry.kind, tuple(path for path in entry.paths if makers[path] is None))
            for entry in stage.inputs
        )
        after = dict.fromkeys([*stage.after, *(maker for maker in makers.values() if maker is not None)])
        kept = tuple(entry for entry in inputs if entry.paths)
        self._stages.append(replace(stage, config=self.config, inputs=kept, after=tuple(after)))

    def _maker(self, path: str) -> str | None:
        """The stage that makes what lies at this path, or matches this glob."""
        place = Path(os.path.abspath(os.path.expanduser(path)))
        for stage in self._stages:
            if any(place.is_relative_to(os.path.abspath(output)) for output in stage.outputs):
                return stage.name
        return None

    def _corpus(self, name: str) -> None:
        section, inputs = self.run.corpora[name], []
        for source_name, source in section.sources.items():
            setting = f"corpora.{name}.sources.{source_name}"
            inputs.append(Input(f"{setting}.paths", InputKind.TEXT, tuple(source.paths)))
            if source.dataset is not None:
                inputs.append(Input(f"{setting}.dataset", InputKind.FOLDER, (source.dataset,)))
        inputs.append(Input(f"corpora.{name}.tokenizer", InputKind.TOKENIZER, (section.tokenizer,)))
        exams = tuple(section.decontaminate.exams)
        inputs.append(Input(f"corpora.{name}.decontaminate.exams", InputKind.QUESTIONS, exams))
        self._add(
            Stage(
                name=f"corpus-{name}",
                command=Command.CORPUS,
                operands=("--only", name),
                settings=(f"corpora.{name}",),
                inputs=tuple(inputs),
                outputs=(self.run.run_dir / "corpus" / name,),
            )
        )

    def _base_model(self) -> Model:
        if self.run.base is not None:
            return self._train("base", "base", Model(None))
        if self.run.model.path is None:
            raise UserError("model.path: a recipe without a 'base' section needs a model to start from")
        return Model(self.run.model.path)

    def _train(
        self,
        name: str,
        trains: StageName,
        start: Model,
        *,
        overrides: tuple[str, ...] = (),
        inputs: tuple[Input, ...] = (),
        after: tuple[str, ...] = (),
    ) -> Model:
        """Train into RUN/NAME; the model that it will leave."""
        output, section = self.run.run_dir / name, getattr(self.run, trains)
        data = tuple(str(source.path) for source in section.data) if isinstance(section, CptConfig) else ()
        self._add(
            Stage(
                name=name,
                command=Command.TRAIN,
                trains=trains,
                settings=(trains, "model", "layout", "seed", "tokenizer"),
                but=tuple(f"{trains}.{name}" for name in OF_THE_RUN_ALONE),
                outputs=(output,),
                overrides=(f"stage={trains}", f"output={output}", *start.overrides, *overrides),
                inputs=(
                    Input(f"{trains}.data", InputKind.CORPUS, data),
                    *start.inputs,
                    *self._tokenizer(),
                    *_adapter(section, trains),
                    *inputs,
                ),
                after=(*start.after, *after),
            )
        )
        return Model(output / "hf", name)

    def _tokenizer(self) -> tuple[Input, ...]:
        given = self.run.tokenizer
        return () if given is None else (Input("tokenizer", InputKind.TOKENIZER, (str(given),)),)

    def _preference_rounds(self, model: Model) -> Model:
        """Sample, pair, score and train, round after round; each round's reference is the round before."""
        run = self.run
        assert run.rpo is not None
        for number in range(1, run.rounds + 1):
            suffix = "" if number == 1 else f"-{number}"
            pairs = run.rpo.pairs if run.pairs is None else run.run_dir / f"pairs{suffix}" / "pairs.jsonl"
            if run.pairs is not None:
                self._pair(f"pairs{suffix}", model, pairs.parent)
            reference = run.run_dir / f"reference{suffix}"
            overrides = (f"rpo.pairs={pairs}", f"rpo.reference={reference}")
            inputs = (Input("rpo.pairs", InputKind.FILE, (str(pairs),)),)
            self._add(
                Stage(
                    name=f"score{suffix}",
                    command=Command.SCORE,
                    settings=SCORE_SETTINGS,
                    outputs=(reference,),
                    overrides=(*overrides, *model.overrides),
                    inputs=(*inputs, *model.inputs, *self._tokenizer(), *_adapter(run.rpo, "rpo")),
                    after=model.after,
                )
            )
            start, scored = model, (f"score{suffix}",)
            model = self._train(f"rpo{suffix}", "rpo", start, overrides=overrides, inputs=inputs, after=scored)
            self._examine(f"rpo{suffix}", model)
            if run.controls and number == run.rounds:
                for control, settings in CONTROLS.items():
                    changed = (*overrides, *settings)
                    found = self._train(control, "rpo", start, overrides=changed, inputs=inputs, after=scored)
                    self._examine(control, found)
        return model

    def _pair(self, name: str, model: Model, output: Path) -> None:
        section = self.run.pairs
        assert section is not None
        exams = [("pairs.questions", section.questions)]
        if section.exam is not None:
            exams.append(("pairs.exam", section.exam))
        self._add(
            Stage(
                name=name,
                command=Command.PAIRS,
                settings=("pairs",),
                but=("pairs.engine.replicas",),
                outputs=(output,),
                overrides=(f"output={output}", *model.overrides),
                inputs=(
                    *(_exam(setting, exam) for setting, exam in exams),
                    *_prompt("pairs.prompt", section.prompt, section.questions),
                    *model.inputs,
                ),
                after=model.after,
                engine=section.engine,
            )
        )

    def _examine(self, name: str, model: Model) -> None:
        section = self.run.eval
        if section is None:
            return
        output = self.run.run_dir / "eval" / name
        self._add(
            Stage(
                name=f"eval-{name}",
                command=Command.EVAL,
                settings=("eval",),
                but=("eval.engine.replicas",),
                outputs=(output,),
                overrides=(f"output={output}", *model.overrides),
                inputs=(
                    _exam("eval.exam", section.exam),
                    *_prompt("eval.prompt", section.prompt, section.exam),
                    *model.inputs,
                ),
                after=model.after,
                engine=section.engine,
            )
        )
        self._examined = True

    def _export(self, model: Model) -> None:
        """RUN/hf, from the newest checkpoint. With adapters, training has merged them already."""
        last = self.run.rpo or self.run.cpt or self.run.base
        if model.made_by is None or last is None or last.adapter is not None:
            return
        hf_dir = self.run.run_dir / "hf"
        checkpoints = self.run.run_dir / model.made_by / "checkpoints"
        self._stages.append(
            Stage(
                name="export",
                command=Command.EXPORT,
                operands=(str(checkpoints), str(hf_dir), "--source", str(model.path)),
                outputs=(hf_dir,),
                after=model.after,
            )
        )


def _adapter(section: CptConfig | RpoConfig, trains: str) -> tuple[Input, ...]:
    if section.adapter is None or section.adapter.path is None:
        return ()
    return (Input(f"{trains}.adapter.path", InputKind.MODEL, (str(section.adapter.path),)),)


def _exam(setting: str, exam: ExamConfig) -> Input:
    return Input(f"{setting}.data", InputKind.EXAM, tuple(map(str, exam.data)))


def _prompt(setting: str, prompt: PromptConfig, exam: ExamConfig) -> tuple[Input, ...]:
    """The prompt's templates, where they are a directory, and its worked examples."""
    inputs = (Input(f"{setting}.template", InputKind.FOLDER, (prompt.template,)),)
    if not prompt.shots:
        return inputs
    if prompt.shot_file is not None:
        return (*inputs, Input(f"{setting}.shot_file", InputKind.FILE, (str(prompt.shot_file),)))
    return (*inputs, Input(f"{setting}.shots", InputKind.SHOTS, tuple(map(str, exam.data))))
