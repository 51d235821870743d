import unicodedata
from collections.abc import Callable

import pytest

from megatron_medllm.config.pairs import FilterConfig
from megatron_medllm.exams.question import Question, question_from_row
from megatron_medllm.preference.candidate import Candidate
from megatron_medllm.preference.contamination import contaminated
from megatron_medllm.preference.filters import (
    candidate_reason,
    contradicts_itself,
    japanese_share,
    option_verdicts,
    pair_reason,
)
from megatron_medllm.preference.gold import with_letters


def question(answer: list[str], text: str = "?", problem_id: str = "1", year: str = "", **more: object) -> Question:
    row = {"problem_id": problem_id, "problem_text": text, "choices": list("甲乙丙丁戊"), "answer": answer, **more}
    return question_from_row(row, year=year, metadata={}, rules={})


def candidate(text: str, answer: str | None, tier: str = "right", **more: object) -> Candidate:
    return Candidate("1", "explained", tier, text, tuple(answer) if answer else None, {}, **more)


def test_japanese_share() -> None:
    assert japanese_share("これは日本語。123") == 1.0
    assert japanese_share("This is English") == 0.0
    assert japanese_share("半分half") == pytest.approx(2 / 6)
    assert japanese_share("123。") == 1.0


@pytest.mark.parametrize(
    ("text", "verdicts"),
    [
        ("aは誤り。bは正しい。\n答え: b", {"a": False, "b": True}),
        ("ａ　誤り。ｂ　正しい。上記の通り。", {"a": False, "b": True}),
        ("a:誤\nbの説明。b:正", {"a": False, "b": True}),
        ("aは甲病の主症状で誤り。cは乙病の主症状で正しい。", {"a": False, "c": True}),
        ("aは正しい。やはりaは誤り。", {}),
        (
            "aは正解ではない。bは正しいとは言えない。cは不正解。dは正解。",
            {"a": False, "b": False, "c": False, "d": True},
        ),
        ("aは正しくない。bは適切でない。cは適切である。", {"a": False, "b": False, "c": True}),
    ],
)
def test_option_verdicts(text: str, verdicts: dict) -> None:
    assert option_verdicts(text, tuple("abcde")) == verdicts


@pytest.mark.parametrize(
    ("text", "answer", "asks", "contradicts"),
    [
        ("aは誤り。bは正しい。\n答え: b", "b", "正しいのはどれか。", False),
        ("aは誤り。bは正しい。\n答え: a", "a", "正しいのはどれか。", True),  # names another option than its answer
        ("cは誤り。bは正しい。\n答え: a", "a", "正しいのはどれか。", True),
        ("aは正しい。bは誤り。cは正しい。\n答え: b", "b", "誤っているのはどれか。", False),
        ("aは誤り。bは正しい。cは誤り。\n答え: b", "b", "誤っているのはどれか。", False),
        ("aは正しい。bは誤り。\n答え: b", "b", "適切でないのはどれか。1つ選べ。患者「はい。」", False),
        ("aは正しい。bは正しい。\n答え: a", "a", "適切でないのはどれか。", True),
        ("aは正しい。bは誤り。\n答え: a,b", "ab", "適切でないのはどれか。2つ選べ。", True),
        ("骨折を疑い固定する。\n答え: b", "b", "正しいのはどれか。", False),
    ],
)
def test_contradictions(text: str, answer: str, asks: str, contradicts: bool) -> None:
    assert contradicts_itself(candidate(text, answer), question(list(answer), asks)) is contradicts


def test_candidate_reasons() -> None:
    asked, config = question(["b"], explanation="短い。"), FilterConfig()
    good = "aは誤り。bは正しい。\n答え: b"
    assert candidate_reason(candidate(good, "b"), asked, config, chosen=True) is None
    assert candidate_reason(candidate(good, "b", truncated=True), asked, config, chosen=True) == "truncated"
    assert candidate_reason(candidate(" \n", None, "malformed"), asked, config, chosen=False) == "empty"
    assert candidate_reason(candidate("The answer. 答え: b", "b"), asked, config, chosen=False) == "language"
    assert candidate_reason(candidate(good, "b", "gold"), asked, config, chosen=True) == "gold explanation too short"
    wrong = candidate("aは正しい。bは正しい。\n答え: a", "a")
    assert candidate_reason(wrong, asked, config, chosen=True) == "explanation contradicts its answer"
    assert candidate_reason(wrong, asked, config, chosen=False) is None  # a bad example may contradict itself


