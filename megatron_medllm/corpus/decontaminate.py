"""Find exam questions in documents: by a run of 30 folded characters, or by half of a question's 13-grams.

Every document is hashed once, in 13-grams; a small table says at once that most of them are in no question. Only
documents with enough hits are looked at more closely.
"""

from dataclasses import dataclass

import numpy as np

from megatron_medllm.config.corpus import DecontaminateConfig
from megatron_medllm.corpus.fold import SEPARATOR, fold, fold_origins, join
from megatron_medllm.corpus.questions import GRAM, QuestionIndex
from megatron_medllm.corpus.shingles import code_points, hash_grams

_FILTER_BITS = 22
_FILTER_SHIFTS = (np.uint64(64 - _FILTER_BITS), np.uint64(64 - 2 * _FILTER_BITS))
_FILTER_MASK = np.uint64((1 << _FILTER_BITS) - 1)


@dataclass(frozen=True)
class Meeting:
    """A question met in a document: its id, the share of its grams found, whether a long run of it was."""

    question: str
    coverage: float
    long_match: bool


@dataclass(frozen=True)
class Found:
    """What one document holds: the questions, and the text without their passages."""

    meetings: list[Meeting]
    masked: str


class Detector:
    """Holds the question index and its filter."""

    def __init__(self, index: QuestionIndex, config: DecontaminateConfig) -> None:
        self.index, self.config = index, config
        self._filters = []
        for shift in _FILTER_SHIFTS:
            table = np.zeros(1 << _FILTER_BITS, bool)
            table[_slots(index.grams, shift)] = True
            self._filters.append(table)

    def find(self, texts: list[str]) -> dict[int, Found]:
        """The contaminated ones among `texts`, by position."""
        codes = code_points(join(texts))
        folded = fold(codes)
        positions, grams = self._hits(hash_grams(folded, GRAM))
        # A separator stands behind each text, and the fold keeps it.
        documents = np.searchsorted(np.flatnonzero(folded == ord(SEPARATOR)), positions)
        covered = self._covered(documents, grams)
        run = self.config.match_chars - GRAM
        in_run = np.zeros(len(positions), bool)
        starts = max(0, len(positions) - run)
        in_run[:starts] = positions[run:] - positions[:starts] == run
        found = {}
        suspects = np.union1d(documents[in_run], np.array(list(covered), np.int64))
        origins = fold_origins(codes) if len(suspects) else positions
        ends = np.cumsum([len(text) + 1 for text in texts])
        for document in suspects:
            low, high = np.searchsorted(documents, [document, document + 1])
            meetings = dict(covered.get(int(document), {}))
            self._add_long_matches(folded, positions[low:high][in_run[low:high]], meetings)
            if meetings:
                start = int(ends[document]) - len(texts[document]) - 1
                spans = self._spans(positions[low:high], grams[low:high], meetings)
                cuts = [(int(origins[a]) - start, int(origins[b - 1]) - start + 1) for a, b in spans]
                found[int(document)] = Found(self._report(meetings), _cut_out(texts[document], cuts))
        return found

    def _hits(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the folded text where a question's gram begins, and the number of each gram."""
        first, second = self._filters
        positions = np.flatnonzero(first.take(_slots(hashes, _FILTER_SHIFTS[0]), mode="clip"))
        candidates = hashes[positions]
        passed = second.take(_slots(candidates, _FILTER_SHIFTS[1]), mode="clip")
        positions, candidates = positions[passed], candidates[passed]
        grams = np.searchsorted(self.index.grams, candidates)
        grams[grams == len(self.index.grams)] = 0
        true = self.index.grams[grams] == candidates if len(self.index.grams) else np.zeros(len(candidates), bool)
        return positions[true], grams[true]

    def _probes_of(self, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The probes of each gram end to end (int64), and how many each has."""
        begins = self.index.bounds[grams]
        sizes = self.index.bounds[grams + 1] - begins
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self.index.probes[np.repeat(begins, sizes) + within].astype(np.int64), sizes

    def _covered(self, documents: np.ndarray, grams: np.ndarray) -> dict[int, dict[int, tuple[float, bool]]]:
        """Per document the questions of which enough distinct grams are there, with their coverage."""
        index = self.index
        probes_total = len(index.probe_question)
        pairs = np.unique(documents * len(index.grams) + grams)
        documents, grams = pairs // len(index.grams), pairs % len(index.grams)
        probes, sizes = self._probes_of(grams)
        counts = np.repeat(index.counts[grams], sizes) | index.probe_recycled[probes]
        keys = (np.repeat(documents, sizes) * probes_total + probes)[counts]
        keys, hits = np.unique(keys, return_counts=True)
        enough = hits >= index.probe_needs[keys % probes_total]
        covered: dict[int, dict[int, tuple[float, bool]]] = {}
        for key, count in zip(keys[enough], hits[enough], strict=True):
            document, probe = divmod(int(key), probes_total)
            question, coverage = int(index.probe_question[probe]), float(count / index.probe_size[probe])
            of_document = covered.setdefault(document, {})
            of_document[question] = max(of_document.get(question, (0.0, False)), (coverage, False))
        return covered

    def _add_long_matches(
        self, folded: np.ndarray, begins: np.ndarray, meetings: dict[int, tuple[float, bool]]
    ) -> None:
        if not len(begins) or not len(self.index.long_grams):
            return
        n, first = self.config.match_chars, int(begins[0])
        windows = hash_grams(folded[first : int(begins[-1]) + n], n)[begins - first]
        at = np.minimum(np.searchsorted(self.index.long_grams, windows), len(self.index.long_grams) - 1)
        for question in np.unique(self.index.long_question[at[self.index.long_grams[at] == windows]]):
            meetings[int(question)] = (meetings.get(int(question), (0.0, False))[0], True)

    def _spans(self, positions: np.ndarray, grams: np.ndarray, meetings: dict) -> list[tuple[int, int]]:
        """Stretches of the folded text that belong to the questions met; small gaps, such as edits, are bridged."""
        is_met = np.zeros(len(self.index.ids), bool)
        is_met[list(meetings)] = True
        probes, sizes = self._probes_of(grams)
        rows = np.repeat(np.arange(len(grams)), sizes)
        own = np.bincount(rows, weights=is_met[self.index.probe_question[probes]], minlength=len(grams)) > 0
        spans: list[tuple[int, int]] = []
        for position in positions[own]:
            if spans and position - spans[-1][1] <= self.config.match_chars:
                spans[-1] = (spans[-1][0], int(position) + GRAM)
            else:
                spans.append((int(position), int(position) + GRAM))
        return spans

    def _report(self, meetings: dict[int, tuple[float, bool]]) -> list[Meeting]:
        return [
            Meeting(self.index.ids[question], round(coverage, 3), long_match)
            for question, (coverage, long_match) in sorted(meetings.items())
        ]


def _slots(hashes: np.ndarray, shift: np.uint64) -> np.ndarray:
    return ((hashes >> shift) & _FILTER_MASK).view(np.int64)


def _cut_out(text: str, cuts: list[tuple[int, int]]) -> str:
    kept, end = [], 0
    for start, stop in cuts:
        kept.append(text[end:start])
        end = stop
    return "".join([*kept, text[end:]])
