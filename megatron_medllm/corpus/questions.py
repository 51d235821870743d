"""Exam questions as sets of grams that a document can be checked against.

A question is printed in several ways (choices with letters, with digits, with neither; or the stem alone), so each
has several probes. Grams that recur over exam editions are boilerplate (次の文を読み…) and prove nothing.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_medllm.config.corpus import DecontaminateConfig
from megatron_medllm.corpus.fold import SEPARATOR, fold, join
from megatron_medllm.corpus.shingles import code_points, hash_grams
from megatron_medllm.errors import UserError
from megatron_medllm.exams.loading import is_metadata, load_question_texts
from megatron_medllm.exams.schema import QuestionRow
from megatron_medllm.inputs import match_files

GRAM = 13
_FEW_GRAMS = 10
_SHORT_GRAMS = 60
_LEAST_GRAMS = 8


@dataclass(frozen=True)
class SoughtQuestion:
    """One exam question. `edition` is its exam's: IgakuQA's `112A1` is of edition 112."""

    id: str
    edition: str
    stem: str
    choices: tuple[str, ...]

    def printings(self) -> list[str]:
        """The ways its text may stand in a document, before folding."""
        if not self.choices:
            return [self.stem]
        lettered = "".join(chr(ord("a") + i) + choice for i, choice in enumerate(self.choices))
        numbered = "".join(f"{i}{choice}" for i, choice in enumerate(self.choices, start=1))
        return [self.stem + tail for tail in ("".join(self.choices), lettered, numbered, "")]


def question_files(patterns: list[str]) -> list[Path]:
    """The files that hold questions; IgakuQA's `*_metadata.jsonl` hold none.

    Raises:
        UserError: a pattern matches nothing.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        paths = [path for path in map(Path, match_files(pattern, suffixes=[".jsonl"])) if not is_metadata(path)]
        if not paths:
            raise UserError(f"decontaminate.exams: {pattern} matches no question file")
        files.update(dict.fromkeys(paths))
    return list(files)


def load_questions(patterns: list[str]) -> list[SoughtQuestion]:
    """Read the texts of questions, in any layout that exams have, or JSONL with `text`; no gold is needed.

    Raises:
        UserError: a pattern matches nothing, or a line is no question.
    """
    return [_question(row, str(path)) for path in question_files(patterns) for row in load_question_texts(path)]


def _question(row: QuestionRow, paper: str) -> SoughtQuestion:
    edition = re.match(r"\d{3}(?=\d*\D|\d{3}$)", row.problem_id)
    return SoughtQuestion(row.problem_id, edition[0] if edition else paper, row.problem_text, row.choices.texts)


@dataclass(frozen=True)
class QuestionIndex:
    """Sorted gram hashes, and which probes hold each. A probe is one printing of one question.

    `grams` uint64 [g] sorted; gram i is in `probes[bounds[i]:bounds[i + 1]]` (int32); `counts` (bool [g]) is False
    for boilerplate. Per probe: its question, its number of grams, how many make a meeting, whether boilerplate counts.
    `long_grams` uint64 sorted are the `match_chars`-grams, less boilerplate, `long_question` one question of each.
    """

    ids: list[str]
    grams: np.ndarray
    bounds: np.ndarray
    probes: np.ndarray
    counts: np.ndarray
    probe_question: np.ndarray
    probe_size: np.ndarray
    probe_needs: np.ndarray
    probe_recycled: np.ndarray
    long_grams: np.ndarray
    long_question: np.ndarray


