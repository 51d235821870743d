"""`medllm pipeline`: the stages run in order on this machine, each a process of its own, and skipped when done.

A stage whose recorded key is still the same, and whose outputs are there, is skipped. Under the same key an interrupted
stage goes on where it stopped; under another its old outputs are removed first.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

import orjson
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from megatron_medllm.config.cluster import REQUEUE_EXIT_CODE
from megatron_medllm.config.run import RunConfig
from megatron_medllm.errors import UserError
from megatron_medllm.evaluation.run_report import table
from megatron_medllm.processes import ProcessId
from megatron_medllm.progress import FILE_VARIABLE
from megatron_medllm.provenance import environment
from megatron_medllm.recipe.inputs import DigestMemory, input_digests
from megatron_medllm.recipe.owner import Owner, owning
from megatron_medllm.recipe.records import Parts, Record, recipe_parts, stage_key
from megatron_medllm.recipe.stages import Stage, recipe_stages
from megatron_medllm.storage import read_json, write_json

_POLL_S = 0.2
_WORTH_TELLING_BYTES = 10**9


def run_pipeline(run: RunConfig, *, console: Console) -> int:
    """Run every stage of the recipe that is not done.

    Returns:
        0 when all are done; else the exit status of the stage that failed, or 128 + the signal that stopped it.

    Raises:
        UserError: an input that no stage makes is missing, or another process works on this run.
    """
    with stop_signals(console) as stop:
        try:
            with owning(run.run_dir, "medllm pipeline") as owner:
                return _run_stages(run, stop, owner, console)
        except KeyboardInterrupt:  # while no stage was running
            return stop.status()


def _run_stages(run: RunConfig, stop: "StopSignals", owner: Owner, console: Console) -> int:
    config_path = run.run_dir / "run.yaml"
    config_path.write_text(yaml.safe_dump(run.model_dump(mode="json"), allow_unicode=True, sort_keys=False))
    write_json(run.run_dir / "environment.json", environment())
    stages = recipe_stages(run, config_path)
    parts = recipe_parts(stages, run.model_dump(mode="json"), _input_digests(run, stages, console))
    with _stage_progress(console) as bars:
        overall = bars.add_task(f"[bold]{escape(run.name)}", total=len(stages), note="")
        for stage in stages:
            record = Record(run.run_dir / "stages" / f"{stage.name}.json")
            if record.is_done(stage_key(parts[stage.name]), stage.outputs):
                console.print(f"[dim]✓ {escape(stage.name)}: done before[/]")
            else:
                for change in record.changes(parts[stage.name]):
                    console.print(f"[yellow]↻[/] {escape(f'{stage.name}: {change}')}", soft_wrap=True)
                status = _run_stage(stage, parts[stage.name], record, run, bars=bars, stop=stop, owner=owner)
                if status:
                    return _report_failure(stage, status, run, console)
                console.print(f"[green]✓[/] {escape(stage.name)}: {record.seconds():.1f} s")
            bars.advance(overall)
    if (run.run_dir / "report.html").is_file():
        console.print(table(read_json(run.run_dir / "summary.json")))
        console.print(f"report: {run.run_dir / 'report.html'}", markup=False, soft_wrap=True)
    return 0


def _input_digests(run: RunConfig, stages: list[Stage], console: Console) -> dict[str, dict[str, str]]:
    """Digests of every stage's inputs; before the first stage runs, so that a missing file is told at once."""
    memory = DigestMemory(run.run_dir / "input-digests.json")
    found = {}
    for stage in stages:
        try:
            found[stage.name] = input_digests(stage.inputs, memory)
        except UserError as error:
            raise UserError(f"{error} (input of stage {stage.name})") from None
    if memory.read_bytes > _WORTH_TELLING_BYTES:
        console.print(f"[dim]{memory.read_bytes / 1e9:.0f} GB of inputs read for their digests, which are kept[/]")
    return found


