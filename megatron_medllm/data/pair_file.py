"""Preference pairs as people have them, read to one form or refused by file, line and field.

Read are JSON lines, a JSON array (both also gzipped or zstd-compressed) and Parquet, with rows in these shapes:

- `prompt`, `chosen`, `rejected` as texts, or as lists of messages (TRL, OpenAI; content may be parts of type text);
- `chosen` and `rejected` as whole conversations, with `prompt` or without (TRL's implicit prompt): what both begin with
  is the prompt;
- ShareGPT: `conversations` of `from` and `value`, `chosen` and `rejected` one such message each.

A message that would be lost on the way (another role, a tool call, an image, a second answer) is an error: what a model
learns from half a conversation is not what its author meant.
"""

import gzip
import io
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import zstandard

from megatron_medllm.errors import UserError

Message = dict[str, str]

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_QUESTION_FIELDS = ("problem_id", "question_id")
_PROMPT_FIELDS = ("prompt", "conversations", "messages")
# Part of what the model is to see, in other tools' files: a prompt read without it would be another prompt.
_LOST_FIELDS = ("system", "instruction", "input", "history", "tools", "images", "image", "videos", "audios")
_LARGEST_WINDOW = 2**31  # what `zstd --long=31` writes
_SHOWN = 80  # characters of a value in a message
_ZSTD_INPUT = 4096  # compressed bytes at once: bounds what a bomb decompresses to
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class PairText:
    """A pair as text. `row` counts the file's pairs from 0; `where` is FILE:LINE.

    `*_ended`: whether the answer has an end of its own, so that an end token may follow it. `question`: the name of the
    question that it answers, where the file gives one.
    """

    row: int
    where: str
    prompt: str | list[Message]
    chosen: str
    rejected: str
    weight: float
    chosen_ended: bool = True
    rejected_ended: bool = True
    question: str | None = None


def read_pairs(path: Path) -> Iterator[PairText]:
    """Read every pair of the file.

    Raises:
        UserError: the file is missing, a folder or damaged; a row lacks a field or cannot be understood.
    """
    for row, (number, record) in enumerate(_records(path)):
        where = f"{path}:{number}"
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
        yield _pair(record, row, where)


def _pair(record: dict[str, Any], row: int, where: str) -> PairText:
    for name in _LOST_FIELDS:
        if record.get(name):
            raise UserError(f"{where}: field {name!r} would be lost; write it into 'prompt', as text or as a message")
    prompt, chosen, rejected = _sides(record, where)
    for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if isinstance(text, str):
            _check_text(text, f"{where}: field {name!r}")
    return PairText(
        row=row,
        where=where,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        weight=_weight(record, where),
        chosen_ended=_flag(record, "chosen_ended", where),
        rejected_ended=_flag(record, "rejected_ended", where),
        question=_question(record),
    )


def _sides(record: dict[str, Any], where: str) -> tuple[str | list[Message], str, str]:
    """Prompt and both answers; messages before the last one of both conversations belong to the prompt."""
    named = [name for name in _PROMPT_FIELDS if record.get(name) is not None]
    if len(named) > 1:
        raise UserError(f"{where}: fields {named[0]!r} and {named[1]!r} both hold a prompt; leave one out")
    prompt = _value(record, named[0], where) if named else None
    chosen, rejected = _value(record, "chosen", where), _value(record, "rejected", where)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(f"{where}: 'chosen' and 'rejected' must both be texts or both be messages")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            raise UserError(f"{where}: field 'prompt' must be a non-empty string or list of messages")
        if isinstance(prompt, list):
            _check_prompt(prompt, where)
        return prompt, chosen, rejected
    assert isinstance(chosen, list) and isinstance(rejected, list)
    shared = _shared_turns(chosen, rejected)
    before, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if [turn["role"] for turn in turns] != ["assistant"]:
            found = _shown(" ".join(turn["role"] for turn in turns))
            raise UserError(
                f"{where}: field {name!r} must hold one assistant message behind what it shares with the other answer, "
                f"found: {found}; turns before the last belong to 'prompt'"
            )
    turns = _prompt_turns(prompt, before, where)
    _check_prompt(turns, where)
    return turns, chosen[0]["content"], rejected[0]["content"]


