from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medllm.exams.loading import load_exam
from megatron_medllm.exams.parsing import parse_answer
from megatron_medllm.exams.question import Question, question_from_row

FIVE = question_from_row(
    {"problem_id": "1", "problem_text": "?", "choices": ["赤", "青い石", "von Gierke病", "d型", "白"], "answer": ["c"]},
    year="",
    metadata={},
    rules={},
)
NUMBER = question_from_row(
    {"problem_id": "2", "problem_text": "?", "choices": [], "answer": ["36.5"]}, year="", metadata={}, rules={}
)
DIGITS = question_from_row(
    {"problem_id": "3", "problem_text": "?", "choices": ["x", "y", "z"], "answer": ["2"]},
    year="",
    metadata={},
    rules={},
)


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("c", "c"),
        (" c\n", "c"),
        ("ｃ", "c"),
        ("C", "c"),
        ("c,e", "ce"),
        ("e, c", "ce"),
        ("c、e", "ce"),
        ("c､e｡", "ce"),
        ("c と e", "ce"),
        ("c・e", "ce"),
        ("c and e", "ce"),
        ("ce", "ce"),
        ("c,c", "c"),
        ("答え：ｃ", "c"),
        ("正解は c と e", "ce"),
        ("正解はcです。", "c"),
        ("「c」", "c"),
        ("**c**", "c"),
        ("(c)", "c"),
        ("選択肢c", "c"),
        ("c。なぜなら、aは誤りである。", "c"),
        ("c: von Gierke病", "c"),
        ("c von Gierke病", "c"),
        ("b. 青い石, e. 白", "be"),
        ("c\n答え: c", "c"),
        ("c\n\n問題: 次の問い\n答え: d", "c"),
        ("a b", "ab"),
    ],
)
def test_lenient_short_answers(output: str, answer: str) -> None:
    assert parse_answer(output, FIVE, mode="answer_only").answer == tuple(answer)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("", "empty"),
        ("f", "f is not a choice"),
        ("c,f", "f is not a choice"),
        ("わかりません", "no answer read"),
        ("bad idea", "no answer read"),
        ("a patient was seen", "no answer read"),
        ("cではない", "no answer read"),
        ("decade", "no answer read"),
    ],
)
def test_malformed_short_answers(output: str, reason: str) -> None:
    parsed = parse_answer(output, FIVE, mode="answer_only")
    assert (parsed.answer, parsed.reason) == (None, reason)


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("a 誤り。c 正しい。\n答え: c", "c"),
        ("考えると…\n答え：ｂ，ｅ", "be"),
        ("答え: a\nいや、違う。\n答え: c", "c"),
        ("aは正解ではない。以上より正解はcである。", "c"),
        ("説明。\n答え: c\n\n問題: 次\n答え: d", "c"),
        ("説明。\n**答え:** c", "c"),
        ("答え:\nc", "c"),
        ("よって $\\boxed{c}$", "c"),
        ("答え: \\boxed{\\text{b}, e}", "be"),
        ("正解は「b」と「e」です。", "be"),
    ],
)
def test_lenient_explanations(output: str, answer: str) -> None:
    assert parse_answer(output, FIVE, mode="explained").answer == tuple(answer)


def test_an_explanation_without_answer_is_malformed() -> None:
    assert parse_answer("aは誤り。cは正しい。", FIVE, mode="explained").reason == "no answer line"
    assert parse_answer("説明の途中で切れ", FIVE, mode="explained").malformed
    assert parse_answer("答え:", FIVE, mode="explained").reason == "empty"


@pytest.mark.parametrize(
    ("output", "number"),
    [("36.5", "36.5"), ("３６．５度", "36.5"), ("約1,130kcal", "1130"), ("答え: 36.5℃", "36.5"), ("-2", "-2")],
)
def test_numbers(output: str, number: str) -> None:
    assert parse_answer(output, NUMBER, mode="answer_only").answer == (number,)
    assert parse_answer(f"計算3×4。\n答え: {output}", NUMBER, mode="explained").answer == (number,)


def test_a_calculation_before_the_number() -> None:
    assert parse_answer("3.5×10+1.5を計算する。\n答え: 36.5", NUMBER, mode="answer_only").answer == ("36.5",)


def test_a_number_is_missing() -> None:
    assert parse_answer("不明", NUMBER, mode="answer_only").reason == "no number"


@pytest.mark.parametrize(("output", "answer"), [("2", "2"), ("２，３", "23"), ("1と3", "13"), ("選択肢2", "2")])
def test_digit_labels(output: str, answer: str) -> None:
    assert parse_answer(output, DIGITS, mode="answer_only").answer == tuple(answer)


def test_strict_strips_nothing() -> None:
    """As IgakuQA's scorer: `prediction.split(',')`, sorted, compared."""
    assert parse_answer("c,a", FIVE, mode="answer_only", parser="strict").answer == ("a", "c")
    for output in ("c, a", " c", "c\n", "ｃ", "C", "答え: c", ""):
        assert parse_answer(output, FIVE, mode="answer_only", parser="strict").malformed, output
    assert parse_answer("説明\n答え: c", FIVE, mode="explained", parser="strict").answer == ("c",)
    assert parse_answer("説明", FIVE, mode="explained", parser="strict").reason == "no answer line"


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet=st.sampled_from("abcdefg答え正解は:：, 、とｃｅ\n問題12.5。()「*選択肢 x"), max_size=60),
    mode=st.sampled_from(["answer_only", "explained"]),
    question=st.sampled_from([FIVE, NUMBER, DIGITS]),
    parser=st.sampled_from(["lenient", "strict"]),
)
def test_any_text_is_parsed_or_malformed(text: str, mode: str, question: Question, parser: str) -> None:
    parsed = parse_answer(text, question, mode=mode, parser=parser)
    if parsed.answer is None:
        assert parsed.reason
    elif question.kind == "choice":
        assert parsed.answer and set(parsed.answer) <= set(question.labels)
        assert list(parsed.answer) == sorted(parsed.answer)


@settings(max_examples=200, deadline=None)
@given(
    labels=st.sets(st.sampled_from("abcde"), min_size=1, max_size=3),
    separator=st.sampled_from([",", "、", " と ", "・", ", ", "，"]),
    wide=st.booleans(),
    lead=st.sampled_from(["", "答え: ", "正解は", "答え：", "解答: "]),
    tail=st.sampled_from(["", "。", "です。", "\n", "\nなぜなら", "（以上）"]),
)
def test_whatever_a_person_would_read(labels: set[str], separator: str, wide: bool, lead: str, tail: str) -> None:
    written = separator.join(sorted(labels))
    if wide:
        written = "".join(chr(ord(c) + 0xFEE0) if c in "abcde" else c for c in written)
    expected = tuple(sorted(labels))
    assert parse_answer(lead + written + tail, FIVE, mode="answer_only").answer == expected
    if lead:
        assert parse_answer("aは誤り。\n" + lead + written + tail, FIVE, mode="explained").answer == expected


def test_gold_written_as_a_prediction_parses_to_itself(shared_data: Path) -> None:
    for question in load_exam("igakuqa", [shared_data / "igakuqa"]).questions:
        gold = ",".join(question.accepted[0])
        for parser in ("lenient", "strict"):
            assert parse_answer(gold, question, mode="answer_only", parser=parser).answer == question.accepted[0]
