"""Input paths as people write them: a file, a folder, or a glob. Whoever reads users' files expands them here.

A path that exists is that path, whatever characters it holds: `run[1]/text.jsonl` is no pattern where it is a file. Of
a pattern, the leading folders that exist are taken as they are, and only the rest is matched.
"""

import glob
import os
from collections.abc import Iterator, Sequence

from megatron_medllm.errors import UserError


def match_files(pattern: str | os.PathLike[str], *, suffixes: Sequence[str] = ()) -> list[str]:
    """The files that a path or glob names, sorted; a folder stands for all files within it.

    `**` recurses. As in a shell, wildcards and folders leave out names that begin with a dot.

    Args:
        suffixes: of a folder's files, only those with one of these endings; default: all.

    Returns:
        paths in the pattern's own form (relative stays relative); empty where nothing matches.
    """
    pattern = os.path.expanduser(os.fspath(pattern))
    found: dict[str, None] = {}
    for path in [pattern] if os.path.exists(pattern) else _matches(pattern):
        found.update(dict.fromkeys(_files_within(path, tuple(suffixes)) if os.path.isdir(path) else [path]))
    return list(found)


def find_inputs(patterns: Sequence[str | os.PathLike[str]], *, field: str, suffixes: Sequence[str] = ()) -> list[str]:
    """The files of several paths or globs, in the patterns' order, each once.

    Args:
        field: the recipe's field that holds the patterns, for the message.

    Raises:
        UserError: a pattern matches no file.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = match_files(pattern, suffixes=suffixes)
        if not matches:
            kind = "".join(f"{suffix} " for suffix in suffixes)
            raise UserError(f"{field}: {os.fspath(pattern)} matches no {kind}file")
        found.update(dict.fromkeys(matches))
    return list(found)


def _matches(pattern: str) -> list[str]:
    """What a glob matches, sorted, its leading existing folders taken literally."""
    literal, rest = "", pattern
    while rest:
        head, slash, tail = rest.partition("/")
        if not slash or not os.path.isdir(literal + head + "/"):
            break
        literal, rest = literal + head + "/", tail
    return sorted(path for path in glob.glob(glob.escape(literal) + rest, recursive=True) if os.path.exists(path))


def _files_within(folder: str, suffixes: tuple[str, ...]) -> list[str]:
    return sorted(path for path in _walk(folder, set()) if not suffixes or path.endswith(suffixes))


def _walk(folder: str, seen: set[str]) -> Iterator[str]:
    """Files below a folder. Links to folders are followed, each real folder once: links may form a circle."""
    if (real := os.path.realpath(folder)) in seen:
        return
    seen.add(real)
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        raise UserError(f"{folder}: this folder may not be read") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = os.path.join(folder, entry.name)
        if entry.is_dir():
            yield from _walk(path, seen)
        elif entry.is_file():
            yield path
