"""Training state on disk: written under a partial name, sealed with digests, renamed when whole.

A checkpoint `step-00000042/` holds Megatron-Core's distributed checkpoint, what `medllm export` needs (model.json,
hf/), `state.json` (step, identity of the run) and `digests.json` (SHA-256 of every file). Only directories with a
matching `digests.json` are ever resumed from.

With `async_save` the tensors are written and sealed by threads while training goes on. A save that fails, on a full
disk mostly, is reported and leaves nothing behind; training goes on and tries again at the next one.
"""

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_medllm.checkpoint.state_writer import SaveError, StateWriter
from megatron_medllm.config.train import CheckpointConfig
from megatron_medllm.errors import UserError
from megatron_medllm.parallel import mcore
from megatron_medllm.parallel.agree import wait_for_all
from megatron_medllm.parallel.runtime import Runtime
from megatron_medllm.storage import digest_file, read_json, write_json
from megatron_medllm.train.best import Best

log = logging.getLogger(__name__)

_STATE, _DIGESTS = "state.json", "digests.json"
_VALIDATIONS = "validations"  # in the state; checkpoints of before 2026-11-27 have none
_NAME = re.compile(r"step-(\d{8,})", re.ASCII)
_SPARE = 1.02  # what files take beyond their tensors


@dataclass
class _Save:
    """A checkpoint on its way to the disk."""

    step: int
    partial: Path
    final: Path
    started: float  # time.monotonic()
    best: int | None  # the best step when it was begun, which stays
    validations: dict[str, Any]
    sealing: "Future[str | None] | None" = None


