"""Reasons not to learn from a response or a pair. Each function answers with a reason, or with None."""

import re

from rapidfuzz.distance import Levenshtein

from megatron_medllm.config.pairs import FilterConfig
from megatron_medllm.exams.question import Question
from megatron_medllm.preference.candidate import Candidate

_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
_JAPANESE = re.compile(r"[ぁ-んァ-ヴー一-鿿々〆]")
_LETTER = re.compile(r"[^\W\d_]")
_RIGHT = r"正しい|正解|適切である|適切(?=[。\s]|$)|正(?=[。\s]|$)|○"
_WRONG = r"誤り|誤って|正しくない|正し(?:い|く)とは|正解では?ない|不正解|不適切|適切でない|誤(?=[。\s]|$)|×"
# What asks for the odd one out: there, `正しい` may mean "fits the question" or "is true".
_ASKS_FOR_WRONG = re.compile(r"(?:ない|誤り|誤っている|不適切な|低い)(?:もの|の)?(?:は|を)|除く")
_ANSWER_LINE = re.compile(r"\n?答え\s*[:：][^\n]*\s*$")


def candidate_reason(candidate: Candidate, question: Question, config: FilterConfig, *, chosen: bool) -> str | None:
    """Why `candidate` cannot be the chosen (or the rejected) side of a pair."""
    if not candidate.text.strip():
        return "empty"
    if candidate.mode == "answer_only":
        return None
    # What was cut off before it reached an answer is malformed: the very thing to reject.
    if config.truncated and candidate.truncated and candidate.tier != "malformed":
        return "truncated"
    if chosen and candidate.tier == "gold" and len(question.explanation.strip()) < config.min_gold_chars:
        return "gold explanation too short"
    if candidate.tier != "malformed" and japanese_share(candidate.text) < config.min_japanese:
        return "language"
    if chosen and config.consistent and contradicts_itself(candidate, question):
        return "explanation contradicts its answer"
    return None


def pair_reason(chosen: Candidate, rejected: Candidate, config: FilterConfig) -> str | None:
    """Why the two cannot be a pair."""
    if chosen.text.strip() == rejected.text.strip():
        return "identical"
    if chosen.mode == "answer_only":
        return None
    # Only between answers that arrive is length a thing to learn by mistake.
    short, long = sorted((len(chosen.text), len(rejected.text)))
    if rejected.tier != "malformed" and long > config.max_length_ratio * short:
        return "length ratio"
    if Levenshtein.normalized_distance(chosen.text, rejected.text) < config.min_edit_distance:
        return "nearly identical"
    return None


def japanese_share(text: str) -> float:
    """Kana and kanji among the letters of `text`; 1.0 when there is no letter."""
    letters = len(_LETTER.findall(text))
    return min(1.0, len(_JAPANESE.findall(text)) / letters) if letters else 1.0


def contradicts_itself(candidate: Candidate, question: Question) -> bool:
    """Whether the explanation's verdicts on the options speak against the answer it ends with.

    Answered options must be called right and no other may be. Where the question asks for what is wrong, explanations
    use `正しい` in both senses, so there it is only refused that answered and other options share a verdict.
    """
    if candidate.answer is None or question.kind == "numeric":
        return False
    verdicts = option_verdicts(candidate.text, question.labels)
    of_answered = {verdicts[label] for label in candidate.answer if label in verdicts}
    of_others = {verdict for label, verdict in verdicts.items() if label not in candidate.answer}
    if _ASKS_FOR_WRONG.search(question.problem_text):
        return len(of_answered) > 1 or bool(of_answered & of_others)
    return False in of_answered or True in of_others


def option_verdicts(text: str, labels: tuple[str, ...]) -> dict[str, bool]:
    """Which options `text` calls right or wrong: `aは…正しい。`, `ｃ　誤り。`, `b:正`; not those it calls both."""
    body = _ANSWER_LINE.sub("", text.translate(_FULL_WIDTH))
    label = "|".join(map(re.escape, labels))
    # One statement reaches from its option to the verdict, without passing another option or two full stops.
    statement = re.compile(
        rf"(?<![A-Za-z0-9])({label})(?:は|が|:|\.|\s)(?:(?!(?<![A-Za-z0-9])(?:{label})(?:は|が|:|\.|\s))[^\n。])*?"
        rf"(?:({_WRONG})|({_RIGHT}))"
    )
    found: dict[str, set[bool]] = {}
    for match in statement.finditer(body):
        found.setdefault(match.group(1), set()).add(match.group(2) is None)
    return {option: verdicts.pop() for option, verdicts in found.items() if len(verdicts) == 1}
