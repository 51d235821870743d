"""`certificate.json`: what was proven of which settings, by which versions; and whether that still holds."""

import hashlib
import platform
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_medllm import __version__
from megatron_medllm.config.run import RunConfig
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json, write_json

NAME = "certificate.json"
_FORMAT = 1
_PACKAGE = Path(__file__).resolve().parents[1]
# What a certificate does not depend on: where things lie, how much of them, what is logged, when it is saved.
_FREE = {
    *("data", "train_tokens", "epochs", "pairs", "reference", "log_every_steps", "validate_every_steps"),
    *("validation_batches", "wandb_project", "guard", "filters", "batch_ramp_steps", "sequence_length"),
    *("global_batch_size", "template", "thinking", "mask_patterns", "too_long", "loss_after"),
    *("validate_at_start", "validation_share"),
}


@dataclass(frozen=True)
class Check:
    """One comparison: the largest relative difference found, where, and what is allowed."""

    name: str
    difference: float
    bound: float
    where: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is a number within the bound."""
        return self.difference <= self.bound


@dataclass(frozen=True)
class Certificate:
    """The proof of one stage's layout."""

    stage: str
    settings: dict[str, Any]
    versions: dict[str, str]
    folding: tuple[str, ...]  # what stood for what
    layout: dict[str, Any]  # as it ran
    ranks: int
    checks: tuple[Check, ...]
    seconds: float
    made: str  # UTC

    @property
    def passed(self) -> bool:
        """Whether every difference was within its bound."""
        return bool(self.checks) and all(check.passed for check in self.checks)


def settings_of(run: RunConfig) -> dict[str, Any]:
    """What the certificate of `run.stage` depends on: layout, shape, and how the stage computes."""
    section = run.stage_config().model_dump(mode="json", exclude=_FREE)
    section["optimizer"] = {"betas": section["optimizer"]["betas"]}
    section["checkpoint"] = {"async_save": section["checkpoint"]["async_save"]}
    section["loss_after"] = bool(getattr(run.stage_config(), "loss_after", ()))
    if section["adapter"] is not None:
        section["adapter"]["path"] = section["adapter"]["path"] is not None
    layout = run.layout.model_dump(mode="json", exclude={"nodes", "gpus_per_node"})
    layout["dp"] = run.layout.data_parallel_size
    model = {"shape": run.model.resolve_shape().model_dump(mode="json"), "backend": run.model.backend}
    return {"layout": layout, "model": model | {"dtype": run.model.dtype}, run.stage: section}


def versions() -> dict[str, str]:
    """The programs that a certificate speaks of; `source` is a digest of this package's own files."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode() + path.read_bytes())
    return {
        "megatron-medllm": __version__,
        "source": digest.hexdigest()[:16],
        "megatron-core": version("megatron-core"),
        "torch": version("torch"),
        "python": platform.python_version(),
    }


def utc_now() -> str:
    """The time as a certificate holds it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def write_certificate(certificate: Certificate, run_dir: Path) -> Path:
    """Put it into RUN_DIR/certificate.json, beside those of the run's other stages; returns the path."""
    path = run_dir / NAME
    stages = read_json(path)["stages"] if path.is_file() else {}
    entry = asdict(certificate) | {"passed": certificate.passed}
    for check in entry["checks"]:
        check["difference"] = check["difference"] if check["difference"] != float("inf") else None
    write_json(path, {"format": _FORMAT, "stages": stages | {certificate.stage: entry}})
    return path


def read_certificate(run: RunConfig) -> Certificate | None:
    """The certificate of `run.stage` that speaks of exactly this run; None where there is none.

    Raises:
        UserError: it is of another version or other settings: names the first of them; or it cannot be read.
    """
    path = run.run_dir / NAME
    if not path.is_file():
        return None
    stored = read_json(path)
    if not isinstance(stored, dict) or stored.get("format") != _FORMAT or not isinstance(stored.get("stages"), dict):
        raise UserError(f"{path}: not a certificate of format {_FORMAT}")
    entry = stored["stages"].get(run.stage)
    if entry is None:
        return None
    try:
        checks = tuple(
            Check(**check | {"difference": float("inf") if check["difference"] is None else check["difference"]})
            for check in entry["checks"]
        )
        certificate = Certificate(
            **{name: value for name, value in entry.items() if name != "passed"}
            | {"checks": checks, "folding": tuple(entry["folding"])}
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: stage {run.stage}: damaged ({error})") from None
    for kind, found, now in (
        ("another version", certificate.versions, versions()),
        ("another config", certificate.settings, settings_of(run)),
    ):
        different = _first_difference(found, now)
        if different:
            raise UserError(f"{path}: stage {run.stage} was certified with {kind}: {different}; run medllm certify")
    return certificate


def _first_difference(found: Any, now: Any, name: str = "") -> str:
    if isinstance(found, dict) and isinstance(now, dict):
        for key in sorted(found.keys() | now.keys()):
            different = _first_difference(found.get(key), now.get(key), f"{name}.{key}" if name else key)
            if different:
                return different
        return ""
    return "" if found == now else f"{name} was {found}, is {now}"


def state_of(run: RunConfig) -> str:
    """One line about the certificate of `run.stage`, for `medllm submit`."""
    try:
        certificate = read_certificate(run)
    except UserError as error:
        return f"no valid certificate: {error}"
    if certificate is None:
        return "no certificate (medllm certify makes one on CPUs)"
    verdict = "certified" if certificate.passed else "CERTIFICATION FAILED"
    folded = f", folded: {'; '.join(certificate.folding)}" if certificate.folding else ""
    return f"{verdict} {certificate.made} on {certificate.ranks} processes{folded}"


def certificate_report(certificate: Certificate) -> str:
    """The table of a certificate, as text."""
    width = max(len(check.name) for check in certificate.checks)
    lines = [f"stage {certificate.stage}: {certificate.ranks} processes against one, {certificate.seconds:.0f} s"]
    lines += [f"  stands for: {note}" for note in certificate.folding]
    lines.append(f"{'':4} {'check':<{width}}  {'difference':>10}  {'bound':>8}  where")
    lines += [
        f"{'ok' if c.passed else 'FAIL':<4} {c.name:<{width}}  {c.difference:>10.2e}  {c.bound:>8.1e}  {c.where}"
        for c in certificate.checks
    ]
    lines.append("certified" if certificate.passed else "NOT certified")
    return "\n".join(lines)
