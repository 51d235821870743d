"""A run directory as a release sees it: which model, what it was trained from, and where its files lie."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_medllm.config.run import RunConfig, load
from megatron_medllm.config.train import CptConfig, RpoConfig
from megatron_medllm.errors import UserError
from megatron_medllm.recipe.stages import CONTROLS
from megatron_medllm.storage import read_json

RECIPE = "run.yaml"


@dataclass(frozen=True)
class FinishedRun:
    """A run and the training whose model is released (`cpt`, `rpo`, `rpo-2`, a control, …)."""

    directory: Path
    config: RunConfig
    model: str

    @classmethod
    def open(cls, directory: Path, stage: str | None = None) -> "FinishedRun":
        """Read the run's recipe and choose the model: `stage`'s, else the last one of the recipe that is there.

        Raises:
            UserError: no run, no such stage, or no model.
        """
        path = directory / RECIPE
        if not path.is_file():
            raise UserError(f"{directory}: holds no {RECIPE}; expected a run directory of medllm pipeline")
        config = load(path, [])
        there = [name for name in trainings(config) if (directory / name / "hf" / "config.json").is_file()]
        if stage is None:
            recipe = [name for name in there if name not in CONTROLS]
            if not recipe:
                raise UserError(f"{directory}: holds no finished model (NAME/hf of {', '.join(trainings(config))})")
            return cls(directory, config, recipe[-1])
        if stage not in there:
            raise UserError(f"--stage {stage}: {directory} has no such model (there are: {', '.join(there) or 'none'})")
        return cls(directory, config, stage)

    @property
    def model_dir(self) -> Path:
        """The HF directory that is released."""
        return self.hf_dir(self.model)

    @property
    def exam_dir(self) -> Path:
        """The released model's evaluation."""
        return self.directory / "eval" / self.model

    def hf_dir(self, training: str) -> Path:
        """What a training exported."""
        return self.directory / training / "hf"

    def exported_path(self, training: str) -> Path:
        """Where a training says which step its export is; runs of earlier versions do not."""
        return self.directory / training / "exported.json"

    def exported(self, training: str) -> dict[str, Any]:
        """What it says: `step`, `ended`, `metric`, `value`; empty where it says nothing."""
        path = self.exported_path(training)
        return dict(read_json(path)) if path.is_file() else {}

    def lineage(self) -> list[str]:
        """The trainings that led to the model, itself the last."""
        names = [name for name in trainings(self.config) if name not in CONTROLS]
        if self.model in CONTROLS:  # it starts from what the last round started from
            return [*names[:-1], self.model]
        return names[: names.index(self.model) + 1]

    def start(self, training: str) -> Path | None:
        """The model directory that a training started from; None for random weights."""
        names = self.lineage()
        before = names.index(training) - 1
        return self.hf_dir(names[before]) if before >= 0 else self.base_dir()

    def base_dir(self) -> Path | None:
        """The model that the run was given; None where its first training began with random weights."""
        if self.config.base is not None or self.config.model.path is None:
            return None
        return self.place(self.config.model.path)

    def section(self, training: str) -> CptConfig | RpoConfig:
        """The training's settings."""
        found = getattr(self.config, training if training in ("base", "cpt") else "rpo")
        assert isinstance(found, CptConfig | RpoConfig)
        return found

    def place(self, path: Path | str) -> Path:
        """Where a path of the recipe lies now: a run directory may have been moved since."""
        given = Path(path).expanduser()
        if given.is_relative_to(self.config.run_dir):
            return self.directory / given.relative_to(self.config.run_dir)
        return given

    def corpora(self) -> dict[str, Path]:
        """The folders of indexed data that the model learned from, by name, in the trainings' order."""
        found: dict[str, Path] = {}
        for training in self.lineage():
            section = self.section(training)
            for source in section.data if isinstance(section, CptConfig) else ():
                folder = self.place(source.path)
                found.setdefault(folder.name, folder)
        return found

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of one of `corpora`.

        Raises:
            UserError: it is missing or broken.
        """
        try:
            return dict(read_json(self.corpora()[name] / "manifest.json"))
        except UserError as error:
            raise UserError(f"chain: stage corpus is missing or broken: {error}") from None

    def pairs_manifest(self, suffix: str) -> dict[str, Any]:
        """The manifest of a round's preference pairs, which this run made itself."""
        return dict(read_json(self.directory / f"pairs{suffix}" / "manifest.json"))

    def round_suffix(self, training: str) -> str | None:
        """What follows `pairs` and `reference` in the names of a preference training's data; None for others."""
        if not isinstance(self.section(training), RpoConfig):
            return None
        rounds = self.config.rounds
        number = rounds if training in CONTROLS else int(training.removeprefix("rpo").removeprefix("-") or 1)
        return "" if number == 1 else f"-{number}"


def trainings(config: RunConfig) -> list[str]:
    """The trainings of a recipe in order, controls at the end."""
    names = [name for name in ("base", "cpt") if getattr(config, name) is not None]
    if config.rpo is not None:
        names += ["rpo" if number == 1 else f"rpo-{number}" for number in range(1, config.rounds + 1)]
        names += CONTROLS if config.controls else ()
    return names