def _prompt_turns(prompt: str | list[Message] | None, before: list[Message], where: str) -> list[Message]:
    """The prompt and the turns that both answers begin with, which may repeat it or go on behind it."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
    spoken = [turn for turn in before if turn["role"] != "system"]
    if not turns or before[: len(turns)] == turns:
        return before
    if isinstance(prompt, str) and spoken[:1] == turns:
        return before
    if before and before[0]["role"] != "assistant":
        raise UserError(f"{where}: 'chosen' and 'rejected' begin with other turns than 'prompt' holds")
    return turns + before


def _shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """How many turns both begin with; the last of each is its answer."""
    most = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(most) if chosen[i] != rejected[i]), max(most, 0))


def _check_prompt(turns: list[Message], where: str) -> None:
    if not turns:
        raise UserError(f"{where}: there is no prompt: 'chosen' and 'rejected' share no turn, and 'prompt' is missing")
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise UserError(f"{where}: field 'prompt': a system message must be the first")
    if turns[-1]["role"] != "user":
        raise UserError(f"{where}: field 'prompt' must end with a user message, ends with {turns[-1]['role']}")


def _value(record: dict[str, Any], name: str, where: str) -> str | list[Message]:
    value = record.get(name)
    if isinstance(value, dict):  # ShareGPT's `chosen` is one message
        value = [value]
    if not isinstance(value, str | list) or not value:
        raise UserError(f"{where}: field {name!r} must be a non-empty string or list of messages")
    if isinstance(value, str):
        return value
    return [_message(turn, f"{where}: field {name!r}, message {number}") for number, turn in enumerate(value, start=1)]


def _message(turn: Any, where: str) -> Message:
    """One turn as role and content, from OpenAI's or ShareGPT's spelling."""
    if not isinstance(turn, dict):
        raise UserError(f"{where} must be an object with 'role' and 'content', is {type(turn).__name__}")
    given = {name: value for name, value in turn.items() if value is not None}
    role_key, text_key = ("from", "value") if "from" in given or "value" in given else ("role", "content")
    for name in (role_key, text_key):
        if name not in given:
            raise UserError(f"{where} has no {name!r}" + (", it is null" if name in turn else ""))
    for name, value in given.items():
        if name not in (role_key, text_key) and value not in ("", [], {}):
            raise UserError(f"{where}: {_shown(name)} would be lost")
    role = given[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        raise UserError(f"{where}: role {_shown(role)} is none of {', '.join(_ROLES)}")
    text = _content(given[text_key], f"{where}: {text_key!r}")
    _check_text(text, f"{where}: {text_key!r}")
    return {"role": _ROLES[role], "content": text}


def _content(content: Any, where: str) -> str:
    """A text, or OpenAI's parts of type text joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{where} must be a text or a list of parts, is {type(content).__name__}")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"{where}: a part of type {_shown(kind)} cannot be read, only type 'text'")
        texts.append(part["text"])
    return "".join(texts)


def _check_text(text: str, where: str) -> None:
    if not text:
        raise UserError(f"{where} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds an escaped lone surrogate, which is no text") from None


def _weight(record: dict[str, Any], where: str) -> float:
    weight = record.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise UserError(f"{where}: field 'weight' must be a positive number, is {_shown(weight)}")
    return float(weight)


def _question(record: dict[str, Any]) -> str | None:
    """The question's own name. What is no name (NaN, a list) is as good as none: the prompt tells questions apart."""
    for name in _QUESTION_FIELDS:
        value = record.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)
        if isinstance(value, float) and value.is_integer():  # how a table with gaps holds whole numbers
            return str(int(value))
    return None


def _flag(record: dict[str, Any], name: str, where: str) -> bool:
    value = record.get(name)
    if value is None:
        return True
    if not isinstance(value, bool):
        raise UserError(f"{where}: field {name!r} must be true or false, is {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """(line or item number from 1, value) of every row."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected a file of pairs (JSON lines, JSON or Parquet)")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".parquet":
        yield from _parquet_records(path)
        return
    try:
        with _open(path) as stream:
            first = stream.readline().removeprefix(_BYTE_ORDER_MARK)
            if first.startswith(_LFS_POINTER):
                raise UserError(f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull`")
            if first.lstrip()[:1] == b"[":
                yield from _array(path, first + stream.read())
            else:
                yield from _lines(path, first, stream)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _array(path: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    """The items of a JSON array, numbered as lines are."""
    try:
        rows = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: not a JSON array ({error})") from None
    yield from enumerate(rows, start=1)


def _lines(path: Path, first: bytes, stream: io.BufferedIOBase) -> Iterator[tuple[int, Any]]:
    number, line = 1, first
    while line:
        if line.strip():
            try:
                yield number, orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error})") from None
        number, line = number + 1, stream.readline()


@contextmanager
def _open(path: Path) -> Iterator[io.BufferedIOBase]:
    """The file's bytes, decompressed as its first bytes say."""
    with open(path, "rb") as stream:
        magic = stream.read(4)
        stream.seek(0)
        if magic[:2] == b"\x1f\x8b":
            yield gzip.GzipFile(fileobj=stream)
        elif magic == b"\x28\xb5\x2f\xfd" or path.suffix == ".zst":
            yield io.BufferedReader(_ZstdStream(stream))
        else:
            yield stream


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a zstd file of one or more frames.

    zstandard's own reader ends without a word where a file was cut short.
    """

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream
        self._frame = self._new_frame()
        self._begun = False
        self._ready = b""

    def _new_frame(self) -> Any:
        return zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            compressed = self._stream.read(_ZSTD_INPUT)
            if not compressed:
                if self._begun:
                    raise EOFError("the zstd stream is cut short")
                return 0
            self._ready, self._begun = self._frame.decompress(compressed), True
            if self._frame.eof:  # another frame may follow
                self._stream.seek(-len(self._frame.unused_data), io.SEEK_CUR)
                self._frame, self._begun = self._new_frame(), False
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _parquet_records(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: broken Parquet ({str(error).splitlines()[0]})") from None
    yield from enumerate(rows, start=1)
