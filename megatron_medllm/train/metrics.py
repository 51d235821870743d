"""Where a run's numbers go: metrics.jsonl always, TensorBoard always, Weights & Biases when configured."""

import math
import secrets
from pathlib import Path
from typing import Any

import orjson
from torch.utils.tensorboard import SummaryWriter

from megatron_medllm.errors import UserError
from megatron_medllm.storage import atomic_write

_WANDB_ID = "wandb-run-id"


class MetricsLog:
    """One line per logged step. Only the main process holds one."""

    def __init__(self, directory: Path, *, wandb_project: str | None, config: dict[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        self._board = SummaryWriter(str(directory / "tensorboard"))
        self._wandb = _start_wandb(wandb_project, directory, config) if wandb_project else None

    def cut(self, step: int) -> None:
        """Forget what was logged after `step`: a resume repeats it."""
        if self.path.is_file():
            whole = [line for line in self.path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            with atomic_write(self.path) as stream:
                stream.writelines(line for line in whole if orjson.loads(line)["step"] <= step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log named numbers under a step, counted from 1."""
        clean = {name: (value if math.isfinite(value) else None) for name, value in values.items()}
        with open(self.path, "ab") as stream:
            stream.write(orjson.dumps({"step": step, **clean}) + b"\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flush everything."""
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def wandb_run_id(directory: Path) -> str:
    """The id of a stage's W&B run: made up once, then the same at every restart, so that a requeue goes on in it."""
    path = directory / _WANDB_ID
    if not path.is_file():
        with atomic_write(path) as stream:
            stream.write(secrets.token_hex(8).encode())
    return path.read_text().strip()


def forget_wandb_run(directory: Path) -> None:
    """Let the stage begin a new W&B run: its steps begin at 1 again, which a W&B run cannot."""
    (directory / _WANDB_ID).unlink(missing_ok=True)


def _start_wandb(project: str, directory: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(f"wandb_project={project!r} is set, but wandb is not installed (pip install wandb)") from None
    return wandb.init(project=project, dir=str(directory), config=config, id=wandb_run_id(directory), resume="allow")
