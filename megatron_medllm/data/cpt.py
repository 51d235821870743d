"""Packed rows for continued pretraining, on Megatron-Core's GPTDataset and its blends.

Megatron-Core decides which tokens make up row i: documents are shuffled per epoch, laid end to end and cut into rows;
a document longer than the row goes on in the next one. Here a row also learns where its documents begin, so that
attention and positions restart there, and which documents it used, so that a ledger can be kept.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split, normalize
from megatron.core.utils import log_single_rank

from megatron_medllm.account import Account
from megatron_medllm.config.train import CptConfig, DataSource
from megatron_medllm.corpus.blend import read_blend
from megatron_medllm.corpus.index import read_index
from megatron_medllm.data.loss_after import LOOKED_AT, LossAfter
from megatron_medllm.data.microbatch import IGNORED, MicroBatch
from megatron_medllm.errors import UserError
from megatron_medllm.parallel.packed import Segment
from megatron_medllm.storage import digest_value

log = logging.getLogger(__name__)
_MANY_PASSES = 16  # repeated more often, data teach hardly anything (arXiv 2305.16264)
_INDEX_LIMIT = 2**31  # entries of a document index: one a document and pass, 4 bytes each


@dataclass(frozen=True)
class DocumentSpan:
    """Tokens [offset, offset + length) of one document of one source, as they stand in a row."""

    source: int
    document: int
    offset: int
    length: int


class _TokenizerFacts:
    """The three facts that Megatron-Core's dataset configuration asks of a tokenizer."""

    def __init__(self, *, eod: int, vocab_size: int) -> None:
        self.eod = eod
        self.vocab_size = vocab_size
        self.unique_identifiers = {"class": "megatron_medllm", "eod": eod, "vocab_size": vocab_size}


@dataclass
class PackedDocumentsConfig(GPTDatasetConfig):
    """Megatron-Core's configuration, and where a document's loss begins (None: at its start)."""

    loss_after: LossAfter | None = None


