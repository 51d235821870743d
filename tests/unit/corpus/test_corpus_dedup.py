"""Near copies found against exact Jaccard similarity, and the right one of a cluster kept."""

import random

import numpy as np
import pytest

from megatron_medllm.config.corpus import DedupConfig
from megatron_medllm.corpus.build import build
from megatron_medllm.corpus.dedup import find_roots, join_groups, sign
from megatron_medllm.corpus.index import read_index
from megatron_medllm.corpus.shingles import hash_grams_of_texts
from tests.worlds.corpus import SENTENCES, read_dropped, write_jsonl

ALPHABET = [chr(code) for code in range(0x4E00, 0x4F00)] + [chr(code) for code in range(0x3041, 0x3090)]


def make_text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(ALPHABET, k=length))


def edit(rng: random.Random, text: str, edits: int) -> str:
    characters = list(text)
    for _ in range(edits):
        characters[rng.randrange(len(characters))] = rng.choice(ALPHABET)
    return "".join(characters)


def jaccard(a: str, b: str) -> float:
    first, second = ({text[i : i + 5] for i in range(len(text) - 4)} for text in (a, b))
    return len(first & second) / len(first | second)


def test_recall_and_precision_on_planted_copies(build_one):
    rng = random.Random(5)
    originals = [make_text(rng, rng.randrange(200, 600)) for _ in range(1500)]
    copies = [edit(rng, text, max(1, len(text) * rng.choice([1, 2, 3, 5, 8, 40]) // 300)) for text in originals]
    similarities = np.array([jaccard(a, b) for a, b in zip(originals, copies, strict=True)])
    output, manifest = build_one([*originals, *copies], dedup={"near": True, "keep": "first"}, chunk_mb=0.1)
    dropped = {int(row["id"].split("-")[1]) - len(originals) for row in read_dropped(output)}
    near = np.flatnonzero(similarities >= 0.8)
    far = np.flatnonzero(similarities < 0.6)
    assert len(near) > 600 and len(far) > 150
    assert np.mean([i in dropped for i in near]) >= 0.99
    assert not dropped & set(far.tolist())
    assert min(dropped) >= 0  # `first` keeps every original
    assert manifest["sources"]["s"]["dropped"]["dedup.near"] == len(dropped)


def test_stated_probability_of_becoming_a_candidate():
    # 1 - (1 - J^rows)^bands, the formula of the config's docstring, against counted collisions.
    rng = np.random.default_rng(0)
    config = DedupConfig(near=True)
    texts, pairs = [], 400
    for _ in range(pairs):
        shared, own_a, own_b = (make_text(random.Random(int(rng.integers(1 << 40))), n) for n in (150, 48, 48))
        texts += [shared + own_a, shared + own_b]  # J = 146 / 246, less a little at the seams
    keys = np.stack([column for name, column in sign(texts, config)[0].items() if name.startswith("band")], axis=1)
    found = (keys[0::2] == keys[1::2]).any(axis=1).mean()
    similarity = np.mean([jaccard(texts[i], texts[i + 1]) for i in range(0, len(texts), 2)])
    assert found == pytest.approx(1 - (1 - similarity**config.rows) ** config.bands, abs=0.08)


def test_which_one_stays(tmp_path, configure):
    base = "".join(SENTENCES)
    paths = [
        write_jsonl(tmp_path / "a.jsonl", [base[:-3], base, "別の文書"]),  # a source that keeps nothing is refused
        write_jsonl(tmp_path / "b.jsonl", [base[:-1] + "。。。", "他の文書"]),
    ]
    sources = {"a": {"paths": str(paths[0])}, "b": {"paths": str(paths[1]), "priority": 0}}

    def kept(keep: str, priority: int) -> dict:
        sources["b"]["priority"] = priority
        config = configure(sources, dedup={"near": True, "keep": keep})
        manifest = build(config, tmp_path / f"{keep}{priority}", workers=1)
        rows = read_dropped(tmp_path / f"{keep}{priority}")
        assert sum(source["documents"] for source in manifest["sources"].values()) == 3
        return sorted(row["id"] for row in rows)

    assert kept("longest", 0) == ["a-0", "a-1"]
    assert kept("first", 0) == ["a-1", "b-0"]
    assert kept("priority", 1) == ["a-0", "a-1"]
    assert kept("priority", -1) == ["a-0", "b-0"]


def test_exact_copies_only(build_one):
    texts = [SENTENCES[0], SENTENCES[0] + " ", SENTENCES[0], "", "", "短い", "短い"]
    output, manifest = build_one(texts, dedup={"exact": True})
    assert [(row["id"], row["step"]) for row in read_dropped(output)] == [
        ("in-2", "dedup.exact"),
        ("in-6", "dedup.exact"),
    ]
    assert read_dropped(output)[0]["reason"].endswith("in.jsonl:1")
    assert manifest["sources"]["s"]["documents"] == 3
    assert manifest["sources"]["s"]["empty_documents"] == 2
    assert len(read_index(output / "s").lengths) == 3


def test_grams_stay_within_their_text():
    hashes, offsets = hash_grams_of_texts(["あいうえおか", "", "いうえおか", "かき"], 5)
    assert offsets.tolist() == [0, 2, 3, 4, 5]
    assert hashes[1] == hashes[3]
    assert len(set(hashes.tolist())) == 4


def test_clusters_join_transitively():
    parents = np.arange(8)
    join_groups(parents, np.array([6, 1, 5]), np.array([5, 2, 2]))
    join_groups(parents, np.array([7]), np.array([7]))
    assert find_roots(parents, parents).tolist() == [0, 1, 1, 3, 4, 1, 1, 7]
