"""Texts that try a corpus builder, what it reads and drops of them, and Megatron's own way of writing them."""

import json
import os
from pathlib import Path

import orjson
import tokenizers
import torch
import zstandard
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_medllm.config.corpus import SourceConfig
from megatron_medllm.corpus.read import read_piece
from megatron_medllm.corpus.units import plan_units

SHARED = Path(os.environ.get("MEDLLM_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))

SENTENCES = [
    "高血圧症の患者に降圧薬を投与した。血圧は収縮期140mmHgから120mmHgへ下がった。",
    "心電図でST上昇を認め、急性心筋梗塞と診断した。緊急冠動脈造影を行う。",
    "発熱と咳嗽を主訴に来院した。胸部エックス線写真で右下肺野に浸潤影を認める。",
    "The patient was given 10 mg of warfarin; PT-INR rose to 2.5.",
    "糖尿病性腎症では蛋白尿が持続し、糸球体濾過量がしだいに低下する。",
]


def write_jsonl(path: Path, texts: list[str], *, ids: bool = True) -> Path:
    rows = [{"id": f"{path.stem}-{i}", "text": text} if ids else {"text": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


FUZZ = [
    "",
    "あ",
    "a",
    "😀👩‍⚕️🏥",
    "\x00",
    "a\x00b\x07",
    "<|endoftext|>",
    "始まり<|endoftext|>終わり<|im_start|>",
    "か\u3099き\u3099は\u309a",  # decomposed kana
    "①10⁶㎎ｶﾞﾝ",
    "\u200b\ufeff",
    "改行\r\nと\tタブ\u2028と\x85",
    " ",
    "長い" * 30_000,
    *SENTENCES,
]


def write_reference(jsonl, prefix, tokenizer_json, eod_id):
    """preprocess_data.py's encode and add_document, with special tokens in a text left as text."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    tokenizer.encode_special_tokens = True
    dtype = DType.optimal_dtype(tokenizer.get_vocab_size())
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for line in jsonl.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
        lengths = [len(ids) + 1] if ids else []
        builder.add_document(torch.IntTensor([*ids, eod_id] if ids else []), lengths)
    builder.finalize(f"{prefix}.idx")


def assert_same_bytes(ours, reference):
    for suffix in (".bin", ".idx"):
        expected = reference.with_name(reference.name + suffix).read_bytes()
        assert ours.with_name(ours.name + suffix).read_bytes() == expected, suffix


def contents(output: Path) -> dict[str, bytes]:
    """The files of a built corpus, by name."""
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.is_file()}


TEXTS = [*SENTENCES, "改行\nのある文書", "末尾"]


def read_all(path, *, chunk_bytes=1 << 20, **options):
    source = SourceConfig(paths=str(path), **options)
    units = plan_units("s", source, first_number=0, chunk_bytes=chunk_bytes)
    batches = [batch for unit in units for piece in unit.pieces for batch in read_piece(piece, source)]
    return (
        [text for batch in batches for text in batch.texts],
        [bad for batch in batches for bad in batch.bad],
        [identifier for batch in batches for identifier in batch.ids],
    )


def read_dropped(output):
    with open(output / "dropped.jsonl.zst", "rb") as stream:
        return [orjson.loads(line) for line in zstandard.ZstdDecompressor().stream_reader(stream).read().splitlines()]
