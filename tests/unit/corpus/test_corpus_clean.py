"""Cleaning steps, one literal expectation each; what a medical text means stays."""

import pytest

from megatron_medllm.config.corpus import CleanConfig
from megatron_medllm.corpus.clean import clean, dedup_lines, japanese_ratios, repeat_ratios

OFF = {"nfc": False}


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "か\u3099 ①10⁶㎎㏄ ｶﾞ Ａ１", "が ①10⁶㎎㏄ ｶﾞ Ａ１"),
        (OFF, "か\u3099", "か\u3099"),
        ({"strip_zero_width": True}, "高\u200b血\ufeff圧\u00ad", "高血圧"),
        ({"strip_control": True}, "a\x00b\x1bc\td\n", "abc\td\n"),
        ({"fold_width": "alphanumeric"}, "ＣＲＰ１２．３（＋）①㎎", "CRP12．3（＋）①㎎"),
        ({"fold_width": "ascii"}, "ＣＲＰ１２．３（＋）①㎎", "CRP12.3(+)①㎎"),
        ({"fold_halfwidth_kana": True}, "ｶﾞﾝ ﾊﾟﾙｽ｡ 10⁶ ㎎", "ガン パルス。 10⁶ ㎎"),
        ({"dedup_lines": True}, "所見\n\n所見\n\n異常なし", "所見\n\n\n異常なし"),
    ],
)
def test_rewriting(options, text, expected):
    assert clean(["前", text, "後"], CleanConfig(**options)) == [("前", "", ""), (expected, "", ""), ("後", "", "")]


@pytest.mark.parametrize(
    ("options", "text", "step", "reason"),
    [
        ({"strip_zero_width": True}, "\u200b\ufeff", "empty", "nothing is left"),
        ({"min_chars": 4}, "三文字", "min_chars", "3 characters"),
        ({"max_chars": 2}, "三文字", "max_chars", "3 characters"),
        ({"min_japanese_ratio": 0.5}, "日本 abcdef", "min_japanese_ratio", "0.222"),
        ({"max_repeat_ratio": 0.3}, "同じ文がつづきます。" * 4, "max_repeat_ratio", "1.000"),
    ],
)
def test_dropping(options, text, step, reason):
    assert clean([text], CleanConfig(**options))[0][1:] == (step, reason)


def test_nothing_is_dropped_by_default():
    texts = ["a", " ", "表" * 1000, "http://example.com\n" * 50]
    assert clean(texts, CleanConfig()) == [(text, "", "") for text in texts]


def test_ratios():
    assert japanese_ratios(["ab", "あア漢、ab", ""]) == pytest.approx([0, 4 / 6, 0])
    texts = ["0123456789", "0123456789" + "0123456789", "short", "ab" * 20, "012345678"]
    assert repeat_ratios(texts) == pytest.approx([0, 2 / 11, 0, 1, 0])
    assert repeat_ratios(["同じ文が続きます。それから、"] * 2) == [0, 0]
    assert dedup_lines("a\nb\na") == "a\nb"
