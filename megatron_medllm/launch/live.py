"""`medllm status`: a whole run as one value, submitted or on this machine; printed once, watched, or as JSON."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_medllm.config.cluster import REQUEUE_EXIT_CODE
from megatron_medllm.config.run import load
from megatron_medllm.errors import UserError
from megatron_medllm.launch.jobs import RunFiles
from megatron_medllm.launch.status import (
    STATUS_COLUMNS,
    StageStatus,
    last_metrics,
    run_status,
    status_cells,
    status_report,
    with_metrics,
    with_progress,
)
from megatron_medllm.launch.supervisor import UNMET_EXIT_CODE, unmet_requirements
from megatron_medllm.recipe.owner import Holder
from megatron_medllm.recipe.records import Ending, Record
from megatron_medllm.recipe.stages import Command, Stage, recipe_stages
from megatron_medllm.storage import read_json

EXIT_STATUS = {"finished": 0, "failed": 1, "stopped": 1, "running": 3, "queued": 3}
_QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_NOT_TO_BLAME = ("cancelled", "CANCELLED", "waiting", "interrupted")
_STOPPED_BY_SIGNAL = (129, 130, 143, REQUEUE_EXIT_CODE)  # HUP, INT, TERM; or saved and stopped by itself
_INTERVAL_S = {"slurm": 5.0, "local": 1.0}  # the controller has others to answer


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands. `where` is `slurm` or `local`."""

    run: str
    where: str
    stages: tuple[StageStatus, ...]

    @property
    def state(self) -> str:
        """`running`, `queued`, `finished`, `failed`, or `stopped`: nobody works on it, and nothing has failed."""
        alive = [stage for stage in self.stages if stage.is_alive]
        if alive:
            return "queued" if all(stage.state in _QUEUED for stage in alive) else "running"
        if all(stage.is_finished for stage in self.stages):
            return "finished"
        return "failed" if self.failing is not None else "stopped"

    @property
    def failing(self) -> StageStatus | None:
        """The first stage that failed; those behind it were cancelled, or wait."""
        over = (stage for stage in self.stages if not stage.is_alive and not stage.is_finished)
        return next((stage for stage in over if stage.state not in _NOT_TO_BLAME), None)

    @property
    def exit_status(self) -> int:
        """For scripts: 0 finished, 3 running or queued, 1 failed or stopped."""
        return EXIT_STATUS[self.state]

    @property
    def headline(self) -> str:
        """The run in one line."""
        done = sum(stage.is_finished for stage in self.stages)
        text = f"{self.run}: {self.state}, {done} of {len(self.stages)} stages done"
        failing = self.failing
        return text if failing is None else f"{text}; {failing.stage} {failing.state.lower()}: {failing.reason}"

    def to_json(self) -> dict[str, Any]:
        """For machines. A stage's numbers are null where it has none."""
        return {
            "run": self.run,
            "where": self.where,
            "state": self.state,
            "exit_status": self.exit_status,
            "failing": self.failing.stage if self.failing else None,
            "stages": [asdict(stage) for stage in self.stages],
        }

    def report(self) -> str:
        """As a plain table, with the run in one line below it."""
        return f"{status_report(list(self.stages))}\n{self.headline}"


def find_status(run: Path) -> RunStatus:
    """Where a run stands: of `medllm submit` and `medllm pipeline`, the one that was called last.

    Raises:
        UserError: neither was, or Slurm does not answer.
    """
    files, recipe = RunFiles(run.resolve()), run / "run.yaml"
    if not recipe.is_file() and not files.submission.is_file():
        raise UserError(f"{run}: no run here: neither submitted nor begun by medllm pipeline")
    if not recipe.is_file() or _changed(files.submission) > _changed(recipe):
        return RunStatus(str(run), "slurm", tuple(run_status(run)))
    return RunStatus(str(run), "local", tuple(local_stages(run, recipe)))


def _changed(path: Path) -> float:
    return path.stat().st_mtime if path.is_file() else 0.0


def local_stages(run: Path, recipe: Path) -> list[StageStatus]:
    """The stages of a run by `medllm pipeline`."""
    holder = Holder.of(run)
    lives = holder is not None and holder.command == "medllm pipeline" and holder.process.lives()
    current = holder.stage if holder is not None and lives else None
    stages = recipe_stages(load(recipe, []), recipe)
    return [_local_stage(run, stage, current=current, lives=lives) for stage in stages]


def _local_stage(run: Path, stage: Stage, *, current: str | None, lives: bool) -> StageStatus:
    ending = Record(run / "stages" / f"{stage.name}.json").ending()
    log = run / "logs" / f"{stage.name}.log"
    state, reason = "PENDING" if lives else "waiting", ""
    if current == stage.name:
        state = "RUNNING"
    elif ending.status == "done":
        state = "finished"
    elif ending.status == "begun" and not lives:
        state = "interrupted" if ending.exit_status in (None, *_STOPPED_BY_SIGNAL) else "failed"
        reason = _why_failed(stage, ending, log) if state == "failed" else ""
    row = StageStatus(stage.name, "-", state, None, None, None, None, 0, reason)
    if stage.trains is not None:
        counted = stage.outputs[0] / "progress.json"
        total = read_json(counted)["total_steps"] if counted.is_file() else None
        return with_metrics(row, last_metrics(stage.outputs[0] / "metrics.jsonl"), total)
    return with_progress(row, [log.with_suffix(".progress")]) if row.is_alive else row


def _why_failed(stage: Stage, ending: Ending, log: Path) -> str:
    if stage.command is Command.EVAL and ending.exit_status == UNMET_EXIT_CODE:
        unmet = unmet_requirements(stage.outputs[0] / "summary.json", since=ending.since - 1)
        if unmet:
            return unmet
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
    return f"exit status {ending.exit_status}: {last}"


def live_view(status: RunStatus) -> Group:
    """What `--watch` shows."""
    rows = [status_cells(stage) for stage in status.stages]
    told = [i for i in range(len(STATUS_COLUMNS)) if {row[i] for row in rows} - {"-", "0", ""}]  # others are left out
    table = Table(*(STATUS_COLUMNS[i] for i in told), box=None, pad_edge=False)
    for stage, row in zip(status.stages, rows, strict=True):
        style = "bold green" if stage.state == "RUNNING" else "red" if stage is status.failing else ""
        table.add_row(*(Text(row[i]) for i in told), style=style)
    return Group(Text(f"{status.headline}  {time.strftime('%H:%M:%S')}", style="bold"), table)


def watch(run: Path, console: Console, *, sleep: Callable[[float], None] = time.sleep) -> RunStatus:
    """Show the run live until nobody works on it any more, or the user has seen enough (Ctrl-C); the last status."""
    status = find_status(run)
    with suppress(KeyboardInterrupt), Live(live_view(status), console=console, auto_refresh=False) as live:
        while status.exit_status == EXIT_STATUS["running"]:
            sleep(_INTERVAL_S[status.where])
            status = find_status(run)
            live.update(live_view(status), refresh=True)
    return status