class Checkpoints:
    """The checkpoints of one run, in one directory."""

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        runtime: Runtime,
        *,
        identity: dict[str, Any],
        best: Best,
        describe: Callable[[Path], None],
    ) -> None:
        """Args:
        directory: of all the run's checkpoints.
        config: which are kept, and whether they are written in the background.
        runtime: where this process stands.
        identity: what a checkpoint must agree in with the run that resumes from it.
        best: what validations found; the best step's checkpoint stays, and every checkpoint carries it.
        describe: writes what export needs into a checkpoint; called on the main process.
        """
        self.directory, self._config, self._runtime = directory, config, runtime
        self._identity, self._describe = identity, describe
        self.best = best
        self._writers = StateWriter()
        self._sealer = ThreadPoolExecutor(max_workers=1)
        self._pending: _Save | None = None
        self.save_s: float | None = None  # seconds that the last whole checkpoint took, on the main process

    def save(self, step: int, chunks: list[nn.Module], optimizer: MegatronOptimizer, *, wait: bool) -> bool:
        """Write the state after `step` steps, once a save still under way is whole. Collective.

        Args:
            wait: return only when it is whole, even with `async_save`.

        Returns:
            False when it could not be written, which has been reported.
        """
        self.finish()
        name = f"step-{step:08d}"
        save = _Save(
            step,
            self.directory / f".partial-{name}",
            self.directory / name,
            time.monotonic(),
            self.best.step,
            self.best.to_json(),
        )
        state = mcore.sharded_state(chunks, optimizer, is_loading=False)
        problem = self._make_room(save, mcore.written_bytes(state))
        if problem is None:
            try:
                self._writers.start(state, save.partial, wait=wait or not self._config.async_save)
                self._pending = save
            except SaveError as error:
                problem = str(error)
        if problem is not None:
            self._give_up(save, problem)
            return False
        self.poll()
        return self.finish() if wait or not self._config.async_save else True

    def _make_room(self, save: _Save, local_bytes: int) -> str | None:
        """Make the partial directory if the disk has room for it; why not, on every process. Collective."""
        needed = torch.tensor([local_bytes], dtype=torch.int64, device=self._runtime.device)
        dist.all_reduce(needed)
        answer: list[str | None] = [None]
        if self._runtime.is_main:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                for left_over in self.directory.glob(".partial-step-*"):
                    shutil.rmtree(left_over)
                free = shutil.disk_usage(self.directory).free
                if free < _SPARE * needed.item():
                    answer = [f"it takes {needed.item() / 1e9:.2f} GB, more than the disk has left"]
                else:
                    save.partial.mkdir()
            except OSError as error:
                answer = [str(error)]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def poll(self) -> None:
        """Begin to seal a checkpoint whose tensors have all been written; call it every step. Collective."""
        self._advance(block=False)

    def _advance(self, *, block: bool) -> None:
        save = self._pending
        if save is None or save.sealing is not None:
            return
        try:
            written = self._writers.finished(block=block)
        except SaveError as error:
            self._pending = None
            self._give_up(save, str(error))
            return
        if written:
            save.sealing = self._sealer.submit(self._seal_on_main, save)

    def finish(self) -> bool:
        """Wait until a save under way is whole. Collective.

        Returns:
            False when it failed, which has been reported.
        """
        if self._pending is None:
            return True
        self._advance(block=True)
        save = self._pending
        if save is None or save.sealing is None:
            return False
        wait_for_all(save.sealing.done)
        answer = [save.sealing.result()]
        dist.broadcast_object_list(answer, src=0)
        self._pending = None
        if answer[0] is not None:
            self._give_up(save, answer[0])
        return answer[0] is None

    def _give_up(self, save: _Save, problem: str) -> None:
        self.best.forget(save.step)
        if self._runtime.is_main:
            shutil.rmtree(save.partial, ignore_errors=True)
            log.error("THE CHECKPOINT OF STEP %d COULD NOT BE WRITTEN: %s (%s)", save.step, problem, self._free())

    def _free(self) -> str:
        """What the disk has left; it may be the disk that is gone, and the other processes wait for this one."""
        try:
            return f"{shutil.disk_usage(self.directory).free / 1e9:.2f} GB free"
        except OSError as error:
            return f"free space unknown: {error.strerror}"

    def _seal_on_main(self, save: _Save) -> str | None:
        """Make written tensors a checkpoint; what went wrong, if anything. Local: it may run beside training."""
        if not self._runtime.is_main:
            return None
        try:
            self._describe(save.partial)
            write_json(save.partial / _STATE, {"step": save.step, **self._identity, _VALIDATIONS: save.validations})
            write_json(save.partial / _DIGESTS, _digests(save.partial, known=self._writers.digests))
            shutil.rmtree(save.final, ignore_errors=True)
            save.partial.rename(save.final)
            self._prune(save)
        except (OSError, UserError) as error:
            return str(error)
        self.save_s = time.monotonic() - save.started
        return None

    def _prune(self, save: _Save) -> None:
        """Remove what need not stay of `save` and those before it.

        Its best is on the disk: that save came before, or is this one. Later steps are there only where a resume passed
        over a damaged one; they must not crowd out what is whole.
        """
        steps = sorted(step for step in self._steps() if step <= save.step)
        for step in steps[: -self._config.keep]:
            every = self._config.keep_every_steps
            if step != save.best and not (every and step % every == 0):
                shutil.rmtree(self.directory / f"step-{step:08d}")

    def _steps(self) -> list[int]:
        """Steps of the checkpoints by name; what else lies there (copies, notes) is left alone."""
        matches = (_NAME.fullmatch(path.name) for path in self.directory.glob("step-*") if path.is_dir())
        return [int(match[1]) for match in matches if match]

    def newest_verified(self) -> Path | None:
        """The newest checkpoint whose files match their digests; says which it passed over. Collective."""
        self.finish()
        return next((path for _, path in self._verified(sorted(self._steps(), reverse=True))), None)

    def best_verified(self) -> tuple[int, Path] | None:
        """The best step whose checkpoint is whole; says which it passed over. Collective."""
        self.finish()
        kept = set(self._steps())
        return next(self._verified([step for step in self.best.ranked() if step in kept]), None)

    def _verified(self, steps: list[int]) -> Iterator[tuple[int, Path]]:
        """Those of the main process's `steps` whose files match their digests, found one by one. Collective."""
        told = [steps]
        dist.broadcast_object_list(told, src=0)
        for step in told[0]:
            path = self.directory / f"step-{step:08d}"
            problems: list[str | None] = [None] * self._runtime.world_size
            dist.all_gather_object(
                problems, verify_checkpoint(path, part=self._runtime.rank, parts=self._runtime.world_size)
            )
            problem = next((text for text in problems if text is not None), None)
            if problem is None:
                yield step, path
                continue
            if self._runtime.is_main:
                log.warning("passing over %s: %s", path, problem)

    def load(self, path: Path, chunks: list[nn.Module], optimizer: MegatronOptimizer) -> int:
        """Restore model and optimizer. Collective.

        Returns:
            steps done.

        Raises:
            UserError: the checkpoint belongs to another model, other data, another stage or the other optimizer.
        """
        state = read_json(path / _STATE)
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise UserError(f"{path}: checkpoint of another run: {name} is {state.get(name)!r}, here {value!r}")
        mcore.require_same_optimizer(optimizer, path)
        loaded = mcore.load_sharded(mcore.sharded_state(chunks, optimizer, is_loading=True), path)
        mcore.restore(chunks, optimizer, loaded)
        step = int(state["step"])
        self.best.go_back(step, state.get(_VALIDATIONS))
        return step


def _files(directory: Path) -> list[str]:
    found = (p for p in directory.rglob("*") if p.is_file() and p.name != _DIGESTS)
    return sorted(str(p.relative_to(directory)) for p in found)


def _digests(directory: Path, *, known: dict[str, str]) -> dict[str, str]:
    """SHA-256 of every file; what its writer hashed is not read again."""
    return {name: known.get(name) or digest_file(directory / name) for name in _files(directory)}


def verify_checkpoint(path: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, or with every `parts`-th of them; None when all match their digests."""
    if not (path / _DIGESTS).is_file():
        return f"{_DIGESTS} is missing"
    expected = read_json(path / _DIGESTS)
    names = sorted(expected)[part::parts]
    missing = next((name for name in names if not (path / name).is_file()), None)
    if missing is not None:
        return f"{missing} is missing"
    with ThreadPoolExecutor() as pool:
        for name, digest in zip(names, pool.map(lambda name: digest_file(path / name), names), strict=True):
            if digest != expected[name]:
                return f"{name} does not match its digest"
    return None
