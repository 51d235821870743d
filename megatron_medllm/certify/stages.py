"""The certificates of a whole recipe: one for every stage that trains."""

from typing import get_args

from megatron_medllm.certify.certificate import state_of
from megatron_medllm.config.run import RunConfig, StageName
from megatron_medllm.errors import UserError


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


def _trained(run: RunConfig) -> list[RunConfig]:
    """The run once for every section that trains, `stage` set to it."""
    names: tuple[StageName, ...] = get_args(StageName)
    return [run.model_copy(update={"stage": name}) for name in names if getattr(run, name) is not None]
