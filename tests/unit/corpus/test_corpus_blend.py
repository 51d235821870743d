"""Weights, replay share, epochs; the manifest as the trainer reads it; inspection."""

import re

import pytest
from pydantic import ValidationError

from megatron_medllm.config.corpus import CorpusConfig
from megatron_medllm.corpus.blend import add_blend, blend_weights, read_blend
from megatron_medllm.corpus.build import build
from megatron_medllm.corpus.inspect import inspect
from megatron_medllm.errors import UserError
from megatron_medllm.storage import read_json
from tests.worlds.corpus import SENTENCES, write_jsonl

TOKENS = {"a": 100, "b": 300, "general": 600}


def make(weights: dict[str, float | None], **overrides) -> CorpusConfig:
    sources = {
        name: {"paths": "unused", "weight": weight, "replay": name == "general"} for name, weight in weights.items()
    }
    return CorpusConfig.model_validate({"sources": sources, "tokenizer": "unused", "eod_id": 0} | overrides)


def test_weights():
    by_tokens = dict.fromkeys(TOKENS, None)
    assert blend_weights(make(by_tokens), TOKENS) == pytest.approx({"a": 0.1, "b": 0.3, "general": 0.6})
    assert blend_weights(make(by_tokens, replay_share=0.2), TOKENS) == pytest.approx(
        {"a": 0.2, "b": 0.6, "general": 0.2}
    )
    given = {"a": 3.0, "b": 1.0, "general": 4.0}
    assert blend_weights(make(given), TOKENS) == pytest.approx({"a": 0.375, "b": 0.125, "general": 0.5})
    assert blend_weights(make(given, replay_share=0.2), TOKENS) == pytest.approx({"a": 0.6, "b": 0.2, "general": 0.2})
    assert blend_weights(make(given), TOKENS | {"a": 0}) == pytest.approx({"a": 0, "b": 0.2, "general": 0.8})
    with pytest.raises(UserError, match="the replay sources hold no tokens"):
        blend_weights(make(given, replay_share=0.2), TOKENS | {"general": 0})


def test_a_small_sources_weight_is_not_rounded_away():
    facts = {name: {"tokens": tokens} for name, tokens in (("a", 1), ("general", 10**12))}
    manifest = add_blend({"sources": facts}, make(dict.fromkeys(facts, None)))
    assert manifest["sources"]["a"]["weight"] == pytest.approx(1e-12, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replay_share": 0.2, "sources": {"a": {"paths": "x"}}}, "replay_share needs"),
        ({"split": (0, 0, 0)}, "positive sum"),
        ({"sources": {"a": {"paths": "x", "dataset": "y"}}}, "exactly one of"),
        ({"sources": {"a": {"paths": "x", "weight": 1}, "b": {"paths": "x"}}}, "every source a weight, or none"),
        ({"sources": {"../a": {"paths": "x"}}}, "cannot be a file name"),
        ({"sources": {"a": {"paths": "x", "clean": {"nfkc": True}}}}, "nfkc"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValidationError, match=message):
        CorpusConfig.model_validate({"sources": {"a": {"paths": "x"}}, "tokenizer": "t", "eod_id": 0} | change)


@pytest.fixture
def built(tmp_path, configure):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", texts) for name, texts in (("a", SENTENCES), ("g", SENTENCES * 3))]
    sources = {"a": {"paths": str(paths[0]), "licence": "CC0"}, "g": {"paths": str(paths[1]), "replay": True}}
    config = configure(sources, replay_share=0.25, split=(0.9, 0.1, 0.0), token_budget=100_000)
    return tmp_path / "out", build(config, tmp_path / "out", workers=1)


def test_manifest_as_read_back(built, eod_id):
    output, manifest = built
    assert read_json(output / "manifest.json") == manifest
    blend = read_blend(output)
    assert [(source.name, source.prefix, source.weight) for source in blend.sources] == [
        ("a", output / "a", 0.75),
        ("g", output / "g", 0.25),
    ]
    assert (blend.split, blend.eod_id, blend.tokenizer_digest) == (
        (0.9, 0.1, 0.0),
        eod_id,
        manifest["tokenizer"]["digest"],
    )
    tokens = manifest["sources"]["a"]["tokens"]
    assert blend.sources[1].tokens == 3 * tokens
    assert manifest["sources"]["a"]["epochs"] == round(100_000 * 0.75 / (0.9 * tokens), 4)
    assert manifest["sources"]["g"]["epochs"] == round(100_000 * 0.25 / (0.9 * 3 * tokens), 4)
    assert manifest["sources"]["a"]["licence"] == "CC0"


def test_summary_page_shows_the_numbers(built):
    output, manifest = built
    page = (output / "summary.html").read_text()
    assert f"{manifest['tokens']:,} tokens" in page and ": 20 documents." in page
    assert re.findall(r"<(?:script|link|img)[^>]*>|https?://", page) == []
    assert "CC0" in page


def test_inspect(built):
    output, manifest = built
    seen = inspect(output / "a.bin", samples=2)
    assert (seen.documents, seen.tokens, seen.dtype) == (5, manifest["sources"]["a"]["tokens"], "uint16")
    assert [number for number, _ in seen.samples] == [0, 4]
    assert seen.samples[0][1].startswith("高血圧症の患者に降圧薬を投与した。")
    assert "both files have the manifest's digests" in seen.checks
    assert "5 documents" in str(seen)


def spoil(path, position, value):
    data = bytearray(path.read_bytes())
    data[position] = value
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: spoil(out / "a.bin", 4, 255), "its BLAKE2b digest is not the one"),
        (lambda out: spoil(out / "a.bin", -2, 0), "document 4 ends with token"),
        (lambda out: (out / "a.bin").write_bytes((out / "a.bin").read_bytes()[:-2]), "but the index holds"),
        (lambda out: (out / "a.idx").write_bytes((out / "a.idx").read_bytes()[:-1]), "its header promises"),
        (lambda out: spoil(out / "a.idx", 0, 0), "not a Megatron index"),
        (lambda out: spoil(out / "a.idx", 34 + 4 * 5, 2), "offsets do not follow"),
        (lambda out: (out / "a.idx").write_bytes((out / "g.idx").read_bytes()), "but the index holds"),
        (lambda out: (out / "a.idx").unlink(), "no such file"),
    ],
)
def test_inspect_finds_damage(built, damage, message):
    output, _ = built
    damage(output)
    with pytest.raises(UserError, match=message):
        inspect(output / "a")
