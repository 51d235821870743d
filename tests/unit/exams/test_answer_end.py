"""Where an answer ends when a base model runs on: what such models really write after it, in both modes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_medllm.exams.ending import answer_end


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" c\n\n問題: 次の疾患のうち", " c"),
        ("c\n考察: cは正しい。\n答え: d\n", "c"),
        ("\n\nb,e\n必ずa,b,c,d,eの中から", "\n\nb,e"),
        ("c。なぜなら、aは誤りである。\nbも誤りである。\n", "c。なぜなら、aは誤りである。"),
        ("答え:\nc\n問題:", "答え:\nc"),
        ("**答え:**\n\n**c**\n", "**答え:**\n\n**c**"),
        ('```json\n{"answer": "c"}\n```\n', '```json\n{"answer": "c"}'),
        ('{\n  "answer":\n  "c"\n}\n', '{\n  "answer":\n  "c"'),
        ("<answer>\nc\n</answer>\n", "<answer>\nc"),
        ("$$\n\\boxed{c}\n$$\n", "$$\n\\boxed{c}"),
        ("<think>aか？\nbか？\n</think>\n\nc\n問題", "<think>aか？\nbか？\n</think>\n\nc"),
        ("aか？\n</think>\nｃ\n", "aか？\n</think>\nｃ"),
        ("④\n答え:", "④"),
        ("３６．５\n", "３６．５"),
        ("von Gierke病\nB型肝炎\n", "von Gierke病"),
        ("c\r\n問題: 次", "c\r"),
    ],
)
def test_a_short_answer_ends_with_its_line(text: str, answer: str) -> None:
    assert text[: answer_end(text, "answer_only")] == answer


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n", "c", "答え:", "答え:\n", "答え：\n\n", "<think>c\n", "```json\n", "\n\n問題: 次の問い\n答え: c"],
)
def test_no_complete_short_answer_yet(text: str) -> None:
    end = answer_end(text, "answer_only")
    assert end is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("aは誤り。\ncが正しい。\n答え: c\n\n問題: 次\n考察: …\n答え: d\n", "aは誤り。\ncが正しい。\n答え: c"),
        ("cである。\n答え：ｂ，ｅ\n解説: …", "cである。\n答え：ｂ，ｅ"),
        ("以上より答え: c\nである。\n", "以上より答え: c"),
        ("説明。\n**答え:** c\n\nhttps://", "説明。\n**答え:** c"),
        ("説明。\n## 答え\n\nc\n続き\n", "説明。\n## 答え\n\nc"),
        ("説明。\n答え:\nc\n続き\n", "説明。\n答え:\nc"),
        ("説明。\n【答え】c\n続き\n", "説明。\n【答え】c"),
        ("説明。よって $\\boxed{c}$ である。\n続き", "説明。よって $\\boxed{c}$ である。"),
        ("説明。\n<answer>c</answer>\n<answer>d</answer>\n", "説明。\n<answer>c</answer>"),
        ('説明。\n{"answer": "c"}\n', '説明。\n{"answer": "c"}'),
        ("Because…\nFinal Answer: c\nQuestion: ", "Because…\nFinal Answer: c"),
        ("4.2 ÷ 2を計算する。\n答え: 4.2 ÷ 2 = 2.1\n問題", "4.2 ÷ 2を計算する。\n答え: 4.2 ÷ 2 = 2.1"),
        ("説明。\n答え: c。aは誤り。bも誤り。\n続き", "説明。\n答え: c。aは誤り。bも誤り。"),
        ("説明。\n答え: ④。①は誤り。\n続き", "説明。\n答え: ④。①は誤り。"),
        ("Because.\nAnswer: c\n\nQuestion: Which\nAnswer: d\n", "Because.\nAnswer: c"),
        ("説明。\n答え: von Gierke病\n続き", "説明。\n答え: von Gierke病"),
        ("説明。\n答え: この病態を考える。まず血圧が低い。\nそこで…\n答え: c\n続き", None),
        ("<think>答え: a\n</think>\n説明。\n答え: c\n問題", "<think>答え: a\n</think>\n説明。\n答え: c"),
        ("aは誤り。以上より正解はcである。\n\n問題: 次\n答え: d\n", "aは誤り。以上より正解はcである。"),
    ],
)
def test_an_explanation_ends_with_the_line_behind_its_marker(text: str, answer: str | None) -> None:
    expected = answer if answer is not None else text[: -len("\n続き")]
    assert text[: answer_end(text, "explained")] == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "aは誤り。\nbも誤り。\n",
        "aは誤り。\n答え: c",  # more may follow on this line
        "aは誤り。\n答え:\n",
        "aは正解ではない。\nbは…\n",
        "正解はcである。なぜなら、\n",
        "免疫応答: 弱い。\n不正解: a\n",
        "<think>考える。\n答え: c\n",
        "aは誤り。aは誤り。" * 40 + "\n",
        "説明。\n\n問題: 次の問い\n考察: …\n答え: d\n",  # the next question's answer
    ],
)
def test_no_complete_explanation_yet(text: str) -> None:
    assert answer_end(text, "explained") is None


@pytest.mark.parametrize("text", ["`" * 4000 + "c", "答え:\n" * 4000, "<answer>" * 4000, "答え: 長い。文。\n" * 2000])
def test_endless_repetitions_take_no_time(text: str) -> None:
    assert answer_end(text, "explained") is None and answer_end(text, "answer_only") in (None, 9)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet=st.sampled_from("abce答え正解は:：, 、\n問題12.。()*#<>/think\\boxed{}"), max_size=60),
    mode=st.sampled_from(["answer_only", "explained"]),
    more=st.text(alphabet=st.sampled_from("abce答え:\n問題。"), max_size=30),
)
def test_the_end_stays_where_it_was_as_more_is_written(text: str, mode: str, more: str) -> None:
    """An engine that stops there and one that is cut there give the same answer."""
    end = answer_end(text, mode)
    if end is not None and "think" not in text:
        assert 0 < end < len(text) and text[:end].strip()
        assert answer_end(text + more, mode) == end
