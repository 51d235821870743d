"""Every byte is what Megatron's preprocess_data.py --append-eod would have written."""

import pytest

from tests.worlds.corpus import FUZZ, SHARED, assert_same_bytes, write_reference


def test_fuzz_set_small_vocabulary(tmp_path, build_one, tokenizer_dir, eod_id):
    output, manifest = build_one(FUZZ, clean={"nfc": False})
    write_reference(tmp_path / "in.jsonl", tmp_path / "reference", tokenizer_dir / "tokenizer.json", eod_id)
    assert_same_bytes(output / "s", tmp_path / "reference")
    assert manifest["dtype"] == "uint16"


@pytest.mark.skipif(not (SHARED / "qwen2.5-tokenizer").exists(), reason="needs the shared data")
def test_fuzz_set_real_tokenizer(tmp_path, build_one):
    tokenizer = SHARED / "qwen2.5-tokenizer"
    output, manifest = build_one(FUZZ, clean={"nfc": False}, tokenizer=str(tokenizer), eod_id=151643)
    write_reference(tmp_path / "in.jsonl", tmp_path / "reference", tokenizer / "tokenizer.json", 151643)
    assert_same_bytes(output / "s", tmp_path / "reference")
    assert manifest["backend"]["name"] == "fastokens"


@pytest.mark.skipif(not (SHARED / "medical_ja.jsonl").exists(), reason="needs the shared data")
def test_medical_text_real_tokenizer(tmp_path, build_one):
    source = tmp_path / "medical.jsonl"
    with open(SHARED / "medical_ja.jsonl", encoding="utf-8") as stream:
        source.write_text("".join(line for _, line in zip(range(400), stream, strict=False)), encoding="utf-8")
    tokenizer = SHARED / "qwen2.5-tokenizer"
    output, manifest = build_one(source, tokenizer=str(tokenizer), eod_id=151643, chunk_mb=0.3)
    write_reference(source, tmp_path / "reference", tokenizer / "tokenizer.json", 151643)
    assert_same_bytes(output / "s", tmp_path / "reference")
    assert manifest["dtype"] == "int32"
    assert manifest["backend"]["name"] == "fastokens"
