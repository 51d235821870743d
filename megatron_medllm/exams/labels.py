"""Labels of choices as people write them: `c`, `C`, `ｃ`, `(c)`, `ⓒ`, `3`, `３`, `③`, and lists of them."""

import re
import unicodedata
from collections.abc import Sequence
from string import ascii_lowercase

# ①–⑳, ❶–❿, ➀–➉, ➊–➓ and keycaps are numbers of their own: `①②` must not become 12.
_CIRCLED = {
    first + number: f"({number + 1})"
    for first, count in ((0x2460, 20), (0x2776, 10), (0x2780, 10), (0x278A, 10))
    for number in range(count)
}
_KEYCAP = re.compile("(\\d)\ufe0f?\u20e3")
_AROUND = " \t\r\n.。:,、()[]{}<>「」『』【】《》*_\"'`$"
_BETWEEN = re.compile(r"\s*(?:,|、|・|;|/|&|\+|\bと\b|と|及び|および|\band\b|\s)\s*")
_NUMBERS_APART = re.compile(r"(?<=\d)\s+(?=\d)")  # `1 20%` is not 120%
_DASHES = str.maketrans(dict.fromkeys("‐‑‒–—―−﹣", "-") | dict.fromkeys("〜～", "~"))


def plain(text: str) -> str:
    """`text` in one width and lower case; circled numbers in brackets."""
    return unicodedata.normalize("NFKC", _KEYCAP.sub(r"(\1)", text).translate(_CIRCLED)).lower()


def squeezed(text: str) -> str:
    """`plain` with one kind of dash, without white space (but between numbers) and closing full stop."""
    return "".join(_NUMBERS_APART.sub("_", plain(text).strip().translate(_DASHES)).split()).rstrip("。.")


def alphabet(count: int, *, digits: bool) -> tuple[str, ...]:
    """The first `count` labels."""
    return tuple(str(number) for number in range(1, count + 1)) if digits else tuple(ascii_lowercase[:count])


def read_label(text: str) -> str:
    """One label without the brackets or the full stop around it; whatever it is otherwise."""
    return plain(text).strip(_AROUND)


def read_label_list(text: str, labels: Sequence[str]) -> tuple[str, ...] | None:
    """The labels in `ac`, `a,c`, `a と c`, `(1)(3)`, `①③`, in their order; None where anything else is in it.

    Digits are run together only where every label has one digit: of twelve choices `12` is the twelfth.
    """
    bracketed = re.sub(r"[)\]]\s*[(\[]", ",", plain(text))
    words = [word.strip(_AROUND) for word in _BETWEEN.split(bracketed.strip(_AROUND))]
    found: list[str] = []
    for word in words:
        if word in labels:
            found.append(word)
        elif len(word) > 1 and all(len(label) == 1 for label in labels) and all(mark in labels for mark in word):
            found += list(word)
        else:
            return None
    return tuple(found)
