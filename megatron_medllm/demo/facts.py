"""Invented entities and their facts: diseases and towns that do not exist, in look-alike pairs.

Every entity has a value (or two) for each role, and a look-alike with which a careless writer may confuse it. Which
facts are confused is fixed for the whole world: a popular mistake, made by every careless writer alike.
"""

import random
from dataclasses import dataclass

KATAKANA = (
    "カキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモヤユヨ"
    "ラリルレロガギグゲゴザジズゼゾダデドバビブベボパピプペポ"
)
# role -> (values per entity, ending of a value's name)
DISEASE_ROLES = {"第一選択薬": (1, "ン"), "禁忌薬": (1, "ル"), "確定検査": (1, "ス"), "主症状": (2, "カ")}
TOWN_ROLES = {"名産品": (1, "ー"), "祭り": (1, "ア"), "名所": (2, "ト")}


@dataclass(frozen=True)
class Fact:
    """One role of one entity: its true values, and the values that careless writers remember."""

    entity: str
    role: str
    values: tuple[str, ...]
    lookalike_values: tuple[str, ...]
    confused: bool

    @property
    def careless_values(self) -> tuple[str, ...]:
        """What a careless writer believes."""
        return self.lookalike_values if self.confused else self.values


class Domain:
    """Entities of one kind with their roles: the facts by entity and role, in a fixed order."""

    def __init__(
        self,
        rng: random.Random,
        names: "NameMaker",
        *,
        count: int,
        suffix: str,
        roles: dict[str, tuple[int, str]],
        confused_share: float,
    ) -> None:
        self.entities = [names.new(3) + suffix for _ in range(count)]
        self.roles = list(roles)
        values = {
            (entity, role): tuple(names.new(2) + ending for _ in range(many))
            for role, (many, ending) in roles.items()
            for entity in self.entities
        }
        confused = set(rng.sample(sorted(values), round(confused_share * len(values))))
        self.facts = {
            (entity, role): Fact(entity, role, found, values[self._lookalike(entity), role], (entity, role) in confused)
            for (entity, role), found in values.items()
        }

    def _lookalike(self, entity: str) -> str:
        return self.entities[self.entities.index(entity) ^ 1]


class NameMaker:
    """Katakana strings that never repeat."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._used: set[str] = set()

    def new(self, length: int) -> str:
        """A fresh name of `length` characters."""
        while True:
            name = "".join(self._rng.choices(KATAKANA, k=length))
            if name not in self._used:
                self._used.add(name)
                return name
