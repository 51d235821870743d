"""Packed rows, token by token: labels, positions, segments, long documents, blends, held-out rows."""

import numpy as np
import pytest
import torch.distributed as dist

from megatron_medllm.config.train import CptConfig, DataSource, OptimizerConfig
from megatron_medllm.corpus.index import bin_path, idx_path, write_index
from megatron_medllm.data.cpt import DocumentSpan, dataset_config, resolve_blend, training_rows, validation_rows
from megatron_medllm.data.microbatch import IGNORED, blank, concatenate
from megatron_medllm.errors import UserError
from megatron_medllm.parallel.packed import Segment
from megatron_medllm.storage import read_json, write_json

X = IGNORED


def write_corpus(directory, sources, *, split=(1.0, 0.0, 0.0), digest="a"):
    """A folder as `medllm corpus build` leaves it, of documents given as lists of ids."""
    facts = {}
    for name, documents in sources.items():
        lengths = np.array([len(document) for document in documents], np.int32)
        directory.mkdir(exist_ok=True)
        bin_path(directory / name).write_bytes(np.concatenate(documents).astype(np.uint16).tobytes())
        with open(idx_path(directory / name), "wb") as stream:
            write_index(stream, lengths, np.dtype(np.uint16))
        facts[name] = {
            "prefix": name, "weight": 1.0, "tokens": int(lengths.sum()), "documents": len(documents)
        }  # fmt: skip
    tokenizer = {"digest": digest, "vocab_size": 100, "eod_id": 0}
    write_json(
        directory / "manifest.json", {"format": 1, "sources": facts, "split": list(split), "tokenizer": tokenizer}
    )
    return directory


def settings_of(tmp_path, corpora, *, sequence_length, loss_after=None):
    config = CptConfig(
        data=corpora, train_tokens=1, sequence_length=sequence_length, global_batch_size=1,
        optimizer=OptimizerConfig(lr=1.0),
    )  # fmt: skip
    blend = resolve_blend(corpora)
    return blend, dataset_config(config, blend, seed=0, loss_after=loss_after, cache_dir=tmp_path / "cache")


def rows_of(tmp_path, documents, *, count, sequence_length, loss_after=None):
    corpus = write_corpus(tmp_path / "corpus", {"one": documents})
    _, settings = settings_of(
        tmp_path, (DataSource(path=corpus),), sequence_length=sequence_length, loss_after=loss_after
    )
    return training_rows(settings, count)


def test_documents_are_packed_with_their_bounds(tmp_path):
    rows = rows_of(tmp_path, [[11, 12, 13, 0], [21, 22, 0]], count=1, sequence_length=6)
    row = rows[0]
    first, second = ([11, 12, 13, 0], [21, 22, 0]) if row.tokens[0] == 11 else ([21, 22, 0], [11, 12, 13, 0])
    a = len(first)
    assert row.tokens.tolist() == (first + second)[:6]
    # No document's last token predicts the next document's first; the row's last label is its extra token.
    assert row.labels.tolist() == [*first[1:], X, *second[1:]][:6]
    assert row.position_ids.tolist() == [*range(a), *range(6 - a)]
    assert row.segments == (Segment(0, a), Segment(a, 6))


def test_a_long_document_goes_on_in_the_next_row(tmp_path):
    document = [*range(1, 20), 0]  # 20 tokens, rows of 8 + 1: two whole ones
    rows = rows_of(tmp_path, [document], count=2, sequence_length=8)
    by_start = sorted((rows[i] for i in range(2)), key=lambda row: row.tokens[0])
    assert [row.tokens.tolist() for row in by_start] == [document[:8], document[8:16]]
    assert [row.labels.tolist() for row in by_start] == [document[1:9], document[9:17]]
    for row in by_start:
        assert row.position_ids.tolist() == list(range(8))
        assert row.segments == (Segment(0, 8),)
    assert sorted(rows.spans(i)[0].offset for i in range(2)) == [0, 8]
    assert {rows.spans(i)[0].length for i in range(2)} == {9}


