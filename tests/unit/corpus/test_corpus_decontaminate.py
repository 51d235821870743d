"""Questions planted verbatim, re-spaced, relabelled or lightly edited are found; ordinary text is not."""

import json
import random

import numpy as np
import pytest

from megatron_medllm.config.corpus import DecontaminateConfig
from megatron_medllm.corpus.decontaminate import Detector
from megatron_medllm.corpus.fold import fold, fold_origins
from megatron_medllm.corpus.questions import SoughtQuestion, index_questions, load_questions
from megatron_medllm.corpus.shingles import code_points
from megatron_medllm.errors import UserError
from tests.worlds.corpus import SENTENCES, SHARED, read_dropped, write_jsonl

# Invented questions in IgakuQA's schema. The instruction recurs over the two editions.
PREFIX = "次の文を読み、以下の問いに答えよ。なお、検査所見はすべて来院時のものである。"
ROWS = {
    "990": [
        (
            "990A1",
            PREFIX + "52歳の男性。昨夜からの右側腹部痛を主訴に来院した。最も考えられるのはどれか。",
            ["尿管結石", "急性虫垂炎", "胆石発作", "腎梗塞", "憩室炎"],
        ),
        ("990A2", "架空熱の潜伏期間として正しいのはどれか。", ["1日", "3日", "1週", "2週", "1か月"]),
    ],
    "991": [
        (
            "991B1",
            PREFIX + "8歳の女児。三日前から続く発熱と頸部の腫れを心配した母親に連れられて来院した。",
            ["麻疹", "風疹", "川崎病", "流行性耳下腺炎", "伝染性単核球症"],
        ),
    ],
}


def question_of(row) -> SoughtQuestion:
    return SoughtQuestion(row[0], row[0][:3], row[1], tuple(row[2]))


QUESTIONS = [question_of(row) for rows in ROWS.values() for row in rows]


def lay_out(question: SoughtQuestion, label: str = "{letter}. ") -> str:
    lines = [
        label.format(letter=chr(97 + i), wide=chr(0xFF41 + i), number=i + 1) + c for i, c in enumerate(question.choices)
    ]
    return question.stem + "\n" + "\n".join(lines)


def respace(rng: random.Random, text: str) -> str:
    return "".join(c + (rng.choice([" ", "\n", "　"]) if rng.random() < 0.2 else "") for c in text)


