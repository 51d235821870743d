"""The number that an output gives: its result, or nothing where a reader could take it for another number."""

import re
import unicodedata

_RAISED = str.maketrans({c: f"^{d}" for c, d in zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", strict=True)})
_EQUALS = re.compile(r"[=≒≈≅→⇒]")
_SENTENCE_END = re.compile(r"。|[.](?=\s|$)|(?<=\d)\s*[(（]|;")
_NUMBER = re.compile(
    r"(?<![a-z\d.])(?P<minus>マイナス\s*|[-−+])?(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d(?:,\d)+(?![\d.])|\d+(?:\.\d+)?|\.\d+)(?![\d])"
)
# Digits of units (`m2`, `m^2`, `/1.73m2`, `co2`) are no second number.
_ANOTHER = re.compile(r"(?<![a-z\d^.])(?<!/)\d")
# What makes the number another one: a range, a bound, a fraction, a calculation, a power, a big unit.
_CHANGES = re.compile(
    r"[.,]\d|\s*(?:[~〜～∼]|[-–−+]\s*\d|から\s*\d|以上|以下|未満|より(?:大|小|多|少)|超|を(?:超|上回|下回)|弱|強|前後"
    r"|[/÷×*^x⁄]\s*\d|[eE]\d|[十百千万億兆])"
)
_BOUND = re.compile(r"(?:[<>≦≧≤≥±~〜√]|\\frac)\s*$")
_LISTED = re.compile(r"[,、;と]\s*[^\d=,、;]+$")


def read_number(line: str) -> str | None:
    """The number that a line gives, as digits without thousands separators; None where there is none.

    Single digits with commas are those of the answer sheet's boxes (`1,3,0`).
    Behind the last `=` (`4.2 ÷ 2 = 2.1` is 2.1), with any unit and width. A calculation without its result, a range, a
    fraction, a bound (`5以上`), a power of ten, `2万` and a second number are not read: each may mean another number.
    """
    line = unicodedata.normalize("NFKC", line.translate(_RAISED)).lower()
    *before, result = _EQUALS.split(line)
    if before and _LISTED.search(before[-1]) and _EQUALS.search(line[: line.rfind(before[-1])]):
        return None  # `x = 2.1, y = 3`
    end = next(
        (found.start() for found in _SENTENCE_END.finditer(result) if re.search(r"\d", result[: found.start()])), None
    )
    result = result[:end]
    found = _NUMBER.search(result)
    if found is None or _BOUND.search(result[: found.start()]) or re.search(r"\d[.,]?$", result[: found.start()]):
        return None
    rest = result[found.end() :]
    if _CHANGES.match(rest) or _ANOTHER.search(rest):
        return None
    if re.search(r"(?<![a-z\d^])\d", result[: found.start()]):
        return None
    number = found["number"].replace(",", "")
    number = f"0{number}" if number.startswith(".") else number
    minus = found["minus"] or ""
    return f"-{number}" if minus.strip() in ("マイナス", "-", "−") else number
