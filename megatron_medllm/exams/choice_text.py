"""Answers that are not a label but the text of a choice, equal to it after folding."""

import re
from collections.abc import Iterator

from megatron_medllm.exams.labels import squeezed
from megatron_medllm.exams.question import Question

_QUOTES = " \t\"'「」『』"
_DECORATION = f"{_QUOTES}*_`${{}}"
_MARKUP = re.compile(r"</\w+>.*|\\(?:boxed|text|mathrm|mathbf|textbf|rm)(?=\s*\{)|\\[()\[\]]")
_COPULA = re.compile(
    r"(?:です|である|だ|でした|となる|になる|が正しい|が正解(?:である|です)?|を選ぶ|と考えられる)(?:ね|よ)?[。.]*$"
)
_LISTS = (re.compile(r"[,、;]"), re.compile(r"[,、;・]|と|及び|および|\band\b"))


def read_choice_texts(line: str, question: Question) -> tuple[str, ...] | None:
    """The labels of the choices whose own texts `line` gives, alone or as a list; None where it is no such text."""
    by_text: dict[str, list[str]] = {}
    for label, choice in zip(question.labels, question.choices, strict=False):
        by_text.setdefault(squeezed(choice.strip(_QUOTES)), []).append(label)
    by_text.pop("", None)
    for form in _forms(line):
        if squeezed(form) in by_text:
            return _alone(by_text[squeezed(form)])
    for separator in _LISTS:
        for form in _forms(line):
            parts = [squeezed(part.strip(_DECORATION)) for part in separator.split(form)]
            if len(parts) > 1 and all(len(by_text.get(part, ())) == 1 for part in parts):
                return tuple(sorted({by_text[part][0] for part in parts}))
    return None


def starts_another_choice(line: str, label: str, question: Question) -> bool:
    """Whether `label` is only the first letter of another choice's text, with which `line` starts."""
    start = squeezed(line.strip(_DECORATION))
    texts = {key: squeezed(text) for key, text in zip(question.labels, question.choices, strict=False)}
    own = texts.pop(label, "")
    if own and start.removeprefix(label).lstrip(" .:,)」』】").startswith(own):
        return False
    others = texts.values()
    return any(len(text) > 1 and text.startswith(label) and start.startswith(text) for text in others)


def _forms(line: str) -> Iterator[str]:
    """What of a line may be the choice's text: all of it, without markup, to its first full stop, without です."""
    bare = _MARKUP.sub("", line).strip(_DECORATION)
    for form in (line, bare, bare.split("。")[0].strip(_DECORATION)):
        yield form
        yield _COPULA.sub("", form).strip(_DECORATION)


def _alone(labels: list[str]) -> tuple[str, ...] | None:
    return tuple(labels) if len(labels) == 1 else None