class PackedDocuments(GPTDataset):
    """Rows of `sequence_length` tokens with their documents' bounds."""

    def _get_num_epochs(self, num_tokens_per_epoch: int) -> int:
        """Passes that give `num_samples` rows and the last one's extra token.

        Upstream adds up pass after pass: for ever where a pass holds no token, for minutes where it holds a few.
        """
        if self.num_samples is None:
            return 1
        return passes_needed(self.num_samples, num_tokens_per_epoch, sequence_length=self.config.sequence_length)

    def spans(self, index: int) -> list[DocumentSpan]:
        """The document parts that make up row `index`, its one extra token (the last label) included."""
        row = self.shuffle_index[index]
        (first, first_offset), (last, last_offset) = self.sample_index[row], self.sample_index[row + 1]
        parts = []
        for position in range(first, last + 1):
            document = int(self.document_index[position])
            offset = int(first_offset) if position == first else 0
            size = int(self.dataset.sequence_lengths[document])
            end = int(last_offset) + 1 if position == last else size
            parts.append(DocumentSpan(0, document, offset, end - offset))
        return [part for part in parts if part.length > 0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        spans = self.spans(index)
        length = self.config.sequence_length
        text = np.zeros(length + 1, dtype=np.int64)
        labels = np.full(length, IGNORED, dtype=np.int64)
        position_ids = np.zeros(length, dtype=np.int64)
        segments = []
        start = 0
        for span in spans:
            end = min(start + span.length, length + 1)
            text[start:end] = self.dataset.get(span.document, offset=span.offset, length=end - start)
            inside = min(end, length)
            if inside > start:
                labels[start : end - 1] = text[start + 1 : end]
                labels[start : start + self._unlearned(span)] = IGNORED
                position_ids[start:inside] = np.arange(inside - start)
                segments.append(Segment(start, inside))
            start = end
        if start < length:
            segments.append(Segment(start, length))  # padding, with nothing to learn
        return {"row": MicroBatch(text[:length], labels, position_ids, tuple(segments))}

    def _unlearned(self, span: DocumentSpan) -> int:
        """How many of the span's first labels are left out: those up to the end of the first `loss_after` marker.

        A part whose marker lies in an earlier row is left out whole: without its prompt it teaches nothing.
        """
        if self.config.loss_after is None:
            return 0
        first = self.config.loss_after.first_learned(self.dataset.get(span.document))
        if first is None:
            return 0
        return span.length if span.offset > 0 else first - 1


def passes_needed(rows: int, tokens: int, *, sequence_length: int) -> int:
    """How often `tokens` (≥ 1) must be read for `rows` rows, each of whose labels reaches one token further."""
    return max(1, -(-(rows * sequence_length + 1) // tokens))


class CptRows:
    """Row i of the training blend or of one source's held-out share, for all i in [0, len)."""

    def __init__(self, dataset: BlendedDataset | PackedDocuments, *, count: int | None = None) -> None:
        self._dataset = dataset
        self._count = len(dataset) if count is None else count

    def __len__(self) -> int:
        return self._count

    def first(self, count: int) -> "CptRows":
        """The first `count` of these rows."""
        return CptRows(self._dataset, count=count)

    def __getitem__(self, index: int) -> MicroBatch:
        return self._dataset[index]["row"]

    def spans(self, index: int) -> list[DocumentSpan]:
        """Which documents row `index` uses."""
        if isinstance(self._dataset, PackedDocuments):
            return self._dataset.spans(index)
        source = int(self._dataset.dataset_index[index])
        spans = self._dataset.datasets[source].spans(int(self._dataset.dataset_sample_index[index]))
        return [DocumentSpan(source, span.document, span.offset, span.length) for span in spans]


@dataclass(frozen=True)
class TrainingBlend:
    """All configured corpora as one: sources with weights, training/validation/test shares, and their tokenizer."""

    names: tuple[str, ...]  # of the sources, told apart by their corpus where two have the same
    prefixes: tuple[str, ...]
    weights: tuple[float, ...]
    tokens: int
    split: tuple[float, float, float]
    tokenizer_digest: str
    vocab_size: int
    eod_id: int
    digest: str  # of what the sources hold: the same paths with other documents are another blend

    @property
    def train_tokens(self) -> int:
        """Tokens of the training share."""
        return int(self.tokens * self.split[0] / sum(self.split))


def resolve_blend(corpora: tuple[DataSource, ...]) -> TrainingBlend:
    """Read the corpora's manifests, check their index files, and that one tokenizer made them all.

    Raises:
        UserError: a manifest or an index is missing or cut, no tokens, or two corpora differ in tokenizer or split.
    """
    found = [(corpus, read_blend(corpus.path)) for corpus in corpora]
    first_corpus, first = found[0]
    names, prefixes, weights, contents, tokens = [], [], [], [], 0
    counts = Counter(source.name for _, blend in found for source in blend.sources)
    for corpus, blend in found:
        for name in ("tokenizer_digest", "eod_id", "split"):
            if getattr(blend, name) != getattr(first, name):
                raise UserError(f"{corpus.path} and {first_corpus.path} were built with a different {name}")
        for source in blend.sources:
            lengths = read_index(source.prefix).lengths
            indexed = int(lengths.sum(dtype=np.int64))
            if indexed != source.tokens:
                raise UserError(f"{source.prefix}.idx holds {indexed} tokens, but its manifest says {source.tokens}")
            if source.tokens:
                if not source.weight > 0:  # such as of `replay_share: 0`; upstream asserts against it
                    left_out = f"{corpus.path}: source {source.name} has the blend weight 0 and is left out"
                    log_single_rank(log, logging.WARNING, left_out)
                    continue
                contents.append([*source.digests, hashlib.blake2b(lengths.tobytes(), digest_size=32).hexdigest()])
                names.append(source.name if counts[source.name] == 1 else f"{corpus.path.name}-{source.name}")
                prefixes.append(str(source.prefix))
                weights.append(corpus.weight * source.weight)
                tokens += source.tokens
    if not prefixes:
        raise UserError(f"{first_corpus.path}: the corpus holds no tokens")
    return TrainingBlend(
        names=tuple(names),
        prefixes=tuple(prefixes),
        weights=tuple(weights),
        tokens=tokens,
        split=first.split,
        tokenizer_digest=first.tokenizer_digest,
        vocab_size=first.vocab_size,
        eod_id=first.eod_id,
        digest=digest_value(contents),
    )


def dataset_config(
    config: CptConfig, blend: TrainingBlend, *, seed: int, loss_after: LossAfter | None, cache_dir: Path
) -> PackedDocumentsConfig:
    """Megatron-Core's configuration of the blend.

    Upstream names a cached index by the sources' paths, not by what they hold: a corpus rebuilt at the same path
    would be read by the old one's. Each content has a folder of its own below `cache_dir`.
    """
    return PackedDocumentsConfig(
        random_seed=seed,
        sequence_length=config.sequence_length,
        blend=(list(blend.prefixes), list(blend.weights) if len(blend.prefixes) > 1 else None),
        split=",".join(str(share) for share in blend.split),
        path_to_cache=str(cache_dir / blend.digest[:16]),
        tokenizer=_TokenizerFacts(eod=blend.eod_id, vocab_size=blend.vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        loss_after=loss_after,
    )


def sample_documents(settings: PackedDocumentsConfig, prefix: str) -> Iterator[np.ndarray]:
    """Token ids [n] of at most `LOOKED_AT` documents of a source, evenly spread."""
    documents = PackedDocuments.build_low_level_dataset(prefix, settings)
    count = PackedDocuments.numel_low_level_dataset(documents)
    for index in np.linspace(0, count - 1, min(count, LOOKED_AT), dtype=np.int64):
        yield documents.get(int(index))


def training_rows(settings: PackedDocumentsConfig, count: int) -> CptRows:
    """The first `count` rows of the blend's training share, documents shuffled anew in every epoch.

    Rows depend on the seed, the blend and their number only, never on the layout: step k reads the same rows anywhere.
    Collective: every rank calls it.

    Upstream's builder is not used here: it always builds the held-out shares too, also for 0 rows, and loops for ever
    where such a share holds no token; and a source with a small weight can get one row more than it has built.

    Raises:
        UserError: the split leaves nothing of a source to train on, or a source is far too small for its weight.
    """
    prefixes, weights = settings.blend
    bounds = settings.split_matrix[Split.train.value]
    counts = [count] if len(prefixes) == 1 else _rows_of_sources(weights, count)
    sources = []
    for prefix, rows in zip(prefixes, counts, strict=True):
        documents = PackedDocuments.build_low_level_dataset(prefix, settings)
        first, last = _share(documents, bounds)
        tokens = int(documents.sequence_lengths[first:last].sum())
        if not tokens:
            raise UserError(
                f"{prefix}: split {settings.split} leaves none of its {_count(documents)} documents to train on; "
                "give training a larger share, or put the source together with another"
            )
        _check_passes(prefix, rows, tokens, last - first, settings.sequence_length)
        sources.append((documents, prefix, first, last, rows))
    datasets = [_packed(*source, Split.train, settings) for source in sources]
    if len(datasets) == 1:
        return CptRows(datasets[0])
    return CptRows(
        BlendedMegatronDatasetBuilder.build_generic_dataset(
            BlendedDataset, lambda: True, True, datasets, weights, count, settings
        )
    )


def validation_rows(settings: PackedDocumentsConfig, blend: TrainingBlend) -> tuple[dict[str, CptRows], Account]:
    """Every source's held-out documents as rows, each token once; sources whose share fills no row are left out.

    Collective: every rank calls it.

    Returns:
        rows by source, and an account of the shares, with the reason where one gives no row.
    """
    bounds = settings.split_matrix[Split.valid.value]
    found: dict[str, CptRows] = {}
    account = Account("validation shares")
    if bounds is None:
        return found, account
    for name, prefix in zip(blend.names, blend.prefixes, strict=True):
        documents = PackedDocuments.build_low_level_dataset(prefix, settings)
        first, last = _share(documents, bounds)
        tokens = int(documents.sequence_lengths[first:last].sum())
        if tokens <= settings.sequence_length:
            account.lose(
                name,
                "a validation share that fills no row",
                f"{prefix}: {last - first} of {_count(documents)} documents with {tokens} tokens "
                f"(a row needs {settings.sequence_length + 1}); trained without validation of this source",
            )
            continue
        found[name] = CptRows(_packed(documents, prefix, first, last, None, Split.valid, settings))
        account.keep(name)
    return found, account


def _rows_of_sources(weights: list[float], count: int) -> list[int]:
    """How many of `count` rows upstream's blend takes from each source; at least 1, so that each can be built."""
    from megatron.core.datasets import helpers

    source, sample = np.zeros(count, np.int16), np.zeros(count, np.int64)
    helpers.build_blending_indices(source, sample, normalize(weights), len(weights), count, False)
    return np.maximum(np.bincount(source, minlength=len(weights)), 1).tolist()


def _check_passes(prefix: str, rows: int, tokens: int, documents: int, sequence_length: int) -> None:
    passes = passes_needed(rows, tokens, sequence_length=sequence_length)
    if passes * documents >= _INDEX_LIMIT:
        raise UserError(
            f"{prefix}: its {tokens} training tokens would be read {passes:,} times; "
            "lower its weight, or train on fewer tokens"
        )
    if passes > _MANY_PASSES:
        message = f"{prefix}: its {tokens} training tokens are read {passes:,} times"
        log_single_rank(log, logging.WARNING, message)


def _count(documents: Any) -> int:
    return int(PackedDocuments.numel_low_level_dataset(documents))


def _share(documents: Any, bounds: tuple[float, float] | None) -> tuple[int, int]:
    """First document of a share and one past its last, rounded as upstream does."""
    first, last = (round(bound * float(_count(documents))) for bound in bounds or (0.0, 0.0))
    return first, last


def _packed(
    documents: Any, prefix: str, first: int, last: int, rows: int | None, split: Split, settings: PackedDocumentsConfig
) -> PackedDocuments:
    """Documents [first, last) as rows. The main process builds the index, the others read it."""
    return BlendedMegatronDatasetBuilder.build_generic_dataset(
        PackedDocuments, lambda: True, True, documents, prefix,
        np.arange(first, last, dtype=np.int32), rows, split, settings,
    )  # fmt: skip
