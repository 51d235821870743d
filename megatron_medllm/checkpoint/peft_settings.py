"""PEFT's `adapter_config.json`, read strictly: what changes the result is reproduced or refused by name.

An adapter's settings decide where its matrices sit, how they are scaled, and whether PEFT does anything else with them:
some of its initialisations change the *base* when the adapter is loaded, some variants are no sum of W and B A.
Settings of peft 0.21's `LoraConfig` are listed here; one that is not listed is refused unless it is off.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from megatron_medllm.config.base import first_problem
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json

CONFIG_NAME = "adapter_config.json"

_Number = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_Rank = Annotated[int, Field(strict=True, gt=0)]
_Names = list[StrictStr] | StrictStr | None
# PEFT's name of the projections that "all-linear" means in a Qwen2 model (every linear but the head).
_ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Starts that leave the base as it is; the others (pissa, olora, corda, loftq, lora_ga, mica) change it, or more than A.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# Settings that say nothing about the result: bookkeeping, and parameters of what must be off.
WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}


class PeftSettings(BaseModel):
    """The settings of a LoRA adapter that this package reproduces."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    r: _Rank
    lora_alpha: _Number
    lora_dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    use_rslora: StrictBool = False
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, _Number] | None = None
    target_modules: _Names = None
    exclude_modules: _Names = None
    layers_to_transform: list[StrictInt] | StrictInt | None = None
    layers_pattern: _Names = None
    init_lora_weights: StrictBool | StrictStr | None = True
    bias: Literal["none"] = "none"
    fan_in_fan_out: Literal[False] | None = False

    def rank_of(self, module: str) -> int:
        """Rank of the adapter on a module, named as in the base model."""
        return _by_pattern(self.rank_pattern or {}, module, self.r)

    def scale_of(self, module: str) -> float:
        """What B A of a module is multiplied by: alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern or {}, module, self.lora_alpha)
        return alpha / rank**0.5 if self.use_rslora else alpha / rank

    def covers(self, module: str) -> bool:
        """Whether PEFT puts an adapter on this module; it ignores tensors of others."""
        if self.exclude_modules and _is_named(self.exclude_modules, module):
            return False
        targets = self.target_modules
        if targets is None:
            return True  # written by hand: the tensors say
        if isinstance(targets, str) and targets.lower() == "all-linear":
            targets = list(_ALL_LINEAR)
        if isinstance(targets, str) or module in targets:
            return _is_named(targets, module)  # layers_to_transform goes with names of parts only
        return _is_named(targets, module) and self._is_in_layers(module)

    @property
    def starts_at_nothing(self) -> bool:
        """Whether an adapter without tensors in the file changes nothing when PEFT loads it."""
        return self.init_lora_weights not in (False, None, "orthogonal")

    def _is_in_layers(self, module: str) -> bool:
        if self.layers_to_transform is None or self.layers_to_transform == []:
            return True
        layers = self.layers_to_transform if isinstance(self.layers_to_transform, list) else [self.layers_to_transform]
        match = re.search(r"\.layers\.(\d+)\.", f".{module}")
        return match is not None and int(match[1]) in layers


def read_settings(adapter_dir: Path) -> PeftSettings:
    """Read and check `adapter_dir`/adapter_config.json.

    Raises:
        UserError: the file is missing or malformed, or a setting has an effect that is not reproduced here.
    """
    path = adapter_dir / CONFIG_NAME
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object of settings, found {type(raw).__name__}")
    for name, value in raw.items():
        if name not in PeftSettings.model_fields and name not in WITHOUT_EFFECT and not _is_off(value):
            raise UserError(f"{path}: {name}={_short(value)} is not supported")
    try:
        settings = PeftSettings.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "literal_error":
            raise UserError(f"{path}: {first['loc'][0]}={_short(first['input'])} is not supported") from None
        raise UserError(f"{path}: {first_problem(error)}") from None
    if settings.init_lora_weights not in _PLAIN_STARTS:
        raise UserError(
            f"{path}: init_lora_weights={settings.init_lora_weights!r} is not supported: PEFT may change the base "
            "model when it loads such an adapter; convert it to plain LoRA with PEFT "
            "(save_pretrained(path_initial_model_for_weight_conversion=...))"
        )
    if isinstance(settings.layers_pattern, list | str) and settings.layers_pattern not in (
        "layers",
        ["layers"],
        [],
        "",
    ):
        raise UserError(f"{path}: layers_pattern={_short(settings.layers_pattern)}: Qwen2's layers are in 'layers'")
    _check_patterns(path, settings)
    return settings


def _check_patterns(path: Path, settings: PeftSettings) -> None:
    """Raises UserError where a pattern is no regular expression."""
    for name in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"):
        value = getattr(settings, name)
        for pattern in [value] if isinstance(value, str) else value if isinstance(value, dict) else ():
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise UserError(f"{path}: {name}: {_short(pattern)} is no regular expression ({error})") from None


def _is_off(value: Any) -> bool:
    """None, false, 0 and what is empty: how PEFT writes a setting that is not used."""
    return not value


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}…"


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name, from a dot on."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _is_named(names: list[str] | str, module: str) -> bool:
    """PEFT's rule: one regular expression for the whole name, or names of which one ends it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
