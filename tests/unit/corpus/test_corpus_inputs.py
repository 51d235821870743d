"""Files as people have them: packed, marked, encoded, nested, printed, cut, named wrongly. Right, or told by name."""

import bz2
import gzip
import io
import json
import lzma
import random
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from pydantic import ValidationError

from megatron_medllm.config.corpus import SourceConfig
from megatron_medllm.corpus.streams import BATCH_BYTES, BrokenInputError, read_blocks
from megatron_medllm.corpus.tokenizer import describe_tokenizer
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_jsonl
from tests.worlds.corpus import SENTENCES, TEXTS, read_all, read_dropped, write_jsonl

ROWS = [{"id": f"a-{i}", "text": text} for i, text in enumerate(TEXTS)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def long_zstd(data: bytes, *, window_log: int = 31) -> bytes:
    """As `zstd --long=31 -c < FILE`: the size is not told, so that the frame asks for the whole window."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=True, write_content_size=0)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = packer.compress(data) + packer.flush()
    assert zstandard.get_frame_parameters(packed).window_size == 1 << window_log
    return packed


PACKED = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
UNMARKED = ["cp932", "shift_jis", "euc-jp", "iso-2022-jp", "utf-16-le", "utf-16-be", "utf-32-le", "gb18030"]


# -- packed ----------------------------------------------------------------------------------------------------------


def test_a_zstd_file_with_a_long_window_is_read(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(long_zstd(JSONL.encode()))
    assert read_all(tmp_path / "a.jsonl.zst")[0] == TEXTS
    texts, bad, _ = read_all(tmp_path / "a.jsonl.zst", zstd_window_mb=1024)
    assert texts == [] and [loss.reason for loss in bad] == ["its zstd window is larger than `zstd_window_mb` allows"]
    with pytest.raises(ValidationError, match="zstd_window_mb"):
        SourceConfig(paths="x", zstd_window_mb=4096)  # the library's own bound


@pytest.mark.parametrize("suffix", PACKED)
def test_packed_files_of_several_members_and_padding_are_read(tmp_path, suffix):
    pack, data = PACKED[suffix], JSONL.encode()
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(pack(data))
    assert read_all(path)[0] == TEXTS
    path.write_bytes(pack(data[:100]) + pack(b"") + pack(data[100:]))
    assert read_all(path)[0] == TEXTS
    if suffix != "zst":
        path.write_bytes(pack(data[:100]) + bytes(512) + pack(data[100:]) + bytes(3 << 20))
        assert read_all(path)[:2] == (TEXTS, [])


@pytest.mark.parametrize("suffix", PACKED)
def test_packed_files_that_are_cut_or_damaged_say_so_at_every_place(tmp_path, suffix):
    whole = PACKED[suffix](JSONL.encode())
    path = tmp_path / f"a.jsonl.{suffix}"
    for cut in range(1, len(whole), 7):
        path.write_bytes(whole[:cut])
        texts, bad, _ = read_all(path)
        assert texts == TEXTS[: len(texts)] and len(bad) == 1 and "cut short" in bad[0].reason, cut
    path.write_bytes(whole + b"rubbish" * 4)
    texts, bad, _ = read_all(path)
    assert texts == TEXTS and len(bad) == 1 and "stream is broken" in bad[0].reason
    path.write_bytes(bytes(100))
    assert len(read_all(path)[1]) == 1


@pytest.mark.parametrize("suffix", PACKED)
def test_packing_is_told_by_the_first_bytes_too(tmp_path, suffix):
    (tmp_path / "a.jsonl").write_bytes(PACKED[suffix](JSONL.encode()))
    assert read_all(tmp_path / "a.jsonl")[0] == TEXTS
    (tmp_path / "A.JSONL").write_bytes(JSONL.encode())
    assert read_all(tmp_path / "A.JSONL")[0] == TEXTS


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["gzip", "zstd", "bzip2", "xz"])
def test_unpacking_is_bounded_at_every_step(compression):
    pack = dict(zip(["gzip", "zstd", "bzip2", "xz"], PACKED.values(), strict=True))[compression]
    stream = io.BytesIO(pack(bytes(200 << 20)))
    sizes = [len(block) for block in read_blocks(stream, compression, window_bytes=1 << 27)]
    assert sum(sizes) == 200 << 20 and max(sizes) <= BATCH_BYTES + (1 << 17)


MEMORY = """
import resource, sys
from megatron_medllm.config.corpus import SourceConfig
from megatron_medllm.corpus.read import read_piece
from megatron_medllm.corpus.units import plan_units
source = SourceConfig(paths=sys.argv[1], max_document_mb=16)
pieces = [piece for unit in plan_units("s", source, first_number=0, chunk_bytes=1 << 30) for piece in unit.pieces]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
losses = [loss.reason for piece in pieces for batch in read_piece(piece, source) for loss in batch.bad]
print(losses, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.gz", "a.json.xz"])
def test_a_small_file_that_unpacks_far_takes_bounded_memory(tmp_path, name):
    data = (b'[{"text": "' if ".json.x" in name else b'{"text": "') + b"x" * (400 << 20)
    (tmp_path / name).write_bytes(PACKED[name.rsplit(".", 1)[1]](data))
    assert (tmp_path / name).stat().st_size < 500_000
    command = [sys.executable, "-c", MEMORY, str(tmp_path / name)]
    losses, grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rsplit(" ", 1)
    assert "longer than 16 MB" in losses
    assert int(grown) < 150  # MiB


def members_of(pack, data, size):
    return b"".join(pack(data[start : start + size]) for start in range(0, len(data), size))


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.json"])
def test_what_a_file_is_is_told_over_the_bounds_of_its_members(tmp_path, suffix, encoding, name):
    """FF FE 00 | 00 ... is a mark of UTF-32 cut in two, and FF FE that of UTF-16."""
    content = "血圧" if name == "a.txt" else ' [{"text": "血圧"}]'
    for size in (1, 2, 3, 5):
        (tmp_path / f"{name}.{suffix}").write_bytes(members_of(PACKED[suffix], content.encode(encoding), size))
        assert read_all(tmp_path / f"{name}.{suffix}")[:2] == (["血圧"], []), size


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("name", ["a.txt", "a.json"])
def test_what_a_file_is_is_told_where_its_first_block_is_long(tmp_path, suffix, name):
    """bzip2 and zstd give nothing before a whole block, here of more than 64 KiB when packed."""
    text = "".join(map(chr, random.Random(0).choices(range(0x4E00, 0x9FA0), k=100_000)))
    content = text if name == "a.txt" else json.dumps([{"text": text}], ensure_ascii=False)
    (tmp_path / f"{name}.{suffix}").write_bytes(PACKED[suffix](content.encode("utf-16")))
    assert read_all(tmp_path / f"{name}.{suffix}")[:2] == ([text], [])


def test_an_archive_in_short_members_is_refused_by_name(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(members_of(gzip.compress, bytes(257) + b"ustar" + bytes(250), 100))
    with pytest.raises(UserError, match="is an archive; unpack it"):
        read_all(tmp_path / "a.jsonl.gz")


def test_archives_and_packed_parquet_are_refused_by_name(tmp_path):
    for name, data, message in (
        ("a.tar.gz", gzip.compress(b"x"), "is an archive; unpack it"),
        ("a.jsonl", b"PK\x03\x04" + bytes(50), "is an archive; unpack it"),
        ("a.jsonl.gz", gzip.compress(bytes(257) + b"ustar" + bytes(250)), "is an archive; unpack it"),
        ("a.parquet.gz", gzip.compress(b"PAR1"), "is a packed Parquet file"),
        ("a.csv", b"text\nx\n", "cannot tell the format of"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_all(tmp_path / name)


def test_pointers_are_called_pointers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    with pytest.raises(
        UserError, match=r"a\.jsonl is a git lfs pointer, not the file itself: fetch it \(`git lfs pull`\)"
    ):
        read_all(path)
    path.rename(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="git lfs pointer"):
        read_all(tmp_path / "a.parquet")
    path = (tmp_path / "a.parquet").rename(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="git lfs pointer"):
        describe_tokenizer(str(path))
    with pytest.raises(UserError, match="git lfs pointer"):
        list(read_jsonl(path))


# -- marks and encodings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-be"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "lines.txt"])
def test_a_byte_order_mark_tells_the_encoding_and_is_no_text(tmp_path, encoding, suffix, name):
    texts = [text.replace("\n", " ") for text in TEXTS]
    content = {
        "a.jsonl": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
        "a.json": json.dumps([{"text": text} for text in texts], ensure_ascii=False, indent=1),
    }.get(name, "\r\n".join(texts))
    mark = "" if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
    data = (mark + content).encode(encoding)
    (tmp_path / (name + suffix)).write_bytes(PACKED[suffix[1:]](data) if suffix else data)
    found, bad, _ = read_all(tmp_path / (name + suffix), **({"format": "lines"} if name == "lines.txt" else {}))
    assert found == ([content] if name == "a.txt" else texts) and bad == []


def test_marks_within_joined_files_are_no_text_either(tmp_path):
    half = b"\xef\xbb\xbf" + JSONL.encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(half) + gzip.compress(half))
    assert read_all(tmp_path / "a.jsonl.gz")[:2] == (TEXTS * 2, [])


@pytest.mark.parametrize("encoding", UNMARKED)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "lines.txt"])
@pytest.mark.parametrize("chunk_bytes", [50, 1 << 20])
def test_files_in_other_encodings_are_read(tmp_path, encoding, name, chunk_bytes):
    texts = [text.replace("\n", " ") for text in TEXTS]
    content = {
        "a.jsonl": "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts),
        "a.json": json.dumps([{"text": text} for text in texts], ensure_ascii=False),
    }.get(name, "\n".join(texts))
    (tmp_path / name).write_bytes(content.encode(encoding))
    options = {"format": "lines"} if name == "lines.txt" else {}
    found, bad, _ = read_all(tmp_path / name, chunk_bytes=chunk_bytes, encoding=encoding, **options)
    assert found == ([content] if name == "a.txt" else texts) and bad == []


@pytest.mark.parametrize(("encoding", "superset"), [("shift_jis", "cp932"), ("euc-jp", "euc_jis_2004")])
def test_characters_that_only_the_superset_has_are_read(tmp_path, encoding, superset):
    data = "①㎎".encode(superset) + "10〜20".encode(encoding)
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "a.json").write_bytes(b'[{"text": "' + data + b'"}]')
    for name in ("a.txt", "a.json"):
        assert read_all(tmp_path / name, encoding=encoding)[:2] == (["①㎎10〜20"], [])


def test_what_is_not_the_encoding_spoils_its_own_line_only(tmp_path):
    good = [json.dumps({"text": text}, ensure_ascii=False) for text in SENTENCES[:3]]
    for encoding, spoil in (
        ("cp932", b'{"text": "\x81\xff"}'),
        ("euc-jp", b'{"text": "\xa4"}'),
        ("utf-8", b'{"text": "\xff"}'),
    ):
        lines = [line.encode(encoding) for line in good]
        (tmp_path / "a.jsonl").write_bytes(b"\n".join([lines[0], spoil, *lines[1:]]))
        texts, bad, _ = read_all(tmp_path / "a.jsonl", encoding=encoding)
        assert texts == SENTENCES[:3] and [(loss.line, loss.kind) for loss in bad] == [
            (2, f"not {encoding.upper().replace('EUC-JP', 'EUC_JP')}")
        ]
        (tmp_path / "a.json").write_bytes(b"[" + b",\n".join([lines[0], spoil, *lines[1:]]) + b"]")
        texts, bad, _ = read_all(tmp_path / "a.json", encoding=encoding)
        assert texts == SENTENCES[:3] and [loss.line for loss in bad] == [2], encoding
    lone = b'{"text": "'.decode().encode("utf-16-le") + b"\x00\xd8" + '"}'.encode("utf-16-le")
    lines = [line.encode("utf-16-le") for line in good]
    (tmp_path / "a.jsonl").write_bytes("\n".encode("utf-16-le").join([lines[0], lone, *lines[1:]]))
    texts, bad, _ = read_all(tmp_path / "a.jsonl", encoding="utf-16")
    assert texts == SENTENCES[:3] and [loss.line for loss in bad] == [2]


@pytest.mark.parametrize("name", ["no-such", "rot13", "base64", ""])
def test_an_unknown_encoding_is_refused(name):
    with pytest.raises(ValidationError, match="no such text encoding"):
        SourceConfig(paths="x", encoding=name)


# -- JSON in other shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_arrays_and_printed_objects_are_read(tmp_path, indent, name):
    pack = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(pack(json.dumps(ROWS, ensure_ascii=False, indent=indent).encode()))
    texts, bad, ids = read_all(tmp_path / name)
    assert texts == TEXTS and bad == [] and ids == [row["id"] for row in ROWS]
    printed = "\n".join(json.dumps(row, indent=4) for row in ROWS)
    (tmp_path / name).write_bytes(pack(printed.encode()))
    assert read_all(tmp_path / name)[:2] == (TEXTS, [])


def test_what_breaks_in_an_array_is_told_with_its_line(tmp_path):
    rows = [json.dumps(row, ensure_ascii=False) for row in ROWS[:3]]
    for rest, line, reason in (
        (['{"text": 5}'], 4, "the text is int, not a string"),
        (['"bare"'], 4, "expected a JSON object, found str"),
        (['{"body": "x", "title": "y"}'], 4, "no field 'text': there are body, title"),
        (['{"text": "\\ud800"}'], 4, "an escaped lone surrogate"),
    ):
        (tmp_path / "a.json").write_text("[" + ",\n".join(rows + rest + rows) + "]")
        texts, bad, _ = read_all(tmp_path / "a.json")
        assert texts == TEXTS[:3] * 2 and [(loss.line, loss.reason) for loss in bad] == [(line, reason)]
    (tmp_path / "a.json").write_text("[" + ",\n".join([*rows, '{"text" 5}', *rows]) + "]")
    texts, bad, _ = read_all(tmp_path / "a.json")
    assert texts == TEXTS[:3] and [(loss.line, loss.kind) for loss in bad] == [(4, "not JSON")]
    whole = "[" + ",\n".join(rows) + "]"
    for cut in range(2, len(whole) - 1, 3):
        (tmp_path / "a.json").write_text(whole[:cut])
        texts, bad, _ = read_all(tmp_path / "a.json")
        assert texts == TEXTS[: len(texts)] and len(bad) == 1, whole[:cut]


def test_an_array_longer_than_a_block_is_read(tmp_path):
    rows = [{"text": str(i) + "血圧" * 400_000} for i in range(8)]  # 2.4 MB each, blocks of 4
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False))
    assert read_all(tmp_path / "a.json")[0] == [row["text"] for row in rows]