def test_pair_reasons() -> None:
    config = FilterConfig(max_length_ratio=3, min_edit_distance=0.1)
    long = "あ" * 100
    assert pair_reason(candidate(long, "a"), candidate(long + "\n", "a"), config) == "identical"
    assert pair_reason(candidate(long, "a"), candidate("い" * 30, "b"), config) == "length ratio"
    assert pair_reason(candidate(long, "a"), candidate("あ" * 95 + "い" * 5, "b"), config) == "nearly identical"
    assert pair_reason(candidate(long, "a"), candidate("あ" * 80 + "い" * 20, "b"), config) is None


CASE = (
    "五十歳の男性が三日前からの発熱と咳とを主訴に来院した。"
    "胸部の写真で右下肺野に浸潤影を認める。最も考えられるのはどれか。"
)


def test_contamination_by_near_duplicate() -> None:
    exam = [question(["a"], CASE, "E1"), question(["a"], "正しいのはどれか。", "E2")]
    copied = question(["a"], "　" + CASE.replace("三日前", "３日前"), "T1")
    fresh = question(["a"], "十歳の女児が頭痛を訴えた。眼底に出血を認める。最も考えられるのはどれか。", "T2")
    short = question(["a"], "誤っているのはどれか。正しいのはどれか、最も考えられるのはどれか。", "T3")
    assert contaminated([copied, fresh, short], exam, same_exam=False) == {"T1": ("E1", "nearly the same text")}


@pytest.mark.parametrize(
    "copy",
    [
        lambda text: text.translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)}),
        lambda text: text.upper().replace("、", " ").replace("。", "\n"),
        lambda text: unicodedata.normalize("NFD", text),
        lambda text: text.translate(str.maketrans("アイウエオカキクケコタテト", "ｱｲｳｴｵｶｷｸｹｺﾀﾃﾄ")),
    ],
)
def test_contamination_folds_as_decontamination_does(copy: Callable[[str], str]) -> None:
    text = "52歳の男性。HbA1c 8.2%でメトホルミンをガイドラインに従って開始した。次に追加すべき薬剤はどれか。"
    exam = [question(["a"], text, "E1"), question(["a"], "短い問いABC。", "E2")]
    copies = [question(["a"], copy(text), "T1"), question(["a"], copy("短い問いABC。"), "T2")]
    found = contaminated(copies, exam, same_exam=False)
    assert {key: twin for key, (twin, _) in found.items()} == {"T1": "E1", "T2": "E2"}
    other = question(["a"], "短い問いABD。", "T3")
    assert contaminated([other], exam, same_exam=False) == {}


def test_contamination_by_year() -> None:
    exam = [question(["a"], CASE, "E1", year="2020")]
    training = [question(["a"], "別の問い", "T1", year="2020"), question(["a"], "他の問い", "T2", year="2019")]
    assert set(contaminated(training, exam, same_exam=True)) == {"T1"}
    assert contaminated(training, exam, same_exam=False) == {}


def test_numbered_choices_become_letters() -> None:
    asked = question(["2", "5"], comment="1:誤\n甲は違う。2:正\n0.5mg、選択肢5も正しい。比は1:10ではない。")
    renamed = with_letters(asked)
    assert renamed.labels == tuple("abcde") and renamed.accepted == (("b", "e"),) and renamed.answer == ("b", "e")
    assert renamed.explanation.startswith("a:誤\n甲は違う。b:正\n0.5mg、選択肢eも正しい。")
    lettered = question(["b"])
    assert with_letters(lettered) is lettered


def test_the_tenth_choice_becomes_the_tenth_letter() -> None:
    asked = question(["2", "10"], choices=list("甲乙丙丁戊己庚辛壬癸"))
    assert asked.accepted == (("10", "2"),)
    assert with_letters(asked).accepted == (("b", "j"),) and set(with_letters(asked).answer) == {"b", "j"}
