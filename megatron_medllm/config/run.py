"""One run: one YAML, `key=value` overrides, one frozen object.

A recipe may fill in every stage (`medllm pipeline`) or one (`medllm train`). Wrong keys name the nearest right one.
"""

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from omegaconf.omegaconf import get_yaml_loader
from pydantic import BaseModel, Field, ValidationError
from yaml import ScalarNode, YAMLError

from megatron_medllm.config.base import Section, first_problem
from megatron_medllm.config.cluster import ClusterConfig
from megatron_medllm.config.corpus import CorpusConfig
from megatron_medllm.config.demo import DemoConfig
from megatron_medllm.config.exam import EvalConfig
from megatron_medllm.config.kernels import KernelsConfig
from megatron_medllm.config.layout import LayoutConfig
from megatron_medllm.config.model import ModelConfig
from megatron_medllm.config.pairs import PairsConfig
from megatron_medllm.config.train import CptConfig, RpoConfig
from megatron_medllm.errors import UserError

StageName = Literal["base", "cpt", "rpo"]

# Keys of earlier versions, and what stands for them.
_MOVED = {"rpo.rpo_guard": "rpo.guard, and its min_edit_distance is rpo.filters.min_edit_distance"}


class RunConfig(Section):
    """Everything that one run is made of."""

    name: str = Field(default="run", description="shown in reports and job names")
    run_dir: Path = Field(description="where everything that the run makes goes")
    data: Path | None = Field(default=None, description="a folder of inputs that the recipe refers to as ${data}")
    seed: int = Field(default=0, ge=0)
    stage: StageName = Field(default="cpt", description="what `medllm train` trains")
    output: Path | None = Field(default=None, description="the stage's folder; default: RUN_DIR/STAGE")
    model: ModelConfig
    tokenizer: Path | None = Field(default=None, description="HF tokenizer folder, for a model that brings none")
    layout: LayoutConfig = LayoutConfig()
    kernels: KernelsConfig = KernelsConfig()
    corpora: dict[str, CorpusConfig] = Field(default={}, description="data sets that `medllm corpus build` makes")
    base: CptConfig | None = Field(default=None, description="pretraining from random weights (miniatures)")
    cpt: CptConfig | None = Field(default=None, description="continued pretraining")
    rpo: RpoConfig | None = Field(default=None, description="preference optimization")
    rounds: int = Field(default=1, ge=1, description="rounds of sample, pair, score, rpo")
    controls: bool = Field(default=False, description="also train SFT-only and plain-DPO controls")
    pairs: PairsConfig | None = None
    eval: EvalConfig | None = None
    demo: DemoConfig | None = Field(default=None, description="the invented miniature world")
    cluster: ClusterConfig | None = None

    def stage_config(self) -> CptConfig | RpoConfig:
        """The section of the stage to train.

        Raises:
            UserError: the recipe has no such section.
        """
        section: CptConfig | RpoConfig | None = getattr(self, self.stage)
        if section is None:
            raise UserError(f"stage={self.stage}, but the configuration has no section {self.stage!r}")
        return section

    def output_dir(self) -> Path:
        """Where the stage writes."""
        return self.output or self.run_dir / self.stage

    def tokenizer_dir(self) -> Path:
        """The folder whose tokenizer goes with the model.

        Raises:
            UserError: neither `model.path` nor `tokenizer` holds a tokenizer.json.
        """
        candidates = [path for path in (self.model.files_dir(), self.tokenizer) if path is not None]
        if not candidates:
            raise UserError("set tokenizer: the model brings none")
        for directory in candidates:
            if (directory / "tokenizer.json").is_file():
                return directory
        raise UserError(f"{candidates[0] / 'tokenizer.json'}: no such file")

    def tokenizer_file(self) -> Path:
        """`tokenizer.json` of `tokenizer_dir()`."""
        return self.tokenizer_dir() / "tokenizer.json"


def load(path: Path, overrides: list[str]) -> RunConfig:
    """Read a YAML file and apply `key=value` overrides.

    Raises:
        UserError: the file is missing or not YAML, an override is malformed, a key is unknown (the nearest known one
            is named), a value has the wrong type, or sections contradict each other.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override!r}: expected key=value")
    try:
        recipe = _read_yaml(path.read_text(encoding="utf-8-sig"))
        if not isinstance(recipe, dict | None):
            raise UserError(f"{path}: expected sections such as model: and cpt:, found {type(recipe).__name__}")
        try:
            changes = OmegaConf.create({})
            for override in overrides:
                key, _, value = override.partition("=")
                OmegaConf.update(changes, key, _read_yaml(value))
            merged = OmegaConf.merge(recipe or {}, changes)
        except TypeError:  # how OmegaConf says that one of the two has a list where the other has a section
            raise UserError(f"{path}: a list and a section meet under one key of {' '.join(overrides)}") from None
        raw = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{path}: {error.full_key} must be given, as {error.full_key}=…") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None


class _Loader(get_yaml_loader()):  # type: ignore[misc]  # a base that a call returns
    """OmegaConf's YAML, but 12:00:00 stays what it says: YAML 1.1 makes it a number to the base of 60, 43200."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        is_clock = kind is ScalarNode and ":" in value and tag in (f"{_TAG}int", f"{_TAG}float")
        return f"{_TAG}str" if is_clock else tag


_TAG = "tag:yaml.org,2002:"


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a safe loader, by inheritance


def _explain(error: ValidationError) -> str:
    """The first problem in one line, with the nearest known key where one is unknown."""
    first = error.errors()[0]
    if first["type"] != "extra_forbidden":
        return first_problem(error)
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if where in _MOVED:
        return f"unknown key {where!r}: it is now {_MOVED[where]}{more}"
    known = _fields_at(RunConfig, first["loc"][:-1])
    near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(sorted(known))}"
    return f"unknown key {where!r}{hint}{more}"


def _fields_at(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the section at `location`."""
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = _section_of(model.model_fields[str(part)].annotation)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _section_of(annotation: Any) -> Any:
    """The pydantic model inside `X | None`, `dict[str, X]` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_of(arg)) is not None), None)
