"""What a stage reads that no stage makes: which files these are, and digests of their content.

A digest is of the bytes, so a touched file changes nothing and an edited one always does, whatever its size and date.
Reading 140 GB to see that nothing has changed would be absurd, so digests are remembered with the file's size, inode,
modification time and *change* time. The last cannot be set back by whoever edits a file and restores its date
(`touch -r`, `rsync -t`, `cp -p`): any write or rename moves it on.
"""

import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from megatron_medllm.config.megatron_dirs import find_megatron
from megatron_medllm.corpus import questions
from megatron_medllm.errors import UserError
from megatron_medllm.exams import loading
from megatron_medllm.inference.exam_requests import find_shot_file
from megatron_medllm.inputs import find_inputs, match_files
from megatron_medllm.storage import digest_file, read_json, write_json

_THREADS = 8  # one does not saturate a file system that is worth a 72B model
_SETTLED_S = 2.0  # a file changed later than this before it was read may change again within the clock's resolution
_MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".model", ".jinja", ".txt", ".tiktoken")
_OF_TOKENIZERS = re.compile(
    r"^(tokenizer|special_tokens|added_tokens|chat_template|vocab|merges)|\.(tiktoken|model|jinja)$"
)
_CORPUS_SUFFIXES = (".bin", ".idx")


class InputKind(Enum):
    """What stands at an input's path, and so which files count."""

    FILE = auto()
    TEXT = auto()  # files, folders and globs of a corpus's sources
    QUESTIONS = auto()  # likewise, of what a corpus is decontaminated against
    EXAM = auto()  # files and folders of questions, with their metadata
    SHOTS = auto()  # the worked examples that lie beside an exam
    MODEL = auto()  # a Hugging Face directory, an adapter's, or a Megatron checkpoint
    TOKENIZER = auto()  # a folder, a file, or a name on the hub
    CORPUS = auto()  # a folder that `medllm corpus build` wrote
    FOLDER = auto()  # a folder, or a name that stands for something else


@dataclass(frozen=True)
class Input:
    """Paths that one setting of the recipe names."""

    setting: str
    kind: InputKind
    paths: tuple[str, ...]


def input_files(entry: Input) -> list[Path]:
    """The files whose content counts, in a stable order.

    Raises:
        UserError: a path names nothing; says which setting did.
    """
    paths = [Path(os.path.expanduser(path)) for path in entry.paths]
    match entry.kind:
        case InputKind.TEXT:
            return [Path(path) for path in find_inputs(entry.paths, field=entry.setting)]
        case InputKind.QUESTIONS:
            return questions.question_files(list(entry.paths))
        case InputKind.EXAM:
            found = loading.question_files(paths)
            metadata = [path.with_name(f"{path.stem}_metadata.jsonl") for path in found]
            return [*found, *(path for path in metadata if path.is_file())]
        case InputKind.SHOTS:
            return [find_shot_file(paths)]
        case InputKind.MODEL:
            return [path for folder in paths for path in _model_files(folder, entry.setting)]
        case InputKind.CORPUS:
            return [path for folder in paths for path in _folder_files(folder, entry.setting, ("manifest.json",))]
        # A name on the hub, of a data set or of a shipped prompt is no path: the setting itself tells of it.
        case InputKind.TOKENIZER:
            named = [path for path in paths if path.exists()]
            return [file for path in named for file in ([path] if path.is_file() else _tokenizer_files(path))]
        case InputKind.FOLDER:
            return [Path(file) for path in paths if path.exists() for file in match_files(path)]
        case InputKind.FILE:
            missing = [path for path in paths if not path.is_file()]
            if missing:
                raise UserError(f"{entry.setting}: {missing[0]}: no such file")
            return paths


def _model_files(folder: Path, setting: str) -> list[Path]:
    place = find_megatron(folder)
    return _folder_files(folder, setting, _MODEL_SUFFIXES) if place is None else list(place.files())


def input_digests(entries: Iterable[Input], memory: "DigestMemory") -> dict[str, str]:
    """Digest by path of everything that the inputs name.

    A corpus is taken for what its manifest says, which holds digests of its parts, and for their sizes.

    Raises:
        UserError: a path names nothing.
    """
    found: dict[str, str] = {}
    for entry in entries:
        found |= memory.digests(input_files(entry))
        if entry.kind is InputKind.CORPUS:
            parts = [path for folder in entry.paths for path in Path(folder).iterdir()]
            sized = [path for path in sorted(parts) if path.suffix in _CORPUS_SUFFIXES]
            found |= {str(path): f"{path.stat().st_size} bytes" for path in sized}
    return found


def _folder_files(folder: Path, setting: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files directly in a folder with one of these endings."""
    if not folder.is_dir():
        raise UserError(f"{setting}: {folder}: no such directory")
    found = sorted(path for path in folder.iterdir() if path.name.endswith(suffixes) and path.is_file())
    if not found:
        raise UserError(f"{setting}: {folder}: holds no {' or '.join(suffixes)}")
    return found


def _tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's own files: it may lie in a model's directory, whose weights do not matter to it."""
    return sorted(path for path in folder.iterdir() if path.is_file() and _OF_TOKENIZERS.search(path.name))


class DigestMemory:
    """Digests of files, remembered in a file of the run directory for as long as nothing has touched them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = read_json(path) if path.is_file() else {}
        self.read_bytes = 0

    def digests(self, paths: Iterable[Path]) -> dict[str, str]:
        """SHA-256 by path; only what is new or was touched is read."""
        found: dict[str, str] = {}
        unknown: list[Path] = []
        for path in paths:
            known = self._known.get(os.path.abspath(path))
            if known is not None and known["stat"] == _stat(path):
                found[str(path)] = known["digest"]
            else:
                unknown.append(path)
        if unknown:
            with ThreadPoolExecutor(_THREADS) as pool:
                for path, digest in zip(unknown, pool.map(self._read, unknown), strict=True):
                    found[str(path)] = digest
            write_json(self._path, self._known)
        return found

    def _read(self, path: Path) -> str:
        before, began = _stat(path), time.time()
        digest = digest_file(path)
        self.read_bytes += before[0]
        changed_s = max(before[2:]) / 1e9
        if began - changed_s > _SETTLED_S and before == _stat(path):
            self._known[os.path.abspath(path)] = {"stat": before, "digest": digest}
        else:
            self._known.pop(os.path.abspath(path), None)
        return digest


def _stat(path: Path) -> list[int]:
    """Size, inode, modification and change time: what no edit leaves as it was."""
    found = path.stat()
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]
