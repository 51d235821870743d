"""Answers as models write them, each kind in several spellings: read right, or malformed; never another answer."""

import pytest

from megatron_medllm.exams.parsing import parse_answer
from megatron_medllm.exams.question import Question, question_from_row


def question(choices: list[str], answer: list[str]) -> Question:
    row = {"problem_id": "1", "problem_text": "?", "choices": choices, "answer": answer}
    return question_from_row(row, year="", metadata={}, rules={})


HEPATITIS = question(["肝硬変", "A群溶血性レンサ球菌感染症", "B型肝炎の合併", "C. difficile感染症", "E型肝炎"], ["c"])
WATER = question(["酸素", "窒素", "水素", "水", "塩"], ["4"])
TWELVE = question([f"薬{number}" for number in range(12)], ["12"])
NUMBER = question([], ["2.1"])
VITAMINS = question(["C", "D", "AB", "A"], ["c"])
MALFORMED = ""


def read(output: str, asked: Question, mode: str = "answer_only") -> str:
    return "+".join(parse_answer(output, asked, mode=mode).answer or ())


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("B型肝炎の合併", "c"),
        ("Ｂ型肝炎の合併です。", "c"),
        ("**B型肝炎の合併**", "c"),
        ("B 型肝炎の合併", "c"),
        ("正解はB型肝炎の合併である。", "c"),
        ('{"answer": "B型肝炎の合併"}', "c"),
        ("肝硬変、E型肝炎", "a+e"),
        ("C. difficile感染症", "d"),
        ("c. B型肝炎の合併", "c"),
        ("選択肢cの「B型肝炎の合併」です", "c"),
        ("B型肝炎", MALFORMED),
        ("B型 肝炎の合併症", MALFORMED),
        ("A群溶血性連鎖球菌", MALFORMED),
        ("A 群溶血性連鎖球菌", MALFORMED),
        ("A・B型", MALFORMED),
        ("B-ALL", MALFORMED),
        ("C. difficile 腸炎", MALFORMED),
        ("C．difficile", MALFORMED),
        ("E. coli", MALFORMED),
        ("C3低下", MALFORMED),
        ("e-ラーニング", MALFORMED),
        ("d-ダイマー", MALFORMED),
    ],
)
def test_a_choices_own_text_and_never_a_words_first_letter(output: str, answer: str) -> None:
    assert read(output, HEPATITIS) == answer
    if "answer" not in output and "正解" not in output:
        assert read(f"考察。\n答え: {output}", HEPATITIS, "explained") == answer


@pytest.mark.parametrize(
    "output",
    [
        *("<answer>c</answer>", "<answer>\nc\n</answer>", "<ANSWER> C </ANSWER>"),
        *('{"answer": "c"}', '{"reason": "…", "answer": ["c"]}', '```json\n{\n  "answer": "C"\n}\n```'),
        *("<think>aか、bか。\n答え: a</think>\n\nc", "aか。</think>c", "<thinking>a</thinking>答え: c"),
        *("\\boxed{c}", "$\\boxed{\\text{c}}$", "\\[\\boxed{ C }\\]"),
        *("**c**", "__c__", "`c`", "**答え:**\n\n**c**", "## 答え: c"),
        *("正解はc", "正解は、選択肢cです", "答えは(c)", "【答え】c", "解答：ｃ", "The answer is C."),
        *("(c)", "c)", "ⓒ", "⒞", "c。", "cが正しい", "cです"),
    ],
)
def test_what_stands_around_an_answer(output: str) -> None:
    assert read(output, HEPATITIS) == "c"


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("(a)(c)", "a+c"),
        ("「a」「c」", "a+c"),
        ('{"answer": ["a", "c"]}', "a+c"),
        ("aかc", MALFORMED),
        ("a or c", MALFORMED),
        ("aまたはc", MALFORMED),
        ("cは誤り", MALFORMED),
        ("c is wrong", MALFORMED),
        ("c: 誤り", MALFORMED),
        ("cが正しいとはいえない", MALFORMED),
        ("不正解: c", MALFORMED),
        ("<think>答え: c", MALFORMED),
        ('{"answer": null}', MALFORMED),
    ],
)
def test_several_answers_and_none(output: str, answer: str) -> None:
    assert read(output, HEPATITIS) == answer


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        *[
            (output, "4")
            for output in ("4. 水", "4.水", "４．水", "4: 水", "4 水", "(4)", "4)", "4番", "水", "④", "④水")
        ],
        *[(output, "4") for output in ("❹", "4\ufe0f\u20e3", "答え: 4. 水", '{"answer": 4}')],
        *[(output, "1+3") for output in ("1,3", "①③", "(1)(3)", "1と3", "13", "①、③")],
        *[
            (output, MALFORMED)
            for output in ("4 mg", "4mg", "4つ", "4.2", "1/2", "1:2", "2〜3", "2 - 3", "1,234", "4%")
        ],
        *[(output, MALFORMED) for output in ("2-メチル", "3歳", "1 型糖尿病", "6", "4以上")],
    ],
)
def test_numbered_choices(output: str, answer: str) -> None:
    assert read(output, WATER) == answer


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        *[(output, "12") for output in ("12", "１２", "⑫", "12. 薬11", "(12)", "薬11", "答え: 12")],
        *[(output, "1+2") for output in ("1,2", "①②", "1と2", "(1)(2)")],
        *[(output, MALFORMED) for output in ("13", "112", "123", "0")],
    ],
)
def test_ten_and_more_choices(output: str, answer: str) -> None:
    assert read(output, TWELVE) == answer


@pytest.mark.parametrize(
    ("output", "answer"),
    [("a", "a"), ("c", "c"), ("AB", "c"), ("A", MALFORMED), ("C", MALFORMED), ("d, a", "a+d"), ("D, A", MALFORMED)],
)
def test_a_label_that_is_another_choices_text(output: str, answer: str) -> None:
    """Small letters are labels, as the prompt shows them; capital ones may be meant as text."""
    assert read(output, VITAMINS) == answer


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        *[(output, "2.1") for output in ("4.2 ÷ 2 = 2.1", "４．２÷２＝２．１", "x = 4.2/2 = 2.1mg", "4.3/2=2.15≒2.1")],
        *[
            (output, "2.1")
            for output in ("2.1 kg/m2", "2.1 mL/分/1.73m²", "２．１％", "約2.1", "2.1 (小数第1位)", "2.1。3日後")
        ],
        *[(output, "1130") for output in ("1,130", "１，１３０ mL", "1130mL/日", "1,1,3,0")],
        *[("マイナス2", "-2"), ("−2", "-2"), (".5", "0.5"), ('{"answer": 36.5}', "36.5")],
        *[
            (output, MALFORMED)
            for output in ("4.2 ÷ 2", "2.1 = 4.2 ÷ 2", "36〜37", "36-37", "36から37", "2.1か2.2", "2,13")
        ],
        *[(output, MALFORMED) for output in ("1/2", "½", "\\frac{1}{2}", "120/80", "10³", "1.2×10^3", "1.2e3", "2万")],
        *[
            (output, MALFORMED)
            for output in ("5以上", "<5", "±2", "2時間30分", "x = 2.1, y = 3", "36.5.2", "1 130", "√2")
        ],
    ],
)
def test_numbers(output: str, answer: str) -> None:
    assert read(output, NUMBER) == answer
    assert read(f"3日分の計算。\n答え: {output}", NUMBER, "explained") == answer
