"""Exam questions of every make: layouts, spellings of the gold, damage; and what models say in answer to them."""

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from megatron_medllm.evaluation.score_file import score_predictions
from megatron_medllm.exams.ending import answer_end
from megatron_medllm.exams.labels import squeezed
from megatron_medllm.exams.loading import load_exam
from megatron_medllm.exams.parsing import parse_answer
from megatron_medllm.exams.question import Question, question_from_row
from megatron_medllm.exams.scoring import score_answer
from tests.fuzz.surface import fuzz, right_or_one_line

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = [
    "水",
    "B型肝炎",
    "A群溶血性レンサ球菌",
    "C. difficile",
    "von Gierke病",
    "20 mg",
    "3",
    "AB",
    "塩、砂糖",
    "Ⅲ度",
    "1: 2",
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["a", "B", "1", "③"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
FIELDS = [
    "problem_id",
    "problem_text",
    "question",
    "choices",
    "options",
    "answer",
    "answer_idx",
    "answer_index",
    "label",
]
MORE_FIELDS = ["answerKey", "points", "text_only", "year", "section", "category", "group", "kinki", "explanation", "id"]
MARKS = (
    'abceＣ１2③.,、。:：()（）[]{}<>*$\\「」 \n答え正解は選択肢とかorではない誤り=÷×〜%mg型群番です"boxedanswerthink/'
)


def circled(number: int) -> str:
    return chr(0x245F + number)


def wide(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


@st.composite
def true_rows(draw: st.DrawFn) -> tuple[dict[str, Any], list[int]]:
    """A row in some layout and spelling, and the positions of the choices that its gold means."""
    count = draw(st.integers(2, 14))
    texts = [f"{draw(st.sampled_from(TEXTS))}{LETTERS[n]}{n}。" for n in range(count)]
    layout = draw(st.sampled_from(["own letters", "own numbers", "medqa", "medqa list", "mmlu", "mmlu index", "arc"]))
    single = layout not in ("own letters", "own numbers")
    places = sorted(draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=1 if single else 3)))
    letters, numbers = [LETTERS[p] for p in places], [str(p + 1) for p in places]
    letter = draw(st.sampled_from([str, str.upper, wide, "({})".format, " {} ".format, "{}.".format]))
    number = draw(st.sampled_from([str, wide, "({})".format, lambda n: circled(int(n)), int]))
    if layout.startswith("own"):
        keys = [letter(k) for k in letters] if layout == "own letters" else [number(k) for k in numbers]
        gold: Any = keys
        if all(isinstance(key, str) for key in keys):
            gold = draw(st.sampled_from([keys, ",".join(keys), "、".join(keys), " ".join(keys)]))
        return {"problem_id": "1", "problem_text": "どれか。", "choices": texts, "answer": gold}, places
    row: dict[str, Any] = {"question": "Which?"}
    place, key = places[0], letter(letters[0])
    if layout == "medqa":
        row |= {
            "options": {LETTERS[n].upper(): text for n, text in enumerate(texts)},
            "answer_idx": key,
            "answer": texts[place],
        }
    elif layout == "medqa list":
        row |= {
            "options": [{"key": LETTERS[n], "value": text} for n, text in enumerate(texts)],
            "answer": draw(st.sampled_from([key, texts[place]])),
        }
    elif layout == "mmlu":
        row |= {"choices": texts, "answer": place, "subject": "anatomy"}
    elif layout == "mmlu index":
        row |= {"options": texts, "answer_index": place}
    else:
        row |= {"choices": {"text": texts, "label": [LETTERS[n] for n in range(count)]}, "answerKey": key}
    return row, places


def check(question: Question) -> None:
    """What every question that was read must be: answerable, in its own labels, by what the prompt shows."""
    assert question.problem_id.strip() and question.points >= 0
    for accepted in question.accepted:
        gold = ",".join(accepted)
        parsed = parse_answer(gold, question, mode="answer_only")
        assert score_answer(question, parsed).correct, (gold, parsed)
        if question.kind == "choice":
            assert accepted and set(accepted) <= set(question.labels) and len(set(accepted)) == len(accepted)
            assert parse_answer(gold, question, mode="answer_only", parser="strict").answer == accepted
            assert question.prohibited <= set(question.labels)


@fuzz("exam questions, well written", case=true_rows())
def test_what_is_well_written_is_read_right(folder: Path, case: tuple[dict[str, Any], list[int]]) -> None:
    row, places = case
    path = folder / "exam.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False))
    outcome = right_or_one_line(lambda: load_exam("x", [path]).questions)
    assert outcome.refusal is None, (outcome.refusal, row)
    (question,) = outcome.value
    check(question)
    assert [question.labels.index(label) for label in question.answer] == places or sorted(
        question.labels.index(label) for label in question.answer
    ) == places


@fuzz(
    "exam questions, wrong gold",
    case=true_rows(),
    wrong=st.sampled_from(["beyond", "word", "twice", "bool", "half", "empty", "null", "object", "zero", "number"]),
    listed=st.booleans(),
)
def test_every_wrong_gold_is_refused(
    folder: Path, case: tuple[dict[str, Any], list[int]], wrong: str, listed: bool
) -> None:
    row, _ = case
    field = next(name for name in ("answer_idx", "answer_index", "answerKey", "answer") if name in row)
    gold = {
        "beyond": "z", "word": "b型", "twice": "a,a", "bool": True, "half": 1.5, "empty": " ", "null": None,
        "object": {"a": 1}, "zero": "0", "number": 99,
    }[wrong]  # fmt: skip
    row.pop("answer" if field != "answer" else "", None)
    path = folder / "exam.jsonl"
    path.write_text("\n" + json.dumps(row | {field: [gold] if listed else gold}))
    if wrong == "zero" and not str(row.get("problem_id")):
        return
    outcome = right_or_one_line(lambda: load_exam("x", [path]).questions)
    if wrong == "zero" and "problem_id" not in row:
        return  # a number counted from 0 where the layout has such
    assert outcome.refusal is not None and outcome.refusal.startswith(f"{path}"), (row, gold)
    assert "field" in outcome.refusal and ":2: " in outcome.refusal


@fuzz(
    "exam questions, any fields",
    case=true_rows(),
    changes=st.dictionaries(st.sampled_from([*FIELDS, *MORE_FIELDS]), JSON, max_size=3),
    dropped=st.sets(st.sampled_from(FIELDS), max_size=2),
)
def test_any_fields(folder: Path, case: tuple[dict[str, Any], list[int]], changes: dict, dropped: set[str]) -> None:
    row = {field: value for field, value in (case[0] | changes).items() if field not in dropped}
    path = folder / "exam.jsonl"
    path.write_text(json.dumps(row))
    outcome = right_or_one_line(lambda: load_exam("x", [path]))
    if outcome.refusal is not None:
        assert outcome.refusal.startswith(f"{path}")
        return
    assert len(outcome.value.questions) + len(outcome.value.void_ids) == 1
    for question in outcome.value.questions:
        check(question)


@fuzz(
    "exam files, damaged",
    rows=st.lists(true_rows(), min_size=1, max_size=4),
    lead=st.sampled_from([b"", b"\xef\xbb\xbf", b"\n\n", b"\x1f\x8b", b"PK\x03\x04"]),
    array=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp932"]),
    cut=st.integers(0, 40),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_damaged_files(folder: Path, rows: list, lead: bytes, array: bool, encoding: str, cut: int, end: str) -> None:
    written = [row | ({"problem_id": str(n)} if "problem_id" in row else {}) for n, (row, _) in enumerate(rows)]
    text = json.dumps(written) if array else end.join(json.dumps(row) for row in written)
    path = folder / "exam.jsonl"
    content = lead + text.encode(encoding)
    path.write_bytes(content[: len(content) - cut])
    outcome = right_or_one_line(lambda: load_exam("x", [path]).questions)
    if outcome.refusal is not None:
        assert outcome.refusal.startswith(f"{path}")
    else:
        assert len(outcome.value) == len(rows) and cut == 0
        for question in outcome.value:
            check(question)


@st.composite
def said(draw: st.DrawFn) -> tuple[Question, str, tuple[str, ...], bool]:
    """A question, an output that gives an answer, the answer, and whether it must be read."""
    count, digits = draw(st.integers(3, 14)), draw(st.booleans())
    texts = [f"{draw(st.sampled_from(TEXTS))}{'甲乙丙丁戊己庚辛壬癸子丑寅卯'[n]}" for n in range(count)]
    row = {"problem_id": "1", "problem_text": "?", "choices": texts, "answer": "1" if digits else "a"}
    question = question_from_row(row, year="", metadata={}, rules={})
    label = draw(st.sampled_from(question.labels))
    text = texts[question.labels.index(label)]
    plain_forms = [
        label,
        f"({label})",
        f"（{wide(label)}）",
        wide(label),
        f"**{label}**",
        f"{label}. {text}",
        f"{label}：{text}",
    ]
    other_forms = [text, f"「{text}」", f"{label} {text}", f"{label}です", f"選択肢{label}", f"\\boxed{{{label}}}"]
    form = draw(st.sampled_from([*plain_forms, *other_forms, label.upper(), circled(int(label)) if digits else label]))
    frame = draw(
        st.sampled_from(
            [
                "{}",
                "答え: {}",
                "答え：{}\n\n",
                "正解は{}",
                "<answer>{}</answer>",
                '{{"answer": "{}"}}',
                "<think>x</think>{}",
                "{}。",
                "{}\n\n問題: 次\n答え: a",
            ]
        )
    )
    return question, frame.format(form), (label,), form in plain_forms


@fuzz("exam answers", case=said())
def test_an_answer_is_read_right_or_malformed(folder: Path, case: tuple[Question, str, tuple[str, ...], bool]) -> None:
    question, output, answer, certain = case
    parsed = parse_answer(output, question, mode="answer_only")
    assert parsed.answer == answer or (parsed.malformed and not certain), (output, question.choices, parsed)
    assert parsed.reason or not parsed.malformed


@fuzz(
    "words for answers",
    start=st.sampled_from("abcABCａＢ"),
    word=st.sampled_from(
        ["型肝炎", "群溶血性", "-ALL", "3低下", "細胞", "リンパ球", "orderline", "・D型", " 型", "β遮断薬", "/G比"]
    ),
    tail=st.sampled_from(["", "である。", "の合併", "\n"]),
)
def test_a_words_first_letter_is_no_answer(folder: Path, start: str, word: str, tail: str) -> None:
    row = {"problem_id": "1", "problem_text": "?", "choices": list("甲乙丙丁"), "answer": "a"}
    question = question_from_row(row, year="", metadata={}, rules={})
    assert parse_answer(start + word + tail, question, mode="answer_only").malformed
    assert parse_answer(f"答え: {start}{word}{tail}", question, mode="explained").malformed


@fuzz(
    "any output",
    text=st.text(st.sampled_from(MARKS) | st.characters(exclude_categories=["Cs"]), max_size=80),
    mode=st.sampled_from(["answer_only", "explained"]),
    choices=st.lists(st.sampled_from(TEXTS), max_size=12, unique=True),
    digits=st.booleans(),
)
def test_any_output(folder: Path, text: str, mode: Any, choices: list[str], digits: bool) -> None:
    row = {"problem_id": "1", "problem_text": "?", "choices": choices, "answer": "1" if digits or not choices else "a"}
    question = question_from_row(row, year="", metadata={}, rules={})
    parsed = parse_answer(text, question, mode=mode)
    assert parsed.malformed == bool(parsed.reason)
    if parsed.answer is not None and question.kind == "choice":
        assert set(parsed.answer) <= set(question.labels) and list(parsed.answer) == sorted(set(parsed.answer))
    end = answer_end(text, mode)
    if end is not None:
        assert 0 < end < len(text) and text[:end].strip()
    for label, choice in zip(question.labels, question.choices, strict=False):
        twins = [c for c in question.choices if squeezed(c) == squeezed(choice)]
        read = parse_answer(choice, question, mode="answer_only").answer
        is_label = choice in question.labels or choice.lower() in question.labels
        assert read in ((label,), None) or len(twins) > 1 or is_label, (choice, read)


@fuzz(
    "predictions",
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["problem_id", "prediction", "x"]), JSON | st.sampled_from(["1", "a"]), max_size=3
        ),
        max_size=3,
    ),
)
def test_predictions(folder: Path, rows: list[dict]) -> None:
    (folder / "exam.jsonl").write_text(
        json.dumps({"problem_id": "1", "problem_text": "?", "choices": ["x", "y"], "answer": "a"})
    )
    (folder / "made.jsonl").write_text("\n".join(map(json.dumps, rows)))
    outcome = right_or_one_line(lambda: score_predictions("x", [folder / "exam.jsonl"], [folder / "made.jsonl"]))
    if outcome.refusal is None:
        assert outcome.value["n"] == 1
