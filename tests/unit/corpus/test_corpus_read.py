"""Every format gives the same documents; what is broken is counted with file and line, and the rest goes on."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_medllm.config.corpus import SourceConfig
from megatron_medllm.corpus.build import build
from megatron_medllm.corpus.index import read_index
from megatron_medllm.corpus.read import count_lines, read_piece
from megatron_medllm.corpus.units import plan_units
from megatron_medllm.errors import UserError
from tests.worlds.corpus import SENTENCES, TEXTS, read_all, read_dropped, write_jsonl


def test_formats_agree(tmp_path):
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress(plain.read_bytes()[:200]) + gzip.compress(plain.read_bytes()[200:])
    )
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(plain.read_bytes()))
    table = pyarrow.table({"text": TEXTS, "id": [f"a-{i}" for i in range(len(TEXTS))], "other": [1] * len(TEXTS)})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=3)
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        texts, bad, ids = read_all(tmp_path / name)
        assert texts == TEXTS and bad == [], name
        assert ids == [f"a-{i}" for i in range(len(TEXTS))], name
    (tmp_path / "e.txt").write_text("一行目\r\n二行目\n\n三行目", encoding="utf-8")
    assert read_all(tmp_path / "e.txt")[0] == ["一行目\r\n二行目\n\n三行目"]
    assert read_all(tmp_path / "e.txt", format="lines")[0] == ["一行目", "二行目", "三行目"]


def test_data_set_by_local_path(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", TEXTS)
    source = SourceConfig(dataset=str(tmp_path))
    units = plan_units("s", source, first_number=0, chunk_bytes=1 << 20)
    texts = [text for unit in units for batch in read_piece(unit.pieces[0], source) for text in batch.texts]
    assert texts == TEXTS


@pytest.mark.parametrize("chunk_bytes", [1, 37, 100, 333, 1 << 20])
def test_cutting_loses_and_repeats_nothing(tmp_path, chunk_bytes):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip(b"\n"))
    assert read_all(path, chunk_bytes=chunk_bytes)[0] == TEXTS


def test_lines_before_a_byte(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"ab\ncd\n\nef")
    assert [count_lines(path, stop) for stop in range(10)] == [0, 1, 1, 1, 2, 2, 2, 3, 4, 4]


BAD_LINES = [
    (b'{"text": "broken', "not JSON"),
    (b'["a list"]', "expected a JSON object, found list"),
    (b'{"body": "x"}', "no field 'text'"),
    (b'{"text": ["a"]}', "the text is list, not a string"),
    (b'{"text": null}', "the text is NoneType, not a string"),
    (b'{"text": "\xff\xfe"}', "not UTF-8"),
    (b'{"text": "a \\ud800 b"}', "an escaped lone surrogate"),
]


def write_bad(path):
    good = json.dumps({"text": SENTENCES[0]}, ensure_ascii=False).encode()
    lines = [good, *(line for line, _ in BAD_LINES), b"", b'{"text": "NaN beside is fine", "score": NaN}', good]
    path.write_bytes(b"\n".join(lines) + b"\n")


@pytest.mark.parametrize("chunk_mb", [64, 0.0001])
def test_broken_lines_are_quarantined(tmp_path, build_one, chunk_mb):
    write_bad(tmp_path / "bad.jsonl")
    output, manifest = build_one(tmp_path / "bad.jsonl", chunk_mb=chunk_mb)
    assert manifest["sources"]["s"]["documents"] == 3
    assert manifest["sources"]["s"]["documents_read"] == 10
    assert manifest["sources"]["s"]["dropped"] == {"read": 7}
    rows = read_dropped(output)
    assert [row["line"] for row in rows] == [2, 3, 4, 5, 6, 7, 8]
    assert {row["file"] for row in rows} == {str(tmp_path / "bad.jsonl")}
    assert all(row["reason"].startswith(reason) for row, (_, reason) in zip(rows, BAD_LINES, strict=True))


def test_strict_names_file_and_line(tmp_path, build_one):
    write_bad(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match=r"bad\.jsonl:2: not JSON"):
        build_one(tmp_path / "bad.jsonl", strict=True, chunk_mb=0.0001)


def test_broken_files(tmp_path, build_one):
    folder = tmp_path / "in"
    folder.mkdir()
    plain = write_jsonl(tmp_path / "plain.jsonl", TEXTS * 200).read_bytes()
    (folder / "a_empty.jsonl").write_bytes(b"")
    (folder / "b_empty.jsonl.gz").write_bytes(b"")
    (folder / "c_cut.jsonl.gz").write_bytes(gzip.compress(plain)[:-200])
    (folder / "d_cut.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(plain)[:-20])
    (folder / "e_wrong.jsonl.gz").write_bytes(b"not gzip at all")
    (folder / "f_wrong.parquet").write_bytes(b"not parquet at all")
    (folder / "g_good.jsonl").write_bytes(plain)
    output, manifest = build_one(folder)
    rows = {row["file"].rsplit("/", 1)[1]: row for row in read_dropped(output)}
    assert sorted(rows) == ["c_cut.jsonl.gz", "d_cut.jsonl.zst", "e_wrong.jsonl.gz", "f_wrong.parquet"]
    assert rows["c_cut.jsonl.gz"]["reason"] == "the gzip stream is cut short"
    assert rows["d_cut.jsonl.zst"]["reason"] == "the zstd stream is cut short"
    assert rows["e_wrong.jsonl.gz"]["reason"].startswith("the gzip stream is broken")
    assert manifest["sources"]["s"]["documents"] > len(TEXTS) * 200
    assert manifest["sources"]["s"]["dropped"] == {"read": 4}


@pytest.mark.slow
def test_one_document_larger_than_a_batch(tmp_path, build_one):
    big = "血圧" * 1_500_000  # 9 MB, read in blocks of 4
    output, manifest = build_one([SENTENCES[0], big, SENTENCES[1]], chunk_mb=1)
    assert manifest["sources"]["s"]["documents"] == 3
    assert manifest["sources"]["s"]["characters"] == len(big) + len(SENTENCES[0]) + len(SENTENCES[1])
    lengths = read_index(output / "s").lengths
    assert np.argmax(lengths) == 1


def test_nothing_to_read(tmp_path, configure):
    with pytest.raises(UserError, match=r"sources\.s\.paths: .*none\*\.jsonl matches no file"):
        build(configure({"s": {"paths": str(tmp_path / "none*.jsonl")}}), tmp_path / "out", workers=1)


def test_a_source_without_a_document_is_refused(tmp_path, build_one):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match=r"^s: no documents at all; check sources\.s\.paths, or leave the source out$"):
        build_one(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match=r"^s: none of 2 documents is left \(empty text: 2, first .*in\.jsonl:1\)"):
        build_one(["", ""])