def _run_stage(
    stage: Stage, parts: Parts, record: Record, run: RunConfig, *, bars: Progress, stop: "StopSignals", owner: Owner
) -> int:
    """Run the stage's command with its log; 0 when its outputs are there."""
    key = stage_key(parts)
    spent = record.seconds() if record.was_begun(key) else 0.0
    if not record.was_begun(key):
        for path in stage.outputs:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    started = time.monotonic()
    record.write(parts, "begun", spent)
    log_path = log_file(run, stage)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    progress_path = log_path.with_suffix(".progress")
    progress_path.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "megatron_medllm", *stage.arguments]
    bar = bars.add_task(f"  {escape(stage.name)}", total=None, note="")
    with open(log_path, "ab") as log:
        environment = os.environ | {FILE_VARIABLE: str(progress_path)}
        with stop.started(command, stdout=log, environment=environment) as child:
            owner.write(stage.name, ProcessId.of(child.pid))
            status = _wait(child, progress_path, bars, bar)
    owner.write()
    bars.remove_task(bar)
    progress_path.unlink(missing_ok=True)
    missing = [path for path in stage.outputs if not path.exists()]
    if status == 0 and missing:
        raise UserError(f"stage {stage.name} ended well, but did not make {missing[0]}; log: {log_path}")
    seconds = spent + time.monotonic() - started
    record.write(parts, "begun" if status else "done", seconds, exit_status=status)
    return status if not stop.number else stop.status()


def _wait(child: subprocess.Popen[bytes], progress_path: Path, bars: Progress, bar: TaskID) -> int:
    """Wait for the child, showing the progress that it writes."""
    while True:
        try:
            return child.wait(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            if progress_path.is_file():
                row = orjson.loads(progress_path.read_bytes())
                bars.update(bar, total=row["total"], completed=row["done"], note=row["note"])


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP: the first asks the running stage to save and stop, the second kills it.

    While no stage runs, they interrupt the pipeline itself.
    """

    def __init__(self, console: Console) -> None:
        self.number = 0  # of the first signal
        self._console = console
        self._child: subprocess.Popen[bytes] | None = None
        self._starting = False

    def status(self) -> int:
        """The exit status that tells of the signal, as shells write it."""
        return 128 + (self.number or signal.SIGINT)

    @contextmanager
    def started(
        self, command: list[str], *, stdout: IO[bytes], environment: dict[str, str]
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Start a process; while the block runs, signals are its own."""
        self._starting = True
        try:
            self._child = subprocess.Popen(
                command,
                stdout=stdout,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # signals of the terminal reach us alone; the child is asked to save first
            )
        finally:
            self._starting = False
        if self.number:  # it came while the child was being started
            self._child.terminate()
        try:
            yield self._child
        finally:
            self._child = None

    def receive(self, number: int, _: FrameType | None) -> None:
        """Handle a signal."""
        again, self.number = bool(self.number), self.number or number
        if number == signal.SIGHUP:  # the terminal is gone, and writing to it an error
            self._console.file = open(os.devnull, "w")  # noqa: SIM115
        if self._starting:
            return
        if self._child is None:
            raise KeyboardInterrupt
        if not again:
            self._child.terminate()
        elif self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)  # its ranks with it: it leads a session


@contextmanager
def stop_signals(console: Console) -> Iterator[StopSignals]:
    """Listen to SIGINT, SIGTERM and, unless the process was started to survive it (nohup), SIGHUP."""
    stop = StopSignals(console)
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop.receive) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def log_file(run: RunConfig, stage: Stage) -> Path:
    """Where a stage's output goes."""
    return run.run_dir / "logs" / f"{stage.name}.log"


def _report_failure(stage: Stage, status: int, run: RunConfig, console: Console) -> int:
    log_path = log_file(run, stage)
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP):
        console.print(f"[yellow]interrupted in stage {escape(stage.name)}[/]; run the same command again to go on")
        return status
    if status == REQUEUE_EXIT_CODE:
        console.print(
            f"[yellow]stage {escape(stage.name)} saved and stopped early[/]; run the same command again to go on"
        )
        return status
    last = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()][-1:]
    line = Text.assemble((f"stage {stage.name} failed", "bold red"), f" (exit status {status}); log: {log_path}")
    console.print(line, soft_wrap=True)
    console.print(*last, markup=False, highlight=False, soft_wrap=True)
    return status


def _stage_progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )
