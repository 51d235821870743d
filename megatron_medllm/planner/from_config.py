"""The workload that a run's configuration describes."""

from typing import Any

from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import CptConfig, RpoConfig
from megatron_medllm.errors import UserError
from megatron_medllm.planner.workload import Mode, Precision, Workload

MODES: dict[str, Mode] = {"bf16": "lora", "fp8": "fp8-lora", "nf4": "qlora"}


def workload_of(run: RunConfig) -> Workload:
    """The training of `run.stage` under `run.layout`.

    RPO's batch counts pairs; it is planned as one packed row per pair, an upper bound.

    Raises:
        UserError: the stage has no section, or layout, model and batch do not fit each other.
    """
    section = run.stage_config()
    precision: Precision = "fp32" if run.model.dtype == "float32" else "bf16"
    if section.fp8 != "none":
        precision = "fp8"
    settings: dict[str, Any] = {}
    if section.adapter is not None:
        settings = {
            "mode": MODES[section.adapter.base],
            "lora_rank": section.adapter.rank,
            "lora_targets": section.adapter.targets,
        }
    return Workload(
        shape=run.model.resolve_shape(),
        layout=run.layout,
        precision=precision,
        objective="rpo" if isinstance(section, RpoConfig) else "cpt",
        backend=run.model.backend,
        sequence_length=section.sequence_length,
        micro_batch_size=section.micro_batch_size,
        global_batch_size=section.global_batch_size,
        token_budget=section.train_tokens if isinstance(section, CptConfig) else None,
        **settings,
    )


def hardware_of(run: RunConfig, name: str | None = None) -> str:
    """The hardware to plan for: `name`, else the cluster's.

    Raises:
        UserError: neither is given.
    """
    if name is not None:
        return name
    if run.cluster is None:
        raise UserError("name the hardware: --hardware h100-sxm, or cluster.hardware in the configuration")
    return run.cluster.hardware
