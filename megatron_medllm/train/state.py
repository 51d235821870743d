"""Training state on disk: written under a partial name, sealed with digests, renamed when whole.

A checkpoint `step-00000042/` holds Megatron-Core's distributed checkpoint, `state.json` (step, identity of the run)
and `digests.json` (SHA-256 of every file). Only directories with a matching `digests.json` are ever resumed from.
"""

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_medllm.config.train import CheckpointConfig
from megatron_medllm.errors import UserError
from megatron_medllm.parallel import mcore
from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.storage import digest_file, full_disk_error, read_json, write_json

log = logging.getLogger(__name__)

_STATE, _DIGESTS = "state.json", "digests.json"


class Checkpoints:
    """The checkpoints of one run, in one directory."""

    def __init__(self, directory: Path, config: CheckpointConfig, runtime: Runtime) -> None:
        self.directory, self._config, self._runtime = directory, config, runtime

    def save(self, step: int, chunks: list[nn.Module], optimizer: MegatronOptimizer, identity: dict[str, Any]) -> Path:
        """Write the state after `step` steps. Collective.

        Raises:
            UserError: the disk is full; nothing is left under a final name.
        """
        final = self.directory / f"step-{step:08d}"
        partial = self.directory / f".partial-step-{step:08d}"
        if self._runtime.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        try:
            mcore.save_sharded(mcore.sharded_state(chunks, optimizer, is_loading=False), partial)
        except OSError as error:
            raise full_disk_error(error, partial) from error
        dist.barrier()
        if self._runtime.is_main:
            write_json(partial / _STATE, {"step": step, **identity})
            write_json(partial / _DIGESTS, _digests(partial))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._prune()
        dist.barrier()
        return final

    def _prune(self) -> None:
        steps = sorted(self._steps())
        for step in steps[: -self._config.keep]:
            every = self._config.keep_every_steps
            if not (every and step % every == 0):
                shutil.rmtree(self.directory / f"step-{step:08d}")

    def _steps(self) -> list[int]:
        return [int(path.name.removeprefix("step-")) for path in self.directory.glob("step-*")]

    def newest_verified(self) -> Path | None:
        """The newest checkpoint whose files match their digests; says which it passed over. Collective."""
        answer: list[Path | None] = [None]
        if self._runtime.is_main:
            for step in sorted(self._steps(), reverse=True):
                path = self.directory / f"step-{step:08d}"
                problem = verify(path)
                if problem is None:
                    answer = [path]
                    break
                log.warning("passing over %s: %s", path, problem)
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def load(self, path: Path, chunks: list[nn.Module], optimizer: MegatronOptimizer, identity: dict[str, Any]) -> int:
        """Restore model and optimizer. Collective.

        Returns:
            steps done.

        Raises:
            UserError: the checkpoint belongs to another model or another stage.
        """
        state = read_json(path / _STATE)
        for name, value in identity.items():
            if state.get(name) != value:
                raise UserError(f"{path}: checkpoint of another run: {name} is {state.get(name)!r}, here {value!r}")
        loaded = mcore.load_sharded(mcore.sharded_state(chunks, optimizer, is_loading=True), path)
        mcore.restore(chunks, optimizer, loaded)
        return int(state["step"])


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != _DIGESTS)
    with ThreadPoolExecutor() as pool:
        return dict(zip([str(p.relative_to(directory)) for p in files], pool.map(digest_file, files), strict=True))


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None when all match their digests."""
    if not (path / _DIGESTS).is_file():
        return f"{_DIGESTS} is missing"
    expected, found = read_json(path / _DIGESTS), _digests(path)
    for name, digest in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} does not match its digest"
    return None