def test_nested_fields_are_named_with_dots(tmp_path, build_one):
    rows = [{"doc": {"text": text, "meta": {"id": f"m{i}"}}, "x": 1} for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    for name in ("a.jsonl", "a.json", "a.parquet"):
        texts, bad, ids = read_all(tmp_path / name, text_field="doc.text", id_field="doc.meta.id")
        assert (texts, bad) == (TEXTS, []) and ids == [f"m{i}" for i in range(len(TEXTS))], name
        texts, bad, _ = read_all(tmp_path / name, text_field="doc.body")
        assert texts == [] and bad[0].reason.endswith("'doc.body': there are doc, x"), name
    flat = [{"doc.text": text} for text in TEXTS]
    (tmp_path / "flat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flat))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), tmp_path / "flat.parquet")
    for name in ("flat.jsonl", "flat.parquet"):
        assert read_all(tmp_path / name, text_field="doc.text")[:2] == (TEXTS, []), name


BINARY = [pyarrow.binary(), pyarrow.large_binary(), pyarrow.dictionary(pyarrow.int32(), pyarrow.binary())]


@pytest.mark.parametrize("kind", BINARY, ids=str)
def test_parquets_binary_columns_are_text(tmp_path, kind):
    values = [text.encode() for text in TEXTS[:3]] + [b"\xff", None] + [TEXTS[3].encode()]
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind)}), tmp_path / "a.parquet")
    texts, bad, _ = read_all(tmp_path / "a.parquet")
    assert texts == TEXTS[:4]
    assert [(loss.line, loss.reason) for loss in bad] == [(4, "not UTF-8"), (5, "the text is NoneType, not a string")]
    values = [text.encode("cp932") for text in TEXTS[:3]]
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind)}), tmp_path / "a.parquet")
    assert read_all(tmp_path / "a.parquet", encoding="cp932")[:2] == (TEXTS[:3], [])