class Markers:
    """Stands where `LossAfter` does: ids 90 91, or 90 alone, are the marker."""

    def __init__(self, *ids):
        self.ids = list(ids)

    def first_learned(self, document):
        ids = document.tolist()
        ends = [at + len(self.ids) for at in range(len(ids)) if ids[at : at + len(self.ids)] == self.ids]
        return min(ends, default=None)


def test_only_what_follows_the_marker_is_learned(tmp_path):
    # 90 91 is the marker; a document without one is learned whole, and the second marker changes nothing.
    marked, plain = [11, 12, 90, 91, 13, 90, 91, 0], [21, 22, 23, 24, 25, 26, 27, 0]
    rows = rows_of(tmp_path, [marked, plain], count=1, sequence_length=15, loss_after=Markers(90, 91))
    labels = {11: [X, X, X, 13, 90, 91, 0, X], 21: [22, 23, 24, 25, 26, 27, 0, X]}
    row = rows[0]
    assert row.labels.tolist() == (labels[row.tokens[0]] + labels[row.tokens[8]])[:15]


def test_the_rest_of_a_marked_document_in_another_row_is_not_learned(tmp_path):
    document = [11, 90, 12, 13, 14, 15, 16, 17, 0]
    rows = rows_of(tmp_path, [document], count=2, sequence_length=4, loss_after=Markers(90))
    by_start = sorted((rows[i] for i in range(2)), key=lambda row: row.tokens[0])
    assert by_start[0].labels.tolist() == [X, 12, 13, 14]
    assert by_start[1].tokens.tolist() == [14, 15, 16, 17]
    assert by_start[1].labels.tolist() == [X, X, X, X]


