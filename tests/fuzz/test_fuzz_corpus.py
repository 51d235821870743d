"""Corpus files of every make: containers, encodings, marks, packing, line ends, cuts, damage."""

import bz2
import gzip
import io
import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard
from hypothesis import strategies as st

from megatron_medllm.config.corpus import SourceConfig
from megatron_medllm.corpus.read import Documents, read_piece
from megatron_medllm.corpus.units import plan_units
from tests.fuzz.surface import fuzz, right_or_one_line

JAPANESE = "血圧が高い患者に降圧薬を投与した。ＡＢアイウ、ー「」 abcXYZ0123.,:;{}[]\"'\\/"  # in every encoding below
ENCODINGS = ["cp932", "shift_jis", "euc-jp", "iso-2022-jp", "gb18030", "utf-16-le", "utf-16-be", "utf-32-le", "utf-7"]
MARKED = ["utf-8-sig", "utf-16", "utf-32"]
PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
CONTAINERS = ["jsonl", "array", "printed array", "printed objects", "lines", "text", "parquet", "binary", "nested"]


@dataclass(frozen=True)
class File:
    """A file and how it is asked for."""

    texts: list[str]
    container: str
    encoding: str
    packing: str
    named: bool
    ending: str
    blank: int
    escaped: bool
    members: int
    chunk_bytes: int


@st.composite
def files(draw: st.DrawFn) -> File:
    container, encoding = draw(st.sampled_from(CONTAINERS)), draw(st.sampled_from(["utf-8", *MARKED, *ENCODINGS]))
    unicode = st.characters(exclude_categories=["Cs"])
    characters = st.sampled_from(JAPANESE) if encoding in ENCODINGS else st.one_of(st.sampled_from(JAPANESE), unicode)
    text = st.text(characters, max_size=60)
    if container in ("lines", "text"):  # what a line cannot hold, and what is no document
        # UTF-16's mark and a NUL are UTF-32's mark.
        text = text.map(lambda t: t.replace("\n", "").replace("\r", "").lstrip("\ufeff\0")).filter(str.strip)
    texts = draw(st.lists(text, min_size=1, max_size=1 if container == "text" else 8))
    return File(
        texts=texts,
        container=container,
        encoding=encoding,
        packing=draw(st.sampled_from(list(PACKERS))),
        named=draw(st.booleans()),
        ending=draw(st.sampled_from(["\n", "\r\n"])),
        blank=draw(st.integers(0, 2)),
        escaped=draw(st.booleans()),
        members=draw(st.integers(1, 3)),
        chunk_bytes=draw(st.sampled_from([1, 17, 100, 1 << 20])),
    )


def in_parquet(file: File) -> bool:
    return file.container in ("parquet", "binary", "nested")


def settings_of(file: File, path: Path) -> SourceConfig:
    encoding = "utf-8" if file.encoding in MARKED else file.encoding
    kind = "lines" if file.container == "lines" else "auto"
    return SourceConfig(
        paths=str(path), encoding=encoding, format=kind, text_field="doc.text" if file.container == "nested" else "text"
    )


def name_of(file: File) -> str:
    suffix = {"lines": ".txt", "text": ".txt", "array": ".json", "printed array": ".json"}.get(file.container, ".jsonl")
    return "in.parquet" if in_parquet(file) else "in" + suffix + (file.packing if file.named else "")


