"""Files that are either whole or absent: atomic writes, digests, and JSON lines that name the broken line."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson

from megatron_medllm.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that takes its final name only when the block ends without an error.

    Raises:
        UserError: the disk is full or the place cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise full_disk_error(error, path) from error
    finally:
        partial.unlink(missing_ok=True)


def full_disk_error(error: OSError, path: Path) -> Exception:
    """The error to raise for a failed write to `path`: a UserError where the user can mend it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: no space left on the disk; make space and run the same command again")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"{path}: cannot be written ({os.strerror(error.errno)})")
    return error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as stream:
        stream.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS) + b"\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with atomic_write(path) as stream:
        stream.writelines(orjson.dumps(row) + b"\n" for row in rows)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:  # a folder, or not ours to read
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from None


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file, blank lines skipped.

    Raises:
        UserError: the file is missing, or a line is not a JSON object (names file and line).
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:  # a folder, or not ours to read
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    with stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                if kind := pointer_kind(line):
                    raise UserError(f"{path} is a {kind} pointer, not the file: fetch it (`{kind} pull`)") from None
                raise UserError(f"{path}:{number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
            yield row


def pointer_kind(head: bytes) -> str:
    """The tool whose pointer a file is that begins like this (`git lfs`, `git annex`); "" for a file that is itself."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "git lfs"
    return "git annex" if head.startswith(b"/annex/objects/") else ""


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_value(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form, in hex."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)).hexdigest()
