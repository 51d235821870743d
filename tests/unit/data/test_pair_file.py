"""Pairs in the forms in which people have them: read to the same thing, or refused by file, line and field."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_medllm.data.pair_file import PairText, read_pairs
from megatron_medllm.errors import UserError

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
SYSTEM = {"role": "system", "content": "s"}
TURN = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "o"}]


def said(who: str, text: Any) -> dict:
    return {"from": who, "value": text}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


def read(tmp_path: Path, *rows: Any) -> list[PairText]:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_pairs(path))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},  # TRL, explicit prompt
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},  # TRL, implicit prompt
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # both, as UltraFeedback has it
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "q", "chosen": [GOOD], "rejected": [BAD]},
        {"conversations": [said("human", "q")], "chosen": said("gpt", "a"), "rejected": said("gpt", "b")},  # ShareGPT
        {"prompt": [said("human", "q")], "chosen": [said("gpt", "a")], "rejected": [said("gpt", "b")]},
        {"prompt": [said("user", "q")], "chosen": [said("assistant", "a")], "rejected": [said("assistant", "b")]},
        {"messages": [USER | {"content": parts("q")}], "chosen": [GOOD | {"content": parts("a")}],
         "rejected": [BAD | {"content": parts("b", "")}]},  # OpenAI's content parts
        {"prompt": [USER | {"tool_calls": None}], "chosen": [GOOD | {"name": ""}], "rejected": [BAD]},  # nulls
    ],
)  # fmt: skip
def test_conversations_in_their_spellings(tmp_path: Path, row: dict) -> None:
    (pair,) = read(tmp_path, row)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], "a", "b")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        # Several turns: all but the last belong to the prompt, wherever they are written.
        ({"chosen": [SYSTEM, *TURN, USER, GOOD], "rejected": [SYSTEM, *TURN, USER, BAD]}, [SYSTEM, *TURN, USER]),
        ({"prompt": TURN[:1], "chosen": [TURN[1], USER, GOOD], "rejected": [TURN[1], USER, BAD]}, [*TURN, USER]),
        ({"prompt": TURN[:1], "chosen": [*TURN, USER, GOOD], "rejected": [*TURN, USER, BAD]}, [*TURN, USER]),
        ({"prompt": "q", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, [SYSTEM, USER]),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, [USER]),
    ],
)
def test_turns_before_the_answer_are_the_prompt(tmp_path: Path, row: dict, prompt: list) -> None:
    (pair,) = read(tmp_path, row)
    assert pair.prompt == prompt and pair.chosen == "a"


PLAIN = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PLAIN, "rejected": None}, "field 'rejected' must be"),
        ({**PLAIN, "prompt": []}, "field 'prompt' must be"),
        ({**PLAIN, "prompt": [said("human", None)]}, "field 'prompt', message 1 has no 'value', it is null"),
        ({**PLAIN, "prompt": [USER | {"content": None}]}, "message 1 has no 'content', it is null"),
        ({**PLAIN, "prompt": [USER | {"content": 3}]}, "'content' must be a text or a list of parts, is int"),
        ({**PLAIN, "prompt": [USER | {"content": ""}]}, "message 1: 'content' is empty"),
        ({**PLAIN, "prompt": [{"role": "tool", "content": "q"}]}, "role 'tool' is none of system, user"),
        ({**PLAIN, "prompt": [said("function_call", "q")]}, "role 'function_call' is none of"),
        ({**PLAIN, "prompt": [{"text": "q"}]}, "message 1 has no 'role'"),
        ({**PLAIN, "prompt": ["q"]}, "message 1 must be an object"),
        ({**PLAIN, "prompt": [USER, GOOD]}, "must end with a user message, ends with assistant"),
        ({**PLAIN, "prompt": [USER, SYSTEM]}, "a system message must be the first"),
        ({**PLAIN, "prompt": [USER | {"content": [{"type": "image_url"}]}]}, "part of type 'image_url'"),
        ({**PLAIN, "prompt": [USER | {"tool_calls": [{"id": "1"}]}]}, "'tool_calls' would be lost"),
        ({**PLAIN, "system": "s"}, "field 'system' would be lost"),
        ({**PLAIN, "images": ["x.png"]}, "field 'images' would be lost"),
        ({**PLAIN, "conversations": [USER]}, "'prompt' and 'conversations' both hold a prompt"),
        ({**PLAIN, "chosen": [GOOD]}, "must both be texts or both be messages"),
        ({"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD]},
         "field 'chosen' must hold one assistant message .* found: 'assistant user assistant'"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "field 'chosen' must hold one .* found: 'user'"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "there is no prompt"),
        ({"chosen": [USER, GOOD], "rejected": [TURN[0], BAD]}, "field 'chosen' must hold one"),
        ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "begin with other turns than 'prompt'"),
        ({"chosen": "qa", "rejected": "qb"}, "field 'prompt' must be"),
        ({**PLAIN, "weight": "1"}, "field 'weight' must be a positive number, is '1'"),
        ({**PLAIN, "weight": True}, "field 'weight' must be"),
        ({**PLAIN, "rejected_ended": "no"}, "field 'rejected_ended' must be true or false"),
        ({**PLAIN, "chosen": "\ud800"}, "lone surrogate|not JSON"),
        ({**PLAIN, "prompt": [{"role": "x" * 9999, "content": "q"}]}, "role 'x{79}… is none of"),
        (["q", "a", "b"], "expected a JSON object, found list"),
    ],
)  # fmt: skip
def test_what_would_be_misread_is_refused_by_line(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"pairs\.jsonl:2: ?.*({message})"):
        read(tmp_path, PLAIN, row)


def test_lines_are_counted_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n" + json.dumps(PLAIN) + "\n\n{}\n")
    rows = read_pairs(path)
    first = next(rows)
    assert (first.row, first.where) == (0, f"{path}:2")
    with pytest.raises(UserError, match=r":4: field 'chosen'|:4: field 'prompt'"):
        next(rows)


TEXT = "".join(json.dumps(PLAIN | {"weight": n}) + "\n" for n in (1, 2)).encode()
ARRAY = json.dumps([PLAIN | {"weight": n} for n in (1, 2)], indent=1).encode()


def frames(data: bytes) -> bytes:
    """Two zstd frames, the second with a long window."""
    settings = zstandard.ZstdCompressionParameters(window_log=30)
    long = zstandard.ZstdCompressor(compression_params=settings).compressobj()  # of unknown size: it asks for 1 GiB
    return zstandard.compress(data[:70]) + long.compress(data[70:]) + long.flush()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("p.jsonl", TEXT),
        ("p.jsonl", b"\xef\xbb\xbf" + TEXT.replace(b"\n", b"\r\n")),
        ("p.json", ARRAY),
        ("p.json", TEXT),
        ("p.jsonl.gz", gzip.compress(TEXT, mtime=0)),
        ("p.json.gz", gzip.compress(b"\xef\xbb\xbf" + ARRAY, mtime=0)),
        ("p.jsonl", gzip.compress(TEXT[:70], mtime=0) + gzip.compress(TEXT[70:], mtime=0)),  # by content
        ("p.jsonl.zst", zstandard.compress(TEXT)),
        ("p.jsonl.zst", frames(TEXT)),
    ],
)
def test_containers(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert [pair.weight for pair in read_pairs(tmp_path / name)] == [1.0, 2.0]


def test_parquet_with_messages(tmp_path: Path) -> None:
    rows = [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "weight": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    (pair,) = read_pairs(tmp_path / "p.parquet")
    assert pair.prompt == [USER] and pair.weight == 1.0


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        ("p.jsonl", b'{"prompt": "\xff"}\n', r"p\.jsonl:1: not JSON"),
        ("p.jsonl", b"[1, 2", "not a JSON array"),
        ("p.jsonl.gz", gzip.compress(TEXT, mtime=0)[:-12], "cannot be read"),
        ("p.jsonl.zst", b"plain text", "cannot be read"),
        ("p.jsonl.zst", zstandard.compress(TEXT)[:-5], "cannot be read|cut short"),
        ("p.parquet", b"PAR1", "broken Parquet"),
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_pairs(tmp_path / name))


def test_a_folder_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; expected a file of pairs"):
        list(read_pairs(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        list(read_pairs(tmp_path / "p.parquet"))
