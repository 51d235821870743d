"""The planner's workload of a recipe's stage."""

from megatron_medllm.config.run import RunConfig
from megatron_medllm.config.train import RpoConfig
from megatron_medllm.planner.workload import Mode, Precision, Workload

_MODES: dict[str, Mode] = {"bf16": "lora", "nf4": "qlora", "fp8": "fp8-lora"}


def workload_of(run: RunConfig) -> Workload:
    """What `run.stage` asks of the machine. A preference pair is planned as one full row, the most it can take.

    Raises:
        UserError: the recipe has no such stage, or model, layout and batch do not fit each other.
    """
    config = run.stage_config()
    precision: Precision = "fp32" if run.model.dtype == "float32" else "bf16" if config.fp8 == "none" else "fp8"
    rpo = isinstance(config, RpoConfig)
    batch = config.global_batch_size
    if rpo:
        per_round = config.micro_batch_size * run.layout.data_parallel_size
        batch = -(-batch // per_round) * per_round
    return Workload(
        shape=run.model.resolve_shape(),
        layout=run.layout,
        mode=_MODES[config.adapter.base] if config.adapter else "full",
        precision=precision,
        objective="rpo" if rpo else "cpt",
        backend=run.model.backend,
        sequence_length=config.sequence_length,
        micro_batch_size=config.micro_batch_size,
        global_batch_size=batch,
        lora_rank=config.adapter.rank if config.adapter else 16,
        lora_targets=config.adapter.targets if config.adapter else (),
        moments_bytes=4 if config.optimizer.moments_dtype == "bfloat16" else 8,
        token_budget=getattr(config, "train_tokens", None),
    )
