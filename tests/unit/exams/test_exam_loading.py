import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_medllm.errors import UserError
from megatron_medllm.exams.loading import load_exam, load_shots


def test_invented_exam(exam_dir: Path) -> None:
    exam = load_exam("invented", [exam_dir])
    assert [q.problem_id for q in exam.questions] == ["900A1", "900A2", "900B1", "901A1", "901A2", "901B1"]
    assert [q.year for q in exam.questions] == ["2001", "2001", "2001", "2002", "2002", "2002"]
    assert [q.section for q in exam.questions] == ["A", "A", "B", "A", "A", "B"]
    assert [q.points for q in exam.questions] == [1, 1, 3, 1, 1, 3]
    by_id = {q.problem_id: q for q in exam.questions}
    assert by_id["901B1"].kind == "numeric" and by_id["901B1"].labels == ()
    assert by_id["900A2"].category == "薬理"
    assert by_id["900A2"].prohibited == {"d", "e"}
    assert by_id["900A2"].human_accuracy == 0.875
    # 901A1 tells the case and says that question 2 belongs to it.
    assert [q.group for q in exam.questions] == ["900A1", "900A2", "900B1", "901A1", "901A1", "901B1"]


def test_filters(exam_dir: Path) -> None:
    assert len(load_exam("invented", [exam_dir], years=["2002"]).questions) == 3
    assert len(load_exam("invented", [exam_dir], text_only=True).questions) == 5
    assert len(load_exam("invented", [exam_dir], limit=2).questions) == 2
    with pytest.raises(UserError, match="no questions of 1999"):
        load_exam("invented", [exam_dir], years=["1999"])


def test_cases_without_numbers_run_to_the_next(tmp_path: Path) -> None:
    """`以下の問い`: the case runs to the next one; the last is as long as the one before."""
    texts = [
        "一",
        "次の文を読み、以下の問いに答えよ。甲",
        "二",
        "三",
        "次の文を読み、以下の問いに答えよ。乙",
        "四",
        "五",
        "六",
    ]
    rows = [
        {"problem_id": f"114C{n}", "problem_text": text, "choices": ["x", "y"], "answer": ["a"]}
        for n, text in enumerate(texts, start=59)
    ]
    (tmp_path / "114-C.jsonl").write_text("\n".join(map(json.dumps, rows)))
    groups = [q.group for q in load_exam("x", [tmp_path]).questions]
    assert groups == ["114C59", "114C60", "114C60", "114C60", "114C63", "114C63", "114C63", "114C66"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem_text": "?", "choices": [], "answer": ["1"]}, "missing field 'problem_id'"),
        ({"question": "?", "options": []}, "missing field 'answer'"),
        ({"problem_id": "1", "problem_text": "?", "choices": ["x"], "answer": []}, "needs its gold"),
        ({"problem_id": "1", "problem_text": "?", "choices": ["x"], "answer": " "}, "needs its gold"),
        ({"problem_id": "1", "problem_text": "?", "choices": "x", "answer": ["a"]}, "'choices' must be a list"),
        (
            {"problem_id": "1", "problem_text": "?", "choices": ["x"], "answer": ["c"]},
            "names 'c', which is not a choice",
        ),
        ({"problem_id": "1", "problem_text": 5, "choices": ["x"], "answer": ["a"]}, "'problem_text' must be a string"),
        ({"problem_id": "1", "problem_text": "?", "choices": ["x"], "answer": ["a"], "points": "two"}, "'points'"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, row: dict, message: str) -> None:
    good = {"problem_id": "0", "problem_text": "?", "choices": ["x"], "answer": ["a"]}
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message) as error:
        load_exam("x", [path])
    assert str(error.value).startswith(f"{path}:2: ")


def test_places_without_questions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or directory"):
        load_exam("x", [tmp_path / "nowhere"])
    with pytest.raises(UserError, match="holds no question files"):
        load_exam("x", [tmp_path])
    row = {"problem_id": "0", "problem_text": "?", "choices": ["x"], "answer": ["a"]}
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(row))
    with pytest.raises(UserError, match="is also in"):
        load_exam("x", [tmp_path])


def test_a_whole_clone_of_the_benchmark(tmp_path: Path) -> None:
    row = {"problem_id": "112A1", "problem_text": "?", "choices": ["x"], "answer": ["a"]}
    other = {"problem_id": "112A1", "prediction": "a"}
    for name, content in {
        "data/2018/112-A.jsonl": row,
        "data/2018/112-A_metadata.jsonl": other,
        "data/2018/112-A_translate.jsonl": other,
        "scripts/prompts/prompt.jsonl": other,
        "baseline_results/2018/112-A_gpt4.jsonl": other,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    (question,) = load_exam("igakuqa", [tmp_path]).questions
    assert (question.problem_id, question.year) == ("112A1", "2018")


def test_keys_of_the_pharmacists_exam(tmp_path: Path) -> None:
    rows = [
        {"problem_id": "1", "problem_text": "?", "choices": ["x", "y", "z"], "answer": ["2", "3"]},
        {"problem_id": "2", "problem_text": "?", "choices": "IMAGES", "answer": ["4"]},
        {"problem_id": "3", "problem_text": "?", "choices": ["x", "y"], "answer": ["解なし"]},
        {
            "problem_id": "4",
            "problem_text": "?",
            "choices": ["x", "y", "z"],
            "answer": ["1", "2", "3（いずれか2つを選択で正解とする）"],
        },
    ]
    path = tmp_path / "2020.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    exam = load_exam("yakugakuqa", [path])
    assert exam.void_ids == ("3",)
    two, picture, any_two = exam.questions
    assert two.labels == ("1", "2", "3") and two.accepted == (("2", "3"),) and two.year == "2020"
    assert picture.kind == "choice" and picture.labels == ("1", "2", "3", "4", "5")
    assert any_two.accepted == (("1", "2"), ("1", "3"), ("2", "3")) and any_two.n_answers == 2


def test_igakuqa_as_published(shared_data: Path) -> None:
    questions = load_exam("igakuqa", [shared_data / "igakuqa"]).questions
    assert len(questions) == 2000
    assert sum(q.points for q in questions) == 2485
    assert sum(q.text_only for q in questions) == 1471
    assert sum(q.points for q in questions if q.text_only) == 1864
    assert Counter(q.year for q in questions) == dict.fromkeys(("2018", "2019", "2020", "2021", "2022"), 400)
    assert sum(q.kind == "numeric" for q in questions) == 12
    # 100 cases of two or three questions.
    sizes = Counter(Counter(q.group for q in questions).values())
    assert sizes == {1: 1750, 2: 50, 3: 50}
    by_id = {q.problem_id: q for q in questions}
    assert by_id["116A71"].everyone_credited
    assert by_id["112B30"].accepted == (("a",), ("d",))
    assert by_id["112A27"].prohibited == {"c", "d", "e"}
    assert len(load_shots(shared_data / "igakuqa" / "fewshot_prompt.jsonl")) == 3


def test_yakugakuqa_as_published(shared_data: Path) -> None:
    exam = load_exam("yakugakuqa", [shared_data / "yakugakuqa"])
    assert (len(exam.questions), len(exam.void_ids)) == (4465, 20)
    assert sum(bool(q.explanation) for q in exam.questions) == 4228
