"""The recipe as data: stages with their inputs, outputs and commands, run in order, skipped when nothing changed.

A stage's *key* is a digest of its command, of the settings it depends on, of its input files and of the keys of the
stages before it. A stage whose recorded key is still the same, and whose outputs are there, is skipped. Under the same
key an interrupted stage goes on where it stopped; under another its old outputs are removed first.
"""

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from megatron_medllm import __version__
from megatron_medllm.config.cluster import REQUEUE_EXIT_CODE
from megatron_medllm.config.run import RunConfig
from megatron_medllm.errors import UserError
from megatron_medllm.evaluation.run_report import table
from megatron_medllm.progress import FILE_VARIABLE
from megatron_medllm.recipe import Stage, recipe_stages
from megatron_medllm.storage import digest_file, digest_value, read_json, write_json

INTERRUPTED = 130
_POLL_S = 0.2


def run_pipeline(run: RunConfig, *, console: Console) -> int:
    """Run every stage of the recipe that is not done.

    Returns:
        0 when all are done; else the exit status of the stage that failed, or 130 after Ctrl-C.

    Raises:
        UserError: an input that no stage makes is missing.
    """
    run.run_dir.mkdir(parents=True, exist_ok=True)
    config_path = run.run_dir / "run.yaml"
    config_path.write_text(yaml.safe_dump(run.model_dump(mode="json"), allow_unicode=True, sort_keys=False))
    write_json(run.run_dir / "environment.json", environment())
    stages = recipe_stages(run, config_path)
    keys: dict[str, str] = {}
    with _stage_progress(console) as bars:
        overall = bars.add_task(f"[bold]{run.name}", total=len(stages), note="")
        for stage in stages:
            keys[stage.name] = stage_key(stage, keys, run)
            record = Record(run.run_dir / "stages" / f"{stage.name}.json")
            if record.is_done(keys[stage.name], stage.outputs):
                console.print(f"[dim]✓ {stage.name}: done before[/]")
            else:
                status = _run_stage(stage, keys[stage.name], record, run, bars)
                if status:
                    return _report_failure(stage, status, run, console)
                console.print(f"[green]✓[/] {stage.name}: {record.seconds():.1f} s")
            bars.advance(overall)
    _print_result(run.run_dir, console)
    return 0


def _print_result(run_dir: Path, console: Console) -> None:
    if (run_dir / "report.html").is_file():
        console.print(table(read_json(run_dir / "summary.json")))
        console.print(f"report: {run_dir / 'report.html'}", soft_wrap=True)


@dataclass(frozen=True)
class Record:
    """What is remembered of a stage between runs."""

    path: Path

    def _read(self) -> dict[str, Any]:
        return read_json(self.path) if self.path.is_file() else {}

    def is_done(self, key: str, outputs: tuple[Path, ...]) -> bool:
        """Whether the stage finished under this key and its outputs are there."""
        found = self._read()
        return found.get("status") == "done" and found["key"] == key and all(path.exists() for path in outputs)

    def was_begun(self, key: str) -> bool:
        """Whether work under this key was interrupted, so that it may go on."""
        return self._read().get("key") == key

    def write(self, key: str, status: str, seconds: float) -> None:
        """Remember."""
        write_json(self.path, {"key": key, "status": status, "seconds": seconds, "finished_at": time.time()})

    def seconds(self) -> float:
        """How long the stage took, interruptions included."""
        return float(self._read().get("seconds", 0.0))


def stage_key(stage: Stage, keys: dict[str, str], run: RunConfig) -> str:
    """What the stage's result depends on, as one digest.

    Raises:
        UserError: an input file is missing.
    """
    for path in stage.inputs:
        if not path.exists():
            raise UserError(f"{path}: no such file (input of stage {stage.name})")
    settings = run.model_dump(mode="json")
    return digest_value(
        {
            "version": __version__,
            "arguments": stage.arguments,
            "settings": {name: _setting(settings, name) for name in stage.settings},
            "inputs": {str(path): digest_file(path) for path in stage.inputs},
            "after": {name: keys[name] for name in stage.after},
        }
    )


def _setting(settings: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        settings = (settings or {}).get(part)
    return settings


def _run_stage(stage: Stage, key: str, record: Record, run: RunConfig, bars: Progress) -> int:
    """Run the stage's command with its log; 0 when its outputs are there."""
    spent = record.seconds() if record.was_begun(key) else 0.0
    if not record.was_begun(key):
        for path in stage.outputs:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    started = time.monotonic()
    record.write(key, "begun", spent)
    log_path = log_file(run, stage)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    progress_path = log_path.with_suffix(".progress")
    progress_path.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "megatron_medllm", *stage.arguments]
    bar = bars.add_task(f"  {stage.name}", total=None, note="")
    with open(log_path, "ab") as log:
        child = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {FILE_VARIABLE: str(progress_path)},
            start_new_session=True,  # Ctrl-C reaches us alone; the child is asked to save first
        )
        try:
            status = _wait(child, progress_path, bars, bar)
        except KeyboardInterrupt:
            child.send_signal(signal.SIGTERM)
            child.wait()
            status = INTERRUPTED
        finally:
            bars.remove_task(bar)
    progress_path.unlink(missing_ok=True)
    missing = [path for path in stage.outputs if not path.exists()]
    if status == 0 and missing:
        raise UserError(f"stage {stage.name} ended well, but did not make {missing[0]}; log: {log_path}")
    record.write(key, "begun" if status else "done", spent + time.monotonic() - started)
    return status


def _wait(child: subprocess.Popen, progress_path: Path, bars: Progress, bar: TaskID) -> int:
    """Wait for the child, showing the progress that it writes."""
    while True:
        try:
            return child.wait(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            if progress_path.is_file():
                row = orjson.loads(progress_path.read_bytes())
                bars.update(bar, total=row["total"], completed=row["done"], note=row["note"])


def log_file(run: RunConfig, stage: Stage) -> Path:
    """Where a stage's output goes."""
    return run.run_dir / "logs" / f"{stage.name}.log"


def _report_failure(stage: Stage, status: int, run: RunConfig, console: Console) -> int:
    log_path = log_file(run, stage)
    if status == INTERRUPTED:
        console.print(f"[yellow]interrupted in stage {stage.name}[/]; run the same command again to go on")
        return status
    if status == REQUEUE_EXIT_CODE:
        console.print(f"[yellow]stage {stage.name} saved and stopped early[/]; run the same command again to go on")
        return status
    last = [line for line in log_path.read_text(errors="replace").splitlines() if line.strip()][-1:]
    console.print(f"[bold red]stage {stage.name} failed[/] (exit status {status}); log: {log_path}", soft_wrap=True)
    console.print(*last, markup=False, highlight=False, soft_wrap=True)
    return status


def _stage_progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def environment() -> dict[str, Any]:
    """Versions, code revision and machine, for the record."""
    names = ("megatron-core", "torch", "transformers", "tokenizers", "numpy", "fastokens", "rensa")
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "versions": {"megatron_medllm": __version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in names},
        "git_revision": revision.stdout.strip() or None,
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), "host_memory_bytes": _memory_bytes()},
    }


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