def bytes_of(file: File) -> bytes:
    """The file's content, packed in `members` parts."""
    if in_parquet(file):
        encoding = file.encoding if file.encoding in ENCODINGS else "utf-8"
        column = pyarrow.array(file.texts, pyarrow.string())
        if file.container == "binary":
            column = pyarrow.array([text.encode(encoding) for text in file.texts], pyarrow.binary())
        if file.container == "nested":
            table = pyarrow.table({"doc": pyarrow.StructArray.from_arrays([column], ["text"])})
        else:
            table = pyarrow.table({"text": column, "other": list(range(len(file.texts)))})
        sink = io.BytesIO()
        pyarrow.parquet.write_table(table, sink, row_group_size=3)
        return sink.getvalue()
    rows = [{"id": str(number), "text": text} for number, text in enumerate(file.texts)]
    if file.container in ("lines", "text"):
        content = (file.ending * (1 + file.blank)).join(file.texts)
    elif file.container == "jsonl":
        lines = [json.dumps(row, ensure_ascii=file.escaped) for row in rows]
        content = (file.ending * (1 + file.blank)).join(lines)
    elif file.container == "printed objects":
        content = file.ending.join(json.dumps(row, ensure_ascii=file.escaped, indent=2) for row in rows)
    else:
        content = json.dumps(rows, ensure_ascii=file.escaped, indent=1 if "printed" in file.container else None)
    data = content.encode(file.encoding)
    pack, step = PACKERS[file.packing], -(-len(data) // file.members)
    return b"".join(pack(data[start : start + step]) for start in range(0, len(data), step))


def read(file: File, path: Path) -> list[Documents]:
    source = settings_of(file, path)
    units = plan_units("s", source, first_number=0, chunk_bytes=file.chunk_bytes)
    return [batch for unit in units for piece in unit.pieces for batch in read_piece(piece, source)]


@fuzz("corpus files", file=files())
def test_whole_files_are_read_right(folder: Path, file: File) -> None:
    path = folder / name_of(file)
    path.write_bytes(bytes_of(file))
    outcome = right_or_one_line(lambda: read(file, path))
    assert outcome.refusal is None
    assert [loss.reason for batch in outcome.value for loss in batch.bad] == []
    assert [text for batch in outcome.value for text in batch.texts] == file.texts


@fuzz("corpus files cut short", file=files(), share=st.floats(0, 1, exclude_max=True))
def test_cut_files_give_a_beginning_and_say_so(folder: Path, file: File, share: float) -> None:
    path = folder / name_of(file)
    whole = bytes_of(file)
    cut = int(share * len(whole))
    path.write_bytes(whole[:cut])
    outcome = right_or_one_line(lambda: read(file, path))
    if outcome.refusal is not None or (cut < 10 and file.packing and not file.named):  # neither name nor magic tells
        return
    found = [text for batch in outcome.value for text in batch.texts]
    lost = [loss for batch in outcome.value for loss in batch.bad]
    if file.container in ("lines", "text"):  # where a text ends nobody can tell
        assert "".join(file.texts).startswith("".join(found)) or lost
        return
    assert found == file.texts[: len(found)]
    # A file that ends between two lines is whole, and so is one that ends between two members.
    mute = file.container in ("jsonl", "printed objects") and (not file.packing or file.members > 1)
    assert len(found) == len(file.texts) or lost or mute or not cut


@fuzz(
    "corpus files damaged", file=files(), damage=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), max_size=3)
)
def test_damaged_files_never_crash_the_reader(folder: Path, file: File, damage: list[tuple[float, bytes]]) -> None:
    data = bytearray(bytes_of(file))
    for share, spoiled in damage:
        position = int(share * len(data))
        data[position : position + len(spoiled)] = spoiled
    path = folder / name_of(file)
    path.write_bytes(data)
    outcome = right_or_one_line(lambda: read(file, path))
    for batch in outcome.value or []:
        assert len(batch.texts) == len(batch.ids) == len(batch.lines)
        assert all("\n" not in loss.reason and loss.line > 0 for loss in batch.bad)
        for text in batch.texts:
            text.encode()  # what is read is Unicode


@fuzz("corpus files of anything", data=st.binary(max_size=300), name=st.sampled_from(
    ["a.jsonl", "a.json", "a.txt", "a.parquet", "a.jsonl.gz", "a.json.zst", "a.txt.bz2", "a.jsonl.xz", "a.csv", "a"]
), encoding=st.sampled_from(["utf-8", *ENCODINGS]))  # fmt: skip
def test_any_bytes_are_read_or_refused(folder: Path, data: bytes, name: str, encoding: str) -> None:
    path = folder / name
    path.write_bytes(data)
    source = SourceConfig(paths=str(path), encoding=encoding)

    def read_all() -> list[Documents]:
        units = plan_units("s", source, first_number=0, chunk_bytes=40)
        return [batch for unit in units for piece in unit.pieces for batch in read_piece(piece, source)]

    right_or_one_line(read_all)
