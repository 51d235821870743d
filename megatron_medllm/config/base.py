"""What every section of the configuration shares: frozen, strict about unknown keys; and what is wrong, in one line."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

_LONGEST_VALUE = 80  # characters of a wrong value that a message repeats


def _word(value: Any) -> Any:
    """YAML 1.1 reads a bare on and off as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)]


class Section(BaseModel):
    """A part of the run's configuration. Unknown keys are refused; values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


def first_problem(error: ValidationError) -> str:
    """The first problem as one line: field, what is wrong, what was found, and how many more there are."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    found = "" if first["type"] == "missing" or isinstance(first["input"], BaseModel) else found_value(first["input"])
    message = " ".join(f"{first['msg'].removeprefix('Value error, ')}{found}{more}".split())
    return f"{where}: {message}" if where else message


def found_value(value: object) -> str:
    """` (found ...)` for a message; nothing for a whole section."""
    if isinstance(value, dict | list):
        return ""
    text = repr(value)
    return f" (found {text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + '…'})"