@pytest.fixture
def process_group():
    """Of this process alone: upstream's blends ask for the rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_blend_keeps_its_shares_and_names_its_sources(tmp_path, process_group):
    documents = [[10 + i, *[1] * 14, 0] for i in range(30)]
    first = write_corpus(tmp_path / "medical", {"text": documents})
    second = write_corpus(tmp_path / "general", {"text": documents, "more": documents[:2]})
    corpora = (DataSource(path=first, weight=6.0), DataSource(path=second, weight=1.0))
    blend, settings = settings_of(tmp_path, corpora, sequence_length=16)
    assert blend.names == ("medical-text", "general-text", "more")
    assert blend.weights == (6.0, 1.0, 1.0)
    rows = training_rows(settings, 16)
    used = [rows.spans(i)[0].source for i in range(16)]
    assert [used.count(source) for source in range(3)] == [12, 2, 2]
    assert all(isinstance(span, DocumentSpan) for span in rows.spans(0))


def test_two_epochs_use_every_token_twice(tmp_path):
    documents = [[i + 1] * 7 + [0] for i in range(8)]  # 64 tokens
    rows = rows_of(tmp_path, documents, count=15, sequence_length=8)
    seen = np.bincount(np.concatenate([rows[i].tokens for i in range(15)]), minlength=9)
    # Of 128 tokens the last 8 fill no row; no document's 7 equal tokens are read more often than twice.
    assert seen.sum() == 120 and seen[1:].max() <= 14 and seen[0] <= 16


def test_held_out_rows_are_of_one_source_and_no_token_comes_twice(tmp_path):
    documents = {name: [[base + i] * 9 + [0] for i in range(10)] for name, base in (("a", 10), ("b", 30))}
    documents["tiny"] = [[1, 0], [2, 0]]
    corpus = write_corpus(tmp_path / "corpus", documents, split=(0.5, 0.5, 0.0))
    blend, settings = settings_of(tmp_path, (DataSource(path=corpus),), sequence_length=7)
    held_out, account = validation_rows(settings, blend)
    assert list(held_out) == ["a", "b"]
    assert account.losses() == [
        f"tiny: lost 1 (a validation share that fills no row), first {corpus}/tiny: 1 of 2 documents with 2 tokens "
        "(a row needs 8); trained without validation of this source"
    ]
    for name, base in (("a", 10), ("b", 30)):
        tokens = np.concatenate([held_out[name][i].tokens for i in range(len(held_out[name]))])
        assert len(held_out[name]) == 7  # 49 of the 50 tokens of five documents
        assert set(tokens.tolist()) <= {0, *range(base + 5, base + 10)}
        assert np.bincount(tokens)[1:].max() <= 9


@pytest.mark.timeout(60)
@pytest.mark.parametrize("documents", range(1, 25))
def test_a_source_of_few_documents_trains_without_validation(tmp_path, documents):
    # Upstream's builder loops for ever here: 2 % of up to 24 documents are none.
    corpus = write_corpus(tmp_path / "corpus", {"s": [[1, 2, 3, 0]] * documents}, split=(0.98, 0.02, 0.0))
    blend, settings = settings_of(tmp_path, (DataSource(path=corpus),), sequence_length=7)
    rows = training_rows(settings, 9)
    assert [len(rows[i].tokens) for i in range(9)] == [7] * 9
    held_out, account = validation_rows(settings, blend)
    assert held_out == {} and "trained without validation of this source" in account.losses()[0]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("split", [(0.4, 0.6, 0.0), (0.0, 1.0, 0.0), (0.02, 0.98, 0.0)])
def test_a_source_of_which_nothing_is_left_to_train_on_is_refused(tmp_path, split):
    corpus = write_corpus(tmp_path / "corpus", {"s": [[1, 2, 3, 0]]}, split=split)
    _, settings = settings_of(tmp_path, (DataSource(path=corpus),), sequence_length=7)
    with pytest.raises(UserError, match=r"corpus/s: split .* leaves none of its 1 documents to train on; give"):
        training_rows(settings, 4)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [2], [5, 3], [8], [9], [3, 17]])
@pytest.mark.parametrize("split", [(1.0, 0.0, 0.0), (0.98, 0.02, 0.0), (0.9, 0.05, 0.05), (0.5, 0.0, 0.5)])
def test_sources_smaller_than_a_row_give_whole_rows(tmp_path, lengths, split):
    if round(split[0] * len(lengths)) == 0:
        return
    corpus = write_corpus(tmp_path / "corpus", {"s": [[7] * (n - 1) + [0] for n in lengths]}, split=split)
    blend, settings = settings_of(tmp_path, (DataSource(path=corpus),), sequence_length=8)
    rows = training_rows(settings, 5)
    assert all(set(rows[i].tokens.tolist()) <= {0, 7} and len(rows[i].tokens) == 8 for i in range(5))
    validation_rows(settings, blend)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("weights", [(1.0, 1e-3, 1e-3, 1e-3), (1.0, 1e-12, 1e-3, 5.0), (1e-9, 1e9, 1.0, 1.0)])
@pytest.mark.parametrize("count", [1, 2, 10, 101])
def test_any_weights_blend(tmp_path, process_group, weights, count):
    # Upstream's builder asks for a row more than the first source has built ("oversamples") at the first of these.
    names = ("a", "b", "c", "d")
    corpora = []
    for number, (name, weight) in enumerate(zip(names, weights, strict=True), start=10):
        documents = [[number] * 7 + [0]] * (1 if name == "a" else 3)
        corpus = write_corpus(tmp_path / name, {name: documents}, split=(0.98, 0.02, 0.0))
        corpora.append(DataSource(path=corpus, weight=weight))
    _, settings = settings_of(tmp_path, tuple(corpora), sequence_length=8)
    rows = training_rows(settings, count)
    assert len(rows) == count
    used = np.bincount([rows.spans(i)[0].source for i in range(count)], minlength=4) / count
    np.testing.assert_allclose(used, np.array(weights) / sum(weights), atol=2.01 / count)
    assert all(rows[i].tokens.max() == 10 + rows.spans(i)[0].source for i in range(count))


@pytest.mark.timeout(60)
def test_a_few_tokens_for_very_many_rows(tmp_path, caplog):
    # 20 million passes, counted and not walked through; more than an index can hold are refused.
    corpus = write_corpus(tmp_path / "corpus", {"s": [[1, 0]]})
    _, settings = settings_of(tmp_path, (DataSource(path=corpus),), sequence_length=4000)
    training_rows(settings, 100)
    assert "its 2 training tokens are read 200,001 times" in caplog.text
    with pytest.raises(UserError, match=r"its 2 training tokens would be read 20,000,000,001 times; lower its weight"):
        training_rows(settings, 10_000_000)


@pytest.mark.parametrize("longer", [False, True])
def test_a_rebuilt_corpus_is_not_read_by_the_old_ones_index(tmp_path, longer):
    old, new = [[1, 2, 3, 0]] * 40, [[4] * 11 + [0]] * 30
    if not longer:
        old, new = new, old
    assert len(rows_of(tmp_path, old, count=12, sequence_length=8)) >= 12
    rows = rows_of(tmp_path, new, count=12, sequence_length=8)
    for i in range(12):
        spans = rows.spans(i)
        assert sum(span.length for span in spans) == 9
        expected = [token for span in spans for token in new[span.document][span.offset : span.offset + span.length]]
        assert rows[i].tokens.tolist() == expected[:8]


def test_a_source_of_weight_0_is_left_out_and_said_so(tmp_path, caplog):
    corpus = write_corpus(tmp_path / "corpus", {"a": [[1, 2, 0]], "replay": [[3, 4, 0]]})
    manifest = read_json(corpus / "manifest.json")
    manifest["sources"]["replay"]["weight"] = 0.0
    write_json(corpus / "manifest.json", manifest)
    blend = resolve_blend((DataSource(path=corpus),))
    assert blend.names == ("a",) and blend.tokens == 3
    assert "source replay has the blend weight 0 and is left out" in caplog.text


def test_a_blends_digest_is_its_contents(tmp_path):
    documents = [[1, 2, 3, 0], [4, 0]]

    def digest(documents, outputs=None):
        corpus = write_corpus(tmp_path / "corpus", {"s": documents})
        manifest = read_json(corpus / "manifest.json")
        write_json(corpus / "manifest.json", manifest | {"outputs": outputs or {}})
        return resolve_blend((DataSource(path=corpus),)).digest

    before = digest(documents)
    assert digest(documents) == before
    assert digest([[1, 2, 0], [3, 4, 0]]) != before  # as many tokens, cut otherwise
    assert digest(documents, {"s.bin": "x", "s.idx": "y"}) != before
    assert digest(documents, {"s.bin": "x", "s.idx": "z"}) != digest(documents, {"s.bin": "x", "s.idx": "y"})


def test_blank_rows_teach_nothing():
    row = concatenate([blank(4), blank(4)])
    assert row.counted_tokens == 0 and row.segments == (Segment(0, 4), Segment(4, 8))
    assert row.attended == 2 * (1 + 2 + 3 + 4)


def test_corpora_of_two_tokenizers_or_with_a_cut_index_are_refused(tmp_path):
    first = write_corpus(tmp_path / "first", {"x": [[1, 2, 0]]})
    second = write_corpus(tmp_path / "second", {"x": [[1, 2, 0]]}, digest="b")
    with pytest.raises(UserError, match="were built with a different tokenizer_digest"):
        resolve_blend((DataSource(path=first), DataSource(path=second)))
    index = idx_path(first / "x")
    index.write_bytes(index.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"x\.idx"):
        resolve_blend((DataSource(path=first),))
