from pathlib import Path

import pytest

from megatron_medllm.errors import UserError
from megatron_medllm.exams.loading import load_exam
from megatron_medllm.exams.prompts import load_prompt_set, render_messages, render_text


@pytest.fixture
def questions(exam_dir: Path) -> dict:
    return {q.problem_id: q for q in load_exam("invented", [exam_dir]).questions}


def test_answer_only_is_the_official_prompt(questions: dict) -> None:
    prompts = load_prompt_set("igakuqa")
    assert prompts.system == "医師国家試験を解きます。"
    assert prompts.prompt(questions["900A2"], "answer_only") == (
        "問題: カゼ病の禁忌薬はどれか。2つ選べ。\na: 甲薬\nb: 乙薬\nc: 丙薬\nd: 丁薬\ne: 戊薬\n"
        "必ずa,b,c,d,eの中からちょうど2個選んでください。\n答え:"
    )
    assert prompts.prompt(questions["901B1"], "answer_only") == "問題: 体温を求めよ。解答：①②.③度\n答え:"


def test_explained(questions: dict) -> None:
    prompts = load_prompt_set("igakuqa")
    assert prompts.prompt(questions["900A1"], "explained", reveal_count=False).endswith(
        "e: 眠\n必ずa,b,c,d,eの中から選んでください。\n考察:"
    )
    assert prompts.response("explained", answer=["a", "c"], explanation="甲も丙も。") == "甲も丙も。\n答え: a,c"
    assert prompts.response("answer_only", answer=["a", "c"]) == "a,c"


def test_compact_set(questions: dict) -> None:
    prompts = load_prompt_set("compact")
    question = questions["900A1"]
    asked = "問題:ソラ病の主症状はどれか。\na.咳\nb.熱\nc.疹\nd.痛\ne.眠\n"
    assert prompts.prompt(question, "answer_only") == asked + "答え:"
    assert prompts.prompt(question, "explained") == asked + "考察:"
    assert prompts.response("explained", answer=["b"], explanation="熱。") == "熱。\n答え:b"


def test_shots(questions: dict) -> None:
    prompts = load_prompt_set("compact")
    shots = [questions["900A2"]]
    explained = render_text(prompts, questions["900A1"], "explained", shots=shots)
    assert explained.count("考察:") == 2
    assert "eは誤り。\n答え:a,c\n\n問題:ソラ病" in explained
    short = render_text(prompts, questions["900A1"], "explained", shots=shots, explain_shots=False)
    assert "答え:a,c\n\n問題:ソラ病" in short and short.count("考察:") == 1
    messages = render_messages(load_prompt_set("igakuqa"), questions["900A1"], "answer_only", shots=shots)
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"] == "a,c"


def test_a_users_own_set(tmp_path: Path, questions: dict) -> None:
    for mode in ("answer_only", "explained"):
        (tmp_path / f"{mode}.prompt.jinja").write_text("{{ kind }}/{{ labels | length }}/{{ count }}")
        (tmp_path / f"{mode}.response.jinja").write_text("{{ answer }}")
    assert load_prompt_set(tmp_path).prompt(questions["900A2"], "explained") == "choice/5/2"
    (tmp_path / "explained.prompt.jinja").write_text("{{ problem }}")
    with pytest.raises(UserError, match=r"explained\.prompt\.jinja: 'problem' is undefined"):
        load_prompt_set(tmp_path).prompt(questions["900A2"], "explained")
    (tmp_path / "explained.prompt.jinja").unlink()
    with pytest.raises(UserError, match=r"explained\.prompt\.jinja is missing"):
        load_prompt_set(tmp_path).prompt(questions["900A2"], "explained")
    with pytest.raises(UserError, match="not one of compact, igakuqa"):
        load_prompt_set("nothing")
