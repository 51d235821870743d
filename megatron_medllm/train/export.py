"""The model that a training leaves: the state it ended in, or its best checkpoint's."""

import logging
import shutil

import torch.distributed as dist

from megatron_medllm.checkpoint.hf_writer import export_hf
from megatron_medllm.errors import UserError
from megatron_medllm.models.config import DTYPES
from megatron_medllm.storage import write_json
from megatron_medllm.train.setup import Trainer, write_end_token

log = logging.getLogger(__name__)


def export_trained(trainer: Trainer, ended: int) -> None:
    """Write OUTPUT/hf of a run that ended after `ended` steps, in place of an earlier one's. Collective.

    OUTPUT/exported.json says which step it is, and why.

    Raises:
        UserError: the best checkpoint is asked for, and none is left whole.
    """
    run, best = trainer.run, trainer.checkpoints.best
    output_dir, hf_dir = run.output_dir(), run.output_dir() / "hf"
    step = load_best(trainer, ended) if trainer.config.checkpoint.exports_best else ended
    if trainer.runtime.is_main:
        shutil.rmtree(hf_dir, ignore_errors=True)
    dist.barrier()
    export_hf(
        trainer.chunks,
        run.model.resolve_shape(),
        hf_dir,
        runtime=trainer.runtime,
        source_dir=run.tokenizer_dir(),
        dtype=DTYPES[run.model.dtype],
    )
    if trainer.runtime.is_main:
        write_end_token(hf_dir, run, trainer.step)
        write_json(
            output_dir / "exported.json",
            {"step": step, "ended": ended, "metric": best.metric, "value": best.value(step)},
        )


def load_best(trainer: Trainer, ended: int) -> int:
    """Bring back the best checkpoint's state; which step that is. Collective."""
    checkpoints = trainer.checkpoints
    best = checkpoints.best
    found = checkpoints.best_verified()
    if found is None:
        raise UserError(
            f"{checkpoints.directory}: no checkpoint that was compared by {best.metric} is whole; "
            "checkpoint.export=last exports the state that training ended in"
        )
    step, path = found
    log.info("exporting step %d of %d: its %s of %.6g is the best", step, ended, best.metric, best.value(step))
    if step != ended:
        checkpoints.load(path, trainer.chunks, trainer.optimizer)
    return step
