"""What a conversion has finished, so that the same command goes on where a killed one stopped."""

import fcntl
import os
import shutil
from pathlib import Path
from threading import Lock
from typing import Any

import orjson

from megatron_medllm.errors import UserError
from megatron_medllm.storage import full_disk_error

JOURNAL_NAME = "journal.jsonl"


class Journal:
    """A directory under construction, and the record of its finished parts.

    The record's first line identifies the job (its source and settings); each further line is a part, written after
    the part's bytes are on the disk. A directory of another job is started anew; a torn last line is dropped.
    """

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        """Open or create `directory`.

        Raises:
            UserError: another process is working on it.
        """
        self.directory = directory
        self._lock = Lock()
        directory.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(directory / JOURNAL_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.done = self._open(identity)
        except BlockingIOError:
            self.close()
            raise UserError(f"{directory}: another process is writing here") from None
        except BaseException:
            self.close()
            raise

    def _open(self, identity: dict[str, Any]) -> dict[str, Any]:
        rows = self._read()
        if rows and rows[0] == identity:
            for leftover in self.directory.rglob(".*.partial"):  # an atomic write that was killed
                leftover.unlink()
            return {row["part"]: row["result"] for row in rows[1:]}
        self._start_anew(identity)
        return {}

    def _read(self) -> list[Any]:
        text = (self.directory / JOURNAL_NAME).read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        os.ftruncate(self._fd, len(whole))
        return [orjson.loads(line) for line in whole.splitlines()]

    def _start_anew(self, identity: dict[str, Any]) -> None:
        for path in self.directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != JOURNAL_NAME:
                path.unlink()
        os.ftruncate(self._fd, 0)
        self._append(identity)

    def _append(self, row: Any) -> None:
        try:
            with self._lock:
                os.write(self._fd, orjson.dumps(row) + b"\n")
                os.fdatasync(self._fd)
        except OSError as error:
            raise full_disk_error(error, self.directory) from error

    def record(self, part: str, result: Any) -> None:
        """Note a finished part; its bytes must be on the disk already."""
        self._append({"part": part, "result": result})
        self.done[part] = result

    def close(self) -> None:
        """Let go of the directory; it stays as it is, for the next attempt."""
        os.close(self._fd)

    def finish(self, final: Path) -> None:
        """Give the directory its final name, without the record."""
        (self.directory / JOURNAL_NAME).unlink()
        os.replace(self.directory, final)
        parent = os.open(final.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)
