"""Rows of question files in the layouts and spellings that people have: read right, or refused by file, line, field."""

import json
from pathlib import Path

import pytest

from megatron_medllm.errors import UserError
from megatron_medllm.exams.loading import load_exam
from megatron_medllm.exams.question import Question

OWN = {"problem_id": "1", "problem_text": "どれか。", "choices": ["甲", "乙", "丙", "丁"]}
OTHER = {"question": "Which?", "choices": ["w", "x", "y", "z"]}
OPTIONS = {"A": "w", "B": "x", "C": "y", "D": "z"}


def load(path: Path, *rows: object) -> tuple[Question, ...]:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return load_exam("x", [path]).questions


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        *[(gold, "a+c") for gold in (["a", "c"], ["ac"], ["a,c"], "ac", "a,c", "a、c", "A C", "ａｃ", ["(a)", "(c)"])],
        *[(gold, "c") for gold in (["c"], "c", "C", "ｃ", "ⓒ", "(c)", "c.", "丙", "c. 丙", ["ｃ"])],
        *[(gold, "3") for gold in (["3"], "3", "３", "③", 3, [3], "(3)", "3.")],
        *[(gold, "1+3") for gold in (["1", "3"], "13", "1,3", "①③", ["①", "③"], [1, 3], "①、③")],
    ],
)
def test_gold_in_its_spellings(tmp_path: Path, answer: object, accepted: str) -> None:
    (question,) = load(tmp_path / "a.jsonl", OWN | {"answer": answer})
    assert ["+".join(keys) for keys in question.accepted] == [accepted]
    assert set(question.accepted[0]) <= set(question.labels)


def test_gold_of_alternatives(tmp_path: Path) -> None:
    either, note = load(
        tmp_path / "a.jsonl",
        OWN | {"answer": ["a or d"]},
        OWN | {"problem_id": "2", "answer": ["1", "2", "4（いずれか2つを選択で正解とする）"]},
    )
    assert either.accepted == (("a",), ("d",))
    assert note.accepted == (("1", "2"), ("1", "4"), ("2", "4"))


def test_twelve_choices_with_numbers(tmp_path: Path) -> None:
    rows = [
        OWN | {"problem_id": str(i), "choices": [f"薬{n}" for n in range(12)], "answer": a}
        for i, a in enumerate(["12", ["1", "12"], "⑫"])
    ]
    assert [q.accepted for q in load(tmp_path / "a.jsonl", *rows)] == [(("12",),), (("1", "12"),), (("12",),)]


@pytest.mark.parametrize("answer", ["13", "112", ["123"], "0"])
def test_of_twelve_choices_digits_are_not_run_together(tmp_path: Path, answer: object) -> None:
    with pytest.raises(UserError, match="which is not a choice"):
        load(tmp_path / "a.jsonl", OWN | {"choices": [f"薬{n}" for n in range(12)], "answer": answer})


@pytest.mark.parametrize(
    "row",
    [
        {"question": "?", "options": OPTIONS, "answer_idx": "C", "answer": "y"},
        {"question": "?", "options": dict(reversed(OPTIONS.items())), "answer": "Y ", "meta_info": "step1"},
        {"question": "?", "options": [{"key": k, "value": v} for k, v in OPTIONS.items()], "answer_idx": "C"},
        {"question": "?", "options": ["w", "x", "y", "z"], "answer_idx": 2, "answer": "y"},
        {"question": "?", "options": ["w", "x", "y", "z"], "answer_index": 2},
        {"question": "?", "options": ["(A) w", "(B) x", "(C) y", "(D) z"], "answer": "C"},
        {"question": "?", "options": ["(A)w", "(B)x", "(C)y", "(D)z"], "label": "C", "answer": None},
        {"question": "?", "choices": ["w", "x", "y", "z"], "answer": 2, "subject": "anatomy"},
        {"question": "?", "choices": ["w", "x", "y", "z"], "answer": "c"},
        {"question": "?", "choices": {"text": ["w", "x", "y", "z"], "label": ["A", "B", "C", "D"]}, "answerKey": "C"},
        {"id": 7, "question": "?", "options": ["w", "x", "y", "z"], "answer": "C", "answer_index": 2},
    ],
)
def test_other_layouts(tmp_path: Path, row: dict) -> None:
    (question,) = load(tmp_path / "test.jsonl", row)
    assert (question.labels, question.choices) == (("a", "b", "c", "d"), ("w", "x", "y", "z"))
    assert question.accepted == (("c",),)
    assert question.problem_id == ("7" if "id" in row else "test:1")