def edit(rng: random.Random, text: str) -> str:
    characters = list(text)
    for _ in range(max(1, len(text) // 50)):
        i = rng.randrange(len(characters))
        characters[i] = rng.choice(["", "が", characters[i] + "は"])
    return "".join(characters)


def plantings(rng: random.Random):
    return {
        "verbatim": lay_out,
        "no labels": lambda q: lay_out(q, ""),
        "full-width labels": lambda q: lay_out(q, "{wide}．"),
        "numbers": lambda q: lay_out(q, "（{number}）"),
        "re-spaced": lambda q: respace(rng, lay_out(q)),
        "edited": lambda q: edit(rng, lay_out(q)),
    }


def met(detector: Detector, texts: list[str]) -> list[set[str]]:
    found = detector.find(texts)
    return [{m.question for m in found[i].meetings} if i in found else set() for i in range(len(texts))]


@pytest.fixture(scope="module")
def detector() -> Detector:
    config = DecontaminateConfig(exams="unused")
    return Detector(index_questions(QUESTIONS, config), config)


@pytest.mark.parametrize("way", plantings(random.Random(0)))
def test_planted_questions_are_found(detector, way):
    plant = plantings(random.Random(1))[way]
    texts = [SENTENCES[i] + plant(question) + SENTENCES[i + 1] for i, question in enumerate(QUESTIONS)]
    assert met(detector, texts) == [{"990A1"}, {"990A2"}, {"991B1"}]


def test_boilerplate_and_ordinary_text_are_not(detector):
    near = "52歳の男性。右側腹部痛を主訴に来院した。尿管結石を疑い、腹部超音波検査を行った。"
    assert met(detector, [*SENTENCES, PREFIX, PREFIX + SENTENCES[0], near, ""]) == [set()] * (len(SENTENCES) + 4)


def test_a_separator_in_a_text_shifts_nothing(detector):
    found = detector.find(["\U0010ffff" * 50, "前" + lay_out(QUESTIONS[0], "") + "後\U0010ffff"])
    assert {position: found[position].masked for position in found} == {1: "前後\U0010ffff"}


@pytest.mark.parametrize("length", range(10, 31))
def test_a_run_matches_from_thirty_characters_on(detector, length):
    stem = "8歳の女児三日前から続く発熱と頸部の腫れを心配した母親に連れられて"
    expected = {"991B1"} if length >= 30 else set()
    assert met(detector, ["前置き。" + stem[:length] + "……。後書き。"]) == [expected]


def test_masking_cuts_the_passage_only(detector):
    before, after = SENTENCES[0] + "\n", "\n以上。" + SENTENCES[1]
    found = detector.find(["無関係", before + lay_out(QUESTIONS[0], "") + after])
    assert list(found) == [1]
    assert found[1].masked == before + after
    assert [(m.question, m.coverage, m.long_match) for m in found[1].meetings] == [("990A1", 1.0, True)]


def test_fold_forgets_layout_width_case_and_voicing():
    def folded(text):
        return "".join(map(chr, fold(code_points(text))))

    assert folded("ＡＢ c、\u3000。㎎①10⁶") == "abcmg1106"
    assert folded("ガ") == folded("ｶﾞ") == folded("カ\u3099") == "カ"
    positions = fold_origins(code_points("a 、㎎b"))
    assert positions.tolist() == [0, 3, 3, 4]


def write_exam(folder):
    for edition, rows in ROWS.items():
        (folder / edition).mkdir(parents=True)
        lines = [json.dumps({"problem_id": i, "problem_text": t, "choices": c}, ensure_ascii=False) for i, t, c in rows]
        (folder / edition / f"{edition}-A.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / edition / f"{edition}-A_metadata.jsonl").write_text('{"problem_id": "x"}\n')
    return folder


@pytest.mark.parametrize("action", ["drop", "mask"])
def test_in_a_build(tmp_path, build_one, action):
    exams = write_exam(tmp_path / "exams")
    texts = [SENTENCES[0], SENTENCES[1] + lay_out(QUESTIONS[2]), lay_out(QUESTIONS[1], ""), SENTENCES[2]]
    output, manifest = build_one(texts, decontaminate={"exams": str(exams), "action": action})
    facts = manifest["sources"]["s"]
    assert facts["contaminated_documents"] == 2
    rows = [(row["id"], row["step"], row["reason"]) for row in read_dropped(output)]
    whole = ("in-2", "decontaminate", "990A2")  # masked, nothing would be left of it
    assert rows == ([("in-1", "decontaminate", "991B1"), whole] if action == "drop" else [whole])
    assert facts["documents"] == (2 if action == "drop" else 3)
    assert (output / "contaminated.jsonl.zst").exists()


def test_what_is_no_question_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["text"])
    assert load_questions([str(tmp_path)])[0].stem == "text"
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(UserError, match=r"b\.jsonl:1: no question here"):
        load_questions([str(tmp_path)])
    with pytest.raises(UserError, match="matches no question file"):
        load_questions([str(tmp_path / "none")])


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "igakuqa").exists(), reason="needs the shared data")
def test_all_of_igakuqa_in_medical_text():
    config = DecontaminateConfig(exams=str(SHARED / "igakuqa" / "20*"))
    questions = load_questions(config.exams)
    assert len(questions) == 2000
    detector = Detector(index_questions(questions, config), config)
    with open(SHARED / "medical_ja.jsonl", encoding="utf-8") as stream:
        documents = [json.loads(line)["text"] for line in stream]
    assert len(detector.find(documents)) <= 0.01 * len(documents)
    rng = random.Random(0)
    for way in ("verbatim", "re-spaced", "edited"):
        plant = plantings(rng)[way]
        texts = []
        for i, question in enumerate(questions):
            host = documents[i][:2000]
            at = rng.randrange(len(host))
            texts.append(host[:at] + plant(question) + host[at:])
        missed = [q.id for q, ids in zip(questions, met(detector, texts), strict=True) if q.id not in ids]
        assert missed == [], way


def test_many_grams_keep_the_filter_honest():
    rng = np.random.default_rng(0)
    questions = [
        SoughtQuestion(f"{100 + i % 5}A{i}", str(100 + i % 5), "".join(map(chr, rng.integers(0x4E00, 0x9000, 80))), ())
        for i in range(300)
    ]
    config = DecontaminateConfig(exams="unused")
    detector = Detector(index_questions(questions, config), config)
    texts = ["".join(map(chr, rng.integers(0x4E00, 0x9000, 500))) for _ in range(300)]
    assert detector.find(texts) == {}
    planted = [text[:200] + question.stem + text[200:] for text, question in zip(texts, questions, strict=True)]
    assert met(detector, planted) == [{question.id} for question in questions]
