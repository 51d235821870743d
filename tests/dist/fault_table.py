"""The table of faults that `medllm certify` must find, and how one is entered into it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any
from unittest.mock import patch

TP, SP, DP, PP, CP = {"tp": 2}, {"tp": 2, "sp": True}, {"dp": 2}, {"pp": 2}, {"cp": 2}
LORA = {"adapter": {"rank": 4, "alpha": 8.0}}


@dataclass(frozen=True)
class Fault:
    """A fault, the smallest layout that shows it, and the check that must."""

    inject: Callable[[], AbstractContextManager]
    what: str
    layout: dict[str, Any]
    found_by: str
    stage: str = "cpt"
    tied: bool = False
    family: str = "qwen2"
    section: dict[str, Any] = field(default_factory=dict)


FAULTS: dict[str, Fault] = {}


def fault(what: str, layout: dict[str, Any], found_by: str, **more: Any) -> Callable:
    """Enter a function that returns the context manager of a fault into the table."""

    def enter(inject: Callable[[], AbstractContextManager]) -> Callable[[], AbstractContextManager]:
        FAULTS[inject.__name__] = Fault(inject, what, layout, found_by, **more)
        return inject

    return enter


def wrap(target: Any, name: str, make: Callable[[Callable], Callable]) -> AbstractContextManager:
    """Replace TARGET.NAME by what `make` makes of it."""
    original = getattr(target, name)
    return patch.object(target, name, wraps(original)(make(original)))