def test_encoding_is_of_binary_columns_only(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    assert read_all(tmp_path / "a.parquet", encoding="utf-16")[:2] == (TEXTS, [])


@pytest.mark.parametrize("data", [b"\xed", b"\xed@", b"\xed@\xed", b"a\x87"])
def test_a_character_of_the_superset_at_the_very_end(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    texts, bad, _ = read_all(tmp_path / "a.txt", encoding="shift_jis")
    assert texts == ([data.decode("cp932")] if data == b"\xed@" else []) and len(texts) + len(bad) == 1


def test_a_broken_string_spoils_its_own_row_only(tmp_path):
    broken = pyarrow.array([b"a", b"\xff", b"b"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    texts, bad, _ = read_all(tmp_path / "a.parquet")
    assert texts == ["a", "b"] and [(loss.line, loss.reason) for loss in bad] == [(2, "not UTF-8")]


def test_a_parquet_file_with_a_damaged_column_name_is_told_by_its_kind(tmp_path):
    """Its schema is thrift, whose names nobody checks: pyarrow raises UnicodeDecodeError as it opens the file."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"doc": {"text": "a"}}]), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data.replace(b"doc", b"d\x80c"))
    texts, bad, _ = read_all(tmp_path / "a.parquet", text_field="doc.text")
    assert texts == [] and [(loss.line, loss.kind) for loss in bad] == [(1, "broken Parquet")]
    assert "can't decode byte 0x80" in bad[0].detail


def test_a_parquet_file_with_a_damaged_column_name_is_named(tmp_path, build_one):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}]), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data.replace(b"text", b"t\x80xt"))
    with pytest.raises(
        UserError, match=r"broken Parquet: 1, first .*a\.parquet:1: broken Parquet: 'utf-8' codec can't decode"
    ):
        build_one(tmp_path / "a.parquet")


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_line_ends(tmp_path, ending):
    texts = [text.replace("\n", " ") for text in TEXTS]
    (tmp_path / "a.txt").write_bytes(ending.join(texts).encode())
    assert read_all(tmp_path / "a.txt", format="lines")[:2] == (texts, [])


def test_a_line_longer_than_the_bound_is_dropped_and_the_next_is_read(tmp_path):
    rows = [json.dumps({"text": text}) for text in ("前", "x" * 12_000_000, "後", "y" * 2_000_000, "末")]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    texts, bad, _ = read_all(tmp_path / "a.jsonl", max_document_mb=1, chunk_bytes=1 << 30)
    assert texts == ["前", "後", "末"]
    reason = "a line longer than 1 MB: raise max_document_mb"
    assert [(loss.line, loss.reason) for loss in bad] == [(2, reason), (4, reason)]
    assert len(read_all(tmp_path / "a.jsonl")[0]) == 5


# -- the account -----------------------------------------------------------------------------------------------------


def test_the_account_counts_every_loss_and_names_the_first(tmp_path, build_one):
    lines = [json.dumps({"text": text}) for text in [*SENTENCES, "短い", "短", "", SENTENCES[0]]]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:2], "{broken", "[1]", "{broken", *lines[2:]]))
    _, manifest = build_one(tmp_path / "a.jsonl", clean={"min_chars": 5}, dedup={"exact": True}, chunk_mb=0.0001)
    path = tmp_path / "a.jsonl"
    facts = manifest["account"]["subjects"]["s"]
    assert facts["kept"] == manifest["sources"]["s"]["documents"] == 5
    lost = {kind: (loss["count"], loss["first"].split(" line ")[0]) for kind, loss in facts["lost"].items()}
    assert lost == {
        "not JSON": (2, f"{path}:3: not JSON: Expecting property name enclosed in double quotes:"),
        "expected a JSON object, found list": (1, f"{path}:4"),
        "clean.min_chars": (2, f"{path}:9: 2 characters"),
        "empty text": (1, f"{path}:11"),
        "dedup.exact": (1, f"{path}:12: copy of {path}:1"),
    }
    assert (
        facts["kept"] + sum(loss["count"] for loss in facts["lost"].values())
        == manifest["sources"]["s"]["documents_read"]
    )


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (
            ['{"body": "x"}'] * 3,
            {},
            r"no field 'text': 3, first .*in:1: no field 'text': there are body\); check sources\.s\.text_field,",
        ),
        (["not json"] * 2, {}, r"not JSON: 2, first .*; check sources\.s\.format,"),
        (['{"text": "short"}'], {"clean": {"min_chars": 9}}, r"clean\.min_chars: 1, .*; check sources\.s\.clean,"),
    ],
)
def test_a_source_that_keeps_nothing_is_an_error_with_the_way_out(tmp_path, build_one, lines, options, message):
    path = tmp_path / "in"
    path.write_text("\n".join(lines))
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        UserError, match=r"^s: none of \d documents is left \(" + message.replace("in:1", r"in\.jsonl:1")
    ):
        build_one(tmp_path / "in.jsonl", **options)
    assert len(read_dropped(tmp_path / "out")) == len(lines)
    write_jsonl(tmp_path / "in.jsonl", SENTENCES)  # mended, the same command goes through
    assert build_one(tmp_path / "in.jsonl")[1]["documents"] == len(SENTENCES)


def test_a_source_in_the_wrong_encoding_says_so(tmp_path, build_one):
    (tmp_path / "a.txt").write_bytes(SENTENCES[0].encode("cp932"))
    with pytest.raises(UserError, match=r"not UTF-8: 1, first .*a\.txt:1\); check sources\.s\.encoding, or leave"):
        build_one(tmp_path / "a.txt")


def test_a_source_of_copies_only_says_so(tmp_path, configure):
    from megatron_medllm.corpus.build import build

    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", SENTENCES)
    sources = {name: {"paths": str(tmp_path / f"{name}.jsonl")} for name in ("a", "b")}
    with pytest.raises(
        UserError, match=r"^b: none of 5 documents is left \(dedup\.exact: 5, .*; check dedup, or leave"
    ):
        build(configure(sources, dedup={"exact": True}), tmp_path / "out", workers=1)


def test_a_data_set_that_breaks_off_is_told(tmp_path, build_one):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a b c"}\n{"text": \n')
    source = SourceConfig(dataset=str(tmp_path / "data"))
    from megatron_medllm.corpus.read import read_piece
    from megatron_medllm.corpus.units import plan_units

    unit = plan_units("s", source, first_number=0, chunk_bytes=1)[0]
    batches = list(read_piece(unit.pieces[0], source))
    assert [loss.kind for batch in batches for loss in batch.bad] == ["the data set breaks off"]


def test_no_frame_is_no_zstd():
    with pytest.raises(BrokenInputError, match="zstd stream is broken"):
        list(read_blocks(io.BytesIO(b"nothing of the kind"), "zstd", window_bytes=1 << 20))
