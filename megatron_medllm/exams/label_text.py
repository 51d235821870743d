"""Labels at the start of a line, as models write them: `c`, `(c)`, `**c**`, `c. 水`, `a と c`, `cです`.

A letter that only begins a word is no label (`B型肝炎`, `A群`, `C. difficile`), nor is a number that counts something
(`2 mg`, `1型`).
"""

import re
from dataclasses import dataclass

from megatron_medllm.exams.labels import plain
from megatron_medllm.exams.question import Question

_BRACKET = r"[\s「『【\[(<*_\"'`${]"
_MARKUP = r"\\boxed\s*\{|\\(?:text|mathrm|mathbf|textbf|rm)\s*\{|\\[(\[]"
_OPENING = re.compile(rf"(?:{_BRACKET}|{_MARKUP})*(?:(?:選択肢|option|choice)\s*:?{_BRACKET}*)?")
_CLOSE = r"(?:[」』】\])>*_\"'`$}]|\\[)\]])*"
_CLOSING = re.compile(rf"{_CLOSE}[.:]?{_CLOSE}\s*")
_BETWEEN_BRACKETS = re.compile(r"([)\]」』】])\s*(?=[(\[「『【])")
_SEPARATOR = re.compile(r"\s*(?:,|、|・|/|&|\+|;|と|及び|および|\band\b|\s)\s*")
_JOINS = {"・", "/", "&", "+", "と"}  # what stands behind them belongs to what stands before
_NEGATED = re.compile(
    r"\s*(?:[.:]\s*)?(?:では?な[いく]|じゃな[いく]|以外|誤り|誤って|不正解|不適切|間違|×"
    r"|(?:is|are)\s+(?:not|wrong|incorrect|false)\b|(?:wrong|incorrect|false)\b)"
)
_OR = re.compile(
    r"\s*(?:\bor\b|か(?!ら)|または|又は|あるいは|もしくは|ないし|[~〜∼–−-]|から)\s*[(「\[]?[a-z\d](?![a-z])"
)
_NO = r"(?![^。,、]*な[いく])"
# What may stand right behind a label: the end, punctuation, or what makes a sentence of it (`cです`, `2番`).
_AFTER = re.compile(
    r"$|[^\w]|_|番(?:目)?(?![一-鿿ァ-ヴ])|です|である|でし|でござい|で(?:は|じゃ)?な|だ(?:[。と]|$)|以外"
    rf"|[がは](?:正|適|最|答|該当|当て){_NO}|を(?:選|挙|答)|に(?:な|該当)|の(?=\s*[(「『])|のみ|だけ|及び|および|または|又は"
    r"|と(?:考|な|思|判|いう|\s*[(「『]|\s*[a-z\d](?![a-z\d]))|か[a-z\d](?![a-z\d])"
)
# Behind a space these still make the letter or the number a part of a term.
_TERM = re.compile(
    r"\s+(?:型|群|級|期|度|号|細胞|波|線|帯|抗[原体]|ウイルス|領域|因子|歳|日|週|か?月|年|回|個|本|錠|時間|分|秒|つ|種|類)"
)
_UNIT = re.compile(r"\s*(?:[a-z]+(?:/|$|\s|[^\x00-\x7f])|[μ%°℃])")
_ENGLISH = re.compile(r"\s+(?!and\b|or\b)[a-z]{2,}")
_GENUS = re.compile(r"[^\w]*[A-ZＡ-Ｚ][.．]\s*[a-z]{3,}")
_LETTERS, _DIGITS = re.compile(r"[a-z]+"), re.compile(r"\d{1,9}")
_GLUED_LETTERS, _GLUED_DIGITS = (
    re.compile(r"[a-z\d]|[.'][a-z\d]|[-‐–−][^\s-]|\\[a-z]"),
    re.compile(r"\d|[./:]\d|['′%]|,\d{3}|[-‐–−][^\s-]|\\[a-z]"),
)


