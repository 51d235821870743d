"""Pairs are held out by question: never one of a question's pairs beside another that trains."""

from pathlib import Path

import numpy as np
import pytest

from megatron_medllm.data.held_out import by_question, hold_out
from megatron_medllm.data.pair_file import read_pairs
from megatron_medllm.data.pairs import Pair, Response
from megatron_medllm.errors import UserError
from tests.worlds.pairs import write_pairs

ANSWER = Response(np.array([1]), np.array([True]))


def pairs(*questions: tuple[str, ...]) -> list[Pair]:
    return [Pair(row, np.array([1]), ANSWER, ANSWER, 1.0, names) for row, names in enumerate(questions)]


def many(count: int) -> list[Pair]:
    """Two pairs a question, as explained and as short answer: other prompts, one name."""
    return pairs(*((f"id:{i // 2}", f"prompt:{i}") for i in range(2 * count)))


def test_a_name_or_a_prompt_in_common_makes_one_question() -> None:
    found = by_question(pairs(("id:1", "prompt:a"), ("prompt:b",), ("id:2", "prompt:a"), ("id:2", "prompt:c"), ()))
    assert found == {"id:1": [0, 2, 3], "prompt:b": [1], "row:4": [4]}
    backwards = by_question(pairs(("id:2", "prompt:c"), ("id:2", "prompt:a"), ("id:1", "prompt:a")))
    assert backwards == {"id:1": [0, 1, 2]}


def test_whole_questions_of_about_the_share_are_held_out() -> None:
    held_out = hold_out(many(500), 0.2)
    assert 75 <= len(held_out.questions) <= 125
    assert sorted(held_out.rows) == sorted(row for i in range(500) if f"id:{i}" in held_out.questions
                                           for row in (2 * i, 2 * i + 1))  # fmt: skip
    assert held_out.report()["pairs"] == 2 * len(held_out.questions)


def test_other_pairs_change_nothing_about_a_question() -> None:
    """A further round has other answers to some of the questions: none that validated trains now."""
    all_of_them, some = many(300), many(300)[100:400]
    first, second = hold_out(all_of_them, 0.1), hold_out(some, 0.1)
    asked = by_question(some)
    assert set(second.questions) == set(first.questions) & set(asked)
    assert hold_out(list(reversed(all_of_them)), 0.1).questions.keys() == first.questions.keys()
    assert set(hold_out(all_of_them, 0.05).questions) < set(first.questions)
    assert first.digest() != second.digest()


def test_at_least_one_question_validates_and_one_trains() -> None:
    assert len(hold_out(many(3), 0.001).questions) == 1
    assert len(hold_out(many(3), 0.999).questions) == 2
    with pytest.raises(UserError, match=r"validation_share=0\.5: all pairs answer one question"):
        hold_out(many(1), 0.5)
    nothing = hold_out(many(1), 0.0)
    assert (nothing.rows, nothing.digest()) == ([], None)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"problem_id": "116A1"}, "116A1"),
        ({"problem_id": 7}, "7"),
        ({"problem_id": 7.0}, "7"),
        ({"question_id": "x"}, "x"),
        ({"problem_id": None, "question_id": "x"}, "x"),
        ({"problem_id": ""}, None),
        ({"problem_id": ["a"]}, None),
        ({"problem_id": True}, None),
        ({"id": "a row's own"}, None),
        ({}, None),
    ],
)
def test_the_files_name_of_a_question(tmp_path: Path, fields: dict, name: str | None) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (text,) = read_pairs(write_pairs(tmp_path / "pairs.jsonl", [row | fields]))
    assert text.question == name