def test_choices_that_are_numbers(tmp_path: Path) -> None:
    (question,) = load(tmp_path / "a.jsonl", OWN | {"choices": [1, 2.5, "3"], "answer": "b"})
    assert (question.choices, question.accepted) == (("1", "2.5", "3"), (("b",),))


def test_arc_with_numbers(tmp_path: Path) -> None:
    choices = {"text": ["w", "x"], "label": ["1", "2"]}
    (question,) = load(tmp_path / "a.jsonl", {"question": "?", "choices": choices, "answerKey": "2"})
    assert (question.labels, question.accepted) == (("1", "2"), (("2",),))


@pytest.mark.parametrize(("answers", "read"), [([0, 3, 1], "adb"), ([4, 1, 2], "dab"), (["0", "3"], "ad")])
def test_numbers_counted_from_what_the_file_shows(tmp_path: Path, answers: list, read: str) -> None:
    assert (
        "".join(q.accepted[0][0] for q in load(tmp_path / "a.jsonl", *[OTHER | {"answer": a} for a in answers])) == read
    )


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([1, 2], r"a\.jsonl:1: field 'answer' may mean a or b, found 1"),
        ([0, 4], r"a\.jsonl: field 'answer' holds 0 as well as the number of choices"),
        ([0, 5], r"a\.jsonl:2: field 'answer' names 5, which is not a choice"),
        ([0, -1], r"a\.jsonl:2: field 'answer' names -1"),
    ],
)
def test_numbers_that_could_be_misread(tmp_path: Path, answers: list, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.jsonl", *[OTHER | {"answer": answer} for answer in answers])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (OWN | {"answer": gold}, "field 'answer'")
        for gold in (
            ["e"],
            ["a", "x"],
            ["aa"],
            ["a", "a"],
            "b型",
            "丙丁",
            ["5"],
            "0",
            [True],
            True,
            2.0,
            {"a": 1},
            [None],
            [[]],
            "",
            [],
            "c（誤植）",
            "答え",
        )
    ]
    + [
        (OWN | {"answer": "a"} | change, f"field '{field}'")
        for field, values in {
            "points": (1.5, "1.5", True, "two", -1, [1], "", "NaN", "1e400"),
            "text_only": ("false", "true", 0, 1, "no", []),
            "problem_id": ("", " ", True, [], 1.5, {}),
            "problem_text": (5, "", "  ", []),
            "choices": (
                "甲",
                5,
                ["甲", True],
                ["甲", None],
                ["甲", ""],
                {"a": "甲", "c": "丙"},
                {"x": "甲"},
                ["甲"] * 27,
                {"a": None},
            ),
            "year": (True, [], 1.5),
            "section": (1, []),
            "category": (1, {}),
            "explanation": (1, ["…"]),
            "kinki": (["x"], "e", 1, [1], {}),
        }.items()
        for change in [{field: value} for value in values]
    ]
    + [
        ({"problem_text": "?", "choices": ["甲"], "answer": "a"}, "missing field 'problem_id'"),
        ({"problem_id": "1", "problem_text": "?", "answer": "a"}, "missing field 'choices'"),
        ({"problem_id": "1", "problem_text": "?", "choices": None, "answer": "a"}, "missing field 'choices'"),
        ({"problem_id": "1", "problem_text": "?", "choices": ["甲"]}, "missing field 'answer'"),
        ({"problem_id": "1", "choices": ["甲"], "answer": "a"}, "no question here"),
        (OWN | {"choices": [], "answer": ["c"]}, "needs one number"),
        (OWN | {"choices": [], "answer": ["36.5℃"]}, "needs one number"),
        (OWN | {"choices": [], "answer": ["1", "2"]}, "needs one number"),
        (OWN | {"choices": [], "answer": ["nan"]}, "needs one number"),
        ({"question": "?", "options": OPTIONS, "answer_idx": "C", "answer": "x"}, "name different choices"),
        ({"question": "?", "options": OPTIONS, "answer": "v"}, "names 'v', which is not a choice"),
        ({"question": "?", "options": ["2", "3", "4", "5"], "answer": "4"}, "may mean"),
        ({"question": "?", "options": ["w", "w"], "answer": "w"}, "names 'w'"),
        ({"question": "?", "options": OPTIONS, "answer_idx": "E"}, "field 'answer_idx' names 'E'"),
        ({"question": "?", "options": OPTIONS | {"F": "v"}, "answer_idx": "A"}, "field 'options' are labelled"),
        (["a"], "expected a JSON object"),
    ],
)
def test_what_would_be_misread_is_refused(tmp_path: Path, row: object, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    with pytest.raises(UserError, match=message) as error:
        load(path, OWN | {"problem_id": "0", "answer": "a"}, row)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_lines_are_counted_with_the_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n" + json.dumps(OWN | {"answer": "x"}))
    with pytest.raises(UserError, match=r"a\.jsonl:3: "):
        load_exam("x", [path])


def test_the_same_id_twice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:2: problem_id '1' is also in .*a\.jsonl:1"):
        load(tmp_path / "a.jsonl", OWN | {"answer": "a"}, OWN | {"answer": "a"})


@pytest.mark.parametrize("lead", ["", "\ufeff", "\n \n"])
def test_a_json_array_and_a_byte_order_mark(tmp_path: Path, lead: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(lead + json.dumps([OWN | {"answer": "a"}, OWN | {"problem_id": "2", "answer": "b"}], indent=1))
    assert [q.accepted for q in load_exam("x", [path]).questions] == [(("a",),), (("b",),)]
    path.write_text(lead + json.dumps([OWN | {"answer": "a"}, OWN | {"problem_id": "2", "answer": "x"}]))
    with pytest.raises(UserError, match=r"a\.json: item 2: field 'answer' names 'x'"):
        load_exam("x", [path])
    path.write_text(lead + json.dumps(OWN | {"answer": "a"}))
    assert len(load_exam("x", [path]).questions) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"\x1f\x8b\x08\x00", "compressed with gzip"),
        (b"PAR1....", "a Parquet file"),
        ('{"problem_id": "1"'.encode("utf-16"), "not JSON"),
        (b'{"problem_text": "\x82\xa0"}', "not JSON"),
        (b"[1]", "item 1: expected a JSON object"),
        (b'[{"problem_id": "1"}', "not JSON"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_exam("x", [path])
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"problem_id": "1", "human_accuracy": "many"}, "field 'human_accuracy'"),
        ({"problem_id": "1", "human_accuracy": 150}, "field 'human_accuracy'"),
        ({"problem_id": "1", "kinki": ["x"]}, "field 'kinki' names 'x'"),
        ({"category": "x"}, "field 'problem_id' missing"),
    ],
)
def test_bad_metadata(tmp_path: Path, metadata: dict, message: str) -> None:
    (tmp_path / "a_metadata.jsonl").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "a.jsonl", OWN | {"answer": "a"})


def test_prohibited_choices_in_any_width(tmp_path: Path) -> None:
    """The published metadata has some full-width letters; they never matched an answer."""
    for kinki, expected in ((["ｃ"], {"c"}), (["cd"], {"c", "d"}), (["d", " a"], {"a", "d"}), ([], set())):
        (tmp_path / "a_metadata.jsonl").write_text(json.dumps({"problem_id": "1", "kinki": kinki}))
        assert load(tmp_path / "a.jsonl", OWN | {"answer": "a"})[0].prohibited == expected


def test_what_is_left_out_is_accounted_for(tmp_path: Path) -> None:
    rows = [OWN | {"problem_id": str(n), "answer": "a", "text_only": n != 2} for n in range(3)]
    path = tmp_path / "a.jsonl"
    load(path, *rows, OWN | {"problem_id": "void", "answer": ["解なし"]})
    account = load_exam("x", [path], text_only=True).account.to_json()["subjects"]["x"]
    assert account == {
        "kept": 2,
        "lost": {
            "no right answer": {"count": 1, "first": f"{path}:4: void is declared void"},
            "needs an image": {"count": 1, "first": f"{path}:3: 2"},
        },
    }