@dataclass(frozen=True, slots=True)
class _Word:
    """A run of letters or digits that may be labels: its end, and where its choice's own text begins behind it."""

    text: str
    end: int
    own_text: int | None


def read_labels(original: str, question: Question) -> tuple[tuple[str, ...], str]:
    """The labels at the start of a line, sorted, and "", or () and the reason why there are none."""
    line = _one_list(original)
    choices = dict(zip(question.labels, map(_one_list, question.choices), strict=False))
    labels: list[str] = []
    joined = False
    position = _end(_OPENING, line, 0)
    while word := _word_at(line, position, question, choices):
        keys = _keys(word.text, question.labels)
        if keys is None and (len(word.text) == 1 or (labels and len(question.labels) > 9)):
            return (), f"{word.text} is not a choice"
        if keys is None or (len(word.text) > 1 and word.text not in question.labels and labels):
            break
        if word.own_text is None:
            if _negated(line, word.end):
                return (), "no answer read"
            if _in_a_term(line, word, question) or (not labels and _GENUS.match(original)):
                labels = [] if joined else labels  # `A・B型` is no a
                break
        labels += keys
        position = _end(_CLOSING, line, word.end)
        if word.own_text is not None:
            position = word.own_text + len(choices[word.text])
            if _negated(line, position):
                return (), "no answer read"
        separator = _SEPARATOR.match(line, position)
        position = _end(_OPENING, line, separator.end() if separator else position)
        if not separator and not line[:position].endswith((" ", ".", ":")):
            break
        joined = separator is not None and separator.group().strip() in _JOINS
        if joined and re.match(r"[a-z\d]", line[position:]) and _word_at(line, position, question, choices) is None:
            return (), "no answer read"
    if not labels:
        return (), "no answer read" if line else "empty"
    return tuple(sorted(set(labels))), ""


def _one_list(text: str) -> str:
    """`plain`, and `(1)(3)` as a list."""
    return _BETWEEN_BRACKETS.sub(r"\1,", plain(text).strip())


def _end(pattern: re.Pattern[str], line: str, position: int) -> int:
    found = pattern.match(line, position)
    return found.end() if found else position


def _word_at(line: str, position: int, question: Question, choices: dict[str, str]) -> _Word | None:
    digits = question.labels[0].isdigit()
    found = (_DIGITS if digits else _LETTERS).match(line, position)
    if found is None:
        return None
    end, choice = found.end(), choices.get(found.group(), "")
    closed = _end(_CLOSING, line, end)
    places = (end, closed, closed + line.startswith(",", closed))
    own = next((at for at in places if choice and line.startswith(choice, at)), None)
    if own is None and (_GLUED_DIGITS if digits else _GLUED_LETTERS).match(line, end):
        return None
    return _Word(found.group(), end, own)


def _keys(word: str, labels: tuple[str, ...]) -> list[str] | None:
    """`c` is one label and `ace` three; `bad` and `decade` are words. Of ten and more choices `12` is one, or none."""
    if word in labels:
        return [word]
    run_together = all(len(label) == 1 for label in labels) and list(word) == sorted(set(word))
    return list(word) if len(word) > 1 and run_together and all(key in labels for key in word) else None


def _in_a_term(line: str, word: _Word, question: Question) -> bool:
    """Whether the letter begins a word, or the number counts something."""
    rest = line[word.end :]
    bracket = re.match(_CLOSE, rest)
    inside = rest[bracket.end() :] if bracket else rest
    if not _AFTER.match(rest) or not _AFTER.match(inside) or _TERM.match(rest):
        return True
    if question.labels[0].isdigit():
        return bool(_UNIT.match(rest))
    return word.text in ("a", "i") and bool(_ENGLISH.match(rest))


def _negated(line: str, position: int) -> bool:
    closed = _end(_CLOSING, line, position)
    return any(pattern.match(line, at) for pattern in (_NEGATED, _OR) for at in (position, closed))
