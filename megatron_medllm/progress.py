"""Progress of long work: a bar at a terminal, or a small file that `medllm pipeline` shows for its stages."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

FILE_VARIABLE = "MEDLLM_PROGRESS_FILE"
UPDATES_PER_S = 5.0


class ProgressFile:
    """Writes `{"title", "done", "total", "note"}` to the file that a parent process watches. Threads may share it."""

    def __init__(self, path: Path, *, title: str, total: float | None) -> None:
        self.path, self.title, self.total = path, title, total
        self.done, self.note, self._written_at = 0.0, "", 0.0
        self._lock = threading.Lock()
        self._write()

    def update(self, done: float, note: str = "") -> None:
        """Set the amount done so far, and a short note such as the loss."""
        with self._lock:
            self.done, self.note = done, note
            if time.monotonic() - self._written_at >= 1 / UPDATES_PER_S or done == self.total:
                self._write()

    def _write(self) -> None:
        row = {"title": self.title, "done": self.done, "total": self.total, "note": self.note}
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(orjson.dumps(row))
        os.replace(partial, self.path)
        self._written_at = time.monotonic()


class ProgressBar:
    """The same surface as `ProgressFile`, drawn by rich on standard error."""

    def __init__(self, bar: RichProgress, *, title: str, total: float | None) -> None:
        self._bar = bar
        self._task = bar.add_task(title, total=total, note="")

    def update(self, done: float, note: str = "") -> None:
        """Set the amount done so far, and a short note such as the loss."""
        self._bar.update(self._task, completed=done, note=note)


@contextmanager
def progress(title: str, total: float | None = None) -> Iterator[ProgressFile | ProgressBar]:
    """Show `title` with a bar that `.update(done, note)` moves; `total` None when it is not known."""
    watched = os.environ.get(FILE_VARIABLE)
    if watched:
        yield ProgressFile(Path(watched), title=title, total=total)
        return
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        yield ProgressBar(bar, title=title, total=total)
