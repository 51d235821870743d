"""The training loop: fetch, step, log, save, stop."""

import logging
import time
from typing import Any

from megatron_medllm.config.cluster import REQUEUE_EXIT_CODE
from megatron_medllm.config.run import RunConfig
from megatron_medllm.data.ledger import Ledger
from megatron_medllm.errors import UserError
from megatron_medllm.parallel import mcore, runtime
from megatron_medllm.progress import progress
from megatron_medllm.storage import write_json
from megatron_medllm.train.export import export_trained
from megatron_medllm.train.guard import LossGuard
from megatron_medllm.train.metrics import MetricsLog, forget_wandb_run
from megatron_medllm.train.one_step import StepResult, run_step
from megatron_medllm.train.setup import Trainer, build_trainer, check_inputs
from megatron_medllm.train.signals import stop_requests
from megatron_medllm.train.throughput import StepClock, Throughput
from megatron_medllm.train.validation import Validation
from megatron_medllm.train.watch import watching

log = logging.getLogger(__name__)


def train(run: RunConfig, *, resume: bool = True) -> int:
    """Train `run.stage` on the processes that are here, from the newest checkpoint that verifies.

    Returns:
        0 when all steps are done and the model is exported; REQUEUE_EXIT_CODE when it stopped early and saved.

    Raises:
        UserError: the configuration and the inputs do not fit, or the run went wrong beyond repair.
    """
    started = time.monotonic()
    check_inputs(run)
    ranks = runtime.start(run.layout, seed=run.seed)
    try:
        trainer = build_trainer(run, ranks)
        try:
            first = _resume(trainer) if resume else 0
            if not resume and trainer.runtime.is_main:
                forget_wandb_run(run.output_dir())
            ended = _fit(trainer, first, started)
            if ended is None:
                return REQUEUE_EXIT_CODE
            export_trained(trainer, ended)
            return 0
        finally:
            mcore.release(trainer.chunks)
    finally:
        runtime.stop()


def _fit(trainer: Trainer, first: int, started: float) -> int | None:
    """Run steps [first, total) of a training begun at `started`, or fewer where nothing gets better any more.

    Returns:
        the steps done; None when a signal or the clock stopped it, saved.
    """
    step_object, ranks, config = trainer.step, trainer.runtime, trainer.config
    books = _Books(trainer, first)
    guard = LossGuard(config.guard)
    step = first
    with (
        progress(trainer.run.stage, total=step_object.total_steps) as bar,
        stop_requests(config.guard, started) as stop,
        watching(trainer, first) as watch,
    ):
        validation = Validation(trainer, stop, books.record_validation, watch.enter)
        validation.begin(first)
        while step < step_object.total_steps and not trainer.checkpoints.best.exhausted:
            clock = StepClock(watch.enter)
            done = run_step(trainer, step, clock, veto=guard.problem)
            done.metrics.update(watch.end_step(step, clock))
            stop.note_step(clock.seconds())
            books.record(step, done, clock)
            step += 1
            bar.update(step, f"loss {done.metrics['loss']:.4f}")
            if guard.note(step - 1, done.metrics["loss"], skipped=done.problem is not None):
                step = _roll_back(trainer)
                books.cut(step)
                continue
            reason = stop.reason(ranks)
            improved = reason is None and validation.after(step)  # a stop saves first; who resumes validates
            finished = step == step_object.total_steps or trainer.checkpoints.best.exhausted
            last = finished or reason is not None
            if last or improved or _due(step, config.checkpoint.every_steps):
                _save(trainer, step, last=last)
            trainer.checkpoints.poll()
            if trainer.checkpoints.save_s is not None:
                stop.note_save(trainer.checkpoints.save_s)
            if reason and not finished:
                log.warning("stopping after step %d of %d: %s", step, step_object.total_steps, reason)
                books.close()
                return None
        validation.after(step)
    books.close()
    return step


def _save(trainer: Trainer, step: int, *, last: bool) -> None:
    """Save; the last save of a run must succeed, any other is tried again at the next."""
    if not trainer.checkpoints.save(step, trainer.chunks, trainer.optimizer, wait=last) and last:
        raise UserError(f"the state after step {step} could not be saved; earlier checkpoints are as they were")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _resume(trainer: Trainer) -> int:
    """Load the newest checkpoint that verifies; the steps it has behind it, 0 where there is none."""
    newest = trainer.checkpoints.newest_verified()
    if newest is None:
        return 0
    log.info("resuming from %s", newest)
    return trainer.checkpoints.load(newest, trainer.chunks, trainer.optimizer)


def _roll_back(trainer: Trainer) -> int:
    newest = trainer.checkpoints.newest_verified()
    if newest is None:
        raise UserError("several steps in a row had to be skipped, and there is no checkpoint to go back to")
    log.warning("rolling back to %s", newest)
    return trainer.checkpoints.load(newest, trainer.chunks, trainer.optimizer)


class _Books:
    """What the main process writes down of every step: ledger, metrics, messages."""

    def __init__(self, trainer: Trainer, first: int) -> None:
        self._trainer = trainer
        self._throughput = Throughput(trainer.run, trainer.runtime)
        self._log: MetricsLog | None = None
        output_dir = trainer.run.output_dir()
        self._ledger = Ledger(output_dir / "ledger.jsonl")
        if trainer.runtime.is_main:
            write_json(output_dir / "progress.json", {"total_steps": trainer.step.total_steps})
            settings: dict[str, Any] = trainer.run.model_dump(mode="json")
            self._log = MetricsLog(output_dir, wandb_project=trainer.config.wandb_project, config=settings)
            self.cut(first if first else -1)  # a run from its first step has nothing before it
            if not first and trainer.step.held_out:
                self._ledger.append(0, [], held_out=list(trainer.step.held_out))

    def cut(self, step: int) -> None:
        if self._log is not None:
            self._log.cut(step)
            self._ledger.cut(step)

    def record(self, step: int, result: StepResult, clock: StepClock) -> None:
        if self._log is None:
            return
        done, metrics, problem = step + 1, result.metrics, result.problem
        self._ledger.append(done, [] if problem else self._trainer.step.consumed(step))
        if problem:
            log.warning("step %d skipped: %s", done, problem)
        if done % self._trainer.config.log_every_steps == 0 or problem:
            numbers = metrics | self._throughput.of(metrics, clock) | {"skipped": float(problem is not None)}
            saved = self._trainer.checkpoints.save_s
            self._log.write(done, numbers if saved is None else numbers | {"save_s": saved})

    def record_validation(self, step: int, metrics: dict[str, float]) -> None:
        if self._log is not None and metrics:
            self._log.write(step, metrics)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