def index_questions(questions: list[SoughtQuestion], config: DecontaminateConfig) -> QuestionIndex:
    """Fold, cut into grams, and subtract boilerplate."""
    questions = sorted(questions, key=lambda question: question.edition)
    printings = [(q, text) for q, question in enumerate(questions) for text in question.printings()]
    folded = fold(code_points(join(text for _, text in printings)))
    # A separator stands behind each printing: its position in `folded` ends the probe.
    ends = np.flatnonzero(folded == ord(SEPARATOR))
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts
    is_full = np.array([text != questions[q].stem or not questions[q].choices for q, text in printings])
    usable = (lengths >= GRAM) & (is_full | (lengths >= config.match_chars))
    probe_question = np.array([q for q, _ in printings], np.int32)
    names = {name: i for i, name in enumerate(dict.fromkeys(question.edition for question in questions))}
    probe_edition = np.array([names[questions[q].edition] for q, _ in printings], np.int32)

    grams, probes, in_editions = _distinct(*_cut(folded, starts, lengths, usable, GRAM), probe_edition)
    counts = in_editions < config.boilerplate_editions
    unique = np.flatnonzero(_changes(grams))
    number = np.cumsum(_changes(grams)) - 1
    telling = np.bincount(probes[counts[number]], minlength=len(printings))
    whole = np.bincount(probes, minlength=len(printings))
    # Most of it recurs: a question asked again, whose grams all count, but more of them must be there.
    recycled = telling < np.maximum(_FEW_GRAMS, whole / 2)
    size = np.where(recycled, whole, telling)
    share = np.where(whole < _SHORT_GRAMS, 0.9, np.maximum(0.6, config.coverage))
    # One edited character spoils GRAM grams, which may be more than half of a short question's.
    one_edit = np.maximum(np.minimum(np.ceil(config.coverage * size), size - GRAM), np.minimum(size, _LEAST_GRAMS))
    needs = np.where(recycled, np.ceil(share * size), one_edit)

    long_grams, long_probes, in_editions = _distinct(
        *_cut(folded, starts, lengths, usable, config.match_chars), probe_edition
    )
    first = np.flatnonzero(_changes(long_grams))[in_editions < config.boilerplate_editions]
    return QuestionIndex(
        ids=[question.id for question in questions],
        grams=grams[unique],
        bounds=np.append(unique, len(grams)),
        probes=probes.astype(np.int32),
        counts=counts,
        probe_question=probe_question,
        probe_size=np.maximum(size, 1),
        probe_needs=np.maximum(needs, 1),
        probe_recycled=recycled,
        long_grams=long_grams[first],
        long_question=probe_question[long_probes[first]],
    )


def _distinct(
    grams: np.ndarray, probes: np.ndarray, probe_edition: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct (gram, probe) pairs sorted by gram, and the number of editions of each distinct gram.

    Probes come sorted by edition, and the sort is stable, so within a gram both stay sorted.
    """
    order = _stable_order(grams)
    grams, probes = grams[order], probes[order]
    new_gram = _changes(grams)
    new_edition = new_gram | _changes(probe_edition[probes])
    in_editions = np.bincount((np.cumsum(new_gram) - 1)[new_edition])
    new_pair = new_gram | _changes(probes)
    return grams[new_pair], probes[new_pair], in_editions


def _stable_order(values: np.ndarray) -> np.ndarray:
    """What `argsort(kind="stable")` gives, from two sorts that are not stable and several times as fast."""
    order = np.argsort(values)
    ranks = np.cumsum(_changes(values[order]))
    keys = ranks * len(values) + order  # equal values in the order of their positions
    keys.sort()
    return keys % max(1, len(values))


def _changes(values: np.ndarray) -> np.ndarray:
    """bool: True where a value differs from the one before it, and at the first."""
    changes = np.ones(len(values), bool)
    changes[1:] = values[1:] != values[:-1]
    return changes


def _cut(
    folded: np.ndarray, starts: np.ndarray, lengths: np.ndarray, usable: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams of usable probes, and the probe of each."""
    hashes = hash_grams(folded, n)
    counts = np.where(usable, np.maximum(lengths - n + 1, 0), 0)
    probes = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(probes)) - np.repeat(np.cumsum(counts) - counts, counts)
    return hashes[starts[probes] + within], probes
